"""Quantizing rounds to the nearest code of the block, in the layout that the runtime and ONNX Runtime read."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quant.blockwise import BlockFormat, Blocks, dequantize, pack, quantize_rows, unpack
from quant.recipe import BLOCK_SIZES
from runtime.tables import dequantize_rows

Float32 = npt.NDArray[np.float32]
BITS = st.sampled_from([4, 8])
FORMATS = st.builds(BlockFormat, st.integers(1, 300), BITS, st.sampled_from(BLOCK_SIZES), st.booleans())
NORMAL = 2.0**-14  # the least float16 that has all its bits
LEAST = 2.0**-24  # the least float16
# a quotient of up to 2^8 codes and its product back are each rounded to 24 bits
ROUNDING = 2.0 ** (8 - 23)


@st.composite
def weights_of(draw: st.DrawFn, form: BlockFormat) -> Float32:
    """Rows whose blocks are of any magnitude that has finite scales, each drawn alike or one by one."""
    num_rows = draw(st.integers(1, 4))
    if draw(st.booleans()):
        elements = st.floats(-1e5, 1e5, width=32)  # zeros, repetitions, subnormals
        drawn: Float32 = draw(arrays.arrays(np.float32, (num_rows, form.width), elements=elements))
        return drawn
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    shape = (num_rows, form.num_blocks)
    magnitudes = np.repeat(10 ** rng.uniform(-12, 4, shape), form.block_size, axis=1)[:, : form.width]
    shifts = np.repeat(rng.choice([0, 0, -1, 1], shape), form.block_size, axis=1)[:, : form.width]  # one-sided blocks
    weights: Float32 = (magnitudes * (rng.uniform(-1, 1, magnitudes.shape) + shifts)).astype(np.float32)
    return weights


def per_weight(values: npt.NDArray[np.generic], form: BlockFormat) -> npt.NDArray[np.float64]:
    """Each weight's value [num_rows, width] from those of the blocks."""
    return np.repeat(values.astype(np.float64), form.block_size, axis=1)[:, : form.width]


def in_blocks(values: npt.NDArray[np.generic], form: BlockFormat) -> npt.NDArray[np.generic]:
    padding = form.num_blocks * form.block_size - form.width
    return np.pad(values, ((0, 0), (0, padding))).reshape(len(values), form.num_blocks, form.block_size)


def steps_off(weights: Float32, blocks: Blocks, form: BlockFormat) -> npt.NDArray[np.float64]:
    """Each weight's error in steps of its block."""
    return np.abs(weights.astype(np.float64) - dequantize(blocks, form)) / np.abs(per_weight(blocks.scales, form))


def assert_same(found: Blocks, expected: Blocks) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def round_trip(weights: Float32, form: BlockFormat) -> tuple[Float32, Float32]:
    """Dequantized weights, and each weight's scale, both [num_rows, width]."""
    codes, scales, _ = quantize_rows(weights, form)
    assert codes.shape == (len(weights), form.row_bytes)
    assert scales.shape == (len(weights), form.num_blocks)
    assert scales.dtype == np.float16
    of_weights = np.repeat(scales.astype(np.float32), form.block_size, axis=1)[:, : form.width]
    return dequantize_rows(codes, scales, form.width, form.bits), of_weights


