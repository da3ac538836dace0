"""Quantizing rounds to the nearest code of the block, in the layout that the runtime and ONNX Runtime read."""

import numpy as np
import numpy.typing as npt
import pytest

from quant.blockwise import BlockFormat, quantize_rows
from quant.recipe import BLOCK_SIZES
from runtime.tables import dequantize_rows

Float32 = npt.NDArray[np.float32]


def round_trip(weights: Float32, form: BlockFormat) -> tuple[Float32, Float32]:
    """Dequantized weights, and each weight's scale, both [num_rows, width]."""
    codes, scales = quantize_rows(weights, form)
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
    codes, scales = quantize_rows(weights, BlockFormat(16, bits, 16))
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
    codes, scales = quantize_rows(weights, BlockFormat(40, bits, 32))
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
    codes, found = quantize_rows(weights, BlockFormat(128, bits, 32))
    np.testing.assert_array_equal(dequantize_rows(codes, found, 128, bits), weights)
    np.testing.assert_array_equal(found, scales[..., 0])


def test_four_bits_are_those_of_ggml() -> None:
    # ggml rounds with the scale before it is stored as float16: the same where float16 holds it
    weights = np.random.default_rng(1).normal(size=(64, 32)).astype(np.float16).astype(np.float32)
    codes, scales = quantize_rows(weights, BlockFormat(32, 4, 32))
    for row, (weight, scale) in enumerate(zip(weights, scales[:, 0], strict=True)):
        # quantize_row_q4_0_ref: d = max / -8, q = min(15, int8(x / d + 8.5))
        extreme = weight[np.abs(weight).argmax()]
        assert scale == extreme / -8
        q = np.minimum(15, (weight * (1 / scale) + np.float32(8.5)).astype(np.uint8))
        np.testing.assert_array_equal(codes[row], q[0::2] | q[1::2] << 4)


def test_low_nibble_comes_first() -> None:
    weights = np.arange(-8, 8, dtype=np.float32)[None]
    codes, scales = quantize_rows(weights, BlockFormat(16, 4, 16))
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
