"""The README's Python blocks run as they stand."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(block)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_make_quickstart_ends_with_the_page(require, tmp_path):
    """The Makefile's own lines with a stand-in for the command: a second run takes a new folder."""
    require("make", None if shutil.which("make") else "no make")
    shutil.copy(README.with_name("Makefile"), tmp_path)
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/venv").write_text("")
    command = tmp_path / "v/bin/reasonrl"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\n[ "$1" = train ] && mkdir -p "$4" || touch "$2/report.html"\n')
    command.chmod(0o755)
    for name in ("quickstart", "quickstart-2"):
        line = ["make", "quickstart", "VENV=v"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        page = tmp_path / "runs" / name / "report.html"
        assert page.exists() and f"Open {page} in a browser" in done.stdout