def assert_within_half_a_scale(weights: Float32, form: BlockFormat) -> None:
    found, scales = round_trip(weights, form)
    steps = np.abs(weights.astype(np.float64) - found) / np.abs(scales)
    # the top code is one step lower than the bottom one, so what would round to it is clipped
    at_clipped_end = weights / scales > (1 << (form.bits - 1)) - 1
    # a quotient of up to 2^7 and its product back are each rounded to 24 bits
    rounding = 2.0 ** (7 - 23)
    assert steps[~at_clipped_end].max(initial=0) <= 0.5 + rounding
    assert steps[at_clipped_end].max(initial=0) <= 1 + rounding


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("width", [1, 31, 32, 256, 300])
def test_error_is_at_most_half_a_scale(width: int, block_size: int, bits: int) -> None:
    weights = np.random.default_rng(width).normal(scale=0.05, size=(40, width)).astype(np.float32)
    assert_within_half_a_scale(weights, BlockFormat(width, bits, block_size))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_law_holds_at_every_magnitude(bits: int) -> None:
    # float16 scales have few bits left below 6e-5, and none for weights as small as 1e-30
    magnitudes = np.logspace(-30, 5, 800, dtype=np.float32)[:, None]
    weights = magnitudes * np.random.default_rng(0).uniform(-1, 1, size=(800, 64)).astype(np.float32)
    assert_within_half_a_scale(weights, BlockFormat(64, bits, 32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_magnitude_is_exact_and_the_other_end_clipped(bits: int, sign: int) -> None:
    middle = 1 << (bits - 1)
    weights = np.zeros((1, 16), np.float32)
    weights[0, :4] = sign * np.array([-3.0, 3.0 * (middle - 1) / middle, 2.999, 0.0])
    codes, scales, _ = quantize_rows(weights, BlockFormat(16, bits, 16))
    assert scales[0, 0] == np.float32(sign * 3.0 / middle)
    found = dequantize_rows(codes, scales, 16, bits)[0]
    assert found[0] == weights[0, 0]
    # 2.999 would be the code behind the last one
    assert found[1] == found[2] == scales[0, 0] * (middle - 1)
    assert (found[3:] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_blocks_and_padding_stay_zero(bits: int) -> None:
    weights = np.zeros((2, 40), np.float32)
    weights[1, 33] = 0.7
    codes, scales, _ = quantize_rows(weights, BlockFormat(40, bits, 32))
    assert scales[:, 0].tolist() == [1, 1]
    found = dequantize_rows(codes, scales, 64, bits)  # the padding too
    assert np.flatnonzero(found).tolist() == [64 + 33]
    assert found[1, 33] == pytest.approx(0.7, rel=2**-11)  # a float16 scale has 11 bits


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_the_grid_are_kept(bits: int) -> None:
    """As after quantization-aware training: every block uses its lowest code."""
    rng, middle = np.random.default_rng(0), 1 << (bits - 1)
    steps = rng.integers(-middle, middle, size=(50, 4, 32))
    steps[..., 5] = -middle
    scales = (rng.uniform(0.001, 0.1, size=(50, 4, 1)) * rng.choice([-1, 1], size=(50, 4, 1))).astype(np.float16)
    weights = (steps.astype(np.float32) * scales.astype(np.float32)).reshape(50, 128)
    codes, found, _ = quantize_rows(weights, BlockFormat(128, bits, 32))
    np.testing.assert_array_equal(dequantize_rows(codes, found, 128, bits), weights)
    np.testing.assert_array_equal(found, scales[..., 0])


def test_four_bits_are_those_of_ggml() -> None:
    # ggml rounds with the scale before it is stored as float16: the same where float16 holds it
    weights = np.random.default_rng(1).normal(size=(64, 32)).astype(np.float16).astype(np.float32)
    codes, scales, _ = quantize_rows(weights, BlockFormat(32, 4, 32))
    for row, (weight, scale) in enumerate(zip(weights, scales[:, 0], strict=True)):
        # quantize_row_q4_0_ref: d = max / -8, q = min(15, int8(x / d + 8.5))
        extreme = weight[np.abs(weight).argmax()]
        assert scale == extreme / -8
        q = np.minimum(15, (weight * (1 / scale) + np.float32(8.5)).astype(np.uint8))
        np.testing.assert_array_equal(codes[row], q[0::2] | q[1::2] << 4)


def test_low_nibble_comes_first() -> None:
    weights = np.arange(-8, 8, dtype=np.float32)[None]
    codes, scales, _ = quantize_rows(weights, BlockFormat(16, 4, 16))
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]


# bytes


@settings(max_examples=60, deadline=None)
@given(st.data(), BITS, st.integers(1, 5), st.integers(1, 33))
def test_unpack_gives_what_pack_took(data: st.DataObject, bits: int, num_rows: int, half_width: int) -> None:
    shape = (num_rows, 2 * half_width)
    levels = data.draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, (1 << bits) - 1)))
    packed = pack(levels, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (num_rows, 2 * half_width * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits), levels)


