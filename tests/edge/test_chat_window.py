"""The example window on a virtual display: it stays responsive during an answer, stops, closes, and tells errors."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tkinter")
pytestmark = pytest.mark.skipif(shutil.which("Xvfb") is None, reason="there is no Xvfb")

ROOT = Path(__file__).parents[2]
# The window as its module runs it, with a model that knows no end, and with somebody who clicks.
DRIVEN = """if True:
    import json, sys, time
    from edge import Runtime
    from edge.examples import chat_window

    load = Runtime.load
    def endless(*arguments, **options):
        runtime = load(*arguments, **options)
        runtime.manifest.generation["eos_token_ids"] = []
        return runtime
    Runtime.load = endless
    found = {}

    class Driven(chat_window.ChatWindow):
        def __init__(self, root, worker):
            super().__init__(root, worker)
            self.ticks, self.steps = [], self.script()
            self.condition = next(self.steps)
            self.tick()

        def tick(self):
            self.ticks.append(time.perf_counter())
            if self.condition():
                self.condition = next(self.steps, None)
            if self.condition is not None:
                self.root.after(5, self.tick)

        def shown(self):
            return self.text.get("1.0", "end")

        def script(self):
            can_send = lambda: self.send_button["state"] == "normal"
            failed = lambda: self.status.get() not in ("loading ...", "ready")
            yield lambda: can_send() or failed()
            if failed():
                found["status"] = self.status.get()
                yield from self.leave()
                return
            self.say("Hello")
            self.ticks.clear()
            yield can_send
            found["seconds"] = self.ticks[-1] - self.ticks[0]
            found["gap"] = max(after - before for before, after in zip(self.ticks, self.ticks[1:]))
            found["answer"], found["status"] = self.shown(), self.status.get()
            self.say("Again")
            self.stop_button.invoke()  # before there is a stream, mostly
            yield can_send
            found["stopped_early"] = self.status.get()
            self.say("And again")
            length = len(self.shown())
            yield lambda: len(self.shown()) > length + 20
            self.stop_button.invoke()
            stopped = time.perf_counter()
            yield can_send
            found["stop_seconds"], found["stopped"] = time.perf_counter() - stopped, self.status.get()
            self.say("Bye")
            length = len(self.shown())
            yield lambda: len(self.shown()) > length + 20
            yield from self.leave()

        def say(self, text):
            self.entry.insert(0, text)
            self.send_button.invoke()

        def leave(self):
            print(json.dumps(found), flush=True)
            self.root.tk.eval(self.root.protocol("WM_DELETE_WINDOW"))
            yield None

    chat_window.ChatWindow = Driven
    code = chat_window.main()
    print(json.dumps(code))
    sys.exit(code)
"""


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    """A display of a virtual screen, which looks for a free number itself."""
    reading, writing = os.pipe()
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", "800x600x24", "-nolisten", "tcp"]
    server = subprocess.Popen(command, pass_fds=[writing], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(writing)
    with os.fdopen(reading) as lines:
        number = lines.readline().strip()
    try:
        assert number, f"Xvfb ended with code {server.wait()}"
        yield f":{number}"
    finally:
        server.terminate()
        server.wait()


def drive(artifact: Path, display: str) -> dict[str, Any]:
    """What was found, and the exit code."""
    environment = os.environ | {"DISPLAY": display, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVEN, str(artifact)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    found, code = map(json.loads, result.stdout.splitlines())
    assert result.returncode == code == 0
    return dict(found)


def test_a_window_stays_responsive_and_stops(demo_artifact: Callable[..., Path], display: str) -> None:
    found = drive(demo_artifact(4), display)
    # an answer fills the context of 1,024 tokens, in some seconds; the window waits for a step's Python at most
    assert found["gap"] < found["seconds"] / 4
    assert found["answer"].startswith("Hello\n")
    assert len(found["answer"]) > 1000
    assert found["status"].startswith("length: 1")
    assert "tokens/s" in found["status"]
    assert found["stopped_early"].startswith("cancelled: ")
    assert found["stopped"].startswith("cancelled: ")
    assert found["stop_seconds"] < found["seconds"] / 2


def test_a_window_tells_why_nothing_is_loaded(tmp_path: Path, display: str) -> None:
    assert "manifest.json" in drive(tmp_path, display)["status"]
