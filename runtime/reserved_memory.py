"""Memory that is reserved once and whose pages the system provides when they are first written.

Its address never changes, and what was never written takes no memory. Where the system has no such mappings, plain
memory of numpy serves, whose pages most systems provide late, too.
"""

import mmap
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from runtime.errors import MemoryBudgetError

PAGE_BYTES = mmap.PAGESIZE


class ReservedMemory:
    """`num_bytes` zero bytes in `array`, from a page's begin on."""

    def __init__(self, num_bytes: int) -> None:
        """Raises MemoryBudgetError where the system grants no such stretch of addresses."""
        self._mapping: mmap.mmap | None = None
        try:
            self.array = self._mapped(whole_pages(num_bytes)) if num_bytes else np.empty(0, np.uint8)
        except (OSError, MemoryError) as error:
            raise MemoryBudgetError(
                f"the system grants no {num_bytes / (1 << 20):,.0f} MiB of addresses for the KV cache; raise its limit "
                "(ulimit -v) or lower context_tokens"
            ) from error

    def _mapped(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        if not hasattr(mmap, "MAP_PRIVATE"):
            return np.empty(num_bytes, np.uint8)
        self._mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # else the first row of a layer may take 2 MiB
            with suppress(OSError):  # a kernel without huge pages
                self._mapping.madvise(mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(self._mapping, np.uint8)

    def release(self, start: int, stop: int) -> None:
        """Gives the pages [start, stop), both at a page's begin, back; what they held is lost."""
        if self._mapping is not None and start < stop and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)


def whole_pages(num_bytes: int) -> int:
    """`num_bytes`, rounded up to pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
