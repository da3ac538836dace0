"""The searched scale is never worse than the largest weight's by the error that it minimizes, and often better."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quant.blockwise import BlockFormat, Blocks, dequantize, quantize_rows, unpack
from quant.recipe import BLOCK_SIZES
from quant.scale_search import search_rows

Float32 = npt.NDArray[np.float32]
FOUR_BITS = st.builds(BlockFormat, st.integers(1, 200), st.just(4), st.sampled_from(BLOCK_SIZES))
NORMAL = 2.0**-14  # the least float16 that has all its bits


@st.composite
def weights_of(draw: st.DrawFn, form: BlockFormat) -> Float32:
    """Rows of any finite scales: drawn one by one, or random with outliers."""
    shape = (draw(st.integers(1, 4)), form.width)
    if draw(st.booleans()):
        drawn: Float32 = draw(arrays.arrays(np.float32, shape, elements=st.floats(-1e5, 1e5, width=32)))
        return drawn
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    magnitudes = 10.0 ** draw(st.integers(-8, 3)) * rng.choice([1, 1, 1, 5], shape)
    weights: Float32 = (magnitudes * rng.normal(size=shape)).astype(np.float32)
    return weights


@st.composite
def mean_squares_of(draw: st.DrawFn, form: BlockFormat) -> Float32:
    """Zeros among them; inputs of any size that activations have."""
    elements = st.just(0.0) | st.floats(2.0**-40, 2.0**40, width=32)
    drawn: Float32 = draw(arrays.arrays(np.float32, form.width, elements=elements))
    return drawn


def block_errors(
    weights: Float32, blocks: Blocks, form: BlockFormat, mean_squares: Float32 | None = None
) -> npt.NDArray[np.float64]:
    """Weighted squared errors [num_rows, num_blocks]."""
    errors = (weights.astype(np.float64) - dequantize(blocks, form)) ** 2
    if mean_squares is not None:
        errors *= mean_squares
    return np.add.reduceat(errors, range(0, form.width, form.block_size), axis=1)


def sizes(weights: Float32, form: BlockFormat, mean_squares: Float32 | None) -> npt.NDArray[np.float64]:
    """Weighted sums of squares [num_rows, num_blocks]."""
    squares = weights.astype(np.float64) ** 2 * (1 if mean_squares is None else mean_squares)
    return np.add.reduceat(squares, range(0, form.width, form.block_size), axis=1)


def assert_same(found: Blocks, expected: Blocks) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@settings(max_examples=150, deadline=None)
@given(st.data(), FOUR_BITS, st.booleans())
def test_no_block_is_worse_than_rounded_to_nearest(data: st.DataObject, form: BlockFormat, is_weighted: bool) -> None:
    weights = data.draw(weights_of(form))
    mean_squares = data.draw(mean_squares_of(form)) if is_weighted else None
    found = search_rows(weights, form, mean_squares)
    assert np.isfinite(found.scales).all()
    assert found.scales.all()
    assert found.zero_points is None
    searched = block_errors(weights, found, form, mean_squares)
    nearest = block_errors(weights, quantize_rows(weights, form), form, mean_squares)
    # the search compares float32: an error of a weight w is w - q, rounded to 2^-23 of w where it is small, so a sum of
    # up to 256 squares is off by 256 * 2^-24 of itself and by cross terms of 2^-22 * |w| * |w - q|, under 2^-23 of the
    # weights' squares and the error; each of both sums
    slack = 2.0**-14 * nearest + 2.0**-44 * sizes(weights, form, mean_squares)
    # squares of weights below 1e-19 leave float32
    assert (searched <= nearest + slack + 2.0**-125).all()


@settings(max_examples=60, deadline=None)
@given(st.data(), FOUR_BITS, st.integers(-20, 20))
def test_only_ratios_of_the_inputs_squares_count(data: st.DataObject, form: BlockFormat, exponent: int) -> None:
    """Exactly for powers of 2, which change no rounding."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    weights = rng.normal(size=(3, form.width)).astype(np.float32)
    mean_squares = rng.exponential(size=form.width).astype(np.float32) * rng.choice([0, 1, 1], form.width)
    mean_squares = mean_squares.astype(np.float32)
    expected = search_rows(weights, form, mean_squares)
    assert_same(search_rows(weights, form, mean_squares * np.float32(2.0**exponent)), expected)


@pytest.mark.parametrize("factor", [1e-6, 0.3, 7.0, 1e6])
def test_other_factors_change_next_to_nothing(factor: float) -> None:
    form, rng = BlockFormat(256, 4, 32), np.random.default_rng(0)
    weights = rng.normal(size=(200, 256)).astype(np.float32)
    mean_squares = rng.exponential(size=256).astype(np.float32)
    found, expected = (
        block_errors(weights, search_rows(weights, form, mean_squares * np.float32(one)), form, mean_squares)
        for one in (factor, 1)
    )
    # another candidate may win only where two are equal to float32's rounding of sums of 32
    np.testing.assert_allclose(found, expected, rtol=32 * 2**-22)


