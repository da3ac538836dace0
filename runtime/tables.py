"""Rows of the token and PLE tables, read from mapped files.

The files are mapped with random access advised, so that the kernel reads no neighbours ahead, and the mapping is
dropped from this process before more than `RESIDENT_BYTES` of it may be resident. The pages stay in the kernel's cache.
"""

import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.manifest import TableSpec

RESIDENT_BYTES = 64 << 20
FAULT_BYTES = 2 << 20  # what Linux maps around one touched page: a whole large folio of its cache, since 6.18

Float32 = npt.NDArray[np.float32]


class RowTable:
    """A table [num_rows, width] in a mapped file; `rows` looks up and multiplies."""

    def __init__(self, folder: Path, spec: TableSpec) -> None:
        self.spec = spec
        with (folder / spec.file).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)
        self._rows, self._scales = _map_arrays(self._map, spec)
        # one touch for the row, one for its scales
        self._touched_by_a_row = 2 * FAULT_BYTES + self._rows.strides[0]
        self._touched_bytes = 0

    def rows(self, token_ids: Sequence[int]) -> Float32:
        """Rows [num_tokens, width] of the given tokens, dequantized and multiplied."""
        index = np.asarray(token_ids, np.int64)
        values = np.empty((len(index), self.spec.width), np.float32)
        step = max(1, RESIDENT_BYTES // self._touched_by_a_row)
        for start in range(0, len(index), step):
            self._make_room(len(index[start : start + step]))
            values[start : start + step] = self._dequantized(index[start : start + step])
        values *= np.float32(self.spec.multiplier)
        return values

    def close(self) -> None:
        """Unmaps the file."""
        del self._rows, self._scales
        self._map.close()

    def _dequantized(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        rows = self._rows[index]
        if self._scales is None:
            return rows.astype(np.float32)
        return dequantize_rows(rows, self._scales[index], self.spec.width, self.spec.bits)

    def _make_room(self, num_rows: int) -> None:
        """Drops the mapping's pages where these rows could exceed the bound."""
        needed = num_rows * self._touched_by_a_row
        if self._touched_bytes + needed > RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched_bytes = 0
        self._touched_bytes += needed


def _map_arrays(mapped: mmap.mmap, spec: TableSpec) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.floating] | None]:
    if spec.bits >= 16:
        dtype = np.float16 if spec.bits == 16 else np.float32
        count = spec.num_rows * spec.width
        return np.frombuffer(mapped, dtype, count).reshape(spec.num_rows, spec.width), None
    codes = np.frombuffer(mapped, np.uint8, spec.num_rows * spec.row_bytes).reshape(spec.num_rows, spec.row_bytes)
    count = spec.num_rows * spec.num_blocks
    scales = np.frombuffer(mapped, np.dtype(spec.scale_dtype), count, spec.scale_offset)
    return codes, scales.reshape(spec.num_rows, spec.num_blocks)


def dequantize_rows(codes: npt.NDArray[np.generic], scales: npt.NDArray[np.floating], width: int, bits: int) -> Float32:
    """Weights [num_rows, width] from codes [num_rows, row_bytes] and scales [num_rows, num_blocks].

    Codes are unsigned around 2^(bits-1); of two 4-bit codes in a byte the low nibble comes first.
    """
    num_rows, num_blocks = scales.shape
    values = _unpack(codes, bits).astype(np.float32)
    values -= 1 << (bits - 1)
    blocks = values.reshape(num_rows, num_blocks, -1)
    blocks *= scales.astype(np.float32)[..., None]
    return values[:, :width] if values.shape[1] == width else np.ascontiguousarray(values[:, :width])


def _unpack(codes: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.generic]:
    if bits == 8:
        return codes
    nibbles = np.empty((*codes.shape, 2), np.uint8)
    np.bitwise_and(codes, 15, out=nibbles[..., 0])
    np.right_shift(codes, 4, out=nibbles[..., 1])
    return nibbles.reshape(codes.shape[0], -1)
