"""The implicit process reward model: two language models whose log-ratio is a token reward.

    r_t = beta * (log pi_phi(y_t | y_<t) - log pi_ref(y_t | y_<t))          PRIME, 2502.01456 eq. 3

Training it needs no step labels: the sum over a completion, through a sigmoid, should be its
outcome. `ImplicitPRM` is the scorer; `learn` gives the scores and the gradient in one pass, so the
scores are those of the model before its step, and one forward and one backward are all it costs.
The model may be a LoRA adapter on the reference (adapter off = reference), or be compared with log-
probabilities that the caller has (the policy as reference). Left out: models with another
tokenizer (the ids scored are the policy's own).
    prm = ImplicitPRM(models.load(phi), models.load(ref)); rewards = prm(rollout)
"""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path

import torch
from torch import Tensor

from reasonrl.batch import lengths, pack, places
from reasonrl.logprobs import batch_logp
from reasonrl.models import Policy
from reasonrl.records import Batch, InputError, Rewards, Rollout, Score, scored, unscorable
from reasonrl.state_file import load_state, save_state
from reasonrl.systems import implicit_prm_loss


class ImplicitPRM:
    """Token rewards of completions: `prm(rollout) -> Rewards`, with `token` (fp32, one a token)
    and as outcome their sum, the log-odds of a right answer."""

    def __init__(
        self,
        prm: Policy,
        ref: Policy | None = None,  # None: the model with its adapter off, or `ref_logp` is given
        *,
        beta: float = 0.05,
        tokens: int = 4096,  # packed tokens of one micro-batch
    ):
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"beta must be a finite number > 0, got {beta}")
        if ref is not None and not same_vocabulary(prm, ref):
            raise InputError("the implicit reward model and its reference differ in vocabulary")
        self.prm, self.ref, self.beta, self.tokens = prm, ref, beta, tokens

    def __call__(self, rollout: Rollout, ref_logp: Tensor | None = None) -> Rewards:
        value = torch.full((sum(lengths(rollout)),), math.nan)
        with torch.no_grad():
            for batch in pack(rollout, None, self.tokens, ref_logp=ref_logp):
                logp = batch_logp(self.prm, batch)
                gap = logp - self._ref(batch).to(logp.device)
                value[places(rollout, batch.rows)] = self.beta * gap.cpu()
        return self._rewards(rollout, value)

    def learn(
        self,
        rollout: Rollout,
        outcome: Tensor,  # (B,) in [0, 1]
        known: Tensor,  # (B,) bool: which outcomes are known
        count: float,  # completions with a known outcome, of all ranks
        ref_logp: Tensor | None = None,  # (N,) fp32, in place of the reference's own
    ) -> tuple[Rewards, float]:
        """Token rewards of the rows with a known outcome, and this rank's share of the loss.

        Adds the gradient of the cross-entropy (mean over `count` completions) to the model's.
        """
        value = torch.full((sum(lengths(rollout)),), math.nan)
        total = 0.0
        rows = known.nonzero()[:, 0].tolist()
        for batch in pack(rollout, None, self.tokens, rows, ref_logp=ref_logp):
            logp = batch_logp(self.prm, batch)
            ref, label = self._ref(batch).to(logp.device), outcome[batch.rows].to(logp)
            cu = batch.cu_seqlens.to(logp.device)
            loss = implicit_prm_loss(logp, ref, label, cu_seqlens=cu, beta=self.beta)
            loss = loss * (len(batch.rows) / count)
            loss.backward()
            total += float(loss.detach())
            value[places(rollout, batch.rows)] = self.beta * (logp.detach() - ref).cpu()
        return self._rewards(rollout, value), total

    def _ref(self, batch: Batch) -> Tensor:
        if batch.ref_logp is not None:
            return batch.ref_logp
        with torch.no_grad():
            if self.ref is not None:
                return batch_logp(self.ref, batch)
            if not adapted(self.prm):
                raise ValueError("ref: expected a policy, an adapter to switch off, or ref_logp")
            with adapter_off(self.prm):
                return batch_logp(self.prm, batch)

    def _rewards(self, rollout: Rollout, value: Tensor) -> Rewards:
        parts = list(value.split(lengths(rollout)))
        return Rewards(outcome=[_sum(part) for part in parts], token=parts)


def _sum(part: Tensor) -> Score:
    total = float(part.double().sum())
    if math.isnan(total):
        return unscorable("the outcome is unknown, so the completion was not scored")
    return scored(total)


def trainable(initial: Policy, lora_rank: int = 0, seed: int = 0) -> Policy:
    """`initial` itself made ready to learn: all of its weights, or a LoRA adapter on them."""
    model = initial.model
    if lora_rank == 0:
        return Policy(model.requires_grad_(True), initial.tokenizer, initial.compute)
    try:
        import peft
    except ImportError:
        raise InputError("algo.lora_rank: needs peft; pip install 'reasonrl[lora]'") from None
    settings = peft.LoraConfig(
        r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, settings).get_base_model()
    return Policy(model, initial.tokenizer, initial.compute)


def same_vocabulary(a: Policy, b: Policy) -> bool:
    """Whether a token id means the same to both."""
    return a.tokenizer.get_vocab() == b.tokenizer.get_vocab()


def save_prm(prm: Policy, folder: Path) -> None:
    """An ordinary checkpoint in folder/prm; beside an adapter, its parameters for going on."""
    if adapted(prm):
        named = {n: p.detach() for n, p in prm.model.named_parameters() if p.requires_grad}
        save_state(folder / "prm_adapter", named)
        merged(prm).save_pretrained(folder / "prm")
    else:
        prm.model.save_pretrained(folder / "prm")
    prm.tokenizer.save_pretrained(folder / "prm")


def restore_prm(prm: Policy, folder: Path) -> None:
    """Put the parameters of `save_prm` back into a model built the same way."""
    if adapted(prm):
        saved = load_state(folder / "prm_adapter")
    else:
        saved = type(prm.model).from_pretrained(folder / "prm", dtype=torch.float32).state_dict()
    here = dict(prm.model.named_parameters())
    with torch.no_grad():
        for name, parameter in here.items():
            if parameter.requires_grad:
                parameter.copy_(saved[name])


def merged(prm: Policy):
    """The model with its adapter folded into the weights, as a plain transformers model."""
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(prm.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[attr-defined]
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    return model


@contextlib.contextmanager
def adapter_off(prm: Policy):
    """The model without its adapter, inside the block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in prm.model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapted(prm: Policy) -> bool:
    """Whether the model carries a LoRA adapter."""
    return any(hasattr(module, "lora_A") for module in prm.model.modules())
