"""What all adapters share: a word about versions that nobody has tried."""

import warnings
from importlib import metadata

import pytest

from reasonrl.integrations import areal, nemo_rl, prime_rl, slime
from reasonrl.integrations._host import host_version


@pytest.fixture(autouse=True)
def fresh():
    host_version.cache_clear()
    yield
    host_version.cache_clear()


@pytest.mark.parametrize("found, said", [("1.16.0", 0), ("1.16", 0), ("1.160.0", 1), ("2.0", 1)])
def test_an_unknown_version_is_named_once_with_those_tested(monkeypatch, found, said):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert host_version("trl", "1.16") == host_version("trl", "1.16") == found
    line = f"reasonrl: tested with trl 1.16, found {found}"
    assert [str(w.message) for w in heard] == [line] * said


def test_a_missing_host_is_no_version():
    assert host_version("a-host-that-nobody-has", "1") is None


HOOKS = {
    "nemo-rl": lambda: nemo_rl.AdvantageEstimator("nothing"),
    "slime": lambda: slime.loss_spec(None),
    "areal": lambda: areal.grpo_loss_fn(None, None, {}, use_decoupled_loss=True),
    "prime-rl": lambda: prime_rl.policy_loss(None, name="nothing"),
}


@pytest.mark.parametrize("package", HOOKS)
def test_every_hook_says_so_before_anything_else(monkeypatch, package):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99.1" if name == package else real(name))
    with (
        pytest.warns(UserWarning, match=f"tested with {package} .*, found 99.1"),
        pytest.raises((AttributeError, ValueError, TypeError)),
    ):
        HOOKS[package]()
