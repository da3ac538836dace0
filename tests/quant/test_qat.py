"""Weights that training left on a 4-bit grid are encoded without further loss, and no others are taken for such."""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quant.blockwise import BlockFormat, quantize_rows
from quant.qat import TILE_BLOCKS, grid_blocks
from runtime.tables import dequantize_rows

Float32 = npt.NDArray[np.float32]
BF16_ROUNDING = 2**-8  # half a unit of 8 bits
NORMAL = 2.0**-14  # the least float16 that has all its bits
GRID_BLOCK = 32

FORMATS = st.builds(BlockFormat, st.integers(1, 100), st.sampled_from([4, 8]), st.sampled_from([16, 32]))
FLOAT16 = st.floats(2**-24, 1024, width=16)  # down to the least subnormal
FLOAT32 = st.floats(NORMAL, 1024, width=32)
BFLOAT16 = FLOAT32.map(lambda scale: float(bf16(np.float32(scale))))


def bf16(values: npt.ArrayLike) -> Float32:
    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def restored(weights: Float32, form: BlockFormat) -> Float32:
    found = grid_blocks(weights, form)
    assert found is not None
    codes, scales = found
    assert (codes.shape, codes.dtype) == ((len(weights), form.row_bytes), np.uint8)
    assert (scales.shape, scales.dtype) == ((len(weights), form.num_blocks), np.float16)
    return dequantize_rows(codes, scales, form.width, form.bits)


def assert_within_bf16_rounding(found: Float32, weights: Float32) -> None:
    # exact: the product of a float16 and a code has 15 bits, and float32 holds its distance from a near number of 8
    assert (np.abs(found - weights) <= BF16_ROUNDING * np.abs(weights)).all()


def grid(codes: npt.NDArray[np.integer], scales: npt.NDArray[np.floating]) -> Float32:
    """Products [num_rows, num_blocks * 32] of codes [num_rows, num_blocks, 32] and scales [num_rows, num_blocks]."""
    return (codes * np.asarray(scales, np.float32)[..., None]).astype(np.float32).reshape(len(codes), -1)


