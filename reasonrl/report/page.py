"""The page itself: style, script and data in one file, allowed to run nothing but that script.

The data stands in a script element that holds JSON with every `<`, `>` and `&` escaped, the page
shows it as text only, and a content security policy names the one script by its hash: whatever a
model writes into a completion, nothing of it can run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reasonrl import __version__
from reasonrl.log import replace_file
from reasonrl.records import InputError
from reasonrl.report.gather import embedded, gather

HERE = Path(__file__).parent
SCRIPTS = ("basics.js", "curves.js", "credit.js", "page.js")  # one script, in this order


def write(runs: Sequence[str | Path], out: Path | None = None) -> Path:
    """The page of one run, or of several side by side, in `out` (default: RUN/report.html)."""
    target = out or Path(runs[0]) / "report.html"
    data = page(gather(runs)).encode()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, data)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror}); name another file with --out"
        ) from None
    return target


def page(data: dict[str, Any], live: bool = False) -> str:
    """The HTML text; live: it asks its server for news."""
    script = "".join((HERE / name).read_text("utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    source = "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline';"
        f" img-src data:; connect-src {source}; base-uri 'none'; form-action 'none'"
    )
    values = {
        "policy": policy,
        "style": (HERE / "page.css").read_text("utf-8"),
        "script": script,
        "data": embedded(data | {"version": __version__, "live": live}),
    }
    text = (HERE / "page.html").read_text("utf-8")
    for name, value in values.items():
        text = text.replace(f"<!--{name}-->", value, 1)
    return text
