"""Saved sessions. The numbers are those of the list of faults."""

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import SessionError
from runtime.session_file import FORMAT_VERSION, MAGIC, MAX_HEADER_BYTES, SessionFile, read_session, write_session

ROOT = Path(__file__).parents[2]
PREFIX_BYTES = 64
HEADER: dict[str, Any] = {"model": "E2B", "num_tokens": 3}
ARRAYS = {
    "keys": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "values": np.arange(6, dtype=np.uint8).reshape(2, 3) + 10,
    "empty": np.zeros((0, 5), np.uint8),
    "hidden": np.arange(64, dtype=np.uint8),
}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", fullmatch=True)
SHAPES = st.lists(st.integers(0, 70), min_size=1, max_size=2)
few = settings(max_examples=150, deadline=None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.session"


@pytest.fixture
def content(path: Path) -> bytes:
    """A small file, saved at `path`."""
    write_session(path, HEADER, ARRAYS)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for the examples of one property."""
    return tmp_path_factory.mktemp("scratch") / "chat.session"


def assert_equal(found: SessionFile, header: object, arrays: dict[str, npt.NDArray[np.uint8]]) -> None:
    assert found.header == header
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        assert found.arrays[name].dtype == np.uint8
        np.testing.assert_array_equal(found.arrays[name], array)


def is_whole(path: Path) -> bool:
    assert_equal(read_session(path), HEADER, ARRAYS)
    return True


def refused(path: Path, match: str = ".") -> None:
    with pytest.raises(SessionError, match=match) as caught:
        read_session(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()  # and so is one line
    assert len(message) < 400 + len(str(path))


def not_written(path: Path, match: str, header: Any = HEADER) -> None:
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    with pytest.raises(SessionError, match=match) as caught:
        write_session(path, header, ARRAYS)
    assert str(caught.value).isprintable()
    assert before == (sorted(path.parent.iterdir()) if path.parent.is_dir() else [])


# What was written is what is read


@few
@given(st.dictionaries(st.text(), PLAIN, max_size=5), st.dictionaries(NAMES, SHAPES, max_size=5), st.randoms())
def test_what_is_written_is_read(scratch: Path, header: dict[str, Any], shapes: dict[str, Any], random: Any) -> None:
    arrays = {
        name: np.frombuffer(random.randbytes(int(np.prod(shape))), np.uint8).reshape(shape)
        for name, shape in shapes.items()
    }
    write_session(scratch, header, arrays)
    assert_equal(read_session(scratch), header, arrays)


@pytest.mark.parametrize("shape", [(5_000_000,), (3, 3_000_000), (3_000_000, 3), (1, 5_000_000), (0, 2**62)])
def test_arrays_of_several_blocks(path: Path, shape: tuple[int, ...]) -> None:
    array = np.resize(np.arange(251, dtype=np.uint8), shape)
    write_session(path, {}, {"rows": array})
    assert_equal(read_session(path), {}, {"rows": array})


def test_parts_of_larger_arrays(path: Path) -> None:
    rows = np.resize(np.arange(251, dtype=np.uint8), (300, 40_000))
    arrays = {"columns": rows[:, 7:-7], "every_other": rows[::2], "turned": rows[:50, :50].T, "back": rows[0, ::-1]}
    write_session(path, {}, arrays)
    assert_equal(read_session(path), {}, arrays)


def test_equal_sessions_give_equal_files(path: Path, content: bytes) -> None:
    write_session(path, HEADER, ARRAYS)
    assert path.read_bytes() == content


def test_arrays_begin_at_multiples_of_64_bytes_and_cannot_be_written_to(path: Path, content: bytes) -> None:
    assert len(content) % 64 == 0
    assert content.index(ARRAYS["hidden"].tobytes()) % 64 == 0
    found = read_session(path).arrays
    with pytest.raises(ValueError, match="read-only"):
        found["keys"][0] = 1


def test_a_conversation_is_private(path: Path) -> None:
    path.touch(0o644)
    write_session(path, HEADER, ARRAYS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_is_written_through(tmp_path: Path, path: Path) -> None:
    (tmp_path / "disk").mkdir()
    path.symlink_to("disk/kept")
    for _ in range(2):  # a target that is not there, and one that is
        write_session(path, HEADER, ARRAYS)
        assert path.is_symlink()
        assert [each.name for each in (tmp_path / "disk").iterdir()] == ["kept"]
        assert is_whole(path)


# What cannot be written


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda path: path.mkdir(), "is a folder, expected a regular file; name the session file itself"),
        (os.mkfifo, "is a device, FIFO or socket, expected a regular file"),
        (lambda path: path.symlink_to(path.name), r"cannot be written: .*; (check the path|mend that)"),
        (lambda path: path.parent.rmdir(), "is not a folder; create it or save elsewhere"),
        (lambda path: (path.parent.rmdir(), path.parent.touch()), "cannot be written: Not a directory; mend that or"),
    ],
)
def test_a_place_that_cannot_be_written(tmp_path: Path, change: Callable[[Path], object], match: str) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder/chat"
    change(path)
    not_written(path, match)


@pytest.mark.parametrize("name", ["a\0b", "a\nb" * 100, "x" * 250])
def test_a_name_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    not_written(tmp_path / name, "cannot be written: (embedded|.*embedded null|File name too long)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_ours(path: Path) -> None:
    path.parent.chmod(0o500)
    not_written(path, "cannot be written: Permission denied; mend that or save elsewhere, what was there is unchanged")


def nested(num_levels: int) -> dict[str, Any]:
    value: Any = []
    for _ in range(num_levels - 2):
        value = [value]
    return {"deep": value}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"score": float("nan")}, "the header cannot be kept: Out of range float values"),
        ({"number": 10**5000}, "the header cannot be kept: Exceeds the limit"),
        (nested(101), "the header is nested deeper than 100 levels; save it without that"),
        (nested(100_000), "the header cannot be kept: maximum recursion depth exceeded"),
        ({"text": "x" * MAX_HEADER_BYTES}, r"the header is 67,109,\d\d\d bytes, at most 67,108,864 can be kept"),
    ],
)
def test_a_header_that_cannot_be_kept(path: Path, content: bytes, header: Any, match: str) -> None:
    not_written(path, f"chat.session: {match}", header)
    assert path.read_bytes() == content


def test_what_can_be_written_is_read_from_deep_down(path: Path) -> None:
    def read(num_calls: int) -> SessionFile:
        return read(num_calls - 1) if num_calls else read_session(path)

    write_session(path, nested(100), {})
    assert read(500).header == nested(100)


@pytest.mark.parametrize("array", [np.zeros(3, np.float32), np.zeros((1, 1, 1), np.uint8), np.zeros((), np.uint8)])
def test_a_bug_of_the_caller_keeps_its_traceback(path: Path, content: bytes, array: Any) -> None:
    for header, arrays in (({}, {"keys": array}), ({}, {"two words": ARRAYS["keys"]}), ({"a": {1: 2}}, {})):
        with pytest.raises((ValueError, TypeError), match=r"array .* expected bytes of|has the keys \[1\]") as caught:
            write_session(path, header, arrays)
        assert not isinstance(caught.value, SessionError)
    assert path.read_bytes() == content


# Damage


def test_truncated_at_every_byte(path: Path, content: bytes) -> None:  # 74
    for size in range(len(content)):
        path.write_bytes(content[:size])
        refused(path, "is empty" if size == 0 else "truncated; restore a copy of it or start a new conversation")


def test_every_bit_flipped(path: Path, content: bytes) -> None:  # 75
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            refused(path)


def test_trailing_bytes(path: Path, content: bytes) -> None:
    for extra in (b"\0", b"x" * 64, content):
        path.write_bytes(content + extra)
        size = f"{len(content) + len(extra):,}"
        refused(path, f"is {size} bytes, expected {len(content):,}: has trailing bytes")


@pytest.mark.parametrize(
    ("find", "put", "match"),
    [
        (ARRAYS["keys"].tobytes(), ARRAYS["values"].tobytes(), "array 'keys' has SHA-256 .*: damaged"),
        (ARRAYS["hidden"].tobytes()[-8:], bytes(8), "array 'hidden' has SHA-256"),
        (ARRAYS["values"].tobytes() + b"\0", ARRAYS["values"].tobytes() + b"\1", "fill up array 'values' are not zero"),
        (b'"E2B"', b'"E4B"', r"the header has SHA-256 [0-9a-f]{8}\.\.\., expected [0-9a-f]{8}\.\.\.: damaged"),
        (MAGIC, b"\x93NUMPY\1\0".ljust(16), "is not a session file; name one"),
        (MAGIC + struct.pack("<Q", 1), MAGIC + struct.pack("<Q", 2), "another version: format 2, .* 1; update gemma-"),
        (MAGIC + struct.pack("<Q", 1), MAGIC + struct.pack("<Q", 0), "another version: format 0, .* start a new conv"),
    ],
)
def test_the_damaged_part_is_named(path: Path, content: bytes, find: bytes, put: bytes, match: str) -> None:
    assert find in content
    path.write_bytes(content.replace(find, put, 1))
    refused(path, match)


def test_swapped_arrays(path: Path, content: bytes) -> None:
    keys, values = (content.index(ARRAYS[name].tobytes()) for name in ("keys", "values"))
    swapped = bytearray(content)
    swapped[keys : keys + 6], swapped[values : values + 6] = ARRAYS["values"].tobytes(), ARRAYS["keys"].tobytes()
    path.write_bytes(swapped)
    refused(path, "array 'keys' has SHA-256")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda path: None, "cannot be read: No such file or directory; check the path"),
        (Path.mkdir, "is a folder, expected a regular file"),
        (os.mkfifo, "is a device, FIFO or socket"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, FIFO or socket"),
        (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
        (Path.touch, "is empty, expected a session"),
    ],
)
def test_what_is_no_file(path: Path, change: Callable[[Path], object], match: str) -> None:
    change(path)
    refused(path, match)


def test_a_name_with_nul_or_a_line_break_is_one_line(tmp_path: Path) -> None:
    for name in ("a\0b", "a\nb"):
        with pytest.raises(SessionError, match=r"a\\(x00|n)b' cannot be read: ") as caught:
            read_session(tmp_path / name)
        assert str(caught.value).isprintable()


# Files made on purpose: their digests are right


def forged(path: Path, text: bytes, arrays: bytes = b"", version: int = FORMAT_VERSION) -> None:
    head = MAGIC + struct.pack("<QQ", version, len(text))
    path.write_bytes(head + hashlib.sha256(head + text).digest() + text + arrays)


def entry(data: bytes = bytes(64), **fields: Any) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    return {"name": "keys", "shape": [64], "offset": 0, "size_bytes": 64, "sha256": sha256} | fields


def test_the_forger_can_write_a_whole_file(path: Path) -> None:
    forged(path, json.dumps({"header": {}, "arrays": [entry()]}).encode(), bytes(64))
    assert_equal(read_session(path), {}, {"keys": np.zeros(64, np.uint8)})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"name": "../keys"}, r"arrays\[0\].name is '../keys', expected at most 64 of letters"),
        ({"name": "k\n"}, r"arrays\[0\].name is 'k\\n'"),
        ({"name": "k" * 65}, "name is 'k"),
        ({"name": 7}, "name is 7"),
        ({"shape": [-64]}, r"shape is \[-64\], expected 1 or 2 integers of 0 to 2\^63 - 1"),
        ({"shape": [-8, -8]}, "shape is"),
        ({"shape": []}, "shape is"),
        ({"shape": [64, 1, 1]}, "shape is"),
        ({"shape": [64.0]}, "shape is"),
        ({"shape": [True, 64]}, "shape is"),
        ({"shape": [2**64, 1]}, "shape is"),
        ({"shape": [2**33, 2**33]}, "size_bytes is 64, expected 73,786,976,294,838,206,464"),
        ({"shape": [2**32, 2**32], "size_bytes": 0}, "size_bytes is 0, expected"),
        ({"shape": "64"}, "shape is"),
        ({"shape": [8, 7]}, r"size_bytes is 64, expected 56 \(from shape \[8, 7\]\)"),
        ({"size_bytes": 64.0}, "size_bytes is 64.0"),
        ({"size_bytes": -64}, "size_bytes is -64"),
        ({"offset": 64}, "offset is 64, expected 0, where the array before it ends"),
        ({"offset": -64}, "offset is -64"),
        ({"offset": False}, "offset is False"),
        ({"sha256": "0" * 63}, "sha256 is '0"),
        ({"sha256": None}, "sha256 is None"),
        ({"sha256": "0" * 64}, "array 'keys' has SHA-256"),
        ({"dtype": "O"}, r"arrays\[0\] is \{.*, expected an object of name, shape, offset, size_bytes, sha256"),
    ],
)
def test_forged_entries(path: Path, fields: dict[str, Any], match: str) -> None:
    forged(path, json.dumps({"header": {}, "arrays": [entry(**fields)]}).encode(), bytes(64))
    refused(path, match)


@pytest.mark.parametrize(
    ("second", "match"),
    [
        ({"offset": 64}, r"arrays\[1\].name is 'keys', expected one that no array before it has"),
        ({"name": "values", "offset": 0}, r"arrays\[1\].offset is 0, expected 64"),  # overlap
        ({"name": "values", "offset": 128}, r"arrays\[1\].offset is 128, expected 64"),  # gap
    ],
)
def test_forged_order(path: Path, second: dict[str, Any], match: str) -> None:
    forged(path, json.dumps({"header": {}, "arrays": [entry(), entry(**second)]}).encode(), bytes(192))
    refused(path, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "the header is not JSON"),
        (b"\xff", "the header is not UTF-8 at byte 0"),
        (b"\xef\xbb\xbf{}", "the header starts with a byte order mark"),
        (b'{"header":{},"arrays":[]}{}', "the header is not JSON: Extra data"),
        (b'{"header":{},"header":{},"arrays":[]}', "the header: key 'header' is there 2 times"),
        (b'{"header":{"a":NaN},"arrays":[]}', "the header: a number is 'NaN', expected a finite one"),
        (b'{"header":{"a":1e999},"arrays":[]}', "the header: a number is '1e999', expected a finite one"),
        (b'{"header":{"a":' + b"9" * 5000 + b'},"arrays":[]}', "the header is not JSON: Exceeds the limit"),
        (b"[" * 1_000_000, "the header is nested too deep"),
        (b'{"a":' * 200_000, "the header is nested too deep"),
        (b"[]", r"the header is \[\], expected an object of header, arrays"),
        (b'{"header":{}}', "expected an object of header, arrays"),
        (b'{"header":[],"arrays":[]}', r"header is \[\], expected an object"),
        (b'{"header":{},"arrays":{}}', r"arrays is \{\}, expected a list"),
        (b'{"header":{},"arrays":[7]}', r"arrays\[0\] is 7, expected an object of name"),
    ],
)
def test_forged_text(path: Path, text: bytes, match: str) -> None:
    forged(path, text)
    refused(path, match)


def test_claims_are_refused_before_anything_is_allocated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object, **__: object) -> None:
        pytest.fail("allocated")

    monkeypatch.setattr(np, "empty", allocate)
    for num_bytes in (2**63, 2**64 - 1, MAX_HEADER_BYTES + 1):
        path.write_bytes(MAGIC + struct.pack("<QQ", 1, num_bytes) + bytes(1000))
        refused(path, f"the header claims {num_bytes:,} bytes, expected at most 67,108,864")
    path.write_bytes(MAGIC + struct.pack("<QQ", 1, MAX_HEADER_BYTES) + bytes(1000))
    refused(path, "is 1,032 bytes, expected at least 67,108,928: truncated")
    for size in (100 * 2**30, 2**63 - 1):
        large = entry(shape=[size], size_bytes=size)
        forged(path, json.dumps({"header": {}, "arrays": [large]}).encode(), bytes(64))
        refused(path, r"bytes, expected [\d,]{15,}: truncated")


def test_a_file_that_does_not_fit_into_memory(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", allocate)
    refused(path, "does not fit into memory; close other programs and load it again")


def readable_or_refused(path: Path) -> SessionFile | None:
    try:
        return read_session(path)
    except SessionError as error:
        assert str(error).isprintable()
        return None


@few
@given(st.binary(max_size=300), st.sampled_from([b"", MAGIC, MAGIC + struct.pack("<Q", 1)]))
def test_any_bytes_are_refused(scratch: Path, content: bytes, start: bytes) -> None:
    scratch.write_bytes(start + content)
    assert readable_or_refused(scratch) is None


@few
@given(st.data())
def test_mutations_are_refused(scratch: Path, data: st.DataObject) -> None:
    write_session(scratch, HEADER, ARRAYS)
    content = scratch.read_bytes()
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(content)), st.integers(0, len(content)))))
    changed = content[:start] + data.draw(st.binary(max_size=40) | st.just(content[start:stop][::-1])) + content[stop:]
    scratch.write_bytes(changed)
    assert (readable_or_refused(scratch) is None) == (changed != content)


@few
@given(PLAIN | st.fixed_dictionaries({"header": PLAIN, "arrays": st.lists(PLAIN, max_size=3)}), st.binary(max_size=200))
def test_forged_values_are_read_or_refused(scratch: Path, value: Any, arrays: bytes) -> None:
    forged(scratch, json.dumps(value).encode(), arrays)
    found = readable_or_refused(scratch)
    assert found is None or (found.header == value["header"] and arrays == b"")


@few
@given(st.dictionaries(st.sampled_from(sorted(entry())), PLAIN | st.lists(st.integers(), max_size=3), max_size=3))
def test_forged_fields_are_read_or_refused(scratch: Path, fields: dict[str, Any]) -> None:
    forged(scratch, json.dumps({"header": {}, "arrays": [entry(**fields)]}).encode(), bytes(64))
    found = readable_or_refused(scratch)
    assert found is None or sum(array.nbytes for array in found.arrays.values()) == 64


# The earlier file survives


def fail_at(number: int, error: BaseException, function: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[object] = []

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == number:
            raise error
        return function(*arguments)

    return call


PLACES = [("write", 1), ("write", 2), ("write", 6), ("fsync", 1), ("rename", 1)]


@pytest.mark.parametrize(("place", "number"), PLACES)
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit(143)]
)
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_the_earlier_file(  # 78
    path: Path, place: str, number: int, error: BaseException, existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if existing:
        write_session(path, HEADER, ARRAYS)
    owner, name = (Path, "replace") if place == "rename" else (os, place)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_at(number, error, getattr(owner, name)))
        with pytest.raises(BaseException) as caught:  # which one is asserted below
            write_session(path, {"other": 1}, ARRAYS)
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"{path} cannot be written: No space left on device; mend that or save els")
        assert isinstance(caught.value, SessionError)
    else:
        assert caught.value is error
    assert list(path.parent.iterdir()) == ([path] if existing else [])
    assert not existing or is_whole(path)


@pytest.mark.parametrize(("place", "number"), [("fsync", 2), ("close", 1)])
def test_an_error_once_it_is_there_is_no_failure(
    path: Path, place: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, place, fail_at(number, OSError(errno.EIO, "Input/output error"), getattr(os, place)))
    write_session(path, HEADER, ARRAYS)
    assert is_whole(path)


def test_everything_is_on_the_disk_before_it_appears(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []

    def note(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        synced.append((name, path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    write_session(path, HEADER, ARRAYS)
    [(partial, existed), (folder, exists)] = synced
    assert partial.startswith(".chat.session.")
    assert partial.endswith(".partial")
    assert (folder, existed, exists) == (path.parent.name, False, True)


SAVER = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np
from runtime.session_file import write_session

def save(path, letter, num_bytes):
    write_session(Path(path), {"letter": letter}, {"rows": np.full(int(num_bytes), ord(letter), np.uint8)})

def kill(place, number):
    owner, name = (Path, "replace") if place == "rename" else (os, place)
    function, calls = getattr(owner, name), []
    def call(*arguments):
        calls.append(place)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    setattr(owner, name, call)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SAVER + code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def letter_of(path: Path) -> str:
    """Whose file it is, once it is seen to be whole."""
    found = read_session(path)
    letter: str = found.header["letter"]
    assert (found.arrays["rows"] == ord(letter)).all()
    return letter


@pytest.mark.parametrize(("place", "number", "num_left"), [*((*each, 1) for each in PLACES), ("fsync", 2, 0)])
def test_killed_while_saving(path: Path, content: bytes, place: str, number: int, num_left: int) -> None:  # 78
    saver = start("kill(sys.argv[2], int(sys.argv[3])); save(sys.argv[1], 'b', 20_000_000)", path, place, number)
    assert saver.communicate()[1] == ""
    assert saver.returncode == -signal.SIGKILL
    assert len(list(path.parent.glob(".chat.session.*.partial"))) == num_left
    assert is_whole(path) if num_left else letter_of(path) == "b"
    write_session(path, HEADER, ARRAYS)  # cleans up
    assert list(path.parent.iterdir()) == [path]


def test_killed_at_any_time(path: Path) -> None:  # 78
    for milliseconds in (0, 3, 7, 12, 25, 40):
        saver = start("print(flush=True)\nwhile True: [save(sys.argv[1], each, 4e6) for each in 'ab']", path)
        assert saver.stdout
        saver.stdout.readline()
        deadline = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < deadline
        time.sleep(milliseconds / 1000)
        saver.kill()
        saver.communicate()
        assert letter_of(path) in "ab"
        assert len(list(path.parent.iterdir())) <= 2


def test_only_what_killed_saves_of_this_file_left_is_removed(path: Path) -> None:
    names = [".chat.session.partial", ".chat.session.1234.partial", ".other.0123abcd.partial", "chat.0123abcd.partial"]
    for name in (*names, ".chat.session.0123abcd.partial"):
        (path.parent / name).touch()
    (path.parent / ".chat.session.00000000.partial").mkdir()
    write_session(path, HEADER, ARRAYS)
    kept = {path.name, *names, ".chat.session.00000000.partial"}
    assert {each.name for each in path.parent.iterdir()} == kept


def test_the_file_of_a_living_save_is_not_removed(path: Path) -> None:
    code = "os.fsync = lambda _: (print(flush=True), sys.stdin.readline()); save(sys.argv[1], 'b', 100)"
    command = [sys.executable, "-c", SAVER + code, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        assert saver.stdout
        saver.stdout.readline()
        write_session(path, HEADER, ARRAYS)
        assert is_whole(path)
        assert len(list(path.parent.iterdir())) == 2
        saver.communicate("\n\n")
    assert saver.returncode == 0
    assert letter_of(path) == "b"
    assert list(path.parent.iterdir()) == [path]


def test_two_processes_save_one_file(path: Path) -> None:
    savers = [start("[save(sys.argv[1], sys.argv[2], 1e6) for _ in range(40)]", path, letter) for letter in "ab"]
    seen = set()
    while any(saver.poll() is None for saver in savers):
        if path.exists():
            seen.add(letter_of(path))
    for saver in savers:
        assert saver.communicate()[1] == ""
        assert saver.returncode == 0
    assert seen <= {"a", "b"}
    assert letter_of(path) in "ab"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_size_limit_of_the_system(path: Path, content: bytes) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)); save(sys.argv[1], 'b', 5e6)"
    _, error = start(limit, path).communicate()
    assert f"SessionError: {path} cannot be written: File too large; mend that or save elsewhere, what was" in error
    assert is_whole(path)
    assert list(path.parent.iterdir()) == [path]


FULL_DISK = """
mount -t tmpfs -o size=1m none "$1" && cd "$1" && shift && exec "$@"
"""


@pytest.fixture
def on_a_small_disk(tmp_path: Path) -> Iterator[list[str]]:
    """Begins a command that runs in a file system of 1 MiB, where the system lets a user mount one."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield command


def test_a_disk_that_is_full(on_a_small_disk: list[str]) -> None:  # 78
    code = """
save("chat", "a", 600_000)
try:
    save("chat", "b", 600_000)
except ValueError as error:
    print(error, os.listdir("."), Path("chat").read_bytes()[-700_000:].count(b"a") >= 600_000)
"""
    command = [*on_a_small_disk, sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SAVER}{code}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    assert result.stdout.startswith("chat cannot be written: No space left on device; mend that or save elsewhere")
    assert result.stdout.endswith("['chat'] True\n")
