"""Applies a quantizer to rows in tiles that stay in a core's cache, several at a time; numpy lets go of the lock."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np
import psutil

from quant.blockwise import BlockFormat, Blocks, Float32, dequantize

TILE_WEIGHTS = 1 << 16  # 256 KiB as float32

Result = TypeVar("Result")


def in_tiles(work: Callable[[slice], Result], weights: Float32) -> list[Result]:
    """What `work` gives for each tile's rows of weights [num_rows, width], in their order."""
    num_rows, width = weights.shape
    step = max(1, TILE_WEIGHTS // width)
    return list(_pool().map(work, (slice(first, first + step) for first in range(0, num_rows, step))))


def joined(tiles: Sequence[Blocks]) -> Blocks:
    """The blocks of all tiles as one."""
    codes, scales, zero_points = zip(*tiles, strict=True)
    zeros = None if zero_points[0] is None else np.concatenate(zero_points)
    return Blocks(np.concatenate(codes), np.concatenate(scales), zeros)


def squared_sums(weights: Float32, blocks: Blocks, form: BlockFormat) -> tuple[float, float]:
    """Sums of (w - dequantized)^2 and of w^2 over rows [num_rows, width] and their blocks."""

    def of_tile(rows: slice) -> tuple[float, float]:
        found = Blocks(*(None if part is None else part[rows] for part in blocks))  # type: ignore[arg-type]
        mine = weights[rows].ravel()
        errors = dequantize(found, form).ravel() - mine
        return float(errors @ errors), float(mine @ mine)

    sums = np.array(in_tiles(of_tile, weights))
    return float(sums[:, 0].sum()), float(sums[:, 1].sum())


@cache
def _pool() -> ThreadPoolExecutor:
    process = psutil.Process()
    num_threads = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count()
    return ThreadPoolExecutor(num_threads)
