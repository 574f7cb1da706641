"""Texts to vectors: any Hugging Face encoder folder, or the hidden states of a language model.

The vector is the mean of the last hidden states over the text's tokens (`pooling="cls"`: that of
the first token, as some encoders are trained). A text longer than the encoder's context is read in
windows, whose tokens are averaged together; nothing is cut off. Vectors are kept in a cache under
the hash of the text and the encoder. Left out: encoders with code of their own.
    encoder = Encoder.load("folder", Cache(None)); encoder(["a step", "another"])  ->  (2, D)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from reasonrl import models, pretrained
from reasonrl.cache import Cache, fingerprint
from reasonrl.records import InputError

BATCH = 32  # windows in one forward


@dataclass
class Encoder:
    """`encoder(texts) -> (n, D)` fp32 on the CPU. name: what the cache tells encoders apart by."""

    model: Any  # a transformers model that returns last_hidden_state
    tokenizer: Any
    name: str
    cache: Cache = field(default_factory=lambda: Cache(None))
    pooling: Literal["mean", "cls"] = "mean"

    @staticmethod
    def load(name: str, cache: Cache, pooling: Literal["mean", "cls"] = "mean") -> Encoder:
        """A folder of an encoder or a language model, or a built-in model's name."""
        if name in ("tiny", "smollm2"):
            policy = models.load(name, dtype="fp32")
            body = policy.model.get_decoder()
            body.set_attn_implementation("sdpa")
            return Encoder(body.eval(), policy.tokenizer, name, cache, pooling)
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"encoder {name}: expected a folder with config.json, found none")
        with pretrained.reading(f"encoder {name}"):
            model = pretrained.model(AutoModel, name)
            tokenizer = pretrained.part(AutoTokenizer, name)
        return Encoder(model.eval(), tokenizer, fingerprint(name), cache, pooling)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        known: dict[str, Tensor] = {}
        for text in texts:
            kept = self.cache.get("vector", self.name, self.pooling, text)
            if kept is not None:
                known[text] = torch.from_numpy(numpy.frombuffer(kept, numpy.float32).copy())
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        for text, vector in zip(missing, self._encoded(missing), strict=True):
            known[text] = vector
            self.cache.put(vector.numpy().tobytes(), "vector", self.name, self.pooling, text)
        return torch.stack([known[text] for text in texts]) if texts else torch.zeros(0, 0)

    @property
    def window(self) -> int:
        """Tokens that one forward may hold, the special ones among them."""
        own = getattr(self.model.config, "max_position_embeddings", None) or 512
        return min(own, getattr(self.tokenizer, "model_max_length", own))

    @torch.no_grad()
    def _encoded(self, texts: Sequence[str]) -> Iterable[Tensor]:
        owner, windows = [], []
        for i, text in enumerate(texts):
            parts = self.tokenizer(
                text, truncation=True, max_length=self.window, return_overflowing_tokens=True
            )["input_ids"]
            if not parts[0]:
                raise InputError(f"encoder: expected some text, got {text[:40]!r}")
            owner += [i] * len(parts)
            windows += parts
        total = torch.zeros(len(texts), self.model.config.hidden_size, dtype=torch.float64)
        count = torch.zeros(len(texts), 1, dtype=torch.float64)
        for at in range(0, len(windows), BATCH):
            chunk, rows = windows[at : at + BATCH], torch.tensor(owner[at : at + BATCH])
            sums, weight = self._pooled(chunk)
            total.index_add_(0, rows, sums)
            count.index_add_(0, rows, weight)
        return (total / count).float()

    def _pooled(self, windows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Sums of hidden states over each window's tokens, and how many there were."""
        longest = max(map(len, windows))
        ids = torch.zeros(len(windows), longest, dtype=torch.long)
        mask = torch.zeros(len(windows), longest, dtype=torch.long)
        for row, window in enumerate(windows):
            ids[row, : len(window)] = torch.tensor(window)
            mask[row, : len(window)] = 1
        device = next(self.model.parameters()).device
        hidden = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        hidden = hidden.last_hidden_state.cpu().double()
        if self.pooling == "cls":
            return hidden[:, 0], torch.ones(len(windows), 1, dtype=torch.float64)
        keep = mask[..., None].double()
        return (hidden * keep).sum(1), keep.sum(1)
