"""Finds the symmetric 4-bit grid that quantization-aware training left in a checkpoint's weights, and encodes on it.

Such weights are bf16(scale * code): a code is an integer in [-8, 7], a scale of either sign belongs to a block of 32
along a row. `quantize_rows` maps a block's largest magnitude to the lowest code; where training left it at another one,
that rounds every weight a second time. Here the grid's own codes come back. Nothing is known of how a checkpoint says
that it was trained so: the weights alone decide.

Source: ggml `quantize_row_q4_0_ref` (the grid); `MatMulNBits` (the bytes, those of `quant.blockwise`).
"""

import numpy as np
import numpy.typing as npt

from quant.blockwise import BlockFormat, Codes, Float16, Float32, encode, padded_blocks

# Half a unit of bfloat16's 8 bits: |w - x| <= 2^-8 |w| where w = bf16(x).
BF16_ROUNDING = np.float32(2**-8)
# With |w| = bf16(step * c) and the extreme bf16(step * top), |w| / extreme * top is between c / (1 + 2^-7) and
# c * (1 + 2^-7). That is at most 1/16 beside a code of up to 8, and c / top * other, for another top, is an integer or
# at least 1/8 beside one: a wrong top never fits a block on the grid.
CODE_TOLERANCE = np.float32(2**-7)
# Random weights fall this near a code with a chance below 1/10, so a random block of 32 fits one of eight tops with
# less than 1e-29, and the first tile turns away a checkpoint that was not trained for the grid.
TILE_BLOCKS = 1024  # 128 KiB a temporary at 32 weights a block, which stays in cache


def grid_blocks(weights: Float32, form: BlockFormat) -> tuple[Codes, Float16] | None:
    """Codes and scales that reproduce every weight to bf16 rounding, or None where some block is on no 4-bit grid.

    |w - dequantized| <= 2^-8 |w|, and bf16(dequantized) == w where a float16 scale exists that allows it. Any block
    size will do whose blocks lie in one block of the grid; longer ones must fit one scale like the others.

    Args:
        weights: [num_rows, width], finite

    Returns:
        codes [num_rows, row_bytes] and scales [num_rows, num_blocks], as `quantize_rows` lays them out
    """
    num_rows, _ = weights.shape
    codes = np.empty((num_rows, form.row_bytes), np.uint8)
    scales = np.empty((num_rows, form.num_blocks), np.float16)
    tile_rows = max(1, TILE_BLOCKS // form.num_blocks)
    for start in range(0, num_rows, tile_rows):
        rows = slice(start, start + tile_rows)
        blocks = padded_blocks(weights[rows], form)
        # numpy reduces down columns far faster than along rows
        found = _grid_scales(np.ascontiguousarray(blocks.reshape(-1, form.block_size).T))
        if found is None:
            return None
        scales[rows] = found.reshape(-1, form.num_blocks)
        codes[rows] = encode(blocks, scales[rows], form)
    return codes, scales


def _grid_scales(blocks: Float32) -> Float16 | None:
    """Scales [num_blocks] of blocks [block_size, num_blocks], or None where one is on no grid.

    Every weight is within 2^-8 of a code's multiple, so the nearest multiple is that one.
    """
    magnitudes = np.abs(blocks)
    extremes = magnitudes.max(0)
    extremes[extremes == 0] = 1  # a block of zeros is on the grid of step 1
    tops = _simplest_tops(magnitudes / extremes)
    if tops is None:
        return None
    # 8 is a code with a minus only, so the scale takes the sign that gives the extreme one
    flipped = (tops == 8) & (blocks.max(0) == extremes)
    signs = np.where(flipped, np.float32(-1), np.float32(1))
    codes = np.rint(blocks / (signs * extremes) * tops)
    if codes.max(initial=0) > 7:
        return None
    scales: Float16 = np.copysign(_steps(magnitudes, np.abs(codes), extremes, tops), signs.astype(np.float16))
    with np.errstate(invalid="ignore"):  # 0 times infinity, where float16 cannot hold the scale
        error = np.abs(blocks - codes * scales.astype(np.float32))
    return scales if (error <= BF16_ROUNDING * magnitudes).all() else None


def _simplest_tops(shares: Float32) -> Float32 | None:
    """For each block the smallest code of its extreme that puts all of it on codes [num_blocks], or None.

    Args:
        shares: [block_size, num_blocks], magnitudes as parts of the block's extreme
    """
    tops = np.zeros(shares.shape[1], np.float32)
    for top in range(1, 9):
        codes = shares * np.float32(top)
        nearest = np.rint(codes)
        codes -= nearest
        np.abs(codes, out=codes)
        nearest *= CODE_TOLERANCE  # 0 at code 0, which only a weight of 0 has
        fits = (codes <= nearest).all(0)
        tops[fits & (tops == 0)] = top
    return tops if tops.all() else None


def _steps(magnitudes: Float32, codes: Float32, extremes: Float32, tops: Float32) -> Float16:
    """The size of each block's scale [num_blocks].

    The one amid the quotients |w| / code is exact where the checkpoint's products are, and within 2^-8 of every weight
    for each float32 scale there is. It gives way to one that rounds to the very weights, if only that one does.
    """
    zero = codes == 0  # the extreme in its place leaves every bound as it is
    magnitudes = np.where(zero, extremes, magnitudes)
    codes = np.where(zero, tops, codes)
    quotients = magnitudes / codes
    lowest, highest = _rounding_interval(magnitudes)
    lowest, highest = (lowest / codes).max(0), (highest / codes).min(0)
    with np.errstate(over="ignore"):  # an infinite scale fails the caller's check
        amid_quotients: Float16 = ((quotients.min(0) + quotients.max(0)) / 2).astype(np.float16)
        amid_interval: Float16 = ((lowest + highest) / 2).astype(np.float16)
    better = ~_within(amid_quotients, lowest, highest) & _within(amid_interval, lowest, highest)
    return np.where(better, amid_interval, amid_quotients)


def _rounding_interval(magnitudes: Float32) -> tuple[Float32, Float32]:
    """The least and the greatest float32 that round to each positive bfloat16, ties to even."""
    bits = magnitudes.view(np.uint32)
    odd = (bits >> 16) & 1
    return (bits - 0x8000 + odd).view(np.float32), (bits + 0x8000 - odd).view(np.float32)


def _within(steps: Float16, lowest: Float32, highest: Float32) -> npt.NDArray[np.bool_]:
    return (lowest <= steps) & (steps <= highest)
