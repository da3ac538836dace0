"""Round to nearest with the scale of each block searched: the squared error is least, some weights may be clipped.

Candidates map the block's weight of largest magnitude to levels from beyond to well inside the range; each one's codes
give the scale that fits them best in closed form. With the inputs' second moments the error is that of the product:
E[(w - q) x]^2 with independent inputs, each weight's squared error times the mean square of its input.

Source: ggml `make_qx_quants` (the search), llama.cpp's importance matrix (the weighting; its diagonal is AWQ's, arXiv
2306.00978 section 3.1).
"""

import numpy as np

from quant.blockwise import (
    BlockFormat,
    Blocks,
    Float16,
    Float32,
    columns,
    encode,
    extremes,
    padded_blocks,
    quantize_rows,
)

# where the weight of largest magnitude comes to lie, in levels beyond the last one: from -1.4 (clipped) to +1.4
SHIFTS = np.linspace(-1.4, 1.4, 15, dtype=np.float32)


def search_rows(weights: Float32, form: BlockFormat, mean_squares: Float32 | None = None) -> Blocks:
    """Quantizes rows with the best of the candidate scales; never worse than `quantize_rows` by what it minimizes.

    At 8 bits, and with zero points, it is `quantize_rows`: clipping gains nothing there.

    Args:
        weights: [num_rows, width]
        mean_squares: [width], of the inputs that the weights are multiplied with; None weighs all alike
    """
    nearest = quantize_rows(weights, form)
    if form.bits == 8 or form.zero_point:
        return nearest
    blocks = padded_blocks(weights, form)
    importance = None
    if mean_squares is not None:
        importance = columns(np.broadcast_to(padded_blocks(mean_squares[None], form), blocks.shape))
    with np.errstate(over="ignore", invalid="ignore"):
        scales = _best_scales(columns(blocks), nearest.scales.ravel(), importance, form)
    return Blocks(encode(blocks, scales.reshape(nearest.scales.shape), form), scales.reshape(nearest.scales.shape))


def _best_scales(blocks: Float32, nearest: Float16, importance: Float32 | None, form: BlockFormat) -> Float16:
    """The best scale of each block [block_size, number of blocks]."""
    extreme = extremes(blocks)
    weighted = blocks if importance is None else blocks * importance
    best = nearest.copy()
    least = _errors(blocks, best, importance, form)
    for shift in SHIFTS:
        levels = _levels(blocks, extreme / -(form.middle + shift), form)
        scaled = levels if importance is None else levels * importance
        products, squares = _dot(weighted, levels), _dot(scaled, levels)
        fitted = np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)
        scales = fitted.astype(np.float16)
        errors = _errors(blocks, scales, importance, form)
        is_better = (errors < least) & (scales != 0)
        best[is_better], least[is_better] = scales[is_better], errors[is_better]
    return best


def _levels(blocks: Float32, scales: Float32, form: BlockFormat) -> Float32:
    """Signed levels of the nearest multiples; 0 where a scale is 0."""
    levels: Float32 = blocks * np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    np.rint(levels, out=levels)
    return np.clip(levels, -form.middle, form.middle - 1, out=levels)


def _errors(blocks: Float32, scales: Float16, importance: Float32 | None, form: BlockFormat) -> Float32:
    """Squared error of each block, weighted."""
    floats = scales.astype(np.float32)
    errors = _levels(blocks, floats, form)
    errors *= floats
    errors -= blocks
    return _dot(errors, errors if importance is None else errors * importance)


def _dot(a: Float32, b: Float32) -> Float32:
    product: Float32 = (a * b).sum(0)
    return product
