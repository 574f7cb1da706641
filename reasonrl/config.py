"""The config of a run: a recipe's YAML plus `key.path=value` overrides, typed, frozen, checked.

    config = load("quickstart", ["steps=50", "optim.schedule=cosine", "learning_rate=3e-5"])

Every mistake is one InputError line with the place, the key, what was expected and what came; an
unknown key names the nearest known one. YAML is read by the 1.2 core rules: 3e-5 is a number, "no"
and 12:30 are strings, a repeated key is an error. `algo`, `task_options` and `model_options` are
handed through: the algorithm, the task, the model check their own knobs, and `LossSpec` its fields.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator

from reasonrl.config_sections import (
    BatchLimit,
    Canary,
    Ceiling,
    ColdStart,
    Count,
    EngineSection,
    Eval,
    Filter,
    Log,
    Lora,
    Optim,
    Positive,
    Rate,
    Sample,
    Save,
    Section,
)
from reasonrl.config_yaml import read_scalar, read_yaml, write_yaml
from reasonrl.keys import refuse
from reasonrl.loss import LossSpec
from reasonrl.records import InputError

RECIPES = Path(__file__).parent / "recipes"
S = TypeVar("S", bound=Section)


class Config(Section):
    model: str = "tiny"  # folder, hub id, "smollm2" or "tiny"
    task: str = "arithmetic"  # built-in name or data file
    seed: Count = 0
    steps: Count = 100  # RL steps
    cold_start_steps: Count = 0
    prompts_per_step: Positive = 8
    group: Positive = 8
    max_completion_length: Positive = 64  # tokens
    updates: Positive = 1  # optimiser steps on one rollout
    learning_rate: Rate = 3e-5
    eval_problems: Count = 500
    algorithm: str = "grpo"
    algo: dict[str, Any] = {}
    loss: dict[str, Any] = {"name": "grpo"}
    task_options: dict[str, Any] = {}
    model_options: dict[str, Any] = {}
    sample: Sample = Sample()
    cold_start: ColdStart = ColdStart()
    optim: Optim = Optim()
    filter: Filter = Filter()
    lora: Lora = Lora()
    ceiling: Ceiling = Ceiling()
    canary: Canary = Canary()
    eval: Eval = Eval()
    save: Save = Save()
    batch: BatchLimit = BatchLimit()
    engine: EngineSection = EngineSection()
    log: Log = Log()
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attn: Literal["auto", "flash", "sdpa"] = "auto"  # of packed batches on a GPU
    # fused layers: ours where the model is known, else liger-kernel's; ours: no GPU without them
    liger: Literal["auto", "ours", "off"] = "auto"
    graphs: Literal["auto", "off"] = "auto"  # rollouts on a GPU replay recorded steps
    threads: Positive | None = None
    nan_patience: Positive = 3  # skipped steps in a row before the run stops
    stall: Annotated[float, Field(ge=0)] = 3600.0  # seconds without any progress; 0 = never ends

    @field_validator("loss")
    @classmethod
    def _named(cls, loss: dict[str, Any]) -> dict[str, Any]:
        return {"name": "grpo", **loss}

    def to_yaml(self) -> str:
        return write_yaml(self.model_dump(mode="json"))

    def digest(self) -> str:
        """A hash of every value, for the checkpoint's manifest."""
        return hashlib.blake2b(self.to_yaml().encode(), digest_size=16).hexdigest()


# what --resume may change (schedules follow the new `steps`); "x." means the whole section
RESUMABLE = tuple("steps eval_problems eval. log. save. ceiling. canary. stall engine.".split())

# whose options a section holds
OPTIONS = {"task": "task_options", "model": "model_options", "algorithm": "algo"}

# names that other trainers use
ELSEWHERE = {
    "lr": "learning_rate",
    "num_generations": "group",
    "group_size": "group",
    "max_steps": "steps",
    "batch_size": "prompts_per_step",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "dataset": "task",
    "data": "task",
    "max_grad_norm": "optim.grad_clip",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "beta": "loss.kl_coef",
}


def load(recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The config of a built-in recipe (by name) or a YAML file; overrides apply in order.

    An override of `task`, `model` or `algorithm` drops the recipe's options of the one it replaces.
    """
    path = _recipe_path(str(recipe))
    values = read_yaml(path)
    before, changed = dict(values), set()
    alone: dict[str, Any] = {}  # what the overrides say without the recipe
    for override in overrides:
        changed.add(_apply(values, override))
        _apply(alone, override)
    for chosen, options in OPTIONS.items():
        if chosen in changed and alone[chosen] != before.get(chosen, _default(chosen)):
            values[options] = alone.get(options, {})
    return _build(values, str(path if path.parent != RECIPES else f"recipe {path.stem}"), changed)


def read(path: str | Path) -> Config:
    """A config as it was written, e.g. a run's config.yaml."""
    return _build(read_yaml(Path(path)), str(path), set())


def changed(config: Config, overrides: Sequence[str], **values: Any) -> Config:
    """A config with other values, and overrides on top."""
    whole = config.model_dump() | values
    for override in overrides:
        _apply(whole, override)
    return _build(whole, "config", set())


def section(kind: type[S], overrides: Sequence[str]) -> S:
    """A config of one kind from `key.path=value` alone; InputError names the first bad key."""
    values: dict[str, Any] = {}
    for override in overrides:
        _apply(values, override)
    refuse(values, "override")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, kind.model_fields, 1, 0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"override: unknown key {key!r}{hint}")
    raise InputError(f"override: {key}: expected {_expected(first)}, got {first['input']!r}")