@settings(max_examples=60, deadline=None)
@given(st.data(), FORMATS)
def test_sizes_are_those_of_the_format(data: st.DataObject, form: BlockFormat) -> None:
    weights = data.draw(weights_of(form))
    codes, scales, zero_points = quantize_rows(weights, form)
    assert (codes.shape, codes.dtype.type) == ((len(weights), form.row_bytes), np.uint8)
    assert (scales.shape, scales.dtype.type) == ((len(weights), form.num_blocks), np.float16)
    assert (zero_points is not None) == form.zero_point
    if zero_points is not None:
        assert (zero_points.shape, zero_points.dtype.type) == (scales.shape, np.uint8)
        assert form.zero_point_bytes == -(-form.num_blocks * form.bits // 8)
        assert zero_points.max() < 1 << form.bits
    # padding is zero, the one thing that a wider row of the same blocks shows
    whole = BlockFormat(form.num_blocks * form.block_size, form.bits, form.block_size, form.zero_point)
    assert not dequantize(Blocks(codes, scales, zero_points), whole)[:, form.width :].any()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.builds(BlockFormat, st.integers(1, 300), BITS, st.sampled_from(BLOCK_SIZES)))
def test_the_runtime_reads_the_same_weights(data: st.DataObject, form: BlockFormat) -> None:
    """Of any codes: also those that rounding never makes."""
    num_rows = data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    codes = rng.integers(256, size=(num_rows, form.row_bytes), dtype=np.uint8)
    scales = rng.normal(size=(num_rows, form.num_blocks)).astype(np.float16)
    expected = dequantize_rows(codes, scales, form.width, form.bits)
    np.testing.assert_array_equal(dequantize(Blocks(codes, scales), form), expected)
    middle = np.full(scales.shape, form.middle, np.uint8)
    np.testing.assert_array_equal(dequantize(Blocks(codes, scales, middle), form), expected)


# rounding


@settings(max_examples=120, deadline=None)
@given(st.data(), FORMATS)
def test_a_weight_is_half_a_step_off_at_most_unless_clipped(data: st.DataObject, form: BlockFormat) -> None:
    weights = data.draw(weights_of(form))
    blocks = quantize_rows(weights, form)
    assert np.isfinite(blocks.scales).all()
    off = steps_off(weights, blocks, form)
    # with zero points the range fits, since its scale is rounded outward; without, the top code is one step short
    is_clipped = (weights / per_weight(blocks.scales, form) > form.middle - 1) & (not form.zero_point)
    assert off[~is_clipped].max(initial=0) <= 0.5 + ROUNDING
    assert off[is_clipped].max(initial=0) <= 1 + ROUNDING


@settings(max_examples=60, deadline=None)
@given(st.data(), FORMATS)
def test_zero_is_exact(data: st.DataObject, form: BlockFormat) -> None:
    weights = data.draw(weights_of(form))
    weights[:, ::3] = 0
    assert not dequantize(quantize_rows(weights, form), form)[:, ::3].any()


@settings(max_examples=120, deadline=None)
@given(st.data(), FORMATS)
def test_quantized_weights_quantize_to_themselves(data: st.DataObject, form: BlockFormat) -> None:
    """Bit for bit in blocks that keep all of their range.

    Symmetric: which are not zero, and whose scale has all of float16's bits. It is then so little above its share of
    the largest magnitude that this is the lowest code. With zero points: which use the first and the last code, or 0
    in one's place. Rounding both ends of a range inward, by nearly half a step each, leaves a block without its last
    code; the next range is that much shorter.
    """
    first = quantize_rows(data.draw(weights_of(form)), form)
    weights = dequantize(first, form)
    second = quantize_rows(weights, form)
    if first.zero_points is None:
        keeps = (np.abs(first.scales) >= NORMAL) & in_blocks(weights, form).any(-1)
    else:
        levels = unpack(first.codes, form.bits).reshape(len(weights), form.num_blocks, form.block_size)
        lowest, highest = (pick(levels, axis=-1) for pick in (np.min, np.max))
        lowest, highest = np.minimum(lowest, first.zero_points), np.maximum(highest, first.zero_points)
        keeps = (lowest == 0) & (highest == 2 * form.middle - 1)
    for mine, theirs in zip(second, first, strict=True):
        if mine is not None and theirs is not None:
            shape = (len(weights), form.num_blocks, -1)
            np.testing.assert_array_equal(mine.reshape(shape)[keeps], theirs.reshape(shape)[keeps])
    kept = per_weight(keeps, form).astype(bool)
    np.testing.assert_array_equal(dequantize(second, form)[kept], weights[kept])


