"""Chromium without a window, spoken to over two pipes in its own protocol."""

from __future__ import annotations

import base64
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vdiff.errors import VdiffError
from vdiff.web.export import npm_package

AXE = "axe-core@4.14.1"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAM = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
TROUBLE = ("Runtime.exceptionThrown", "Log.entryAdded")


class Tab:
    """A page, and all that happened in it.

    Attributes:
        requests: addresses that were asked for.
        trouble: exceptions, errors and warnings, in words.
    """

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back = to, back
        self.number, self.pending, self.session = 0, b"", ""
        self.requests: list[str] = []
        self.trouble: list[str] = []
        self.seen: set[str] = set()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Ask and wait for the answer; what happens meanwhile is noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": values}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self._note(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.pending:
            more = os.read(self.back, 2**16)
            assert more, "the browser is gone"
            self.pending += more
        line, _, self.pending = self.pending.partition(b"\0")
        return dict(json.loads(line))

    def _note(self, event: dict[str, Any]) -> None:
        method, values = str(event.get("method", "")), event.get("params", {})
        self.seen.add(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        if method in TROUBLE:
            self.trouble.append(json.dumps(values)[:500])
        if method == "Runtime.consoleAPICalled" and values.get("type") in ("error", "warning", "assert"):
            self.trouble.append(json.dumps(values)[:500])

    def open(self, page: Path | str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Show a file or an address in a window of that size, in light or dark colours."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.seen.discard("Page.loadEventFired")
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while "Page.loadEventFired" not in self.seen:
            self._note(self._next())

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        told = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def press(self, key: str) -> None:
        """Press and let go a key."""
        code = {"Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Tab": 9}[key]
        values: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **values, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **values)

    def save(self, path: Path, *, whole: bool = True) -> None:
        """A picture of the window, or of the whole page."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(told["data"]))


@functools.cache
def _axe() -> tuple[str, str]:
    """The program of axe-core, of the file VDIFF_AXE or downloaded by npm; and why it cannot be had."""
    if path := os.environ.get("VDIFF_AXE"):
        return Path(path).read_text(encoding="utf-8"), ""
    try:
        with npm_package(AXE) as package:
            return (package / "axe.min.js").read_text(encoding="utf-8"), ""
    except VdiffError as error:
        return "", error.cause


def check_accessible(tab: Tab) -> None:
    """Axe-core finds no serious violation in the page that is shown; skips the test if axe-core cannot be had."""
    program, missing = _axe()
    if missing:
        pytest.skip(missing)
    tab.run(program + "; true")
    found = tab.run("axe.run().then(all => all.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html)]))")
    assert [each for each in found if each[0] in ("serious", "critical")] == []


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A tab of a browser of its own, which keeps what it keeps in `folder`."""
    assert PROGRAM is not None
    theirs, to = os.pipe()
    back, mine = os.pipe()

    def hand_over() -> None:  # the protocol wants descriptors 3 and 4
        first, second = os.dup(theirs), os.dup(mine)
        os.dup2(first, 3)
        os.dup2(second, 4)

    command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-dev-shm-usage", f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        command, close_fds=False, preexec_fn=hand_over, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(theirs)
    os.close(mine)
    try:
        yield Tab(to, back)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(back)
