"""Where quantized matrices and tables lie in their files: read from the manifest, checked to the byte.

A quantized matrix has a float16 scale a block, and its rows are padded to whole panels of 32 in both layouts (see
`runtime.panels`).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Self

from runtime.errors import ArtifactError
from runtime.layout import LAYOUTS, Layout
from runtime.panels import PANEL_ROWS, SCALE_BYTES, WORD_BYTES
from runtime.strict_json import MANIFEST, WAY_OUT, bad_field, integer, object_of, one_of, string

ALIGNMENT = 64  # what the native product asks for; a page would waste half a page a matrix


def padded_rows(num_rows: int) -> int:
    """Rows of whole panels."""
    return -(-num_rows // PANEL_ROWS) * PANEL_ROWS


@dataclass(frozen=True, slots=True)
class MatrixSpec:
    """A quantized matrix that a conversion permutes: `num_bytes` bytes at `offset` of `file`, in either layout."""

    file: str
    offset: int
    num_rows: int
    num_blocks: int
    block_bytes: int

    @property
    def padded_rows(self) -> int:
        """Rows with those that fill the last panel."""
        return padded_rows(self.num_rows)

    @property
    def panel_bytes(self) -> int:
        """Bytes of 32 rows in either layout."""
        return PANEL_ROWS * self.num_blocks * (self.block_bytes + SCALE_BYTES)

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.padded_rows // PANEL_ROWS * self.panel_bytes

    @property
    def scale_offset(self) -> int:
        """Where the scales start in the portable layout."""
        return self.offset + self.padded_rows * self.num_blocks * self.block_bytes

    @classmethod
    def from_json(cls, value: object, field: str) -> Self:
        """The matrix under `field` of the manifest."""
        entry = object_of(value, field, [field.name for field in fields(cls)])
        string(entry["file"], f"{field}.file")
        integer(entry["offset"], f"{field}.offset", 0)
        for name in ("num_rows", "num_blocks", "block_bytes"):
            integer(entry[name], f"{field}.{name}", 1)
        matrix = cls(**entry)
        if matrix.offset % ALIGNMENT:
            raise bad_field(f"{field}.offset", matrix.offset, f"a multiple of {ALIGNMENT:,}")
        if matrix.block_bytes % WORD_BYTES:
            raise bad_field(f"{field}.block_bytes", matrix.block_bytes, f"a multiple of {WORD_BYTES}")
        return matrix


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A table [num_rows, width] that fills its file: a quantized matrix in a layout, or rows of 16- or 32-bit floats.

    Floats have no blocks: `block_size` is 0. A value is `quantized * scale * multiplier`.
    """

    file: str
    num_rows: int
    width: int
    bits: int
    block_size: int
    layout: Layout
    multiplier: float

    @property
    def is_quantized(self) -> bool:
        """Whether codes and scales are stored instead of floats."""
        return self.bits < 16

    @property
    def num_blocks(self) -> int:
        """Scales of one row."""
        return -(-self.width // self.block_size) if self.block_size else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row without its scales; a quantized row is padded to whole blocks."""
        return (self.num_blocks * self.block_size or self.width) * self.bits // 8

    @property
    def matrix(self) -> MatrixSpec:
        """The table as a matrix; only where it is quantized."""
        return MatrixSpec(self.file, 0, self.num_rows, self.num_blocks, self.block_size * self.bits // 8)

    @classmethod
    def from_json(cls, value: object, field: str) -> Self:
        """The table under `field` of the manifest."""
        entry = object_of(value, field, [field.name for field in fields(cls)])
        for name in ("num_rows", "width", "bits"):
            integer(entry[name], f"{field}.{name}", 1)
        integer(entry["block_size"], f"{field}.block_size", 0)
        string(entry["file"], f"{field}.file")
        one_of(entry["layout"], f"{field}.layout", LAYOUTS)
        if type(entry["multiplier"]) not in (int, float) or not 0 < entry["multiplier"] < math.inf:
            raise bad_field(f"{field}.multiplier", entry["multiplier"], "a number above 0")
        return cls(**entry)

    def check(self, file_size: int) -> None:
        """Raises ArtifactError unless the format is one that exists and fills `file_size` bytes exactly."""
        self._check_format()
        num_bytes = self.matrix.num_bytes if self.is_quantized else self.num_rows * self.row_bytes
        if file_size != num_bytes:
            scales = f" and {SCALE_BYTES * self.num_blocks} bytes of scales" if self.is_quantized else ""
            num_rows = padded_rows(self.num_rows) if self.is_quantized else self.num_rows
            raise ArtifactError(
                f"{self.file} is {file_size:,} bytes, expected {num_bytes:,}: {num_rows:,} rows of {self.row_bytes:,} "
                f"bytes{scales}; {WAY_OUT}"
            )

    def _check_format(self) -> None:
        if self.bits in (16, 32):
            if self.block_size:
                raise bad_field(f"{self.file}: block_size", self.block_size, f"0 at {self.bits} bits")
            if self.layout != "portable":
                raise bad_field(f"{self.file}: layout", self.layout, f"portable at {self.bits} bits")
            return
        if self.bits not in (4, 8):
            raise bad_field(f"{self.file}: bits", self.bits, "4, 8, 16 or 32")
        if self.block_size < 1 or self.block_size * self.bits % (8 * WORD_BYTES):
            raise bad_field(f"{self.file}: block_size", self.block_size, f"{WORD_BYTES} bytes of codes or multiples")


def check_matrices(matrices: Iterable[MatrixSpec], file_sizes: Mapping[str, int]) -> None:
    """Raises ArtifactError where a matrix lies in another file, beyond its end or over another matrix."""
    ends = dict.fromkeys(file_sizes, 0)
    for matrix in sorted(matrices, key=lambda matrix: (matrix.file, matrix.offset)):
        if matrix.file not in file_sizes:
            raise bad_field("a matrix's file", matrix.file, "a file of weights")
        end, size = matrix.offset + matrix.num_bytes, file_sizes[matrix.file]
        place = f"matrices: {matrix.file} at {matrix.offset:,}"
        if matrix.offset < ends[matrix.file]:
            raise bad_field(place, matrix.offset, f"at least {ends[matrix.file]:,}, where the matrix before it ends")
        if end > size:
            raise ArtifactError(f"{MANIFEST}: {place}: ends at {end:,}, the file at {size:,}; {WAY_OUT}")
        ends[matrix.file] = end
