"""The file that keeps a conversation: a JSON header and named arrays of bytes, whole and undamaged or refused.

Knows nothing of conversations or KV caches. The file is, without a gap that is not zero:

- 64 bytes: magic, format version, size of the JSON text (both little-endian, 64 bits), and the SHA-256 of the 32 bytes
  before it and the JSON text, so a flipped bit of either does not go unseen;
- the JSON text, filled up with spaces so that it ends at a multiple of 64 bytes: `header` as it was given, and
  `arrays`, each with name, shape, offset from the end of the text, size and SHA-256;
- the arrays in that order, each filled up with zeros to a multiple of 64 bytes.

Source: the layout follows safetensors (huggingface/safetensors, README.md, "Format"), which has no digests.
"""

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from profiles.errors import shown
from runtime.atomic_file import replaced_file, write_all
from runtime.errors import SessionError
from runtime.strict_json import JsonError, json_values

FORMAT_VERSION = 1
MAGIC = b"gemma-edge-conv\n"
MAX_HEADER_BYTES = 64 * 2**20

_WAY_OUT = "restore a copy of it or start a new conversation"
_ALIGNMENT = 64
_PREFIX = struct.Struct("<16sQQ32s")
_DIGEST_BYTES = 32
_BLOCK_BYTES = 4 * 2**20
_MAX_INTEGER = 2**63 - 1
# Python reads JSON of some 1,000 levels, less where it is called from deep down; what was saved must load everywhere.
_MAX_LEVELS = 100
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SessionFile:
    """What a session file holds. The arrays lie in one buffer and cannot be written to."""

    header: dict[str, Any]
    arrays: Mapping[str, Bytes]


