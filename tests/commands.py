"""A command line run in this process, and what every failure of one must look like."""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Command = Callable[[Sequence[str]], int]
Capture = pytest.CaptureFixture[str]


def run(command: Command, arguments: Sequence[object]) -> int:
    """The exit code, whether it was returned or raised."""
    try:
        return command([str(argument) for argument in arguments])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def assert_fails(command: Command, arguments: Sequence[object], match: str, capfd: Capture) -> None:
    """Exit code 1, nothing on standard output, one line on standard error: of native libraries too."""
    capfd.readouterr()
    code = run(command, arguments)
    out, err = capfd.readouterr()
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert len(err) < 2200
    assert re.search(match, err), err


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder with the digest of what it holds, "" for what is no file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }
