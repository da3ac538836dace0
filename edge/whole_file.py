"""Writes a file whole or not at all, and tells before long work whether it can be written."""

import contextlib
import os
import tempfile
from pathlib import Path

from runtime.errors import EdgeError


def check_destination(path: Path, option: str) -> None:
    """Told before minutes of measuring, not behind them.

    Raises:
        EdgeError: names the option and the path, which is a folder or lies in none.
    """
    if path.is_dir():
        raise EdgeError(f"{option} {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise EdgeError(f"{option} {path}: {path.parent} is not a folder; create it or choose another")


def write_whole(path: Path, text: str, option: str) -> None:
    """Replaces the file whole; what is no regular file, such as a pipe, is written to.

    Raises:
        EdgeError: it cannot be written; what was there before still is.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        finally:
            with contextlib.suppress(OSError):
                Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise EdgeError(f"{option} {path}: {error.strerror or error}; the figures above are all there are") from error
