"""A headless Chromium, driven over its DevTools protocol through two pipes."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass(slots=True)
class Browser:
    """One page."""

    commands: IO[bytes]
    replies: IO[bytes]
    session: str = ""
    number: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    def do(self, method: str, **params: Any) -> Any:
        """A command's result."""
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        self.commands.write(json.dumps({"id": self.number, "method": method, "params": params, **session}).encode())
        self.commands.write(b"\0")
        self.commands.flush()
        while (reply := self._reply()).get("id") != self.number:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def run(self, script: str) -> Any:
        """The value of a script."""
        result = self.do("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def wait(self, condition: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def type(self, text: str) -> None:
        self.do("Input.insertText", text=text)

    def press_enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, text="\r")

    def picture(self, scheme: str) -> bytes:
        """A screenshot as PNG in a colour scheme, "light" or "dark"."""
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        return base64.b64decode(self.do("Page.captureScreenshot")["data"])

    def _reply(self) -> dict[str, Any]:
        raw = bytearray()
        while (byte := self.replies.read(1)) != b"\0":
            assert byte, "the browser has ended"
            raw += byte
        reply: dict[str, Any] = json.loads(raw)
        return reply


@contextmanager
def open_browser(width: int = 900, height: int = 700) -> Iterator[Browser]:
    """A browser with an empty page, which ends behind the block."""
    assert CHROMIUM is not None
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        flags = f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={folder}/user"
        command = f"exec {CHROMIUM} {flags} --window-size={width},{height} about:blank 3<&{their_in} 4>&{their_out}"
        process = subprocess.Popen(["bash", "-c", command], pass_fds=(their_in, their_out), stderr=subprocess.DEVNULL)
        os.close(their_in)
        os.close(their_out)
        with os.fdopen(our_out, "wb") as commands, os.fdopen(our_in, "rb") as replies:
            try:
                browser = Browser(commands, replies)
                page = browser.do("Target.createTarget", url="about:blank")["targetId"]
                browser.session = browser.do("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
                size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
                browser.do("Emulation.setDeviceMetricsOverride", **size)
                browser.do("Page.enable")
                browser.do("Log.enable")
                yield browser
            finally:
                process.kill()
                process.wait()
