"""The hook that hides what must not be stored or sent: found by its path, run on every text."""

from __future__ import annotations

import pytest

from reasonrl import InputError
from reasonrl.redact import load, redacted


def test_a_redactor_is_found_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hide_names.py").write_text("def hide(text):\n    return text.upper()\n")
    assert redacted({"a": ["x", 1, None]}, load("hide_names:hide")) == {"a": ["X", 1, None]}
    for path, named in [
        ("hide_names", "module:function"),
        ("no_such_module_here:f", "cannot be imported"),
        ("hide_names:nothing", "no function"),
    ]:
        with pytest.raises(InputError, match=named):
            load(path)
    with pytest.raises(InputError, match="expected a string back, got NoneType"):
        redacted("x", lambda text: None)  # type: ignore[arg-type,return-value]
