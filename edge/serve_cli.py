"""`edge-serve`: serves an artifact over HTTP with OpenAI's API, and a chat page."""

import argparse
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from edge.command import CommandParser, run_command
from profiles import available_profiles
from runtime.engine import Runtime
from runtime.errors import EdgeError, RequestError
from runtime.staging import terminate_as_interrupt
from runtime.turns import ContextPolicy

NEEDED = ("starlette", "uvicorn")
KEY_VARIABLE = "EDGE_API_KEY"
MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command("edge-serve", lambda: _serve(options))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="edge-serve", description="Serve an edge artifact over HTTP with OpenAI's API.")
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder made by edge-export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one (default: %(default)s)")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"what clients must send (default: the environment's {KEY_VARIABLE}, if set)"
    )
    parser.add_argument(
        "--queue", type=int, default=16, metavar="N", help="requests that may wait at most (default: %(default)s)"
    )
    parser.add_argument(
        "--max-body", type=int, default=4 * MIB, metavar="BYTES", help="of a request at most (default: %(default)s)"
    )
    parser.add_argument("--profile", default="laptop", help=f"{', '.join(available_profiles())} or a TOML file")
    parser.add_argument("--memory-budget", metavar="BYTES", help='such as "2 GiB" (default: the profile\'s)')
    parser.add_argument(
        "--context-policy",
        choices=get_args(ContextPolicy),
        default="stop",
        help="where the context is full: stop (default), or slide, which drops the oldest turns and goes on",
    )
    return parser


def _serve(options: argparse.Namespace) -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise EdgeError(f"{', '.join(missing)} not installed; run: pip install 'gemma-edge[serve]'")
    from edge.serve.guard import check_access

    api_key = os.environ.get(KEY_VARIABLE) or None if options.api_key is None else options.api_key
    check_access(options.host, api_key)
    for name, value, least in (("--queue", options.queue, 0), ("--max-body", options.max_body, 1)):
        if value < least:
            raise RequestError(f"{name} is {value}, expected an integer >= {least}")
    with (
        terminate_as_interrupt(),
        bound_socket(options.host, options.port) as bound,
        Runtime.load(options.artifact, profile=options.profile, memory_budget=options.memory_budget) as runtime,
    ):
        _run(runtime, bound, options, api_key)


def _run(runtime: Runtime, bound: socket.socket, options: argparse.Namespace, api_key: str | None) -> None:
    from edge.serve.app import ServeOptions, make_app
    from edge.serve.guard import is_loopback
    from edge.serve.listening import make_server

    model = Path(options.artifact).resolve().name
    serve_options = ServeOptions(
        model=model,
        api_key=api_key,
        is_loopback=is_loopback(options.host),
        max_waiting=options.queue,
        max_body_bytes=options.max_body,
        context_policy=options.context_policy,
    )
    server = make_server(make_app(runtime, serve_options))
    bound.listen()  # who reads the line below can connect
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"{model}: http://{shown}:{port}, context of {runtime.context_tokens:,} tokens", flush=True)
    server.run([bound])


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which does not listen yet; raises RequestError where it cannot be bound."""
    if not 0 <= port <= 65535:
        raise RequestError(f"--port is {port}, expected 0 to 65535")
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        if os.name == "posix":  # on Windows it would let two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        if bound is not None:
            bound.close()
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{host}:{port}: {reason}; choose another --host or --port") from error
    return bound


if __name__ == "__main__":
    sys.exit(main())
