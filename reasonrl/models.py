"""Policies, references and scorers: transformers models behind one small class.

`Policy` gives hidden states without logits through the packed attention, and its head as tensors.
`load` takes a folder, a hub id, `smollm2` (from its PyPI wheel, converted once into a cache) or
`tiny` (a small transformer built from scratch). Left out: encoder-decoder models.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reasonrl import (
    attention,
    checkpoint,
    heads,
    layers,
    pretrained,
    products,
    smollm2,
    tiny,
    vision,
    whole_decoder,
)
from reasonrl.records import Batch, InputError

ALL_ATTENTION_FUNCTIONS.register(attention.NAME, attention.attention)
ALIGNED = 64  # bytes, torch's own choice on a CPU
PRM_FILE = "prm.json"  # what makes a folder a process reward model
OS_ERROR = re.compile(r"\(os error ([0-9]+)\)")


@contextlib.contextmanager
def os_errors(folder: Path) -> Iterator[None]:
    """The tokenizers library says a full disk by a bare Exception; here it is an OSError."""
    try:
        yield
    except Exception as error:
        found = OS_ERROR.search(str(error)) if type(error) is Exception else None
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from None


@dataclass
class Policy:
    """A causal language model with its tokenizer and the dtype of its matrix products."""

    model: Any  # transformers PreTrainedModel, parameters in fp32
    tokenizer: Any
    compute: torch.dtype = torch.float32
    processor: Any = None  # of images, where the model has eyes
    attn: str = "auto"  # the packed path's attention: auto, flash, sdpa
    graphs: str = "auto"  # decoding by CUDA graphs: auto (on a GPU), off
    engine: Any = None  # the server that samples in its place (engine.Engine)
    sharded: bool = False  # every rank holds a part of every weight

    @property
    def replays(self) -> bool:
        return self.graphs == "auto" and self.device.type == "cuda"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def eos(self) -> frozenset[int]:
        """Every token id that ends a completion."""
        declared = getattr(self.model.generation_config, "eos_token_id", None)
        ids = declared if isinstance(declared, list) else [declared]
        ids = [*ids, self.tokenizer.eos_token_id]
        return frozenset(i for i in ids if i is not None)

    @property
    def context(self) -> int:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30)

    def hidden(
        self, input_ids: Tensor, position_ids: Tensor, plan: Any, images: Sequence[Any] = (),
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Packed ids (L,) and positions (L,) or (3, L), images of the prompts among them -> last
        hidden states (L, D), or those of tokens `rows` (N,)."""
        decoder, flat = self.model.get_decoder(), position_ids.dim() == 1
        if images:
            out = vision.hidden(self, input_ids, position_ids, plan, images)
        else:
            given = input_ids, position_ids, plan, rows
            found = whole_decoder.computed(decoder, *given) if flat else None
            if found is not None:
                return found
            out = decoder(
                input_ids=input_ids[None],
                position_ids=position_ids[None] if flat else position_ids[:, None],
                plan=plan,
                use_cache=False,
            ).last_hidden_state.squeeze(0)
        return out if rows is None else out.index_select(0, rows)

    def at_head(self, batch: Batch, function: heads.HeadCall) -> Any:
        """function(hidden states (N, D) that predict a batch's tokens, head) in the compute dtype,
        inside the module that owns the head."""
        device = self.device
        with self.autocast():
            plan = attention.Packed(batch.layout, device, attn=self.attn)
            ids, positions = batch.input_ids.to(device), batch.position_ids.to(device)
            predict = batch.predict.to(device)
            hidden = self.hidden(ids, positions, plan, batch.images, predict)
        return heads.at_head(self.model, hidden, function, self.compute)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B, V) with the model's own multiplier and soft cap; for sampling, never for
        training."""
        u, scale = self.head(hidden), heads.scale_of(self.model)
        u = u if scale == 1.0 else u * scale
        return u if self.softcap is None else self.softcap * torch.tanh(u / self.softcap)

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    @property
    def softcap(self) -> float | None:
        return heads.softcap_of(self.model)

    def autocast(self):
        enabled = self.compute != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute, enabled=enabled)

    def follow(self, other: Policy) -> Policy:
        """Itself, in the compute dtype, with the attention, the decoding and the layers of the
        policy that it runs beside."""
        self.compute, self.attn, self.graphs = other.compute, other.attn, other.graphs
        if self.device.type == other.device.type and layers.fused(other.model):
            layers.fuse(self.model, "auto")
        return self

    def frozen(self) -> Policy:
        """A copy of the weights as they are now, without gradients: a reference."""
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        return replace(self, model=model, engine=None)

    def save(self, folder: Path) -> None:
        """In the Hugging Face layout, loadable by `load` and from_pretrained."""
        for part in (self.model, self.tokenizer, self.processor):
            if part is not None:
                with os_errors(folder):
                    part.save_pretrained(folder)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Without gradients, linear layers in the compute dtype: cast (and on a CPU packed) once,
        not per call."""
        was_training = self.model.training
        self.model.eval()
        try:
            with products.prepared(self.model, self.compute), torch.no_grad():
                yield
        finally:
            self.model.train(was_training)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where the hardware multiplies it fast, fp32 elsewhere."""
    if name == "fp32":
        return torch.float32
    if name == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def load(
    name: str, *, dtype: str = "auto", device: str = "cpu", seed: int = 0, attn: str = "auto",
    liger: str = "off", graphs: str = "auto", **options,
) -> Policy:  # fmt: skip
    """The policy called `name`; InputError where the folder holds no usable model.

    device: auto = a GPU where there is one; attn: auto | flash | sdpa (`attention`); liger: auto |
    ours | off (`layers`); graphs: auto | off (`decoding`); options: the sizes of a model built
    here; vision_tower: frozen | trained, for one with images.
    """
    if attn not in attention.KINDS:
        raise InputError(f"attn: expected one of {', '.join(attention.KINDS)}, got {attn!r}")
    if graphs not in ("auto", "off"):
        raise InputError(f"graphs: expected auto or off, got {graphs!r}")
    _bound_kernel_cache()
    target = placed(device)
    how = options.pop("vision_tower", None)
    model: Any
    processor: Any = None
    if name == "tiny":
        model, tokenizer = tiny.build(seed=seed, **options)
    elif name == "tiny-vl":
        _needs_pillow(name)
        from reasonrl import tiny_vl  # a model with eyes costs nothing where none is asked for

        model, tokenizer, processor = tiny_vl.build(seed=seed, **options)
    else:
        if options:
            raise InputError(
                f"model_options: only model=tiny and tiny-vl take options, got {sorted(options)}"
            )
        folder = smollm2.fetch() if name == "smollm2" else name
        model, tokenizer, processor = _pretrained(str(folder))
    _check(name, model, tokenizer)
    if processor is None:
        if how is not None:
            raise InputError(f"model_options.vision_tower: {name} has no images to look at")
        model.set_attn_implementation(attention.NAME)
    else:
        vision.set_tower(model, how or "trained")
        # packed attention for the text; an image's patches attend as the model has it
        model.set_attn_implementation({"text_config": attention.NAME, "vision_config": "sdpa"})
    model = model.to(target)
    layers.fuse(model, liger)
    return Policy(model, tokenizer, compute_dtype(dtype, target), processor, attn, graphs)


def placed(device: str) -> torch.device:
    """auto: a GPU where there is one; InputError where there is no such device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device: expected a usable NVIDIA GPU for cuda, found none")
    return target


