"""On a GPU: layers and decoding by kernels of ours (`liger=ours`), against their own modules.

    python -m pytest tests/test_gpu_layers.py

As test_gpu.py. These kernels are what `liger=auto` takes there.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_gpu import gpu, packed, tiny  # noqa: F401, a fixture
from test_packing import gradients, made_up
from transformers import AutoConfig, AutoModelForCausalLM

from reasonrl import layers, lean, sampling, whole_layer
from reasonrl.attention import NAME, attend
from reasonrl.kernels import draw, reference, slots
from reasonrl.logprobs import rollout_logp
from reasonrl.records import Problem
from reasonrl.rollout import Sampling, sample

pytestmark = pytest.mark.gpu


def qwen3(liger="ours", **changes):
    """Whose heads are normed."""
    policy = tiny(liger="off", **changes)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 64}
    size |= {"num_attention_heads": 6, "num_key_value_heads": 2}
    torch.manual_seed(5)
    words = policy.head.weight.shape[0]
    config = AutoConfig.for_model("qwen3", vocab_size=words, tie_word_embeddings=True, **size)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.set_attn_implementation(NAME)
    model.generation_config.eos_token_id = policy.model.generation_config.eos_token_id
    model = model.to("cuda")
    layers.fuse(model, liger)
    return replace(policy, model=model)


@pytest.mark.parametrize("made, count", [(tiny, 2), (qwen3, 4)])
@pytest.mark.parametrize("rows", [((40, 7, 19), (12, 33, 3)), ((300, 500, 1, 64),)])
def test_a_layer_as_one_function_errs_no_more_than_its_modules(rows, made, count, monkeypatch):
    """In bf16, of every parameter's gradient against fp32."""
    rollout, inner, whole = made_up(rows), whole_layer.computed, []
    advantage = torch.randn(sum(map(len, rollout.completion_ids)))

    def computed(*given):
        out = inner(*given)
        whole.append(out is not None)
        return out

    monkeypatch.setattr(whole_layer, "computed", computed)
    found = []
    for kind in ({"liger": "off"}, {"dtype": "bf16", "liger": "off"}, {"dtype": "bf16"}):
        policy = made(**{"liger": "ours", "context": 2048} | kind)
        found.append(gradients(policy, packed(policy, rollout, advantage, 1 << 14)))
    assert whole == [True] * count and len(found) == 3
    truth, yard, ours = found
    for name, wanted in truth.items():
        gap, allowed = (
            float((g[name].float() - wanted).norm() / wanted.norm()) for g in (ours, yard)
        )
        assert gap <= 1.5 * allowed + 1e-3, (name, gap, allowed)


@pytest.mark.parametrize("width, rows", [(200, 64), (3000, 3)])
@pytest.mark.parametrize("sizes", [(14, 2, 64), (8, 8, 128), (32, 8, 80), (4, 2, 256)], ids=str)
def test_a_placed_token_sees_its_row_in_bf16(sizes, width, rows):
    (heads, groups, size), kind = sizes, torch.bfloat16
    noise = torch.Generator("cuda").manual_seed(0)

    def made(*shape):
        return torch.randn(*shape, generator=noise, device="cuda")

    qkv = made(rows, (heads + 2 * groups) * size).to(kind)
    kept = [made(rows, width, groups, size).to(kind) for _ in range(2)]
    angle = torch.cat([made(rows, size // 2)] * 2, -1)
    turn, norms = (angle.cos(), angle.sin()), (made(size), made(size))
    length = torch.randint(0, width, (rows,), generator=noise, device="cuda")
    length[0], length[-1] = 0, width - 1
    before = [x.clone() for x in kept]
    out = slots.place_and_attend(qkv, *turn, *kept, length, size**-0.5, norms, 1e-6)
    q, k, v = qkv.unflatten(1, (-1, size)).split([heads, groups, groups], 1)
    wide = torch.float64
    q, k = (
        reference.rms_norm(x.to(wide), w.to(wide), 1e-6, wide)
        for x, w in zip((q, k), norms, strict=True)
    )
    q, k = reference.rotary(q, k, *(x.to(wide) for x in turn), wide)
    at = torch.arange(rows, device="cuda")
    for cache, new in zip(before, (k, v), strict=True):
        cache[at, length] = new.to(kind)
    for ours, wanted in zip(kept, before, strict=True):
        gap, most = ours.double() - wanted.double(), wanted.double().abs().amax(-1, keepdim=True)
        assert (gap.abs() <= 2**-7 * most).all()  # its halves are rounded once, then turned
    sees = (torch.arange(width, device="cuda") <= length[:, None])[:, None, None, :]
    keys, values = (x.transpose(1, 2).double() for x in before)
    truth = attend(q[:, :, None], keys, values, sees, size**-0.5)[:, :, 0].flatten(1)
    assert float((out.double() - truth).norm() / truth.norm()) < 0.01


@pytest.mark.parametrize("made", [tiny, qwen3])
def test_a_decoder_without_modules_samples_what_the_trainer_says(made, monkeypatch):
    """In bf16: log p as drawn against the trainer's, no further apart than through modules."""
    prompts = [[5 + i, 6, 7 + i][: 1 + i % 3] for i in range(12)]
    rows, gaps, taken = [Problem(str(i), "") for i in range(12)], [], []
    inner = lean._on_a_gpu
    for own in (True, False):
        policy = made(dtype="bf16", liger="ours", layers=4, width=128)

        def fits(policy, decoder, own=own):
            taken.append(own and inner(policy, decoder))
            return taken[-1]

        monkeypatch.setattr(lean, "_on_a_gpu", fits)
        rollout = sample(policy, rows, prompts, 4, Sampling(64), seed=1)
        trained = rollout_logp(policy, rollout, 4096).cpu()
        gaps.append(float((torch.cat(rollout.logp) - trained).abs().mean()))
    assert taken == [True, False]
    assert gaps[0] <= 1.5 * gaps[1] + 1e-4, gaps


def test_a_token_is_drawn_as_plain_torch_draws_it(monkeypatch):
    x = torch.randn(64, 151_936, device="cuda").mul(3).bfloat16()
    uniform = torch.rand(64, dtype=torch.float64, device="cuda")
    ours = draw.draw(x, uniform, 0.7)
    theirs = sampling.choose(x, uniform, Sampling(1, temperature=0.7))
    # the sums are rounded unlike: an aim at a border may fall on either side
    same = ours[0] == theirs[0]
    assert int((~same).sum()) <= 1
    torch.testing.assert_close(ours[1][same], theirs[1][same], rtol=0, atol=5e-5)
