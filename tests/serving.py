"""A server of the demo artifact in a thread, and a scripted runtime for what the demo model does not do by itself."""

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from openai import OpenAI
from starlette.testclient import TestClient

from edge import Runtime
from edge.serve.app import ServeOptions, make_app
from edge.serve.listening import make_server
from edge.serve_cli import bound_socket
from runtime.response import Piece, ResponseFormat
from runtime.stats import StatsRecorder
from runtime.stream import Generation
from runtime.tool_calls import ToolCall

ROOT = Path(__file__).parents[1]
NO_FORMAT = ResponseFormat(7, 8, 11, 12, 13)


@dataclass(slots=True)
class Served:
    """A running server."""

    runtime: Runtime
    port: int
    options: ServeOptions
    desk: Any
    _loops: list[asyncio.AbstractEventLoop]

    def call(self, function: Callable[[], Any]) -> None:
        """Calls a function in the server's event loop."""
        self._loops[0].call_soon_threadsafe(function)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60, **options)


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Served]:
    """A server on a free port; behind it nothing of it runs."""
    with Runtime.load(folder, profile="laptop") as runtime, bound_socket("127.0.0.1", 0) as bound:
        serve_options = ServeOptions(model=folder.name, **options)
        app = make_app(runtime, serve_options)
        server, loops = make_server(app), []

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve([bound])

        thread = threading.Thread(target=asyncio.run, args=(serve(),), name="serving")
        thread.start()
        try:
            while not server.started:
                time.sleep(0.002)
            yield Served(runtime, bound.getsockname()[1], serve_options, app.state.desk, loops)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@contextmanager
def started(artifact: Path, *options: str, key: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "edge.serve_cli", str(artifact), "--port", "0", *options]
    environment = os.environ | {"EDGE_API_KEY": key}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)  # type: ignore[call-overload]
    try:
        line = process.stdout.readline()
        match = re.fullmatch(r"bits4: (http://127\.0\.0\.1:\d+), context of [\d,]+ tokens\n", line)
        assert match, line or process.stderr.read()
        yield process, match[1]
    finally:
        process.kill()
        process.communicate()


def raw_request(port: int, body: bytes, path: str = "/v1/chat/completions", headers: str = "") -> bytes:
    """A POST as bytes, which may be closed at any time."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


@dataclass(slots=True)
class Script:
    """A runtime whose answers are written down: pieces, then the generation or an error."""

    pieces: Sequence[tuple[str, str]] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"
    error: Exception | None = None
    wait: Callable[[], Any] = lambda: None
    calls: list[dict[str, Any]] = field(default_factory=list)
    context_tokens: int = 1024

    @property
    def prompts(self) -> Any:
        return self

    @property
    def response_format(self) -> ResponseFormat:
        return NO_FORMAT

    def stream(self, prompt: Any, **options: Any) -> "ScriptedStream":
        self.calls.append({"prompt": prompt, **options})
        return ScriptedStream(self)

    def stream_chat(self, messages: Any, **options: Any) -> "ScriptedStream":
        self.calls.append({"messages": messages, **options})
        return ScriptedStream(self)

    def test_client(self, **options: Any) -> TestClient:
        app = make_app(self, ServeOptions(model="scripted", **options))  # type: ignore[arg-type]
        return TestClient(app, base_url="http://localhost", headers={"content-type": "application/json"})


class ScriptedStream:
    def __init__(self, script: Script) -> None:
        self._script = script
        self.generation: Generation | None = None

    async def __aiter__(self) -> AsyncIterator[Piece]:
        script = self._script
        for number, (kind, text) in enumerate(script.pieces, 1):
            await asyncio.to_thread(script.wait)
            yield Piece(text, kind, num_tokens=number)  # type: ignore[arg-type]
        if script.error is not None:
            raise script.error
        texts = {name: "".join(text for kind, text in script.pieces if kind == name) for name in ("text", "thinking")}
        self.generation = Generation(
            text=texts["text"],
            thinking=texts["thinking"],
            token_ids=[7, 100, 101, 8, 102],
            finish_reason=script.finish_reason,  # type: ignore[arg-type]
            stats=replace(StatsRecorder(9).finish(5), num_reused_tokens=4, num_drafted=3, num_accepted=2),
            tool_calls=script.tool_calls,
        )

    def close(self) -> None:
        pass
