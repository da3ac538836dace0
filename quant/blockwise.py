"""Symmetric block-wise quantization to 4 or 8 bits, in the byte layout of ONNX Runtime's `MatMulNBits`.

A block of `block_size` weights along a row shares one scale. Codes are unsigned around 2^(bits-1); two 4-bit codes
share a byte, the earlier one in the low nibble. Rows are padded with zero weights to whole blocks. The float16 scale
maps the weight of largest magnitude to the lowest code, as llama.cpp's Q4_0 does, so a checkpoint trained for that grid
keeps it.

Source: onnxruntime ContribOperators `MatMulNBits`; ggml `quantize_row_q4_0_ref`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float16 = npt.NDArray[np.float16]
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How rows of `width` weights are packed: `bits` is 4 or 8, `block_size` weights share a scale."""

    width: int
    bits: int
    block_size: int

    @property
    def num_blocks(self) -> int:
        """Blocks in a row, the last one padded."""
        return -(-self.width // self.block_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's codes."""
        return self.block_size * self.bits // 8

    @property
    def zero_byte(self) -> int:
        """A byte of codes of zero weights."""
        return 0x88 if self.bits == 4 else 0x80

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's codes."""
        return self.num_blocks * self.block_bytes


def quantize_rows(weights: Float32, form: BlockFormat) -> tuple[Codes, Float16]:
    """Rounds each weight to the nearest code of its block.

    |w - dequantized| <= |scale| / 2, and <= |scale| for a weight at the clipped end (near the largest magnitude, with
    the other sign).

    Args:
        weights: [num_rows, width]

    Returns:
        codes [num_rows, row_bytes] and scales [num_rows, num_blocks]; a scale is infinite where its block is too large
    """
    num_rows, width = weights.shape
    padded = np.zeros((num_rows, form.num_blocks * form.block_size), np.float32)
    padded[:, :width] = weights
    blocks = padded.reshape(num_rows, form.num_blocks, form.block_size)
    scales = _scales(blocks, form.bits)
    middle = 1 << (form.bits - 1)
    blocks /= scales.astype(np.float32)[..., None]
    np.rint(blocks, out=blocks)
    blocks += middle
    np.clip(blocks, 0, 2 * middle - 1, out=blocks)
    return _pack(blocks.astype(np.uint8).reshape(num_rows, -1), form.bits), scales


def _scales(blocks: Float32, bits: int) -> Float16:
    """One scale a block, rounded away from zero so that none is too small for its block; 1 where all weights are 0."""
    lowest, highest = blocks.min(-1), blocks.max(-1)
    exact = np.where(-lowest >= highest, lowest, highest) / -(1 << (bits - 1))
    with np.errstate(over="ignore"):  # infinite where a block is too large for the scale's type
        scales: Float16 = exact.astype(np.float16)
        beyond = np.nextafter(scales, np.copysign(np.inf, exact).astype(np.float16))
    scales = np.where(np.abs(scales) < np.abs(exact), beyond, scales)
    scales[scales == 0] = 1
    return scales


def _pack(codes: Codes, bits: int) -> Codes:
    if bits == 8:
        return codes
    low, high = codes[:, 0::2], codes[:, 1::2]
    return np.bitwise_or(low, np.left_shift(high, 4, dtype=np.uint8), dtype=np.uint8)
