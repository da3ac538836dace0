"""Rows of the token and PLE tables, read from their files one by one.

Reads, not a mapping: the rows of a text lie far apart, and what a mapping makes resident around each of them (a whole
large folio of the kernel's cache, up to 2 MiB) takes longer to map and to drop again than a row takes to copy.
So a table keeps nothing resident in this process, and a file that was cut short is an error instead of a bus error.
What the system's cache keeps of the rows that were read is bounded too, where the system can be told to drop it.
"""

import os
import weakref
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.errors import ArtifactError
from runtime.matrix_spec import TableSpec
from runtime.panels import PANEL_ROWS, SCALE_BYTES, Bytes, Scales, code_words, panel_scales

Float32 = npt.NDArray[np.float32]

# The most that stays in the system's cache of a table that only single rows are read from: a few thousand E2B tokens.
CACHED_TABLE_BYTES = 64 << 20
PAGE_BYTES = 4096

# the two weights of a byte of 4-bit codes, as one element
_PAIRS = np.stack([np.arange(256) % 16 - 8, np.arange(256) // 16 - 8], axis=-1).astype(np.float32).view(np.uint64)[:, 0]


class RowTable:
    """A table [num_rows, width] in a file; `rows` looks up and multiplies.

    Args:
        cached_bytes: the most of the file that this reader leaves in the system's cache; None where others, such as a
            session that maps it, want it there
    """

    def __init__(self, folder: Path, spec: TableSpec, *, cached_bytes: int | None = None) -> None:
        self.spec = spec
        self._cached_bytes = cached_bytes
        self._num_read_bytes = 0  # whole pages, since the cache was last told to drop them
        descriptor = os.open(folder / spec.file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._release = weakref.finalize(self, os.close, descriptor)  # also where nobody calls `close`
        self._file = FileIO(descriptor, closefd=False)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # neighbours are not read ahead
        if cached_bytes is not None:
            self._drop_cached()  # a whole file may be there, just written or checked
        if spec.layout == "native":
            self._panel = np.empty(spec.matrix.panel_bytes // 4, np.uint32).reshape(1, spec.num_blocks, -1)

    def rows(self, token_ids: Sequence[int]) -> Float32:
        """Rows [num_tokens, width] of the given tokens, dequantized and multiplied.

        Raises:
            ArtifactError: the file is shorter than it was when it was opened.
        """
        values = self._dequantized(token_ids) if self.spec.is_quantized else self._floats(token_ids)
        values *= np.float32(self.spec.multiplier)
        return values

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        self._release()

    def _floats(self, token_ids: Sequence[int]) -> Float32:
        rows = np.empty((len(token_ids), self.spec.width), np.float16 if self.spec.bits == 16 else np.float32)
        for row, token_id in zip(rows, token_ids, strict=True):
            self._read(token_id * self.spec.row_bytes, row)
        return rows.astype(np.float32, copy=False)

    def _dequantized(self, token_ids: Sequence[int]) -> Float32:
        codes = np.empty((len(token_ids), self.spec.row_bytes), np.uint8)
        scales = np.empty((len(token_ids), self.spec.num_blocks), np.float16)
        read_row = self._read_from_panel if self.spec.layout == "native" else self._read_row
        for index, token_id in enumerate(token_ids):
            read_row(int(token_id), codes[index], scales[index])
        return dequantize_rows(codes, scales, self.spec.width, self.spec.bits)

    def _read_row(self, token_id: int, codes: Bytes, scales: Scales) -> None:
        self._read(token_id * len(codes), codes)
        self._read(self.spec.matrix.scale_offset + token_id * SCALE_BYTES * len(scales), scales)

    def _read_from_panel(self, token_id: int, codes: Bytes, scales: Scales) -> None:
        panel, row = divmod(token_id, PANEL_ROWS)
        self._read(panel * self._panel.nbytes, self._panel)
        codes.view(np.uint32).reshape(len(scales), -1)[...] = code_words(self._panel)[0, :, :, row]
        scales[...] = panel_scales(self._panel)[0, :, row]

    def _read(self, offset: int, array: npt.NDArray[np.generic]) -> None:
        if self._cached_bytes is not None:
            self._make_room_in_cache(self._cached_bytes, offset, array.nbytes)
        self._file.seek(offset)
        if self._file.readinto(array.data) != array.nbytes:
            end = offset + array.nbytes
            raise ArtifactError(f"{self.spec.file} ends before byte {end:,}: it was cut while in use; load it again")

    def _make_room_in_cache(self, most: int, offset: int, num_bytes: int) -> None:
        num_pages = (offset % PAGE_BYTES + num_bytes - 1) // PAGE_BYTES + 1
        if self._num_read_bytes + num_pages * PAGE_BYTES > most:
            self._drop_cached()
        self._num_read_bytes += num_pages * PAGE_BYTES

    def _drop_cached(self) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._num_read_bytes = 0


def dequantize_rows(codes: Bytes, scales: Scales, width: int, bits: int) -> Float32:
    """Weights [num_rows, width] from codes [num_rows, row_bytes] and scales [num_rows, num_blocks].

    Codes are unsigned around 2^(bits-1); of two 4-bit codes in a byte the low nibble comes first.
    """
    num_rows, num_blocks = scales.shape
    values: Float32
    if bits == 4:
        values = np.take(_PAIRS, codes, mode="clip").view(np.float32)  # no index is out of range
    else:
        values = codes.astype(np.float32)
        values -= 128
    blocks = values.reshape(num_rows, num_blocks, -1)
    blocks *= scales.astype(np.float32)[..., None]
    return values if values.shape[1] == width else np.ascontiguousarray(values[:, :width])
