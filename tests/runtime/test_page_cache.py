import errno
import mmap
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime import loading, native
from runtime.engine import Runtime
from runtime.errors import ArtifactError
from runtime.page_cache import read_ahead
from tests.layouts import needs_native
from tests.models import ONE_THREAD
from tests.page_residency import num_cached_pages, num_pages

MIB = 1 << 20
SIZES = (40 * MIB + 5000, 4 * MIB, 100)  # the first is several pieces, the last of them not a whole one

needs_advice = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no MADV_HUGEPAGE")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Files that are not in the page cache."""
    if sys.platform != "linux":
        pytest.skip("how to evict a file and what is in the page cache is asked in Linux's way")
    made = []
    for index, size in enumerate(SIZES):
        made.append(tmp_path / str(index))
        made[-1].write_bytes(os.urandom(size))
        _evict(made[-1])
    if any(map(num_cached_pages, made)):
        pytest.skip("this file system keeps files in the page cache")
    return made


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Exceptions that ended a thread."""
    found: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    return found


class Threads(list[threading.Thread]):
    """The threads that read ahead; `before_start` is called when one is about to start."""

    before_start: Callable[[], None] = staticmethod(lambda: None)

    def join(self) -> None:
        for thread in self:
            thread.join()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    started = Threads()
    start = threading.Thread.start

    def recorded(thread: threading.Thread) -> None:
        if thread.name == "edge-read-ahead":
            started.before_start()
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", recorded)
    return started


def _evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # dirty pages would stay
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def advised(paths: list[Path], monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> list[tuple[int, int]]:
    """The sizes of mappings with the advice that is given for them, which fails with `error`."""
    given: list[tuple[int, int]] = []

    class Mapping(mmap.mmap):
        def madvise(self, option: int, *span: int) -> None:
            given.append((len(self), option))
            if error is not None:
                raise error
            super().madvise(option, *span)

    monkeypatch.setattr(mmap, "mmap", Mapping)
    return given


@needs_advice
def test_every_page_is_read(paths: list[Path], threads: Threads, faults: list[Any]) -> None:
    read_ahead(paths)
    threads.join()
    assert [num_cached_pages(path) for path in paths] == [num_pages(path) for path in paths]
    assert all(thread.daemon for thread in threads), "they must not keep a process from ending"
    assert not faults


@needs_advice
def test_huge_pages_are_advised(paths: list[Path], threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    given = advised(paths, monkeypatch)
    read_ahead(paths)
    threads.join()
    assert given == [(size, mmap.MADV_HUGEPAGE) for size in SIZES]


@needs_advice
def test_a_kernel_that_refuses_the_advice(
    paths: list[Path], threads: Threads, faults: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = advised(paths, monkeypatch, OSError(errno.EINVAL, "Invalid argument"))
    read_ahead(paths)
    threads.join()
    assert len(given) == 1
    assert not any(map(num_cached_pages, paths))
    assert not faults


def test_a_system_without_the_advice(paths: list[Path], threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    read_ahead(paths)
    assert not threads
    assert not any(map(num_cached_pages, paths))


@needs_advice
@pytest.mark.parametrize("missing_bytes", [0, 1])
def test_files_that_memory_has_no_room_for(
    missing_bytes: int, paths: list[Path], threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    available = sum(SIZES) - missing_bytes
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    read_ahead(paths)
    threads.join()
    assert bool(threads) == any(map(num_cached_pages, paths)) == (missing_bytes == 0)


@needs_advice
def test_a_file_that_vanishes(paths: list[Path], threads: Threads, faults: list[Any]) -> None:
    threads.before_start = lambda: paths[1].unlink(missing_ok=True)
    read_ahead(paths)
    threads.join()
    assert threads
    assert num_cached_pages(paths[0]) == num_pages(paths[0])
    assert not faults


# the engine


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Path]]:
    """What the engine reads ahead."""
    calls: list[list[Path]] = []
    monkeypatch.setattr(loading, "read_ahead", lambda paths: calls.append(list(paths)))
    return calls


@needs_native
def test_native_weights_are_read_but_for_the_ple_table(
    tiny_artifact: Callable[..., Path], asked: list[list[Path]]
) -> None:
    folder = tiny_artifact("wide", 4, "int8", "native")
    Runtime.load(folder, profile=ONE_THREAD).close()
    assert asked == [[folder / name for name in ("decoder.onnx.data", "drafter.onnx.data", "token_table.bin")]]
    assert (folder / "ple_table.bin").exists(), "of which a token needs one row"


@needs_native
@pytest.mark.parametrize("is_there", [False, True], ids=["missing", "empty"])
@pytest.mark.parametrize("name", ["decoder.onnx.data", "drafter.onnx.data", "token_table.bin"])
def test_a_damaged_file_is_refused_before(
    name: str, is_there: bool, tiny_artifact: Callable[..., Path], tmp_path: Path, asked: list[list[Path]]
) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(tiny_artifact("wide", 4, "int8", "native"), folder)
    (folder / name).unlink()
    if is_there:
        (folder / name).touch()
    with pytest.raises(ArtifactError, match=f"{name} is {'0 bytes, expected [0-9,]+' if is_there else 'missing'}"):
        Runtime.load(folder, profile=ONE_THREAD)
    assert asked == []


def test_a_portable_artifact_is_not_read(tiny_artifact: Callable[..., Path], asked: list[list[Path]]) -> None:
    Runtime.load(tiny_artifact("wide", 4), profile=ONE_THREAD).close()
    assert asked == []


def test_the_portable_copy_of_a_native_artifact_is_not_read(
    tiny_artifact: Callable[..., Path], asked: list[list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "unusable_because", lambda: "they are not to be used")
    with Runtime.load(tiny_artifact("wide", 4, "int8", "native"), profile=ONE_THREAD) as runtime:
        assert runtime.manifest.layout == "portable"
    assert asked == []