def _bound_kernel_cache() -> None:
    """Keep few of oneDNN's compiled products: packed batches have a new length every time, so its
    default of 1024 grows by 50 MB a step (SmolLM2-135M on a CPU) and is hardly ever hit."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # read at the first product


def _pretrained(folder: str):
    path = Path(folder)
    if path.exists():
        if not (path / "config.json").is_file():
            inside = checkpoint.checkpoints(path) if path.is_dir() else []
            hint = f"; a run's models are its checkpoints, as {inside[0][1]}" if inside else ""
            raise InputError(
                f"model {folder}: expected a folder with config.json, found none{hint}"
            )
        if not any(path.glob("*.safetensors")):
            raise InputError(f"model {folder}: expected weights (*.safetensors), found none")
        if (path / PRM_FILE).is_file():
            raise InputError(
                f"model {folder}: expected a language model, got a process reward model"
                f" ({PRM_FILE}); it scores steps and writes nothing"
            )
    elif folder.startswith((".", "/", "~")) or folder.count("/") > 1:
        raise InputError(
            f"model {folder}: no such folder; give a model's folder, a hub id, smollm2 or tiny"
        )
    with pretrained.reading(f"model {folder}"):
        config = pretrained.part(AutoConfig, folder)
        tokenizer = pretrained.part(AutoTokenizer, folder)
        for name in ("is_local", "local_files_only"):  # where it came from is no part of it: saved
            tokenizer.init_kwargs.pop(name, None)  # again it is the file that was loaded
        eyes = vision.is_vision(config)
        if eyes:
            _needs_pillow(folder)
        kind = AutoModelForImageTextToText if eyes else AutoModelForCausalLM
        model = pretrained.model(kind, folder)
        processor = pretrained.part(AutoImageProcessor, folder) if eyes else None
    _align(model)
    if config.is_encoder_decoder:
        raise InputError(f"model {folder}: expected a decoder-only model, got {config.model_type}")
    if eyes and not vision.usable(model):
        raise InputError(
            f"model {folder}: {config.model_type} reads images in a way that packed training does"
            " not know (Qwen2-VL, Qwen2.5-VL and Qwen3-VL are known)"
        )
    return model, tokenizer, processor


def _align(model: nn.Module) -> None:
    """Give weights that lie in a mapped file memory of their own, at addresses as torch chooses
    them: a matrix product rounds by its operands' alignment, and a run that is resumed must go on
    bit for bit."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % ALIGNED:
            tensor.data = tensor.data.clone()


def _needs_pillow(name: str) -> None:
    if importlib.util.find_spec("PIL") is None:
        raise InputError(f"model {name}: images need the package pillow (pip install pillow)")


def _check(name: str, model, tokenizer) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"model {name}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows;"
            " it belongs to another model"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"model {name}: the tokenizer has no end-of-sequence token")
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(
            f"model {name}: {type(model).__name__} does not use transformers' attention interface,"
            " which packed training needs"
        )
    try:
        heads.check(model)
    except ValueError as error:
        raise InputError(f"model {name}: {error}") from None
