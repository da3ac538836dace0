"""Writes an artifact beside its destination and renames it into place: it appears whole or not at all.

Knows nothing of what is written. `.{name}.partial`, a sibling of the destination and so on its file system, holds
a marker file and the folder that is filled. The marker says that the folder is ours to delete, and its lock that an
export is at work: the system frees the lock when a process dies, so what a killed export left is found and removed.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from runtime.errors import BusyDestinationError, DestinationError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

MARKER = "gemma-edge-export.lock"


@contextmanager
def staged_folder(destination: Path, *, sources: Sequence[Path]) -> Iterator[Path]:
    """Yields an empty folder that becomes `destination` when the body ends, and vanishes when it raises.

    An existing empty folder is replaced. OSErrors of the body and of the disk (no space) pass as they are.

    Raises:
        DestinationError: `destination` is in use, holds something, cannot be written, or overlaps one of `sources`.
    """
    destination = destination.resolve()
    _check_overlap(destination, sources)
    _check_vacant(destination)
    partial = destination.with_name(f".{destination.name}.partial")
    with _locked(partial):
        _check_vacant(destination)
        folder = partial / "artifact"
        if folder.exists():  # of an export that was killed
            shutil.rmtree(folder)
        try:
            folder.mkdir()
            yield folder
            _check_vacant(destination)
            _publish(folder, destination)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Within, SIGTERM raises SystemExit(143) in the main thread, so that what was begun is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not break the clean-up
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def _check_overlap(destination: Path, sources: Sequence[Path]) -> None:
    for source in (source.resolve() for source in sources):
        inside = _within(destination, source)
        if inside and _within(source, destination):
            relation = "is"
        elif inside or _within(source, destination):
            relation = "lies inside" if inside else "contains"
        else:
            continue
        raise DestinationError(
            f"destination {destination} {relation} the source {source}; choose a folder apart from it"
        )


def _within(path: Path, folder: Path) -> bool:
    # by identity, not by name: a file system may ignore case or be mounted twice
    return folder.exists() and any(above.exists() and above.samefile(folder) for above in (path, *path.parents))


def _check_vacant(destination: Path) -> None:
    if not destination.parent.is_dir():
        raise DestinationError(f"{destination.parent} is not a folder; create it or choose another destination")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise DestinationError(f"destination {destination} is a file; choose a folder")
    if any(destination.iterdir()):
        raise DestinationError(f"destination {destination} is not empty; remove it or choose another")
    if os.path.ismount(destination):
        raise DestinationError(f"destination {destination} is a mount point; choose a folder inside it")


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    descriptor = _open_marker(partial)
    try:
        _lock(descriptor, partial)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        yield
    finally:
        # The marker goes before the lock does: afterwards it may be another export's. Windows cannot delete an open
        # file, and so not that of another export either.
        if sys.platform == "win32":
            os.close(descriptor)
            _drop(partial)
        else:
            _drop(partial)
            os.close(descriptor)


def _open_marker(partial: Path) -> int:
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise DestinationError(f"{partial} exists and is not an export's; move it away")
    try:
        partial.mkdir(exist_ok=True)
        names = {path.name for path in partial.iterdir()}
        if names and MARKER not in names:
            raise DestinationError(f"{partial} exists and is not an export's; move it away")
        return os.open(partial / MARKER, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.rmdir()
        raise DestinationError(
            f"cannot create {partial}: {error.strerror}; choose a destination you can write"
        ) from error


def _lock(descriptor: int, partial: Path) -> None:
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # an export that ended meanwhile took the marker away, and the lock on it is worth nothing
        held = os.path.samestat(os.fstat(descriptor), (partial / MARKER).stat())
    except (BlockingIOError, PermissionError, FileNotFoundError):
        held = False
    if not held:
        raise BusyDestinationError(f"another export holds {partial}; wait until it ends or choose another destination")


def _drop(partial: Path) -> None:
    with contextlib.suppress(OSError):
        if {path.name for path in partial.iterdir()} == {MARKER}:
            (partial / MARKER).unlink()
            partial.rmdir()


def _publish(folder: Path, destination: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)
    if sys.platform == "win32" and destination.exists():
        destination.rmdir()  # elsewhere an empty folder is replaced
    folder.replace(destination)
    with contextlib.suppress(OSError):  # it is there and whole, whether or not this file system can say so
        _sync(destination.parent)


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # not possible there
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