@settings(max_examples=30, deadline=None)
@given(st.data(), FOUR_BITS)
def test_inputs_alike_are_as_none(data: st.DataObject, form: BlockFormat) -> None:
    weights = data.draw(weights_of(form))
    assert_same(search_rows(weights, form, np.ones(form.width, np.float32)), search_rows(weights, form))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_gaussian_weights_lose_a_tenth_of_the_squared_error(block_size: int) -> None:
    form = BlockFormat(512, 4, block_size)
    weights = np.random.default_rng(block_size).normal(scale=0.03, size=(200, 512)).astype(np.float32)
    searched, nearest = (
        block_errors(weights, quantize(weights, form), form).sum() for quantize in (search_rows, quantize_rows)
    )
    # measured: 0.84 to 0.90 of the error of nearest, in blocks of 16 to 256
    assert searched < 0.91 * nearest


def test_known_inputs_lose_more_of_the_product_s_error() -> None:
    form, rng = BlockFormat(512, 4, 32), np.random.default_rng(0)
    weights = rng.normal(scale=0.03, size=(200, 512)).astype(np.float32)
    mean_squares = np.exp(2 * rng.normal(size=512)).astype(np.float32)  # channels e times as large, or as small
    errors = [
        block_errors(weights, found, form, mean_squares).sum()
        for found in (
            quantize_rows(weights, form),
            search_rows(weights, form),
            search_rows(weights, form, mean_squares),
        )
    ]
    # measured: 0.56 to 0.63 of that of a search that knows no inputs
    assert errors[2] < 0.7 * errors[1] < 0.7 * errors[0]


@settings(max_examples=60, deadline=None)
@given(st.data(), FOUR_BITS)
def test_its_own_output_comes_back_where_a_block_uses_an_end(data: st.DataObject, form: BlockFormat) -> None:
    """With no error: code -8 is what nearest maps the largest weight to, and 7 is among the candidates.

    Fitting may leave the largest weight at 6, from where no candidate leads back; then it is no worse than nearest.
    """
    first = search_rows(data.draw(weights_of(form)), form)
    weights = dequantize(first, form)
    second = search_rows(weights, form)
    levels = np.abs(unpack(first.codes, 4).reshape(len(weights), form.num_blocks, -1).astype(int) - 8)
    uses_an_end = (levels.max(-1) >= 7) & (np.abs(first.scales) >= NORMAL)
    assert not block_errors(weights, second, form)[uses_an_end].any()


def test_nearly_all_blocks_use_an_end() -> None:
    form = BlockFormat(512, 4, 32)
    weights = dequantize(search_rows(np.random.default_rng(0).normal(size=(200, 512)).astype(np.float32), form), form)
    # measured: all of 3,200; in blocks of 16, 2 of 6,400 end at 6
    assert (block_errors(weights, search_rows(weights, form), form) > 0).mean() < 1e-3


@pytest.mark.parametrize("mean_squares", [None, np.arange(100, dtype=np.float32)], ids=["alike", "weighted"])
@pytest.mark.parametrize(
    "form", [BlockFormat(100, 8, 32), BlockFormat(100, 4, 32, True), BlockFormat(100, 8, 64, True)]
)
def test_eight_bits_and_zero_points_are_rounded_to_nearest(form: BlockFormat, mean_squares: Float32 | None) -> None:
    weights = np.random.default_rng(0).normal(size=(20, 100)).astype(np.float32)
    assert_same(search_rows(weights, form, mean_squares), quantize_rows(weights, form))


@pytest.mark.parametrize("mean_squares", [None, np.zeros(72, np.float32), np.ones(72, np.float32)])
def test_zero_blocks(mean_squares: Float32 | None) -> None:
    form = BlockFormat(72, 4, 32)
    weights = np.zeros((2, 72), np.float32)
    weights[1, 40] = 0.5
    found = search_rows(weights, form, mean_squares)
    assert found.scales[:, 0].tolist() == [1, 1]
    np.testing.assert_array_equal(dequantize(found, form), weights)


def test_inputs_that_are_never_there_leave_nearest() -> None:
    form = BlockFormat(64, 4, 32)
    weights = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    assert_same(search_rows(weights, form, np.zeros(64, np.float32)), quantize_rows(weights, form))


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1e-20, 1e-7])
def test_weights_too_small_for_float16_s_bits(magnitude: float) -> None:
    form = BlockFormat(64, 4, 32)
    weights = np.random.default_rng(0).uniform(-magnitude, magnitude, (50, 64)).astype(np.float32)
    found = search_rows(weights, form, np.ones(64, np.float32))
    assert np.isfinite(found.scales).all()
    assert found.scales.all()
    assert np.abs(dequantize(found, form)).max() <= 2 * magnitude


def test_a_block_too_large_has_an_infinite_scale_and_its_neighbours_have_not() -> None:
    form = BlockFormat(96, 4, 32)
    weights = np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32)
    weights[0, 40] = 1e30
    for mean_squares in (None, np.ones(96, np.float32)):
        scales = search_rows(weights, form, mean_squares).scales
        assert np.argwhere(~np.isfinite(scales)).tolist() == [[0, 1]]
        np.testing.assert_array_equal(scales[1], search_rows(weights[1:], form, mean_squares).scales[0])