@pytest.mark.parametrize("bits", [4, 8])
def test_most_blocks_with_zero_points_keep_their_range(bits: int) -> None:
    form = BlockFormat(512, bits, 32, zero_point=True)
    weights = dequantize(quantize_rows(np.random.default_rng(0).normal(size=(200, 512)).astype(np.float32), form), form)
    changed = (dequantize(quantize_rows(weights, form), form) != weights).reshape(-1, 32).any(1)
    # both ends are rounded inward by nearly half a step only where the two halves are within what the scale's rounding
    # takes from the range: 2^-10 of 15 steps, or of 255
    assert changed.mean() < {4: 0.015, 8: 0.25}[bits]


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_blocks(bits: int, zero_point: bool) -> None:
    form = BlockFormat(40, bits, 32, zero_point)
    blocks = quantize_rows(np.zeros((3, 40), np.float32), form)
    assert (blocks.scales == 1).all()
    assert not dequantize(blocks, form).any()


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("magnitude", [1e-5, 1e-7, 1e-8, 1e-20, 1e-40])
def test_tiny_weights_have_subnormal_scales(magnitude: float, bits: int, zero_point: bool) -> None:
    form = BlockFormat(64, bits, 32, zero_point)
    weights = np.random.default_rng(0).uniform(-magnitude, magnitude, (50, 64)).astype(np.float32)
    blocks = quantize_rows(weights, form)
    scales = per_weight(np.abs(blocks.scales), form)
    is_zero = np.repeat(~in_blocks(weights, form).any(-1), 32, axis=1)
    assert (scales[is_zero] == 1).all()
    # what is not representable is a step of up to the least float16 more than the exact one, never none
    exact = 2 * magnitude / ((1 << bits) - zero_point)
    assert (scales[~is_zero] >= LEAST).all()
    assert (scales[~is_zero] <= exact * (1 + 2**-10) + LEAST).all()
    assert np.isfinite(dequantize(blocks, form)).all()
    is_clipped = (weights / per_weight(blocks.scales, form) > form.middle - 1) & (not zero_point)
    assert steps_off(weights, blocks, form)[~is_clipped].max() <= 0.5 + ROUNDING


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_too_small_for_a_step_of_float32_are_zero(bits: int, zero_point: bool) -> None:
    weights = np.full((1, 32), 1e-45, np.float32)
    form = BlockFormat(32, bits, 32, zero_point)
    blocks = quantize_rows(weights, form)
    assert blocks.scales.tolist() == [[1]]
    assert not dequantize(blocks, form).any()


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_block_too_large_has_an_infinite_scale_and_its_neighbours_have_not(
    sign: int, bits: int, zero_point: bool
) -> None:
    form = BlockFormat(96, bits, 32, zero_point)
    num_steps = (1 << bits) - 1 if zero_point else form.middle
    largest = sign * np.float32(num_steps * 65504)  # the largest float16
    weights = np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32)
    weights[0, 32:64] = 0
    weights[0, 40] = largest
    neighbours = quantize_rows(weights, form)
    assert np.isfinite(neighbours.scales).all()
    for beyond in (np.nextafter(largest, np.float32(sign * np.inf)), sign * np.float32(1e38)):
        weights[0, 40] = beyond
        found = quantize_rows(weights, form)
        assert np.argwhere(~np.isfinite(found.scales)).tolist() == [[0, 1]]
        found.scales[0, 1] = neighbours.scales[0, 1]
        np.testing.assert_array_equal(found.scales, neighbours.scales)
