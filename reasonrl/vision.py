"""Images in a prompt: what a vision-language policy sees, made once a prompt for all its group.

    ids, seen = prepare(policy, problems, prompt_ids)   # one token an image -> as many as needed

Any transformers model with an image tower, 3-d positions (mRoPE) and `get_image_features` works:
Qwen2-VL, Qwen2.5-VL, Qwen3-VL. A prompt's tokens keep their places; where an image stands its token
is repeated once for every merged patch, positions come from the model's own `get_rope_index`, and a
completion goes on from the largest of them. Left out: video; models whose image features change the
attention (they would need another plan). Legend: P prompts, L packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reasonrl import images
from reasonrl.records import InputError, Problem

if TYPE_CHECKING:
    from reasonrl.attention import Packed
    from reasonrl.models import Policy

TOWER = ("frozen", "trained")


@dataclass(frozen=True)
class Seen:
    """The images of one prompt as the model takes them."""

    pixels: Tensor  # (patches, features) fp32
    grid: Tensor  # (images, 3) int64: frames, rows and columns of patches
    positions: Tensor  # (3, tokens of the prompt) int64


def is_vision(config: Any) -> bool:
    """Whether a config is of a model that takes images."""
    return hasattr(config, "vision_config")


def usable(model: Any) -> bool:
    """Whether a model gives its positions and image features as this file asks for them."""
    inner = model.model
    tools = ("get_rope_index", "get_image_features", "language_model", "visual")
    return all(hasattr(inner, tool) for tool in tools) and hasattr(model.config, "image_token_id")


def tower(model: Any) -> Any:
    """The module that turns pixels into tokens of the prompt."""
    return _base(model).visual


def _base(model: Any) -> Any:
    """Tower and decoder together, also under an adapter."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.model


def set_tower(model: Any, how: str) -> None:
    """Whether the image tower learns too."""
    if how not in TOWER:
        raise InputError(f"model_options.vision_tower: expected {' or '.join(TOWER)}, got {how!r}")
    tower(model).requires_grad_(how == "trained")


def prepare(
    policy: Policy, problems: Sequence[Problem], prompt_ids: Sequence[Sequence[int]]
) -> tuple[Sequence[Sequence[int]], Sequence[Seen | None]]:
    """Prompts with as many image tokens as their images take, and what is seen; () without images.

    Prompts that were prepared before come out as they went in. InputError names the problem: images
    for a model without eyes, or another number of images than the prompt has places for.
    """
    if not any(problem.images for problem in problems):
        return prompt_ids, ()
    ids, seen = [], []
    for problem, prompt in zip(problems, prompt_ids, strict=True):
        own, what = _look(policy, problem, prompt)
        ids.append(own)
        seen.append(what)
    return ids, seen


def hidden(
    policy: Policy, input_ids: Tensor, position_ids: Tensor, plan: Packed, seen: Sequence[Seen]
) -> Tensor:
    """Packed ids (L,) and positions (3, L), with the images in the order of their tokens -> (L, D).

    Only prompts have images: where a completion happens to write the image token, it is a word.
    """
    model = _base(policy.model)
    pixels = torch.cat([s.pixels for s in seen]).to(input_ids.device)
    grid = torch.cat([s.grid for s in seen]).to(input_ids.device)
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in model.visual.parameters())
    with torch.set_grad_enabled(learns):
        features = model.get_image_features(pixels, grid, return_dict=True)
    asked = torch.zeros_like(input_ids, dtype=torch.bool)
    asked[plan.prompts] = True
    place = asked & (input_ids == policy.model.config.image_token_id)
    found = torch.cat(list(features.pooler_output))
    words = model.get_input_embeddings()(input_ids)
    words = words.masked_scatter(place[:, None], found.to(words.dtype))
    deep = [torch.cat(list(level)) for level in getattr(features, "deepstack_features", None) or ()]
    levels = {"visual_pos_masks": place[None], "deepstack_visual_embeds": deep} if deep else {}
    out = model.language_model(
        inputs_embeds=words[None],
        position_ids=position_ids[:, None],
        plan=plan,
        use_cache=False,
        **levels,
    )
    return out.last_hidden_state[0]


def idle(policy: Policy, images: Sequence[Seen]) -> Tensor | None:
    """Exactly 0, of every parameter of an image tower that learns and has nothing to look at: what
    reduces gradients over ranks waits for all of them."""
    if images or policy.processor is None:
        return None
    learning = [p for p in tower(policy.model).parameters() if p.requires_grad]
    if not learning or not torch.is_grad_enabled():
        return None
    return sum((p.flatten()[:1].sum() * 0.0 for p in learning), torch.zeros(()))


def refuse(problems: Sequence[Problem], who: str) -> None:
    """InputError where a problem has images and `who` reads text only: nothing is overlooked."""
    for problem in problems:
        if problem.images:
            raise InputError(
                f"problem {problem.id}: {who} reads text only, the problem has"
                f" {len(problem.images)} image(s)"
            )


def _look(policy: Policy, problem: Problem, prompt: Sequence[int]) -> tuple[list[int], Seen | None]:
    if policy.processor is None:
        refuse([problem], f"the model ({type(policy.model).__name__})")
        return list(prompt), None
    token = policy.model.config.image_token_id
    short = [i for i, run in groupby(prompt) for i in ([i] if i == token else run)]
    places = short.count(token)
    if places != len(problem.images):
        raise InputError(
            f"problem {problem.id}: {len(problem.images)} image(s) for {places} place(s) in the"
            " prompt"
        )
    if not places:
        return list(prompt), None
    try:
        pictures = images.decode(problem.images)
    except images.BadImage as error:
        raise InputError(f"problem {problem.id}: {error}") from error
    out = policy.processor(pictures, return_tensors="pt")
    grid = out["image_grid_thw"]
    merged = grid.prod(-1) // policy.model.config.vision_config.spatial_merge_size**2
    counts = iter(merged.tolist())
    ids = [i for s in short for i in ([s] * next(counts) if s == token else [s])]
    row = torch.tensor([ids])
    kinds = (row == token).int()
    positions, _ = _base(policy.model).get_rope_index(row, kinds, image_grid_thw=grid)
    return ids, Seen(out["pixel_values"].float(), grid, positions[:, 0])
