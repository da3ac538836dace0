"""Memory of this process, split by what the system can take back: mapped pages yes, anonymous ones no.

Source: https://docs.kernel.org/filesystems/proc.html, RssAnon, RssFile and RssShmem of /proc/self/status; mallopt(3).
"""

import ctypes
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
# Tensors of a decode step, up to 17 tokens, are smaller: mapping them anew in every step would cost page faults.
LARGE_BLOCK_BYTES = 1 << 20
KEPT_FREE_BYTES = 8 << 20  # of the heap, which would shrink and grow in every step otherwise
# of malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Resident memory: heap and buffers are anonymous, model files are mapped."""

    anonymous_bytes: int
    mapped_bytes: int


@dataclass(slots=True)
class PeakMemory:
    """The largest usage seen by `sample`: a sampled peak, so one that came and went between two samples is missed.

    The two maxima are taken apart and may be of different moments; their sum is an upper bound of the samples.
    """

    usage: MemoryUsage = MemoryUsage(0, 0)

    def sample(self) -> MemoryUsage:
        """The usage now, after raising the maxima to it."""
        now = memory_usage()
        anonymous = max(now.anonymous_bytes, self.usage.anonymous_bytes)
        self.usage = MemoryUsage(anonymous, max(now.mapped_bytes, self.usage.mapped_bytes))
        return now


def memory_usage() -> MemoryUsage:
    """Resident memory now; where the system does not say what is anonymous, what is this process's alone."""
    try:
        status = _STATUS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        status = ""
    pages = {name: int(size) * 1024 for name, size in re.findall(r"^Rss(Anon|File|Shmem):\s*(\d+) kB$", status, re.M)}
    if len(pages) == 3:
        return MemoryUsage(pages["Anon"], pages["File"] + pages["Shmem"])
    memory = psutil.Process().memory_full_info()
    return MemoryUsage(memory.uss, max(memory.rss - memory.uss, 0))


def release_free_memory() -> None:
    """Gives the heap's free pages back to the system, which glibc keeps; nothing where the C library is another."""
    if libc := _glibc():
        libc.malloc_trim(0)


def keep_large_blocks_apart() -> None:
    """Makes glibc map blocks of 1 MiB and more each for itself, for the whole process; nothing elsewhere.

    By itself it takes blocks of up to 32 MiB from its heap once one of their size has been freed. Those of a prefill
    leave holes there: in E2B its peak is 251 MiB so, and 202 MiB with mappings.
    """
    if libc := _glibc():
        libc.mallopt(_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, KEPT_FREE_BYTES)


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
    except OSError:  # a static interpreter loads nothing
        return None
    return library if hasattr(library, "malloc_trim") else None