@st.composite
def products(draw: st.DrawFn, width: int, scales: st.SearchStrategy[float]) -> Float32:
    """Rows of codes times scales of either sign, before any rounding; each block has a largest code of its own."""
    num_rows, num_blocks = draw(st.integers(1, 4)), -(-width // GRID_BLOCK)
    shape = (num_rows, num_blocks)
    codes = draw(arrays.arrays(np.int8, (*shape, GRID_BLOCK), elements=st.integers(-8, 7)))
    tops = draw(arrays.arrays(np.int8, shape, elements=st.integers(0, 8)))[..., None]
    signed = st.tuples(scales, st.sampled_from([-1, 1])).map(lambda pair: pair[0] * pair[1])
    sizes = draw(arrays.arrays(np.float32, shape, elements=signed))
    return grid(np.clip(codes, -tops, tops), sizes)[:, :width]


def off_the_grid(weights: Float32) -> Float32:
    """One weight in the last block, half-way between two codes."""
    moved = weights.copy()
    step = np.abs(weights[-1, -GRID_BLOCK:]).max() / 8
    moved[-1, -2] = bf16(2.5 * step)
    return moved


def random_grid(shape: tuple[int, int], top: int, scale_type: npt.DTypeLike = np.float16) -> Float32:
    """bf16 weights whose every block has codes up to `top`, of its scale's sign, and down to 1 - top."""
    rng = np.random.default_rng(top)
    blocks = (shape[0], shape[1] // GRID_BLOCK)
    codes = rng.integers(1 - top, top + 1, size=(*blocks, GRID_BLOCK))
    codes[..., :4] = np.array([top, 1, top - 1, 1 - top])
    if top == 8:
        codes = -codes
    return bf16(grid(codes, (rng.uniform(0.001, 0.1, blocks) * rng.choice([-1, 1], blocks)).astype(scale_type)))


@settings(max_examples=100, deadline=None)
@given(st.data(), FORMATS)
def test_a_grid_whose_scales_float16_holds_comes_back_exactly(data: st.DataObject, form: BlockFormat) -> None:
    weights = bf16(data.draw(products(form.width, st.one_of(FLOAT16, BFLOAT16))))
    np.testing.assert_array_equal(bf16(restored(weights, form)), weights)


@settings(max_examples=60, deadline=None)
@given(st.data(), FORMATS)
def test_a_grid_of_any_scale_comes_back_to_bf16_rounding(data: st.DataObject, form: BlockFormat) -> None:
    weights = bf16(data.draw(products(form.width, FLOAT32)))
    assert_within_bf16_rounding(restored(weights, form), weights)


@settings(max_examples=40, deadline=None)
@given(st.data(), FORMATS)
def test_products_that_were_never_rounded_come_back_to_the_scale_s_rounding(
    data: st.DataObject, form: BlockFormat
) -> None:
    weights = data.draw(products(form.width, FLOAT32))
    # half a unit of float16's 11 bits, and float32's rounding of the quotients, which may turn a tie
    assert (np.abs(restored(weights, form) - weights) <= (2**-11 + 2**-22) * np.abs(weights)).all()


def test_every_float32_scale_has_a_float16_that_serves() -> None:
    """All of [1, 2): the weights change only where a product passes a tie, so both ends of each stretch are all of it.

    Codes 2, 4, 6 and 8 round as 1 and 3 do; other scales are these times a power of 2.
    """
    odd = np.array([1, 3, 5, 7])
    ties = np.arange(2**8, 2**13) / 2**9  # every midpoint of two bfloat16 from 1/2 to 16 is among these
    stretches = np.unique((ties / odd[:, None]).astype(np.float32))
    stretches = stretches[(stretches >= 1) & (stretches < 2)]
    scales = np.concatenate([np.nextafter(stretches, np.float32(0)), stretches, np.nextafter(stretches, np.float32(4))])
    weights = bf16(scales[:, None] * np.arange(-8, 8, dtype=np.float32))
    assert_within_bf16_rounding(restored(weights, BlockFormat(16, 4, 16)), weights)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("top", range(1, 9))
def test_products_that_float16_scales_left_unrounded_are_exact(top: int, bits: int) -> None:
    """As in a float16 or float32 checkpoint."""
    rng = np.random.default_rng(top)
    codes = rng.integers(-top, min(top, 7) + 1, size=(40, 4, GRID_BLOCK))
    codes[..., :2] = [-top, 1]  # code 1 keeps a larger step from fitting
    scales = rng.normal(size=(40, 4)).astype(np.float16)
    weights = grid(codes, scales)
    np.testing.assert_array_equal(restored(weights, BlockFormat(128, bits, GRID_BLOCK)), weights)


def test_codes_and_scales_are_those_of_absmax_where_every_block_uses_the_lowest_code() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, size=(50, 4, GRID_BLOCK))
    codes[..., :2] = [-8, 1]
    weights, form = grid(codes, rng.normal(size=(50, 4)).astype(np.float16)), BlockFormat(128, 4, GRID_BLOCK)
    found, absmax = grid_blocks(weights, form), quantize_rows(weights, form)
    assert found is not None
    np.testing.assert_array_equal(found[0], absmax[0])
    np.testing.assert_array_equal(found[1], absmax[1])


@pytest.mark.parametrize("top", [5, 7])
def test_absmax_rounds_a_second_time_where_the_lowest_code_is_unused(top: int) -> None:
    weights, form = random_grid((64, 256), top), BlockFormat(256, 4, GRID_BLOCK)

    def relative_error(found: Float32) -> float:
        return float(np.linalg.norm(found - weights) / np.linalg.norm(weights))

    codes, scales, *_ = quantize_rows(weights, form)
    assert relative_error(dequantize_rows(codes, scales, form.width, form.bits)) > 0.01
    assert relative_error(restored(weights, form)) < BF16_ROUNDING
    np.testing.assert_array_equal(bf16(restored(weights, form)), weights)


def test_a_llama_cpp_checkpoint_is_on_the_grid() -> None:
    blocks = np.random.default_rng(3).normal(scale=0.02, size=(300, GRID_BLOCK)).astype(np.float32)
    # quantize_row_q4_0_ref: d = max / -8, q = min(15, int8(x / d + 8.5)), d stored as float16
    extremes = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    exact = extremes / -8
    codes = np.minimum(15, (blocks * (1 / exact) + np.float32(8.5)).astype(np.int8)) - 8
    weights = bf16(codes * exact.astype(np.float16).astype(np.float32)).reshape(100, 96)
    np.testing.assert_array_equal(bf16(restored(weights, BlockFormat(96, 4, GRID_BLOCK))), weights)


@pytest.mark.parametrize("block_size", [16, 32, 64, 256])
@pytest.mark.parametrize("spread", ["normal", "uniform"])
def test_random_weights_are_on_no_grid(spread: str, block_size: int) -> None:
    rng = np.random.default_rng(block_size)
    weights = rng.normal(size=(8, 256)) if spread == "normal" else rng.uniform(-1, 1, size=(8, 256))
    assert grid_blocks(bf16(weights), BlockFormat(256, 4, block_size)) is None
    assert grid_blocks(bf16(weights[:1, :block_size]), BlockFormat(block_size, 4, block_size)) is None


@pytest.mark.parametrize("num_rows", [1, TILE_BLOCKS])
def test_one_weight_off_the_grid_is_enough(num_rows: int) -> None:
    weights, form = random_grid((num_rows, 96), 8, np.float32), BlockFormat(96, 4, GRID_BLOCK)
    assert_within_bf16_rounding(restored(weights, form), weights)
    assert grid_blocks(off_the_grid(weights), form) is None


def test_eight_has_no_code_of_the_scale_s_sign() -> None:
    weights = np.zeros((1, 16), np.float32)
    weights[0, :3] = [8, -8, 7]
    assert grid_blocks(weights, BlockFormat(16, 4, 16)) is None
    weights[0, 2] = 4  # codes 2, -2 and 1 of a larger step
    found = grid_blocks(weights, BlockFormat(16, 4, 16))
    assert found is not None
    assert found[1].tolist() == [[4]]
    # the nearest bfloat16 to 8 has its code too
    weights[0, :3] = [8, -7.96875, 7]
    assert grid_blocks(weights, BlockFormat(16, 4, 16)) is None


def test_a_small_weight_is_not_taken_for_zero() -> None:
    weights = np.arange(-8, 8, dtype=np.float32)[None]
    weights[weights == 0] = 1e-6
    assert grid_blocks(weights, BlockFormat(16, 4, 16)) is None


@pytest.mark.parametrize("longer", [64, 128])
def test_longer_blocks_must_fit_one_scale(longer: int) -> None:
    codes = np.random.default_rng(4).integers(-8, 8, size=(3, 4, GRID_BLOCK))
    codes[..., :2] = [-8, 1]
    one_scale = bf16(grid(codes, np.full((3, 4), 0.0123, np.float16)))
    form = BlockFormat(128, 4, longer)
    np.testing.assert_array_equal(bf16(restored(one_scale, form)), one_scale)
    assert grid_blocks(bf16(grid(codes, np.array([[0.01, 0.013, 0.017, 0.019]] * 3))), form) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_blocks_have_scale_one_and_padding_stays_zero(bits: int) -> None:
    weights = np.zeros((2, 40), np.float32)
    weights[1, 33] = bf16(0.7)
    found = grid_blocks(weights, BlockFormat(40, bits, 32))
    assert found is not None
    codes, scales = found
    assert scales.tolist() == [[1, 1], [1, weights[1, 33]]]
    whole = dequantize_rows(codes, scales, 64, bits)  # the padding too
    np.testing.assert_array_equal(whole, np.pad(weights, [(0, 0), (0, 24)]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e-30, 1e-8, 3.3e-7, 1e5, 1e38])
def test_scales_beyond_float16_are_left_to_others(size: float) -> None:
    # 3.3e-7 lies between the float16 5 and 6 times 2^-24, 8 % from both
    weights = bf16(np.float32(size) * np.array([[1, 0, -2, 3]], np.float32))
    assert grid_blocks(weights, BlockFormat(4, 4, 16)) is None


def test_rows_do_not_depend_on_the_tile_they_are_in() -> None:
    weights, form = random_grid((TILE_BLOCKS, 96), 7), BlockFormat(96, 8, GRID_BLOCK)
    whole = restored(weights, form)
    for rows in (slice(0, 1), slice(TILE_BLOCKS // 3 - 1, TILE_BLOCKS // 3 + 2), slice(TILE_BLOCKS - 1, None)):
        np.testing.assert_array_equal(restored(weights[rows], form), whole[rows])
