"""Debian's Chromium without a window, driven over a pipe by its own protocol (DevTools)."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARY = shutil.which("chromium")
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-pipe",
)


class Browser:
    """One tab. `events` are all that it told so far: requests, console messages, errors."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._number = commands, answers, 0
        self._left, self._session = b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def open(self, url: str, width: int, scheme: str = "light") -> None:
        """Load a page as on a screen of that width, from a fresh list of events."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, script: str) -> Any:
        """What an expression, or its promise, gives in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, file: Path) -> None:
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def requested(self) -> list[str]:
        """The addresses that the page asked for, without data that it holds itself."""
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def complaints(self) -> list[dict[str, Any]]:
        """Console messages, log entries and exceptions of any kind."""
        told = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.events if event.get("method") in told]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            data = os.read(self._answers, 1 << 20)
            assert data, "the browser has ended"
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def browser(folder: Path, options: Sequence[str] = ()) -> Iterator[Browser]:
    """A browser whose profile is in `folder`; ended afterwards."""
    their_commands, commands = os.pipe()
    answers, their_answers = os.pipe()
    moved = f'exec {BINARY} "$@" 3<&{their_commands} 4>&{their_answers}'  # the protocol's own descriptors
    command = ["bash", "-c", moved, "chromium", *_OPTIONS, f"--user-data-dir={folder}", *options]
    process = subprocess.Popen(
        command, pass_fds=[their_commands, their_answers], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for descriptor in (their_commands, their_answers):
        os.close(descriptor)
    try:
        yield Browser(commands, answers)
    finally:
        for descriptor in (commands, answers):
            os.close(descriptor)
        process.kill()
        process.wait()
