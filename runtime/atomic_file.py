"""Replaces a private file as a whole: it is the earlier one or the new one, whatever happens in between.

Knows nothing of what is written. A temporary sibling, `.{name}.{8 hexadecimal digits}.partial`, is filled, synced and
renamed. A lock on it says that its writer is alive: the system frees the lock when a process dies, so what a killed
writer left is found and removed by the next one. A process id in the name would say less: ids are used again, and
those of another container mean nothing here.
"""

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextmanager
def replaced_file(path: Path) -> Iterator[int]:
    """Yields a descriptor to write to; the file becomes `path`, of mode 0600, when the body ends.

    When the body raises, nothing of it is left and `path` is as it was. OSErrors pass as they are. A `path` that is a
    symbolic link is itself replaced; one with several names loses none but this.
    """
    _remove_abandoned(path)
    partial, descriptor = _create(path)
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
            if sys.platform != "win32":
                partial.replace(path)  # while it is locked: nobody may take it for abandoned
        finally:
            with contextlib.suppress(OSError):  # it is synced or given up by now
                os.close(descriptor)
        if sys.platform == "win32":
            partial.replace(path)  # an open file cannot be renamed there
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    with contextlib.suppress(OSError):  # it is there and whole, whether or not this file system can say so
        _sync_folder(path.parent)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes all of `data`, which is one-dimensional: the system may take it in parts."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _create(path: Path) -> tuple[Path, int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        descriptor = os.open(partial, flags, 0o600)
        try:
            is_held = _lock(descriptor)
        except OSError:  # a file system without locks: nobody can take it for abandoned either
            is_held = True
        # another writer that came by before the lock was taken has removed it
        if is_held and partial.exists():
            return partial, descriptor
        os.close(descriptor)
        partial.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.partial")
    with contextlib.suppress(OSError):  # a folder that may be written but not listed
        for other in path.parent.iterdir():
            if ours.fullmatch(other.name):
                with contextlib.suppress(OSError):
                    _remove_unless_locked(other)


def _remove_unless_locked(partial: Path) -> None:
    if sys.platform == "win32":
        partial.unlink()  # refused there while its writer has it open
        return
    descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if _lock(descriptor):
            partial.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return  # not possible there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
