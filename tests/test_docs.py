"""The site is true: links resolve, options exist, commands parse, code runs, plans agree."""

from __future__ import annotations

import argparse
import dataclasses
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from reasonrl import cli
from reasonrl import config as configs
from reasonrl.algos import ALGOS
from reasonrl.loss import LossSpec
from reasonrl.prm_train import PRMConfig
from reasonrl.tasks.table import TASKS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXT = {page.name: page.read_text() for page in PAGES}
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
PLAN = re.compile(r"<!-- plan: (.*?) -->\n(.*?)\n?<!-- end -->", re.DOTALL)
SECTIONS = set(configs.Config.model_fields)


def blocks(kind: str) -> list[tuple[str, str]]:
    return [(n, body) for n, text in TEXT.items() for k, body in BLOCK.findall(text) if k == kind]


def commands() -> list[tuple[str, list[str]]]:
    """Every `reasonrl ...` line of the pages, as words."""
    found = []
    for name, body in blocks("bash"):
        lines = body.replace("\\\n", " ").splitlines()
        found += [(name, shlex.split(line)[1:]) for line in lines if line.startswith("reasonrl ")]
    return found


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [p for each in action.choices.values() for p in parsers(each)]
    return found


def knobs(kind: type) -> set[str]:
    return {f.name for f in dataclasses.fields(kind) if f.init}


def known_keys() -> set[str]:
    """Dotted config keys, with the knobs that algorithms, tasks, LossSpec and `prm train` have."""
    flat = set(configs._flat(configs.Config().model_dump(mode="json"))) | SECTIONS
    flat |= {f"algo.{k}" for kind in ALGOS.values() for k in knobs(kind) - {"task", "policy"}}
    flat |= {f"loss.{k}" for k in knobs(LossSpec)} | {"loss.name"}
    tasks = [kind for kind in TASKS.values() if dataclasses.is_dataclass(kind)]
    return (
        flat
        | {f"task_options.{k}" for kind in tasks for k in knobs(kind)}
        | {"task_options.eval_file"}
    )


def test_every_page_is_in_the_navigation_and_the_other_way_round():
    listed = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


@pytest.mark.parametrize("name", TEXT)
def test_links_resolve(name):
    text = BLOCK.sub("", TEXT[name])
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            assert (ROOT / "docs" / path).is_file(), target
            assert not anchor, "links go to pages"
    for span in spans(text):  # files of the repository are named by their paths
        if re.fullmatch(r"(reasonrl|kernels|tests|recipes|bench|csrc)/[\w/.]*", span):
            assert (ROOT / span).exists(), span


def test_options_named_in_prose_exist():
    keys = known_keys()
    flags = {f for p in parsers(cli._parser()) for f in p._option_string_actions}
    seen = 0
    for name, text in TEXT.items():
        for span in spans(text):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span):
                assert flag in flags, f"{name}: {flag}"
                seen += 1
            key = span.partition("=")[0].strip()
            if re.fullmatch(r"[a-z_]+\.[a-z_]+", key) and key.split(".")[0] in SECTIONS:
                assert key in keys, f"{name}: {key}"
                seen += 1
    assert seen > 60  # the pages do name their options


def test_a_systems_page_names_the_knobs_of_its_own_algorithm():
    for name in ("prime", "reasonflux", "merf"):
        own = knobs(ALGOS[name])
        named = {s[5:] for s in spans(TEXT[f"{name}.md"]) if re.fullmatch(r"algo\.\w+", s)}
        assert named and named <= own, (name, named - own)
    for key in ("lambda_step", "lambda_final", "trajectory", "kind", "separator", "lora_rank"):
        assert f"`{key}`" in TEXT["reasonflux.md"] and key in PRMConfig.model_fields


@pytest.mark.parametrize("recipe", ["prime", "reasonflux", "merf"])
def test_the_column_of_the_recipe_is_the_recipes(recipe):
    """Numbers of the table's third column against the built-in recipe's values."""
    config = configs.load(recipe)
    values = configs._flat(config.model_dump(mode="json"))
    algo = {f.name: f.default for f in dataclasses.fields(ALGOS[recipe])}
    checked = 0
    for line in TEXT[f"{recipe}.md"].splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        names = re.findall(r"`([\w.]+)`", cells[0]) if line.startswith("| `") else []
        shown = cells[2].split(", ") if names else []
        if not names or shown == [""] or shown == ["unset"]:
            continue
        assert len(names) == len(shown), line
        for name, text in zip(names, shown, strict=True):
            value = values.get(name)
            if value is None:
                top, _, last = name.partition(".")
                value = algo.get(last) if top == "algo" else getattr(LossSpec(), last)
            assert yaml_value(text) == value, f"{name}: page {text}, recipe {value}"
            checked += 1
    assert checked >= 6


def yaml_value(text: str):
    value = yaml.safe_load(text)
    return float(text) if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", text) else value


@pytest.mark.parametrize("name, words", commands(), ids=lambda x: x if isinstance(x, str) else "")
def test_commands_parse(name, words, monkeypatch):
    """The parser takes every command, and the config every override of `train`."""
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    parser = cli._parser()
    options, rest = parser.parse_known_args(words)
    assert all("=" in word and hasattr(options, "overrides") for word in rest), rest
    if words[0] == "train":
        overrides = [*options.overrides, *rest]
        config = configs.load(options.recipe, overrides)
        own = knobs(ALGOS[config.algorithm])
        assert set(config.algo) <= own, config.algo
    if words[:2] == ["prm", "train"]:
        configs.section(PRMConfig, [w for w in [*map(str, options.data), *rest] if "=" in w])


CODE = blocks("python")


@pytest.mark.parametrize("name, body", CODE, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CODE)])
def test_code_runs(name, body, tmp_path, capsys):
    script = tmp_path / "block.py"
    script.write_text(body)
    runpy.run_path(str(script), run_name="docs_block")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("words, table", PLAN.findall(TEXT["scale.md"]))
def test_plans_are_what_the_command_prints(words, table, capsys):
    assert cli.main(["plan", *shlex.split(words)]) == 0
    shown, _, printed = table.partition("\n```\n\n")
    assert shown == f"```bash\nreasonrl plan {words}"
    assert printed.strip() == capsys.readouterr().out.strip()


def test_the_citation_names_this_version():
    from reasonrl import __version__

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == __version__ and cited["license"] == "Apache-2.0"