def recipes() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def diff(old: Section, new: Section) -> list[str]:
    """Dotted keys whose values differ, in the order of the config."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    absent = object()
    keys = list(dict.fromkeys([*before, *after]))
    return [k for k in keys if not _same(before.get(k, absent), after.get(k, absent))]


def check_resume(old: Section, new: Section, where: str) -> None:
    """InputError naming the first key that differs and may not, both values with it."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    for key in diff(old, new):
        free = any(key == r or (r[-1] == "." and key.startswith(r)) for r in RESUMABLE)
        if not free:
            was, now = before.get(key, "absent"), after.get(key, "absent")
            raise InputError(f"{where}: {key}: the run has {was!r}, --resume asks for {now!r}")


def _default(key: str) -> Any:
    return Config.model_fields[key].default


def _recipe_path(recipe: str) -> Path:
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe or "\\" in recipe:
        path = Path(recipe)
        if not path.exists():
            built = f" (built in: {', '.join(recipes())})"
            raise InputError(f"{recipe}: no such file; give a YAML file or a recipe's name{built}")
        return path
    if recipe not in recipes():
        near = difflib.get_close_matches(recipe, recipes(), 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(recipes()) or "none"
        raise InputError(f"unknown recipe {recipe!r}{hint} (known: {known}, or a YAML file)")
    return RECIPES / f"{recipe}.yaml"


def _apply(values: dict[str, Any], override: str) -> str:
    """Put one `key.path=value` into the nested values; returns the key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise InputError(f"override {override!r}: expected key.path=value")
    *path, last = key.split(".")
    section = values
    for depth, name in enumerate(path):
        below = section.setdefault(name, {})
        if not isinstance(below, dict):
            part = ".".join(path[: depth + 1])
            raise InputError(f"override {override!r}: {part} is a value, not a section")
        section = below
    section[last] = read_scalar(text, f"override {override!r}")
    return key


def _build(values: dict[str, Any], where: str, overridden: set[str]) -> Config:
    refuse(values, where)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    else:
        touched = any(key.split(".")[0] == "loss" for key in overridden)
        _check_loss(config.loss, "override" if touched else where)
        return config
    key = ".".join(str(part) for part in first["loc"])
    place = "override" if any(k == key or k.startswith(f"{key}.") for k in overridden) else where
    if first["type"] == "extra_forbidden":
        raise InputError(f"{place}: unknown key {key!r}; did you mean {_nearest(key)!r}?")
    raise InputError(f"{place}: {key}: expected {_expected(first)}, got {first['input']!r}")


def _check_loss(loss: dict[str, Any], where: str) -> None:
    """The loss section must make a LossSpec."""
    known = ["name", *(f.name for f in fields(LossSpec))]
    for key in loss:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.0)[0]
            raise InputError(f"{where}: unknown key 'loss.{key}'; did you mean 'loss.{near}'?")
    changes = {key: value for key, value in loss.items() if key != "name"}
    try:
        LossSpec.named(loss["name"], **changes)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: loss: {error}") from None


def _expected(error: Any) -> str:
    """What a key wants, in words, from pydantic's error record."""
    limits = error.get("ctx", {})
    kinds = {
        "int_type": "an integer",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "a string",
        "dict_type": "a section of keys",
        "model_type": "a section of keys",
        "finite_number": "a finite number",
        "tuple_type": "a list",
        "literal_error": limits.get("expected"),
        "greater_than": f"a number > {limits.get('gt')}",
        "greater_than_equal": f"a number >= {limits.get('ge')}",
        "less_than": f"a number < {limits.get('lt')}",
        "less_than_equal": f"a number <= {limits.get('le')}",
    }
    return kinds.get(error["type"]) or error["msg"]


def _nearest(key: str) -> str:
    """The known dotted key most like this one, by the whole key or by its last part."""
    if key in ELSEWHERE:
        return ELSEWHERE[key]
    flat = _flat(Config().model_dump(mode="json"))
    known = [*flat, *Config.model_fields]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.split(".")[-1], candidate.split(".")[-1]).ratio()
        return whole + last

    return max(known, key=likeness)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; an empty section stays a value, so that emptiness is visible."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, dict):
            out[f"{prefix}{key}"] = value
    return out


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b
