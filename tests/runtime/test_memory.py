import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import memory
from runtime.memory import MemoryUsage, PeakMemory, keep_large_blocks_apart, memory_usage, release_free_memory

ROOT = Path(__file__).parents[2]
SIZE = 50_000_000
# the kernel counts up to 64 pages a thread late, and the test itself needs a little
SLACK = 5_000_000


def touched_block() -> mmap.mmap:
    """Anonymous memory of its own, never heap that was freed before."""
    block = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block[:: mmap.PAGESIZE] = b"1" * len(range(0, SIZE, mmap.PAGESIZE))
    return block


def test_touched_memory_is_anonymous() -> None:
    before = memory_usage()
    block = touched_block()
    after = memory_usage()
    assert after.anonymous_bytes - before.anonymous_bytes > len(block) - SLACK
    assert abs(after.mapped_bytes - before.mapped_bytes) < SLACK


def test_a_mapped_file_is_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = memory_usage()
        assert not any(mapped[:: mmap.PAGESIZE])
        after = memory_usage()
    assert after.mapped_bytes - before.mapped_bytes > SIZE - SLACK
    assert after.anonymous_bytes - before.anonymous_bytes < SLACK


def test_the_peak_keeps_what_was_freed() -> None:
    peak = PeakMemory()
    start = peak.sample()
    block = touched_block()
    peak.sample()
    block.close()
    now = peak.sample()
    assert peak.usage.anonymous_bytes - start.anonymous_bytes > SIZE - SLACK
    assert peak.usage.anonymous_bytes > now.anonymous_bytes
    assert PeakMemory().usage == MemoryUsage(0, 0)


@pytest.mark.parametrize("status", [None, "VmRSS:\t 5 kB\n"])
def test_systems_that_do_not_say_what_is_anonymous(
    status: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if status:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    usage = memory_usage()
    assert usage.anonymous_bytes > 2**20
    assert usage.mapped_bytes >= 0


@pytest.mark.skipif(memory._glibc() is None, reason="the C library gives nothing back")
def test_free_memory_is_given_back() -> None:
    blocks = [bytes(10_000) for _ in range(SIZE // 10_000)]  # too small to be mapped alone
    last = bytes(10_000)  # above them in the heap, which shrinks from its end alone
    del blocks
    before = memory_usage().anonymous_bytes
    release_free_memory()
    assert before - memory_usage().anonymous_bytes > SIZE // 2
    assert last


def no_library(_: None) -> object:
    raise OSError("static")


@pytest.mark.parametrize(
    ("platform", "library"), [("linux", lambda _: object()), ("linux", no_library), ("win32", no_library)]
)
def test_a_c_library_that_gives_nothing_back(
    platform: str, library: Callable[[None], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(memory.ctypes, "CDLL", library)
    memory._glibc.cache_clear()
    release_free_memory()
    keep_large_blocks_apart()
    assert memory._glibc() is None
    memory._glibc.cache_clear()


BLOCKS = """
from runtime.memory import keep_large_blocks_apart, memory_usage
import numpy as np, sys
if sys.argv[1] == "apart":
    keep_large_blocks_apart()
size = 8 << 20
del_first = np.ones(size, np.uint8)  # raises glibc's threshold once it is freed
del del_first
before = memory_usage().anonymous_bytes
held = []
for _ in range(8):
    block, behind = np.ones(size, np.uint8), np.ones(4096, np.uint8)  # what is behind stays: the heap cannot shrink
    held.append(behind)
    del block
    size -= 1 << 16
print(memory_usage().anonymous_bytes - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_large_blocks_leave_no_holes() -> None:
    kept = {}
    for mode in ("apart", "default"):
        command = [sys.executable, "-c", BLOCKS, mode]
        kept[mode] = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert kept["apart"] < 1 << 20 < 4 << 20 < kept["default"]
