"""A headless Firefox, driven by its own protocol (Marionette: JSON over a socket, the length before
each message), so that nothing has to be installed beside the browser."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

BROWSER = shutil.which("firefox") or shutil.which("firefox-esr")
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Escape": "\ue00c", "End": "\ue010"}
KEYS |= {"ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015"}
START = 120.0  # seconds for the first start of a browser
PREFS = {
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "toolkit.telemetry.reportingpolicy.firstRun": False,
    "ui.prefersReducedMotion": 1,
}


class Firefox:
    """One browser with one page; `with Firefox(folder) as fox`."""

    def __init__(self, profile: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        lines = [f"user_pref({json.dumps(k)}, {json.dumps(v)});" for k, v in PREFS.items()]
        (profile / "user.js").write_text(
            "\n".join([*lines, f'user_pref("marionette.port", {port});'])
        )
        command = [BROWSER, "--headless", "--marionette", "--remote-allow-system-access"]
        command += ["--no-remote", "--profile", str(profile)]
        with (profile / "said.txt").open("w") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        self.number, end = 0, time.monotonic() + START
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", port), timeout=START)
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.process.kill()
                    raise RuntimeError((profile / "said.txt").read_text()) from None
                time.sleep(0.05)
        self.file = self.socket.makefile("rb")
        self._read()
        about = self("WebDriver:NewSession")["capabilities"]
        self.version = about["browserVersion"]

    def __enter__(self) -> Firefox:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            self("Marionette:Quit", flags=["eForceQuit"])
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.socket.close()

    def __call__(self, name: str, **values: Any) -> Any:
        self.number += 1
        message = json.dumps([0, self.number, name, values]).encode()
        self.socket.sendall(str(len(message)).encode() + b":" + message)
        _, number, error, found = self._read()
        assert number == self.number
        if error:
            raise RuntimeError(f"{name}: {error['error']}: {error['message']}")
        return found

    def _read(self) -> Any:
        size = b""
        while (byte := self.file.read(1)) != b":":
            if not byte:
                raise ValueError("Firefox has closed its door")
            size += byte
        return json.loads(self.file.read(int(size)))

    def goto(self, url: str) -> None:
        self("WebDriver:Navigate", url=url)

    def js(self, script: str, *arguments: Any) -> Any:
        """What a function body gives in the page."""
        return self("WebDriver:ExecuteScript", script=script, args=list(arguments))["value"]

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return self.js(script, selector)

    def until(self, script: str) -> None:
        for _ in range(600):
            if self.js(f"return {script}"):
                return
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}")

    def press(self, *names: str) -> None:
        """Keys, one after the other, by a real keyboard's events."""
        keys = [KEYS.get(name, name) for name in names]
        pressed = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        self("WebDriver:PerformActions", actions=[{"type": "key", "id": "k", "actions": pressed}])

    def point(self, x: float, y: float) -> None:
        """The pointer to a place of the window."""
        move = {"type": "pointerMove", "x": round(x), "y": round(y), "origin": "viewport"}
        pointer = {"type": "pointer", "id": "m", "actions": [move], "parameters": {}}
        self("WebDriver:PerformActions", actions=[pointer])

    def picture(self) -> bytes:
        """A PNG of the window."""
        return base64.b64decode(self("WebDriver:TakeScreenshot", full=False)["value"])

    def inside(self, script: str, *arguments: Any) -> Any:
        """What a function body gives in the browser itself."""
        self("Marionette:SetContext", value="chrome")
        try:
            return self(
                "WebDriver:ExecuteScript", script=script, args=list(arguments), sandbox="system"
            )["value"]
        finally:
            self("Marionette:SetContext", value="content")

    def console(self) -> list[str]:
        """Every error and warning so far that came from a page, policy violations among them."""
        script = (
            "return Services.console.getMessageArray()"
            ".filter((m) => m instanceof Ci.nsIScriptError)"
            ".filter((m) => /^(file|http|data)/.test(m.sourceName))"
            ".map((m) => m.sourceName + ': ' + m.errorMessage)"
        )
        return self.inside(script)

    def dark(self, on: bool) -> None:
        """What the system is said to prefer."""
        name = "layout.css.prefers-color-scheme.content-override"
        self.inside("Services.prefs.setIntPref(arguments[0], arguments[1])", name, 0 if on else 1)
