"""OpenRLHF's policy loss and ours give the same loss, gradient and tuple on the same batch."""

import importlib
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from reasonrl.integrations.openrlhf import PolicyLoss


@pytest.fixture(scope="module")
def host(require, tmp_path_factory):
    """The released class, from its own file beside a stand-in for the one helper it imports: the
    package's __init__ wants a GPU stack."""
    try:
        files = metadata.files("openrlhf") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [f for f in files if str(f).endswith("openrlhf/models/loss.py")]
    require("openrlhf", None if found else "pip install --no-deps openrlhf")
    folder = tmp_path_factory.mktemp("host") / "openrlhf_loss"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "utils.py").write_text(MASKED_MEAN)
    (folder / "loss.py").write_text(Path(str(found[0].locate())).read_text())
    sys.path.insert(0, str(folder.parent))
    try:
        return importlib.import_module("openrlhf_loss.loss").PolicyLoss
    finally:
        sys.path.remove(str(folder.parent))


MASKED_MEAN = """
def masked_mean(tensor, mask, dim=None):
    if mask is None:
        return tensor.mean(dim=dim)
    return (tensor * mask).sum(dim=dim) / mask.sum(dim=dim)
"""


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(6, 9, generator=generator)  # noqa: E731
    old = -1.0 + 0.1 * draw()
    mask = (torch.rand(6, 9, generator=generator) < 0.7).float()
    mask[2] = 0  # a completion without a token
    return old + 0.4 * draw(), old, draw(), mask


CASES = [
    {},
    {"token_level_loss": False},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.3},
    {"dual_clip": 2.0},
    {"policy_loss_type": "gspo", "clip_eps_low": 0.02, "clip_eps_high": 0.05},
]
COUNTS = [
    {},
    {"dp_size": 2, "batch_num_tokens": 71.0, "global_batch_size": 11.0},
]


@pytest.mark.parametrize("counts", COUNTS, ids=["local", "global"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_numbers_are_the_hosts(host, options, counts):
    logp, old, advantage, mask = batch()
    results = []
    for kind in (host, PolicyLoss):
        x = logp.clone().requires_grad_()
        out = kind(**options)(x, old, advantage, action_mask=mask, **counts)
        out[0].backward()
        results.append((out, x.grad))
    (theirs, grad), (ours, own) = results
    assert len(theirs) == len(ours)
    assert torch.allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    assert (own - grad).norm() <= 1e-5 * grad.norm()
    assert torch.allclose(ours[2], theirs[2], rtol=1e-5, atol=1e-6)
    if not options.get("dual_clip") and options.get("policy_loss_type") != "gspo":
        assert torch.allclose(ours[1], theirs[1].detach(), atol=1e-6)
    assert ours[3:] == theirs[3:] == (None, None)


def test_without_the_host_it_stands_alone():
    logp, old, advantage, mask = batch()
    loss, clipped, kl, *rest = PolicyLoss()(logp, old, advantage, action_mask=mask)
    ratio = (logp - old).exp()
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    assert torch.allclose(loss, (expected * mask).sum() / mask.sum())
    assert 0 < float(clipped) < 1 and torch.isfinite(kl)
    nothing = PolicyLoss()(logp, old, advantage, action_mask=torch.zeros_like(mask))
    assert float(nothing[0]) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_correction_level": "token"}, "is_correction_level"),
        ({"policy_loss_type": "reinforce"}, "policy_loss_type"),
        ({"dual_clip": 0.5}, "dual_clip"),
    ],
)
def test_what_it_has_not_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**options)
    with pytest.raises(TypeError, match="unknown argument 'clip'"):
        PolicyLoss(clip=0.2)
