"""`reasonrl report`, `audit`, `replay` and `doctor`: look at a run, and at the machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reasonrl.commands import waiting
from reasonrl.records import InputError


def add(commands) -> None:
    command = commands.add_parser("report", help="one HTML page of a run, or of several")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    command.add_argument("--out", type=Path, help="file to write (default: RUN/report.html)")
    command.add_argument("--open", action="store_true", help="show it in the browser")
    command.add_argument("--serve", action="store_true", help="follow a live run (this machine)")
    command.add_argument("--port", type=int, default=8090)
    command.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    command.set_defaults(run=_report)

    command = commands.add_parser("audit", help="monitors for reward hacking; status 1 on an alarm")
    command.add_argument("run_folder", type=Path, metavar="RUN")
    waiting.add(command)
    command.set_defaults(run=_audit)

    command = commands.add_parser("replay", help="a gradient that was not finite, made again")
    command.add_argument("run_folder", type=Path, metavar="RUN")
    waiting.add(command)
    command.set_defaults(run=_replay)

    command = commands.add_parser("doctor", help="what is installed, tried; status 1 if broken")
    waiting.add(command)
    command.set_defaults(run=_doctor)


def _report(options: argparse.Namespace) -> int:
    import webbrowser

    from reasonrl import progress
    from reasonrl.report import serve, write

    if options.serve:
        if options.out:
            raise InputError("--out: --serve writes no file")
        server = serve(options.runs, options.port)
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        print(f"{address} (Ctrl-C ends it)", flush=True)
        if options.open:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
        finally:
            server.server_close()
    with progress.shown(options.quiet):
        page = write(options.runs, options.out)
    print(page)
    if options.open:
        webbrowser.open(page.resolve().as_uri())
    return 0


def _replay(options: argparse.Namespace) -> int:
    import json

    from reasonrl.log import json_row
    from reasonrl.replay import again

    print(json.dumps(json_row(again(options.run_folder))))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from reasonrl.doctor import examine, verdict

    lines = examine()
    width = max(len(line.name) for line in lines)
    for line in lines:
        print(f"{line.name:{width}}  {line.state:7}  {line.text}")
    print(verdict(lines))
    return int(any(line.state == "broken" for line in lines))


def _audit(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from reasonrl.audit import audit

    found = audit(options.run_folder)
    table = Table("monitor", "verdict", "what was seen")
    marks = {"ok": "green", "alarm": "bold red", "not measured": "dim"}
    for finding in found:
        seen = "\n".join([finding.text, *finding.examples])
        table.add_row(finding.name, f"[{marks[finding.verdict]}]{finding.verdict}[/]", _plain(seen))
    Console(file=sys.stdout).print(table)
    alarms = [finding.name for finding in found if finding.verdict == "alarm"]
    print(f"alarm: {', '.join(alarms)}" if alarms else "no alarm")
    return 1 if alarms else 0


def _plain(text: str):
    """Text of a model, shown as it is: no markup, no terminal control."""
    from rich.text import Text

    return Text("".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in text))
