"""The file that keeps a conversation: a JSON header and named arrays of bytes. Knows nothing of what they mean.

    8 bytes   magic
    8 bytes   length of the header, little-endian
    32 bytes  SHA-256 of the header
    header    JSON: version, SHA-256 of all that follows, the caller's "content", and of each array name and shape
    arrays    one behind the other in the header's order, nothing between them

A checksum tells damage, not malice: who reads a file checks what is in it.
"""

import contextlib
import glob
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from runtime.errors import SessionError

MAGIC = b"EDGECHAT"
VERSION = 1
PREFIX_BYTES = 48
MAX_HEADER_BYTES = 64 << 20
MAX_NAME_CHARS = 200

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SessionFile:
    """What a file holds; the arrays are views of one buffer."""

    header: dict[str, Any]
    arrays: dict[str, Bytes]


def write_session(path: Path, header: Mapping[str, Any], arrays: Mapping[str, Bytes]) -> None:
    """Writes a file that only its owner can read, whole or not at all; one that was there is replaced.

    Raises:
        SessionError: it cannot be written; what was there is as before.
    """
    entries = [{"name": name, "shape": list(array.shape)} for name, array in arrays.items()]
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).data.cast("B"))
    text = json.dumps(
        {"version": VERSION, "arrays_sha256": digest.hexdigest(), "arrays": entries, "content": dict(header)},
        allow_nan=False,
    ).encode()
    prefix = MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest()
    destination = path.resolve()  # through a link, which stays one
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        _drop_stale(destination)
        with _created(partial) as file:
            _write_all(file, memoryview(prefix + text))
            for array in arrays.values():
                _write_all(file, np.ascontiguousarray(array).data.cast("B"))
            os.fsync(file.fileno())
        partial.replace(destination)
        _sync_folder(destination.parent)
    except OSError as error:
        raise SessionError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def read_session(path: Path) -> SessionFile:
    """Reads a file and checks every byte of it.

    Raises:
        SessionError: it is no session file, of another version, or damaged.
    """
    try:
        with _opened(path) as file:
            header, entries, num_bytes = _read_header(path, file)
            buffer = np.empty(num_bytes, np.uint8)
            if _read_into(file, buffer) != num_bytes:
                raise _damaged(path, "it ends too early")
    except OSError as error:
        reason = error.strerror or error
        raise SessionError(f"{path}: cannot be read: {reason}; give a file of Conversation.save") from error
    if hashlib.sha256(buffer.data).hexdigest() != header["arrays_sha256"]:
        raise _damaged(path, "its KV rows have another checksum")
    arrays, start = {}, 0
    for name, shape in entries:
        stop = start + int(np.prod(shape))
        arrays[name] = buffer[start:stop].reshape(shape)
        start = stop
    return SessionFile(header["content"], arrays)


def _opened(path: Path) -> FileIO:
    # a FIFO or a device would block, or never end
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise SessionError(f"{path}: not a file; give a file of Conversation.save")
    return FileIO(path)


def _read_header(path: Path, file: FileIO) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...]]], int]:
    """The header, names and shapes of the arrays, and their bytes."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(PREFIX_BYTES)
    if len(prefix) < PREFIX_BYTES or prefix[:8] != MAGIC:
        raise SessionError(f"{path}: not a session file; give a file of Conversation.save")
    num_bytes = int.from_bytes(prefix[8:16], "little")
    if num_bytes > min(MAX_HEADER_BYTES, size - PREFIX_BYTES):
        raise _damaged(path, f"its header is said to have {num_bytes:,} bytes, the file has {size:,}")
    text = file.read(num_bytes)
    if hashlib.sha256(text).digest() != prefix[16:]:
        raise _damaged(path, "its header has another checksum")
    try:
        header = json.loads(text)
        if header["version"] != VERSION:
            raise SessionError(f"{path}: written by another version of gemma-edge; start a new conversation")
        entries = [(_name(entry["name"]), _shape(entry["shape"])) for entry in header["arrays"]]
        is_valid = isinstance(header["content"], dict) and len(dict(entries)) == len(entries)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, SessionError):
            raise
        raise _damaged(path, f"its header is not one: {error}") from error
    expected = sum(_num_bytes(shape) for _, shape in entries)
    found = size - PREFIX_BYTES - num_bytes
    if not is_valid or expected != found:
        raise _damaged(path, f"its arrays have {found:,} bytes, by its header {expected:,}")
    return header, entries, expected


def _name(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME_CHARS:
        raise ValueError(f"an array's name is {value!r:.40}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) not in (1, 2):
        raise ValueError(f"a shape is {value!r:.40}")
    if any(type(size) is not int or not 0 <= size < 1 << 48 for size in value):
        raise ValueError(f"a shape is {value!r:.40}")
    return tuple(value)


def _num_bytes(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


def _damaged(path: Path, reason: str) -> SessionError:
    return SessionError(f"{path}: the session file is damaged: {reason}; use another copy, or start a new conversation")


def _created(partial: Path) -> FileIO:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return FileIO(os.open(partial, flags, 0o600), "r+")


def _write_all(file: FileIO, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]


def _read_into(file: FileIO, buffer: Bytes) -> int:
    view, num_read = buffer.data, 0
    while num_read < len(view) and (num_new := file.readinto(view[num_read:])):
        num_read += num_new
    return num_read


def _drop_stale(destination: Path) -> None:
    """Removes what killed saves of this file left: those whose process is gone, or was this one."""
    for left in destination.parent.glob(f".{glob.escape(destination.name)}.*.partial"):
        process = left.name.removesuffix(".partial").rpartition(".")[2]
        if process.isdigit() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # not possible there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
