"""Block-wise quantization to 4 or 8 bits, in the byte layout of ONNX Runtime's `MatMulNBits`.

A block of `block_size` weights along a row shares one scale. Codes are unsigned around 2^(bits-1); two 4-bit codes
share a byte, the earlier one in the low nibble. Rows are padded with zero weights to whole blocks. The float16 scale
maps the weight of largest magnitude to the lowest code, as llama.cpp's Q4_0 does, so a checkpoint trained for that grid
keeps it. Asymmetric blocks have a zero point each, the code of a zero weight.

Source: onnxruntime ContribOperators `MatMulNBits`; ggml `quantize_row_q4_0_ref`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float16 = npt.NDArray[np.float16]
Codes = npt.NDArray[np.uint8]


class Blocks(NamedTuple):
    """Quantized rows: codes [num_rows, row_bytes], and for each block a scale and, if asymmetric, a zero point.

    Scales and zero points are [num_rows, num_blocks]; a weight is (code - zero point) * scale. Without zero points the
    code of zero is 2^(bits-1).
    """

    codes: Codes
    scales: Float16
    zero_points: Codes | None = None


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How rows of `width` weights are packed: `bits` is 4 or 8, `block_size` weights share a scale."""

    width: int
    bits: int
    block_size: int
    zero_point: bool = False

    @property
    def num_blocks(self) -> int:
        """Blocks in a row, the last one padded."""
        return -(-self.width // self.block_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's codes."""
        return self.block_size * self.bits // 8

    @property
    def middle(self) -> int:
        """The code of a zero weight where there are no zero points."""
        return 1 << (self.bits - 1)

    @property
    def zero_byte(self) -> int:
        """A byte of codes of zero weights."""
        return 0x88 if self.bits == 4 else 0x80

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's codes."""
        return self.num_blocks * self.block_bytes

    @property
    def zero_point_bytes(self) -> int:
        """Bytes of a row's zero points, which are packed as codes are."""
        return -(-self.num_blocks * self.bits // 8)


def quantize_rows(weights: Float32, form: BlockFormat) -> Blocks:
    """Rounds each weight to the nearest code of its block.

    Symmetric: |w - dequantized| <= |scale| / 2, and <= |scale| for a weight at the clipped end (near the largest
    magnitude, with the other sign). With zero points: <= |scale| / 2.

    Args:
        weights: [num_rows, width]

    Returns:
        codes [num_rows, row_bytes] and scales [num_rows, num_blocks]; a scale is infinite where its block is too large
    """
    blocks = padded_blocks(weights, form)
    if form.zero_point:
        return _asymmetric(blocks, form)
    scales = _scales(blocks, form.bits)
    return Blocks(encode(blocks, scales, form), scales)


def padded_blocks(weights: Float32, form: BlockFormat) -> Float32:
    """A copy of the weights as blocks [num_rows, num_blocks, block_size]; zeros fill the last one."""
    num_rows, width = weights.shape
    padded = np.zeros((num_rows, form.num_blocks * form.block_size), np.float32)
    padded[:, :width] = weights
    return padded.reshape(num_rows, form.num_blocks, form.block_size)


def encode(blocks: Float32, scales: Float16, form: BlockFormat) -> Codes:
    """Codes [num_rows, row_bytes] of the nearest multiples of given scales; overwrites the blocks."""
    blocks /= scales.astype(np.float32)[..., None]
    np.rint(blocks, out=blocks)
    blocks += form.middle
    np.clip(blocks, 0, 2 * form.middle - 1, out=blocks)
    return pack(blocks.astype(np.uint8).reshape(len(blocks), -1), form.bits)


def dequantize(blocks: Blocks, form: BlockFormat) -> Float32:
    """The weights [num_rows, width] that the codes stand for."""
    levels = unpack(blocks.codes, form.bits).reshape(len(blocks.codes), form.num_blocks, form.block_size)
    values = levels.astype(np.float32)
    values -= form.middle if blocks.zero_points is None else blocks.zero_points[..., None]
    values *= blocks.scales.astype(np.float32)[..., None]
    return values.reshape(len(values), -1)[:, : form.width]


def pack(levels: Codes, bits: int) -> Codes:
    """Two 4-bit codes a byte, the earlier one in the low nibble; 8-bit ones as they are. [num_rows, even number]"""
    if bits == 8:
        return levels
    pairs = np.ascontiguousarray(levels).view("<u2")
    packed: Codes = (pairs | pairs >> 4).astype(np.uint8)
    return packed


def unpack(codes: Codes, bits: int) -> Codes:
    """The levels that `pack` took."""
    if bits == 8:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)


def _scales(blocks: Float32, bits: int) -> Float16:
    """One scale a block, rounded away from zero so that none is too small for its block; 1 where all weights are 0."""
    scales = outward(extremes(columns(blocks)) / np.float32(-(1 << (bits - 1))))
    return scales.reshape(blocks.shape[:-1])


def columns(blocks: Float32) -> Float32:
    """A copy [block_size, number of blocks]: numpy reduces down columns several times faster than along short rows."""
    return np.ascontiguousarray(blocks.reshape(-1, blocks.shape[-1]).T)


def extremes(columns: Float32) -> Float32:
    """The weight of largest magnitude of each block [number of blocks]; of two, the negative one."""
    lowest, highest = columns.min(0), columns.max(0)
    found: Float32 = np.where(-lowest >= highest, lowest, highest)
    return found


def outward(exact: Float32) -> Float16:
    """The nearest float16 not below in magnitude; 1 for 0, infinite where it is too large for the type."""
    with np.errstate(over="ignore"):
        scales: Float16 = exact.astype(np.float16)
        beyond = np.nextafter(scales, np.copysign(np.inf, exact).astype(np.float16))
    scales = np.where(np.abs(scales) < np.abs(exact), beyond, scales)
    scales[scales == 0] = 1
    return scales


def _asymmetric(blocks: Float32, form: BlockFormat) -> Blocks:
    """The range of a block, which includes 0, in equal steps; the zero point is the code of 0."""
    most = 2 * form.middle - 1
    lowest, highest = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scales = outward((highest - lowest) / most)
    with np.errstate(invalid="ignore"):
        zero_points = np.clip(np.rint(-lowest / scales.astype(np.float32)), 0, most)
        blocks /= scales.astype(np.float32)[..., None]
    np.rint(blocks, out=blocks)
    blocks += zero_points[..., None]
    np.clip(blocks, 0, most, out=blocks)
    codes = pack(np.nan_to_num(blocks).astype(np.uint8).reshape(len(blocks), -1), form.bits)
    return Blocks(codes, scales, np.nan_to_num(zero_points).astype(np.uint8))
