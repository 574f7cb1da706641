"""The head as tensors: what it does to the logits, adapters on it, its shards on two ranks."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    GraniteConfig,
    GraniteForCausalLM,
)

from reasonrl import heads, linear_logp, tiny

sys.path.insert(0, str(Path(__file__).parent))  # the worker is a script that we import from too

import heads_worker as worker

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "softcap": (Gemma2ForCausalLM, Gemma2Config(**SMALL, final_logit_softcapping=0.7)),
    "logit_scale": (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=7.0)),
    "logits_scaling": (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=0.2)),
    "lm_head_multiplier": (
        FalconH1ForCausalLM,
        FalconH1Config(
            **SMALL, lm_head_multiplier=4.0, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16,
            mamba_d_state=8, mamba_n_groups=1,
        ),
    ),
}  # fmt: skip
IDS = torch.tensor([[3, 9, 4, 17, 30, 8], [5, 5, 41, 2, 11, 7]])


def taken(hidden, head):
    return linear_logp(
        hidden[:, :-1].contiguous(), head.weight, IDS[:, 1:], bias=head.bias, softcap=head.softcap
    )


def agree(model, parameters=None):
    """Values and gradients of our head against log_softmax of the model's own logits."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    heads.verify(model)
    heads.attach(model)
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = model(input_ids=IDS).logits.log_softmax(-1)[:, :-1]
    expected = expected.gather(-1, IDS[:, 1:, None])[..., 0]
    ours = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), head_call=taken)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(expected.shape)
    a = torch.autograd.grad((expected * weight).sum(), wanted, allow_unused=True)
    b = torch.autograd.grad((ours * weight).sum(), wanted, allow_unused=True)
    seen = 0
    for x, y in zip(a, b, strict=True):
        if x is None or float(x.norm()) == 0:
            continue
        seen += 1
        assert (y - x).norm() <= 2e-5 * x.norm() + 1e-7, (x.norm(), y.norm())
    assert seen and "forward" not in inner.get_output_embeddings().__dict__


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_does_to_its_logits_is_honoured(name):
    kind, config = FAMILIES[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    changed = heads.softcap_of(model) == 0.7 or heads.scale_of(model) in (7.0, 5.0, 4.0)
    assert changed
    agree(model)


def test_what_the_text_part_of_a_model_with_eyes_does_to_its_logits():
    config = Gemma3Config(text_config={**SMALL, "final_logit_softcapping": 0.7})
    model = SimpleNamespace(config=config)
    assert heads.softcap_of(model) == 0.7 and not heads.alone(model)


def lora(require, dora=False, **options):
    found = importlib.util.find_spec("peft")
    require("peft", None if found else "pip install 'reasonrl[lora]'")
    import peft

    torch.manual_seed(0)
    model, _ = tiny.build(seed=0, width=32, layers=1, heads=2)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False  # merging would change the embeddings too
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"], use_dora=dora, **options
    )
    made = peft.get_peft_model(model, config)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return made


def test_a_lora_adapter_on_the_head_is_part_of_the_weight(require):
    model = lora(require, lora_dropout=0.0)
    agree(model)
    with model.disable_adapter(), torch.no_grad():
        plain = model(input_ids=IDS, head_call=taken)
    with torch.no_grad():
        adapted = model(input_ids=IDS, head_call=taken)
    assert (plain - adapted).abs().max() > 0.1
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS, head_call=taken), adapted)


def test_a_full_copy_of_the_head_beside_an_adapter(require):
    found = importlib.util.find_spec("peft")
    require("peft", None if found else "pip install 'reasonrl[lora]'")
    import peft

    model, _ = tiny.build(seed=0, width=32, layers=1, heads=2)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    agree(peft.get_peft_model(model, config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "has dropout"),
        ({"dora": True}, "has a variant such as DoRA"),
        ({"lora_bias": True}, "has a bias"),
    ],
)
def test_adapters_that_are_no_product_are_refused(require, options, message):
    with pytest.raises(ValueError, match=message):
        heads.check(lora(require, **options))


def test_a_head_that_is_no_linear_layer_is_refused():
    model, _ = tiny.build(seed=0, width=32, layers=1, heads=2)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="the head is a Sequential"):
        heads.check(model)


def test_an_unknown_change_of_the_logits_is_found():
    model, _ = tiny.build(seed=0, width=32, layers=1, heads=2)
    model.lm_head.register_forward_hook(lambda module, args, out: out + out.sum(-1, keepdim=True))
    model.lm_head.register_forward_hook(lambda module, args, out: 1.3 * out)
    heads.check(model)
    model.config.final_logit_softcapping = 0.5  # which a Llama does not do
    with pytest.raises(ValueError, match="its logits differ from hidden @ weight.T"):
        heads.verify(model)


WORLD, TIMEOUT = 2, 400  # seconds; a quiet machine needs about fifteen
ZERO, FSDP2 = ("zero2", "zero3"), ("fsdp2", "fsdp2-head", "dtensor")


def launch(out: Path, kinds: tuple[str, ...]) -> Path:
    """Both ranks through all kinds; a rank that fails or hangs fails the test with its log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(WORLD):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
        env = os.environ | {k: str(v) for k, v in place.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
        env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
        with open(out / f"{rank}.log", "w") as log:
            command = [sys.executable, worker.__file__, str(out), *kinds]
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks):
            assert time.monotonic() < deadline, f"{kinds}: a rank hangs"
            time.sleep(0.1)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        logs = [(out / f"{rank}.log").read_text()[-3000:] for rank in range(WORLD)]
    assert [r.returncode for r in ranks] == [0] * WORLD, logs
    return out


@pytest.fixture(scope="module")
def zero(tmp_path_factory, require):
    found = importlib.util.find_spec("deepspeed")
    require("deepspeed", None if found else "pip install 'reasonrl[deepspeed]'")
    return launch(tmp_path_factory.mktemp("zero"), ZERO)


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("fsdp2"), FSDP2)


@pytest.mark.parametrize("kind", [*ZERO, *FSDP2])
def test_a_sharded_head_gives_the_step_of_one_process(kind, request):
    out = request.getfixturevalue("zero" if kind in ZERO else "fsdp2")
    tied = kind not in ("fsdp2-head", "dtensor")
    losses, weights = worker.alone(tied, head_only=kind == "dtensor")
    whole = sum(v.numel() for v in weights.values())
    for rank in (torch.load(out / f"{kind}-{rank}.pt") for rank in range(WORLD)):
        assert rank["losses"] == pytest.approx(losses, abs=1e-5)
        assert rank["weights"].keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(rank["weights"][name], weight, atol=1e-5, rtol=0)
        sharded = kind != "zero2"  # stage 2 shards gradients and optimizer states
        assert (rank["held"] < 0.6 * whole) == sharded, (rank["held"], whole)
    assert losses[-1] != pytest.approx(losses[0], abs=1e-3)
