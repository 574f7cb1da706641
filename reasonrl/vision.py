"""Images in a prompt: what a vision-language policy sees, made once a prompt for all its group.

    ids, seen = prepare(policy, problems, prompt_ids)   # one token an image -> as many as needed

Any transformers model with an image tower, 3-d positions (mRoPE) and `get_image_features` works:
Qwen2-VL, Qwen2.5-VL, Qwen3-VL. A prompt's tokens keep their places; where an image stands its token
is repeated once for every merged patch, positions come from the model's own `get_rope_index`, and a
completion goes on from the largest of them. What a tower that does not learn makes of pixels is
kept beside them for whoever looks next (rollout, reference, update, a judge of the whole group),
until they or the step are gone. Left out: video; models whose image features change the attention
(they would need another plan). Legend: P prompts, L packed tokens, K of them of images.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from reasonrl import images
from reasonrl.records import InputError, Problem

if TYPE_CHECKING:
    from reasonrl.attention import Packed
    from reasonrl.models import Policy

TOWER = ("frozen", "trained")
Levels = list[Tensor]  # what a tower makes of pixels: (K, D) for the words, then for deeper layers
Kept = MutableMapping[Tensor, Levels]  # by the pixels themselves
# of every tower that does not learn: how it computes, the versions of its weights, what is kept
_kept: WeakKeyDictionary[nn.Module, tuple[tuple, Kept]] = WeakKeyDictionary()


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
    ids, seen, looked = [], [], {}
    for problem, prompt in zip(problems, prompt_ids, strict=True):
        own, what = _look(policy, problem, prompt, looked)
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
    asked = torch.zeros_like(input_ids, dtype=torch.bool)
    asked[plan.prompts] = True
    place = asked & (input_ids == policy.model.config.image_token_id)
    found, *deep = _features(policy, seen, input_ids.device)
    words = model.get_input_embeddings()(input_ids)
    words = words.masked_scatter(place[:, None], found.to(words.dtype))
    more = {"visual_pos_masks": place[None], "deepstack_visual_embeds": deep} if deep else {}
    out = model.language_model(
        inputs_embeds=words[None],
        position_ids=position_ids[:, None],
        plan=plan,
        use_cache=False,
        **more,
    )
    return out.last_hidden_state[0]


def _features(policy: Policy, seen: Sequence[Seen], device: torch.device) -> Levels:
    """Of all these images: made now where the tower learns (or is a rank's shards, which all ranks
    run alike), else once for the same pixels, and kept outside of a GPU's memory."""
    visual = tower(policy.model)
    learns = any(p.requires_grad for p in visual.parameters())
    if learns or policy.sharded:
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return _made(policy, seen, device)
    kept = _store(policy, visual)
    new = list({id(s.pixels): s for s in seen if s.pixels not in kept}.values())
    if new:
        with torch.no_grad():
            made = _made(policy, new, device)
        sizes = [int(s.grid.prod(-1).sum()) // visual.spatial_merge_size**2 for s in new]
        parts = zip(*(level.cpu().split(sizes) for level in made), strict=True)
        for s, part in zip(new, parts, strict=True):
            kept[s.pixels] = [level.clone() for level in part]  # frees the others' with its own
    every = zip(*(kept[s.pixels] for s in seen), strict=True)
    return [torch.cat(level).to(device) for level in every]


def _made(policy: Policy, seen: Sequence[Seen], device: torch.device) -> Levels:
    pixels = torch.cat([s.pixels for s in seen]).to(device)
    grid = torch.cat([s.grid for s in seen]).to(device)
    out = _base(policy.model).get_image_features(pixels, grid, return_dict=True)
    deep = getattr(out, "deepstack_features", None) or ()
    return [torch.cat(list(level)) for level in (out.pooler_output, *deep)]


def _store(policy: Policy, visual: nn.Module) -> Kept:
    """What is kept for a tower; one with equal weights that computes alike has the same."""
    now = _state(policy.compute, visual)
    if visual not in _kept or _kept[visual][0] != now:
        same = (
            kept
            for other, (state, kept) in _kept.items()
            if other is not visual and state == _state(policy.compute, other)
            if _equal(other, visual)
        )
        _kept[visual] = now, next(same, WeakTensorKeyDictionary())
    return _kept[visual][1]


def _state(compute: torch.dtype, visual: nn.Module) -> tuple:
    return compute, *(p._version for p in visual.parameters())


def _equal(one: nn.Module, other: nn.Module) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(
        mine[n].device == w.device and torch.equal(mine[n], w) for n, w in others.items()
    )


def forget() -> None:
    """Let go of what is kept: a step is over, and a run that is resumed behind it has nothing."""
    _kept.clear()


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


def _look(
    policy: Policy,
    problem: Problem,
    prompt: Sequence[int],
    looked: dict[tuple[str, ...], tuple[Tensor, Tensor]],  # pixels and grid, by the images
) -> tuple[list[int], Seen | None]:
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
    names = tuple(i if isinstance(i, str) else i.key for i in problem.images)
    if names not in looked:
        try:
            pictures = images.decode(problem.images)
        except images.BadImage as error:
            raise InputError(f"problem {problem.id}: {error}") from error
        out = policy.processor(pictures, return_tensors="pt")
        looked[names] = out["pixel_values"].float(), out["image_grid_thw"]
    pixels, grid = looked[names]
    merged = grid.prod(-1) // policy.model.config.vision_config.spatial_merge_size**2
    counts = iter(merged.tolist())
    ids = [i for s in short for i in ([s] * next(counts) if s == token else [s])]
    row = torch.tensor([ids])
    kinds = (row == token).int()
    positions, _ = _base(policy.model).get_rope_index(row, kinds, image_grid_thw=grid)
    return ids, Seen(pixels, grid, positions[:, 0])
