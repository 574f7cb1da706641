"""What works here and what does not: versions, kernels, verifiers, host trainers, each one tried.

A line is `ok`, `missing` (not installed; what brings it) or `broken` (installed, and does not work:
the error). Kernels are run against the reference, verifiers judge an answer, and each installed
host is used: TRL trains two steps, OpenRLHF's and verl's loss interfaces are called. Nothing is
fetched. Left out: several machines, speed (bench).
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from typing import Any, Literal, NamedTuple

import torch

from reasonrl import flash, ops, tiny
from reasonrl.attention import Packed
from reasonrl.loss import LossSpec, policy_loss
from reasonrl.progress import phase
from reasonrl.records import InputError, KernelUnavailable


class Line(NamedTuple):
    name: str
    state: Literal["ok", "missing", "broken"]
    text: str


class Absent(Exception):
    """What is checked is not installed; the message says what brings it."""


def examine() -> list[Line]:
    """Every check, in the order in which they should be read."""
    lines = []
    with phase("trying", len(CHECKS), "parts") as part:
        for name, check in CHECKS:
            lines.append(_tried(name, check))
            part.add()
    return lines


def verdict(lines: list[Line]) -> str:
    """One sentence."""
    broken = [line.name for line in lines if line.state == "broken"]
    if broken:
        return f"broken: {', '.join(broken)}"
    missing = sum(line.state == "missing" for line in lines)
    return f"everything installed works ({missing} optional parts are not installed)"


def _tried(name: str, check: Callable[[], str]) -> Line:
    quiet = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(quiet), redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            return Line(name, "ok", check())
    except (Absent, KernelUnavailable) as error:
        return Line(name, "missing", str(error))
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        said = str(error).strip().splitlines()
        return Line(name, "broken", f"{type(error).__name__}: {said[0] if said else 'no message'}")
    except (AssertionError, AttributeError, KeyError) as error:
        return Line(name, "broken", f"{type(error).__name__}: {error}")


def _version(package: str, install: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise Absent(f"not installed; {install}") from None


def _base() -> str:
    found = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "transformers", "accelerate"))
    return f"Python {platform.python_version()}, {found}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        raise Absent("none usable; everything runs on the CPU")
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _kernel(impl: str) -> str:
    """The loss and its gradient by one implementation against the reference."""
    device = "cpu" if impl == "native" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise Absent("needs a GPU; on a CPU its kernels run in the tests only")
    made = torch.Generator().manual_seed(0)
    logp, old, advantage = (torch.randn(4, 9, generator=made).to(device) for _ in range(3))
    spec = LossSpec.named("dapo")
    got = []
    for name in (impl, "reference"):
        x = logp.clone().requires_grad_(True)
        policy_loss(x, old, advantage, spec, impl=name).loss.backward()  # type: ignore[arg-type]
        assert x.grad is not None
        got.append(x.grad)
    gap = float((got[0] - got[1]).abs().max())
    if gap > 1e-5:
        raise RuntimeError(f"its gradient differs from the reference by {gap:.1e}")
    return f"agrees with the reference ({gap:.0e})"


def _linear() -> str:
    hidden, weight = torch.randn(5, 16), torch.randn(40, 16)
    target = torch.arange(5)
    value = ops.linear_logp(hidden, weight, target)
    assert isinstance(value, torch.Tensor)
    expected = (hidden @ weight.T).log_softmax(-1)[range(5), range(5)]
    if not torch.allclose(value, expected, atol=1e-4):
        raise RuntimeError("linear_logp differs from torch's log_softmax")
    return "linear_logp agrees with torch"


def _nvcc() -> str:
    if shutil.which("nvcc") is None:
        raise Absent("not on the PATH; CUDA kernels are not built here")
    return str(shutil.which("nvcc"))


def _imported(package: str, module: str, install: str) -> Callable[[], str]:
    def check() -> str:
        version = _version(package, install)
        importlib.import_module(module)
        return version

    return check


def _flash() -> str:
    """Packed attention by torch's flash kernels against the masked path."""
    if not torch.cuda.is_available():
        raise Absent("no GPU: packed batches attend by SDPA (attn=flash would be refused)")
    layout, found = [(0, 5, [7, 3])], []
    made = torch.Generator().manual_seed(0)
    q, k = (torch.randn(h, 15, 64, generator=made).to("cuda", torch.float16) for h in (4, 2))
    if missing := flash.missing(q.transpose(0, 1)):
        raise Absent(f"needs {missing}; SDPA is used")
    for attn in ("sdpa", "flash"):
        found.append(Packed(layout, "cuda", attn=attn).attend(0, q, k, k, 0.125).float())
    gap = float((found[0] - found[1]).abs().max())
    if gap > 1e-2:
        raise RuntimeError(f"it differs from SDPA by {gap:.1e}")
    return f"torch's flash kernels agree with SDPA ({gap:.0e})"


