"""`edge-serve` as a command: what it refuses to begin with, and how it ends."""

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from edge import serve_cli
from edge.serve.guard import is_loopback
from tests.commands import Capture, assert_fails, run
from tests.serving import started

BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "open to all": (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask; set a key with EDGE_API_KEY"),
    "open to all 6": (["--host", "::"], "--host :: lets other machines ask"),
    "empty key": (["--api-key", ""], "the API key must be 1 to 256 printable ASCII characters"),
    "key with space": (["--api-key", "a b"], "the API key must be 1 to 256 printable ASCII characters"),
    "queue": (["--queue", "-1"], "--queue is -1, expected an integer >= 0"),
    "max-body": (["--max-body", "0"], "--max-body is 0, expected an integer >= 1"),
    "port": (["--port", "70000"], "--port is 70000, expected 0 to 65535"),
    "no artifact": (["--port", "0"], "none: .*"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_cannot_be_served(capfd: Capture, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.delenv(serve_cli.KEY_VARIABLE, raising=False)
    options, match = BAD_OPTIONS[case]
    assert_fails(serve_cli.main, ["none", *options], f"^edge-serve: {match}", capfd)


def test_a_port_that_is_taken(capfd: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        match = f"^edge-serve: 127.0.0.1:{port}: Address already in use; choose another --host or --port"
        assert_fails(serve_cli.main, ["none", "--port", port], match, capfd)


def test_help_is_no_fault(capfd: Capture) -> None:
    assert run(serve_cli.main, ["--help"]) == 0
    assert capfd.readouterr().out.startswith("usage: edge-serve")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("", False), ("example.org", False)],
)
def test_names_of_this_machine(name: str, expected: bool) -> None:
    assert is_loopback(name) is expected


@pytest.mark.parametrize(("number", "code", "line"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_ends_it_in_the_midst_of_a_stream(
    demo_artifact: Callable[..., Path], number: str, code: int, line: str
) -> None:
    with started(demo_artifact(4), key="secret") as (process, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        body = {"prompt": "def ", "max_tokens": 1000, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as response:
            pieces = response.iter_text()
            next(pieces)
            process.send_signal(getattr(signal, number))
            sent = time.monotonic()
            text = "".join(pieces)
        assert "the server is shutting down" in text or "[DONE]" in text
        assert process.wait(10) == code
        assert time.monotonic() - sent < 3
        assert process.stderr is not None
        assert process.stderr.read() == f"edge-serve: {line}\n"
