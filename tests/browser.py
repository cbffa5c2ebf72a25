"""Headless Chromium, spoken to in the DevTools protocol over two pipes: no library, no port."""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Message = dict[str, Any]


class Tab:
    """A page in a browser, and all that was heard of it.

    Args:
        send (`int`): file descriptor to write commands to; each is JSON, ended by a zero byte.
        receive (`int`): file descriptor to read answers and events from.
    """

    def __init__(self, send: int, receive: int):
        self._send, self._receive = send, os.fdopen(receive, "rb")
        self._sent, self._session = 0, None
        self.events: list[Message] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> Message:
        """Returns the result of a command; events that come before it are kept."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._sent:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> Message:
        read = bytearray()
        while (byte := self._receive.read(1)) != b"\0":
            assert byte, "the browser has ended"
            read += byte
        return json.loads(read)

    def open(self, page: Path, width: int, height: int = 900, scheme: str = "light") -> None:
        """Shows a file in a window of this width, in pixels, to a reader who prefers this colour scheme."""
        self.events.clear()
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self("Emulation.setDeviceMetricsOverride", **metrics)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        """Returns the value of an expression in JavaScript."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press_tab(self) -> None:
        """Goes to the next element that the keyboard reaches."""
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)

    def screenshot(self, path: Path) -> None:
        """Writes the whole page as PNG."""
        taken = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def headless(program: str, profile: Path) -> Iterator[Tab]:
    """Starts a browser with one tab.

    Args:
        program (`str`): Chromium.
        profile (`Path`): an empty folder for what it keeps.
    """
    (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()

    def give() -> None:  # the browser reads from 3 and writes to 4
        os.dup2(theirs_in, 3)
        os.dup2(theirs_out, 4)

    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    command = [program, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, preexec_fn=give, pass_fds=(3, 4), **quiet)
    for theirs in (theirs_in, theirs_out):
        os.close(theirs)
    try:
        yield Tab(ours_out, ours_in)
    finally:
        process.terminate()
        process.wait()
        os.close(ours_out)