def _maths() -> str:
    from reasonrl.rewards import verify_math

    found = [s.value for s in verify_math([r"\boxed{\frac12}", "7"], ["0.5", "8"])]
    if found != [1.0, 0.0]:
        raise RuntimeError(f"expected scores [1.0, 0.0], got {found}")
    return "judges in its workers"


def _sandbox() -> str:
    """Which sandbox confines programs here, and why not a better one; one program is graded."""
    from reasonrl.rewards import code

    try:
        box = code.choose()
    except InputError as error:
        raise Absent(str(error)) from None
    (score,) = code.verify_code(
        ["def f(x): return x + 1"], [["assert f(1) == 2", "assert f(1) == 3"]]
    )
    if score.value != 0.5:
        raise RuntimeError(f"{box.name}: expected the score 0.5, got {score}")
    with code.Process("code", 1.0, box) as process:
        layers = ", ".join(process.layers)
    return f"{box.name} ({box.why}): {layers}"


def _trl() -> str:
    version = _version("trl", "pip install 'reasonrl[trl]'")
    from datasets import Dataset

    from reasonrl.integrations import trl as adapter

    model, tokenizer = tiny.build(layers=1, width=32, heads=2)
    tokenizer.padding_side = "left"
    with tempfile.TemporaryDirectory() as folder:
        config = adapter.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            max_steps=2,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = adapter.GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=_lengths,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": f"{i}+1"} for i in range(8)]),
        )
        trainer.train()
    return f"{version}, two steps trained{_tested(version, adapter.TESTED)}"


def _lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def _openrlhf() -> str:
    version = _version("openrlhf", "pip install --no-deps openrlhf")
    from reasonrl.integrations import openrlhf as adapter

    logp = torch.randn(2, 5, requires_grad=True)
    mask = torch.ones(2, 5)
    out: Any = adapter.PolicyLoss()(logp, logp.detach(), torch.randn(2, 5), action_mask=mask)
    if len(out) != adapter.tuple_length():
        raise RuntimeError(f"{version}: expected {adapter.tuple_length()} values, got {len(out)}")
    out[0].backward()
    return f"{version}, PolicyLoss called{_tested(version, adapter.TESTED)}"


def _verl() -> str:
    version = _version("verl", "see verl's own installation")
    from reasonrl.integrations import verl as adapter

    adapter.register()
    return f"{version}, registered{_tested(version, adapter.TESTED)}"


def _named(package: str, module: str) -> Callable[[], str]:
    """A host that takes a function by its path: whether ours and the host's are importable."""

    def check() -> str:
        adapter = importlib.import_module(f"reasonrl.integrations.{module}")
        version = _version(package, "the adapter is ready; see the host's own installation")
        return f"{version}, {adapter.__name__} loads{_tested(version, adapter.TESTED)}"

    return check


def _images() -> str:
    """A picture is written, decoded in the worker, and seen by a small model."""
    import os

    from reasonrl import images, models
    from reasonrl.prompts import render
    from reasonrl.rollout import Sampling, sample
    from reasonrl.tasks import make_task

    if importlib.util.find_spec("PIL") is None:
        raise Absent("pillow is not installed; pip install 'reasonrl[vision]'")
    problem = make_task("charts", style="compact").problem("train", 0)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(os.path.realpath(folder), "chart.png")
        problem.images[0].draw().save(path)
        (picture,) = images.decode([path])
    policy = models.load("tiny-vl", dtype="fp32", width=64, layers=1, vision_layers=1)
    ids = [render(policy.tokenizer, problem.prompt, images=1)]
    rollout = sample(policy, [problem], ids, 2, Sampling(2), 0)
    return f"{picture.size[0]} x {picture.size[1]} decoded; {len(rollout.text)} completions on it"


def _tested(version: str, tested: str) -> str:
    return "" if version.startswith(tested) else f"; tested with {tested}"


CHECKS: tuple[tuple[str, Callable[[], str]], ...] = (
    ("base", _base),
    ("gpu", _gpu),
    ("native kernels", lambda: _kernel("native")),
    ("linear_logp", _linear),
    ("triton kernels", lambda: _kernel("triton")),
    ("cuda kernels", lambda: _kernel("cuda")),
    ("nvcc", _nvcc),
    ("flash attention", _flash),
    (
        "liger-kernel",
        _imported(
            "liger-kernel", "liger_kernel", "pip install liger-kernel (a CPU has our layers)"
        ),
    ),
    ("deepspeed", _imported("deepspeed", "deepspeed", "pip install 'reasonrl[deepspeed]'")),
    ("peft", _imported("peft", "peft", "pip install 'reasonrl[lora]'")),
    ("images", _images),
    ("maths verifier", _maths),
    ("code sandbox", _sandbox),
    ("trl", _trl),
    ("openrlhf", _openrlhf),
    ("verl", _verl),
    ("slime", _named("slime", "slime")),
    ("prime-rl", _named("prime-rl", "prime_rl")),
    ("nemo-rl", _named("nemo-rl", "nemo_rl")),
    ("areal", _named("areal", "areal")),
)
