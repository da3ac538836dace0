"""Matrices that a checkpoint stores quantized: what each storage can give, and re-encoding for our block format.

Storages are in `export.bitsandbytes_tensors` and `export.packed_tensors`; `export.quantization_config` finds which
matrix has which. None knows of models or graphs.
"""

from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from export.errors import CheckpointError
from quant.blockwise import BlockFormat, Blocks, Codes, Float16, pack

Float32 = npt.NDArray[np.float32]

FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
MAX_COUNT = 1 << 31
FLOAT16_ROUNDING = 2.0**-11  # of a normal float16, relative


class TensorReader(Protocol):
    """The tensors of a checkpoint's files as they are stored; names are those in the files."""

    def place(self, name: str) -> str:
        """A tensor's file and name, for messages."""
        ...

    def stored(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Type and shape of a tensor; None where no file has it."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor, or all of it."""
        ...


class QuantizedTensor(Protocol):
    """A matrix [num_rows, width] that is stored quantized; reads from the files what it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: [num_rows, width]."""
        ...

    @property
    def nf4_block_size(self) -> int | None:
        """Weights that share a scale, where it is stored as NF4."""
        ...

    def rows(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) dequantized in float32, which is the library's own result before it rounds it."""
        ...

    def fits(self, form: BlockFormat, start: int, stop: int) -> bool:
        """Whether there are `blocks` of these rows; reads the scales alone."""
        ...

    def blocks(self, form: BlockFormat, start: int, stop: int) -> Blocks | None:
        """The stored codes of rows [start, stop) in another format, exact but for scales rounded to float16.

        None where the format, or float16 for one of these rows' scales, cannot hold them.
        """
        ...

    def nf4_blocks(self, start: int, stop: int) -> tuple[Codes, Float32] | None:
        """Packed codes and scales of rows [start, stop) laid end to end, as bitsandbytes has them.

        None where they are no NF4, or begin or end within a block.
        """
        ...


def reencode(levels: Codes, bits: int, scales: Float32, zero_points: Codes | None, form: BlockFormat) -> Blocks | None:
    """Codes in another format: the same where it has as many bits, moved to its middle where it has more.

    Args:
        levels: [num_rows, width], unsigned around 2^(bits-1)
        scales: [num_rows, num_groups] for groups of equal size along a row
        zero_points: as scales; None where all are 2^(bits-1)

    Returns:
        None where blocks would cross groups, or bits, zero points or scales do not fit.
    """
    halves = float16_scales(scales)
    if halves is None or not holds_codes(form, bits, scales.shape[1], is_symmetric=zero_points is None):
        return None
    num_rows, width = levels.shape
    offset = form.middle - (1 << (bits - 1))
    zeros = np.full(scales.shape, form.middle, np.uint8) if zero_points is None else zero_points + np.uint8(offset)
    padded = np.empty((num_rows, form.num_blocks * form.block_size), np.uint8)
    np.add(levels, offset, out=padded[:, :width], casting="unsafe")
    padded[:, width:] = zeros[:, -1:]
    repeats = form.num_blocks // scales.shape[1]  # without padding where there is more than one group
    return Blocks(
        pack(padded, form.bits),
        np.repeat(halves, repeats, axis=1),
        np.repeat(zeros, repeats, axis=1) if form.zero_point else None,
    )


def holds_codes(form: BlockFormat, bits: int, num_groups: int, *, is_symmetric: bool) -> bool:
    """Whether a format has the bits and zero points for codes, and no block of it crosses groups along a row."""
    crosses = num_groups > 1 and form.width // num_groups % form.block_size
    return bits <= form.bits and not crosses and (is_symmetric or form.zero_point)


def float16_scales(scales: Float32) -> Float16 | None:
    """Scales as float16; None where one is beyond its range or in the part of it that has fewer digits."""
    with np.errstate(over="ignore"):
        halves: Float16 = scales.astype(np.float16)
    fits = np.abs(halves.astype(np.float32) - scales) <= np.abs(scales) * np.float32(FLOAT16_ROUNDING)
    return halves if fits.all() else None


def expect(
    reader: TensorReader, name: str, types: Collection[str], shape: tuple[int, ...], matrix: str, size: tuple[int, ...]
) -> None:
    """Raises CheckpointError unless one of a matrix's tensors is there, of one of the types and of the shape."""
    found = reader.stored(name)
    expected = f"expected {' or '.join(sorted(types))} {list(shape)} for a matrix of {list(size)}"
    if found is None:
        raise CheckpointError(f"{reader.place(matrix)} is quantized, but there is no tensor {name}, {expected}")
    if found[0] not in types or found[1] != shape:
        raise CheckpointError(f"{reader.place(name)} is {found[0]} {list(found[1])}, {expected}")


def read_finite(reader: TensorReader, name: str, start: int = 0, stop: int | None = None) -> Float32:
    """Floats of any type as float32; CheckpointError on NaN or infinity."""
    values: Float32 = reader.read(name, start, stop).to(torch.float32).numpy()
    check_finite(reader, name, values)
    return values


def check_finite(reader: TensorReader, name: str, values: Float32) -> None:
    """Raises CheckpointError on NaN or infinity."""
    if not np.isfinite(values).all():
        raise CheckpointError(f"{reader.place(name)} holds NaN or infinity; the checkpoint is damaged")


def is_count(value: Any) -> bool:
    """Whether a value that was read from JSON is a whole number above 0 that can be a size."""
    return type(value) is int and 0 < value < MAX_COUNT