class _FaultError(ValueError):
    """What is wrong with a session file and the way out, worded to follow its path."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    sha256: str

    @classmethod
    def from_json(cls, value: object, field: str, offset: int) -> Self:
        """The entry under `field` of the JSON text, whose array must begin at `offset`."""
        keys = [each.name for each in fields(cls)]
        if not isinstance(value, dict) or sorted(value) != sorted(keys):
            raise _unexpected(field, value, f"an object of {', '.join(keys)}")
        name, shape, start, size, sha256 = (value[key] for key in keys)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise _unexpected(f"{field}.name", name, "at most 64 of letters, digits, '_', '.' and '-'")
        if not isinstance(shape, list) or len(shape) not in (1, 2) or not all(map(_is_count, shape)):
            raise _unexpected(f"{field}.shape", shape, "1 or 2 integers of 0 to 2^63 - 1")
        if not _is_count(size) or size != math.prod(shape):
            raise _unexpected(f"{field}.size_bytes", size, f"{math.prod(shape):,} (from shape {shape})")
        if not _is_count(start) or start != offset:
            raise _unexpected(f"{field}.offset", start, f"{offset:,}, where the array before it ends")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise _unexpected(f"{field}.sha256", sha256, "64 hexadecimal digits")
        return cls(name, tuple(shape), start, size, sha256)

    @property
    def end(self) -> int:
        """Where the array after this one begins."""
        return _aligned(self.offset + self.size_bytes)


def write_session(path: Path, header: Mapping[str, Any], arrays: Mapping[str, Bytes]) -> None:
    """Saves a session; `path` is the earlier file or the new one, whatever happens in between.

    The file is readable by its owner alone. A symbolic link is written through: its target is replaced, and the link
    stays. The arrays must not change meanwhile: a file in which they did is refused when it is read.

    Args:
        header: plain JSON values, at most 100 levels deep.
        arrays: of one or two dimensions, under short identifiers; parts of larger ones are written row by row.

    Raises:
        SessionError: the file cannot be written, or `header` cannot be kept.
    """
    try:
        head = _head(header, arrays)
        target = _target(path)
        with replaced_file(target) as descriptor:
            write_all(descriptor, head)
            for array in arrays.values():
                for block in _blocks(array):
                    write_all(descriptor, block)
                write_all(descriptor, bytes(-array.nbytes % _ALIGNMENT))
    except _FaultError as fault:
        raise SessionError(f"{_shown(path)}{fault}") from fault
    except OSError as error:
        way_out = "mend that or save elsewhere, what was there is unchanged"
        raise SessionError(f"{_shown(path)} cannot be written: {_reason(error)}; {way_out}") from error


def read_session(path: Path) -> SessionFile:
    """The session in `path`; allocates no more than the file has bytes, and its JSON text takes.

    Raises:
        SessionError: there is none, or it is damaged, foreign or of another format version.
    """
    try:
        _check_kind(path, path.stat())
        with open(path, "rb", opener=_open) as file:
            size = _check_kind(path, os.fstat(file.fileno())).st_size
            header, entries = _read_head(file, size)
            return SessionFile(header, _read_arrays(file, entries))
    except _FaultError as fault:
        raise SessionError(f"{_shown(path)}{fault}") from fault
    except MemoryError as error:
        raise SessionError(
            f"{_shown(path)} does not fit into memory; close other programs and load it again"
        ) from error
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise SessionError(f"{_shown(path)} cannot be read: {_reason(error)}; check the path") from error


# Writing


def _head(header: Mapping[str, Any], arrays: Mapping[str, Bytes]) -> bytes:
    content = {"header": dict(header), "arrays": [asdict(entry) for entry in _entries(arrays)]}
    try:
        text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (ValueError, RecursionError) as error:
        raise _FaultError(f": the header cannot be kept: {error}; save it without that") from error
    _check_plain(content["header"])
    text = text.ljust(_aligned(len(text)))
    if len(text) > MAX_HEADER_BYTES:
        raise _FaultError(
            f": the header is {len(text):,} bytes, at most {MAX_HEADER_BYTES:,} can be kept; start a new conversation"
        )
    head = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(text), b"")[:-_DIGEST_BYTES]
    return head + hashlib.sha256(head + text).digest() + text


def _entries(arrays: Mapping[str, Bytes]) -> Iterator[_Entry]:
    offset = 0
    for name, array in arrays.items():
        if array.dtype != np.uint8 or array.ndim not in (1, 2) or not _NAME.fullmatch(name):
            raise ValueError(
                f"array {name!r} is {array.dtype} {list(array.shape)}, expected bytes of 1 or 2 dimensions"
            )
        digest = hashlib.sha256()
        for block in _blocks(array):
            digest.update(block)
        entry = _Entry(name, array.shape, offset, array.nbytes, digest.hexdigest())
        yield entry
        offset = entry.end


def _blocks(array: Bytes) -> Iterator[memoryview]:
    """The bytes of an array, a few rows at a time: only those that do not lie side by side are copied."""
    num_rows = _BLOCK_BYTES * len(array) // max(1, array.nbytes) or 1
    for start in range(0, len(array), num_rows):
        yield np.ascontiguousarray(array[start : start + num_rows]).reshape(-1).data


def _check_plain(header: object) -> None:
    """Refuses what JSON would keep otherwise or not give back: keys that are no strings, and too many levels."""
    level = [header]
    for _ in range(_MAX_LEVELS):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                if not all(isinstance(key, str) for key in value):
                    raise TypeError(f"the header has the keys {shown(list(value))}, expected strings")
                inner += value.values()
            elif isinstance(value, list | tuple):
                inner += value
        level = inner
    if level:
        raise _FaultError(f": the header is nested deeper than {_MAX_LEVELS} levels; save it without that")


def _target(path: Path) -> Path:
    try:
        target = path.resolve()
    except (RuntimeError, ValueError) as error:  # a loop of links, or a NUL
        raise _FaultError(f" cannot be written: {shown(str(error))}; check the path") from error
    try:
        _check_kind(target, target.stat())
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise _FaultError(f": {_shown(target.parent)} is not a folder; create it or save elsewhere") from None
    return target


# Reading


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # were it a FIFO by now, opening would wait


def _check_kind(path: Path, status: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, FIFO or socket"
        raise _FaultError(f" is {kind}, expected a regular file; name the session file itself")
    return status


def _read_head(file: BufferedReader, size: int) -> tuple[dict[str, Any], list[_Entry]]:
    prefix = file.read(_PREFIX.size)
    if not prefix:
        raise _FaultError(f" is empty, expected a session; {_WAY_OUT}")
    if not MAGIC.startswith(prefix[: len(MAGIC)]):
        raise _FaultError(" is not a session file; name one that Conversation.save wrote")
    if len(prefix) < _PREFIX.size:
        raise _wrong_size(len(prefix), _PREFIX.size, "at least ")
    _, version, num_bytes, digest = _PREFIX.unpack(prefix)
    if version != FORMAT_VERSION:
        way_out = "update gemma-edge" if version > FORMAT_VERSION else "start a new conversation"
        raise _FaultError(
            f" was written by another version: format {version:,}, this program reads {FORMAT_VERSION}; {way_out}"
        )
    if num_bytes > MAX_HEADER_BYTES:
        raise _FaultError(
            f": the header claims {num_bytes:,} bytes, expected at most {MAX_HEADER_BYTES:,}: damaged; {_WAY_OUT}"
        )
    begin = _PREFIX.size + num_bytes
    if begin > size:
        raise _wrong_size(size, begin, "at least ")
    text = file.read(num_bytes)
    _check_digest("the header", hashlib.sha256(prefix[:-_DIGEST_BYTES] + text).hexdigest(), digest.hex())
    header, entries = _parse(text)
    expected = begin + (entries[-1].end if entries else 0)
    if size != expected:
        raise _wrong_size(size, expected)
    return header, entries


def _parse(text: bytes) -> tuple[dict[str, Any], list[_Entry]]:
    try:
        content = json_values(text)
    except JsonError as fault:
        raise _FaultError(f": the header{fault}; {_WAY_OUT}") from fault
    if not isinstance(content, dict) or sorted(content) != ["arrays", "header"]:
        raise _unexpected("the header", content, "an object of header, arrays")
    if not isinstance(content["header"], dict):
        raise _unexpected("header", content["header"], "an object")
    if not isinstance(content["arrays"], list):
        raise _unexpected("arrays", content["arrays"], "a list")
    entries: dict[str, _Entry] = {}
    offset = 0
    for index, value in enumerate(content["arrays"]):
        entry = _Entry.from_json(value, f"arrays[{index}]", offset)
        if entry.name in entries:
            raise _unexpected(f"arrays[{index}].name", entry.name, "one that no array before it has")
        entries[entry.name] = entry
        offset = entry.end
    return content["header"], list(entries.values())


def _read_arrays(file: BufferedReader, entries: list[_Entry]) -> dict[str, Bytes]:
    size = entries[-1].end if entries else 0
    data = np.empty(size, np.uint8)
    num_read = file.readinto(data.data)
    if num_read != size:
        raise _FaultError(f" became {size - num_read:,} bytes shorter while it was read; load it again")
    data.flags.writeable = False
    arrays = {}
    for entry in entries:
        end = entry.offset + entry.size_bytes
        array = data[entry.offset : end]
        _check_digest(f"array {entry.name!r}", hashlib.sha256(array.data).hexdigest(), entry.sha256)
        if data[end : entry.end].any():
            raise _FaultError(f": the bytes that fill up array {entry.name!r} are not zero: damaged; {_WAY_OUT}")
        arrays[entry.name] = array.reshape(entry.shape)
    return arrays


def _check_digest(part: str, found: str, expected: str) -> None:
    if found != expected:
        raise _FaultError(f": {part} has SHA-256 {found[:8]}..., expected {expected[:8]}...: damaged; {_WAY_OUT}")


def _wrong_size(found: int, expected: int, bound: str = "") -> _FaultError:
    fault = "truncated" if found < expected else "has trailing bytes"
    return _FaultError(f" is {found:,} bytes, expected {bound}{expected:,}: {fault}; {_WAY_OUT}")


def _unexpected(field: str, found: object, expected: str) -> _FaultError:
    return _FaultError(f": {field} is {shown(found)}, expected {expected}; {_WAY_OUT}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INTEGER


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _shown(path: Path) -> str:
    """The path, in one line whatever characters it has."""
    return str(path) if str(path).isprintable() else ascii(str(path))
