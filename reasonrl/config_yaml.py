"""YAML by the 1.2 core rules: 3e-5 is a number, "no" is a string, a repeated key is an error.

PyYAML reads YAML 1.1, where 3e-5 is a string, `no` is false, 010 is eight and 12:30 is 750.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from reasonrl.records import InputError

NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
INT = re.compile(r"^[-+]?[0-9]{1,300}$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
KINDS = (("null", NULL), ("bool", BOOL), ("int", INT), ("float", FLOAT))


class Loader(yaml.SafeLoader):
    """The safe loader with the core schema's scalars and without repeated keys."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """The safe dumper, quoting every string that either version of YAML would take for another."""


for _kind, _pattern in KINDS:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, None)
    Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, None)
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 10))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; InputError with the line where it is not one."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    values = _parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values


def write_yaml(values: dict[str, Any]) -> str:
    """The text that `read_yaml` reads back as the same values."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False)


def read_scalar(text: str, where: str) -> Any:
    """The value of an override: a scalar, or a list, mapping or quoted string written inline."""
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return _parse(text, where)
    kind = next((kind for kind, pattern in KINDS if pattern.match(text)), "str")
    return _parse(text, where) if kind != "str" else text


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}:" if mark else ""
        raise InputError(f"{where}:{line} {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{where}: {reason}") from None
