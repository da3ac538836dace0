"""Work in tiles is the work at once, in the same order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import tiles
from quant.blockwise import BlockFormat, Blocks, dequantize, quantize_rows
from quant.tiles import TILE_WEIGHTS, in_tiles, joined, squared_sums

# one tile, whole ones, one with a shorter last, and rows that are each more than one
SHAPES = [(1, 1), (1000, 64), (1024, 64), (1025, 64), (5000, 33), (3, TILE_WEIGHTS), (3, TILE_WEIGHTS + 1), (7, 3)]
shapes = pytest.mark.parametrize(("num_rows", "width"), SHAPES)
KINDS = pytest.mark.parametrize(("bits", "zero_point"), [(4, False), (8, True)])


@shapes
def test_tiles_are_all_rows_in_their_order(num_rows: int, width: int) -> None:
    weights = np.broadcast_to(np.arange(num_rows, dtype=np.float32)[:, None], (num_rows, width))
    found = in_tiles(lambda rows: weights[rows, 0], weights)
    np.testing.assert_array_equal(np.concatenate(found), weights[:, 0])
    assert all(len(tile) == 1 or len(tile) * width <= TILE_WEIGHTS for tile in found)
    assert len(found) == -(-num_rows // max(1, TILE_WEIGHTS // width))


def test_an_error_in_a_tile_is_the_caller_s() -> None:
    with pytest.raises(ZeroDivisionError):
        in_tiles(lambda rows: 1 // (2048 - rows.start), np.zeros((5000, 64), np.float32))


@KINDS
@shapes
def test_joined_tiles_are_the_rows_at_once(num_rows: int, width: int, bits: int, zero_point: bool) -> None:
    form = BlockFormat(width, bits, 32, zero_point)
    weights = np.random.default_rng(0).normal(size=(num_rows, width)).astype(np.float32)
    found = joined(in_tiles(lambda rows: quantize_rows(weights[rows], form), weights))
    for mine, theirs in zip(found, quantize_rows(weights, form), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
def test_joined_takes_tiles_of_any_sizes(sizes: list[int], zero_point: bool) -> None:
    form = BlockFormat(40, 4, 16, zero_point)
    weights = np.random.default_rng(0).normal(size=(sum(sizes), 40)).astype(np.float32)
    parts = np.split(weights, np.cumsum(sizes)[:-1])
    found = joined([quantize_rows(part, form) for part in parts])
    for mine, theirs in zip(found, quantize_rows(weights, form), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@KINDS
@shapes
def test_squared_sums_are_those_of_all_weights(num_rows: int, width: int, bits: int, zero_point: bool) -> None:
    form = BlockFormat(width, bits, 32, zero_point)
    weights = np.random.default_rng(0).normal(size=(num_rows, width)).astype(np.float32)
    blocks = quantize_rows(weights, form)
    squared_error, squared_weights = squared_sums(weights, blocks, form)
    exact = weights.astype(np.float64)
    # sums of a tile are float32: 2^16 positive terms, of which BLAS keeps at least 8 sums apart, each term and addition
    # rounded to 2^-24; they err either way, so a 16th of the bound 2^13 * 2^-24 is far more than they do
    tolerance = 2**-15
    assert squared_weights == pytest.approx((exact**2).sum(), rel=tolerance)
    # the float32 differences are themselves rounded, to 2^-24 of a weight, which is 2^-15 of its error at 8 bits
    errors = dequantize(blocks, form).astype(np.float64) - exact
    assert squared_error == pytest.approx((errors**2).sum(), rel=2 * tolerance)


def test_sums_of_exact_blocks_are_exact() -> None:
    form = BlockFormat(64, 4, 32)
    blocks = Blocks(np.full((3, 32), 0x19, np.uint8), np.ones((3, 2), np.float16))  # 1 and -7
    assert squared_sums(dequantize(blocks, form), blocks, form) == (0, 3 * 32 * (1 + 49))
    assert squared_sums(np.zeros((3, 64), np.float32), blocks, form) == (3 * 32 * (1 + 49), 0)


def test_tiles_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are cores; on one core, one by one."""
    from threading import Barrier

    tiles._pool.cache_clear()
    monkeypatch.setattr("psutil.Process.cpu_affinity", lambda self: [0, 1])
    barrier = Barrier(2, timeout=10)
    in_tiles(lambda rows: barrier.wait(), np.zeros((2048, 64), np.float32))
    tiles._pool().shutdown()
    tiles._pool.cache_clear()
