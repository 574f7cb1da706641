"""The house keeps itself: import directions, file sizes, names, and the cost of the import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    p
    for top in ("kernels", "reasonrl", "bench", "examples", "tests")
    for p in (ROOT / top).rglob("*.py")
    if not p.is_relative_to(ROOT / "reasonrl" / "kernels")
)
NATIVE = sorted(
    p for kind in ("*.cpp", "*.cu", "*.h", "*.cuh") for p in (ROOT / "csrc").rglob(kind)
)

# the stair, top to bottom: a module may import from its own row and from the rows beneath it
STAIR = [
    {"cli"},
    {
        "train",
        "serve",
        "plan",
        "plan_memory",
        "plan_shapes",
        "doctor",
        "report",
        "audit",
        "canary",
        "replay",
        "commands",
        "plots",
        "plot_data",
        "plot_scores",
        "benchmarks",
        "judge_bench",
        "thinking_data",
    },
    {"integrations"},
    {"algos"},
    {
        *"rewards tasks labels prm_train implicit_train template trajectory".split(),
        *"judge_data judge_train".split(),
    },
    {
        *"models rollout batch checkpoint log config lora logprobs heads vision".split(),
        *"prm prm_heads asking encoder asker decoding burst lean slots engine".split(),
    },
    {
        *(
            "loss",
            "credit",
            "advantage",
            "systems",
            "segment",
            "prompts",
            "reward_spec",
            "choice",
            "curves",
            "monitors",
            "judging",
            "cases",
            "quality",
            "targets",
            "cache",
            "redact",
            "pairs",
        ),
        *(
            "curate",
            "answer",
            "answer_forms",
            "rows",
            "stepwise",
            "stepwise_formats",
            "dense",
            "attention",
            "sampling",
            "importance",
            "vocab_parallel",
            "layers",
            "cpu_layers",
            "gpu_layers",
            "structure",
            "calls",
            "products",
            "places",
            "whole_layer",
            "whole_decoder",
            "chat",
            "tiny",
            "tiny_vl",
            "images",
            "smollm2",
            "pretrained",
            "images_header",
            "workers",
        ),
    },
    {"ops"},
    {"implementations"},
    {"checks", "compiled", "flash", "heap", "keys", "progress", "records", "watchdog"},
]
LEVEL = {name: level for level, row in enumerate(STAIR) for name in row}
NEVER = {"models", "rollout", "batch", "checkpoint", "log", "config"}  # never rewards or algos
HOSTS = ("trl", "verl", "openrlhf", "vllm", "wandb")
SANDBOXED = {"_math_worker.py", "_code_worker.py"}  # where model text may meet a parser of code


def module(path: Path) -> str:
    """The top name of a file in reasonrl: reasonrl/algos/prime.py -> algos."""
    return path.relative_to(ROOT / "reasonrl").parts[0].removesuffix(".py")


def imports(path: Path, top_level: bool = False) -> set[str]:
    tree, found = ast.parse(path.read_text()), set()
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """The top names in reasonrl that a file imports, at its head or inside a function."""
    found = {name.split(".")[1] for name in imports(path) if name.startswith("reasonrl.")}
    return {name for name in found if name in LEVEL or name == "kernels"}


def in_package() -> list[Path]:
    return [p for p in SOURCES if p.is_relative_to(ROOT / "reasonrl") and p.name != "__init__.py"]


@pytest.mark.parametrize("path", in_package(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    me = module(path)
    level = LEVEL.get(me)
    for name in ours(path) - {me}:
        if name == "kernels":
            assert me == "ops", "only reasonrl/ops.py imports the kernels"
            continue
        if level is not None:
            assert LEVEL[name] >= level, f"{me} must not import {name}"
        assert name not in ("train", "cli") or me in ("cli", "train", "commands")
        assert name != "integrations" or me in ("cli", "doctor")
        assert not (me in NEVER and name in ("rewards", "algos"))
        verifiers = {f"reasonrl.rewards.{name}" for name in ("verify", "code", "outcome")}
        assert not (me == "tasks" and name == "rewards") or verifiers & imports(path)


def test_nothing_sideways_between_algorithms_rewards_integrations():
    shared = {
        "algos": {"base", "process"},
        "rewards": {"verify"},
        "integrations": {"verl", *(f"trl_{x}" for x in "prm rewards rows trust merf".split())},
    }
    for folder, allowed in shared.items():
        for path in (ROOT / "reasonrl" / folder).glob("*.py"):
            if path.name == "__init__.py" or path.stem.startswith("_"):
                continue
            prefix = f"reasonrl.{folder}."
            found = {n.split(".")[2] for n in imports(path) if n.startswith(prefix)}
            siblings = {p.stem for p in path.parent.glob("*.py") if not p.stem.startswith("_")}
            assert not (found & siblings) - allowed - {path.stem}, path


def test_kernels_import_torch_triton_and_each_other_only():
    allowed = {"torch", "triton", "__future__", "reasonrl", "importlib"}
    for path in (ROOT / "kernels").glob("*.py"):
        names = imports(path)
        roots = {name.split(".")[0] for name in names}
        assert roots - allowed <= set(sys.stdlib_module_names), path
        own = {n for n in names if n.startswith("reasonrl.") and n != "reasonrl._C"}
        own = {n for n in own if not n.startswith(("reasonrl.kernels", "reasonrl.records"))}
        assert not own, path
        if path.stem.startswith("reference"):
            assert "triton" not in roots and "reasonrl._C" not in names, path


def test_hosts_are_imported_in_one_file_each():
    for host in HOSTS:
        users = [p for p in in_package() if any(n.split(".")[0] == host for n in imports(p))]
        assert len(users) <= 1 or all("integrations" in p.parts for p in users), (host, users)


def test_kernels_have_no_init_and_nobody_imports_their_bare_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "reasonrl" / "kernels"
    assert link.is_symlink() and link.resolve() == ROOT / "kernels"
    for path in SOURCES:
        assert not any(name.split(".")[0] == "kernels" for name in imports(path)), path


@pytest.mark.parametrize("path", [*SOURCES, *NATIVE], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    lines = path.read_text().count("\n")
    assert lines <= 400, f"{path.name} has {lines} lines"


def test_no_broad_except_and_no_code_from_text():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                kind = node.type.id if isinstance(node.type, ast.Name) else None
                broad = node.type is None or kind in ("Exception", "BaseException")
                reraised = any(isinstance(x, ast.Raise) and x.exc is None for x in ast.walk(node))
                answered = path.name == "_code_worker.py"  # what the program raises is its answer
                assert not broad or reraised or answered, f"{path}:{node.lineno} catches everything"
            if isinstance(node, ast.Call) and path.name not in SANDBOXED:
                called = node.func.id if isinstance(node.func, ast.Name) else None
                if isinstance(node.func, ast.Attribute) and node.func.attr in (
                    "sympify",
                    "parse_expr",
                ):
                    called = node.func.attr
                forbidden = ("eval", "exec", "sympify", "parse_expr")
                assert called not in forbidden, f"{path}:{node.lineno} calls {called}"


def test_inits_hold_reexports_or_one_table():
    for path in (ROOT / "reasonrl").rglob("__init__.py"):
        if path.is_relative_to(ROOT / "reasonrl" / "kernels"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                assert node.name in ("__getattr__", "__dir__"), f"{path} holds logic: {node.name}"
            assert not isinstance(node, ast.ClassDef), path


HEAVY = """
import sys
import torch
before = set(sys.modules)
import reasonrl
import time
start = time.process_time()
import reasonrl.ops, reasonrl.loss, reasonrl.advantage, reasonrl.records, reasonrl.choice
print(time.process_time() - start)
new = {m.split(".")[0] for m in set(sys.modules) - before}
print(sorted(new & {"triton", "transformers", "datasets", "accelerate", "sympy", "pydantic"}))
"""


def test_importing_reasonrl_is_cheap():
    run = [sys.executable, "-c", HEAVY]
    out = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    seconds, heavy = out.splitlines()
    assert heavy == "[]" and float(seconds) < 1.0  # 0.3 s on a quiet machine
