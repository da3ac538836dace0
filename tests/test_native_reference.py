"""The reference ops themselves: the panels' bytes, rounding of activations, rows that do not depend on each other."""

import numpy as np
import pytest

from quant.blockwise import BlockFormat, quantize_rows
from runtime.tables import dequantize_rows
from tests.native_reference import PANEL_ROWS, attend, pack_panels, product, quantize_activations, unpack_panels

FORMATS = [(64, 96, 4, 32), (32, 100, 4, 64), (40, 300, 8, 128), (96, 256, 4, 256), (33, 33, 8, 32)]
formats = pytest.mark.parametrize(("num_rows", "width", "bits", "block_size"), FORMATS)


def make_matrix(num_rows: int, width: int, bits: int, block_size: int):
    """(weights as they are stored, codes [N32, num_blocks, block_bytes], scales [N32, num_blocks])"""
    form = BlockFormat(width, bits, block_size)
    weights = np.random.default_rng(0).standard_normal((num_rows, width)).astype(np.float32)
    codes, scales, _ = quantize_rows(weights, form)
    stored = dequantize_rows(codes, scales, width, bits)
    padding = -num_rows % PANEL_ROWS
    codes = np.pad(codes, ((0, padding), (0, 0)), constant_values=0x88 if bits == 4 else 0x80)
    return stored, codes.reshape(-1, form.num_blocks, form.block_bytes), np.pad(scales, ((0, padding), (0, 0)))


@formats
def test_unpack_of_pack(num_rows: int, width: int, bits: int, block_size: int) -> None:
    stored, codes, scales = make_matrix(num_rows, width, bits, block_size)
    panels = pack_panels(codes, scales)
    assert panels.size == codes.size + 2 * scales.size
    values, steps = unpack_panels(panels, num_rows, width, bits, block_size)
    found = (values * steps[..., None]).reshape(num_rows, -1)[:, :width]
    np.testing.assert_array_equal(found, stored)


def test_the_bytes_of_a_panel() -> None:
    _, codes, scales = make_matrix(64, 96, 4, 32)
    panels = pack_panels(codes, scales)
    block = 64 + 16 * 32  # scales, then 16 bytes of codes for each of 32 rows
    second_panel_third_block = panels[(3 + 2) * block : (3 + 3) * block]
    np.testing.assert_array_equal(second_panel_third_block[:64].view(np.float16), scales[32:, 2])
    words = second_panel_third_block[64:].reshape(4, 32, 4)
    for word in range(4):
        np.testing.assert_array_equal(words[word], codes[32:, 2, 4 * word : 4 * word + 4])


@formats
def test_product(num_rows: int, width: int, bits: int, block_size: int) -> None:
    stored, codes, scales = make_matrix(num_rows, width, bits, block_size)
    matrix = unpack_panels(pack_panels(codes, scales), num_rows, width, bits, block_size)
    x = np.random.default_rng(1).standard_normal((7, width)).astype(np.float32)
    exact = x.astype(np.float64) @ stored.T.astype(np.float64)
    np.testing.assert_allclose(product(x, *matrix, rounds=False), exact, rtol=1e-6, atol=1e-6)
    rounded = product(x, *matrix, rounds=True)
    # an activation is off by half a step of its block at most
    steps = np.repeat(quantize_activations(x, block_size)[1], block_size, axis=1)[:, :width]
    bound = steps / 2 @ np.abs(stored).T
    assert (np.abs(rounded - exact) <= bound * 1.001).all()
    assert np.abs(rounded - exact).max() > 0.02 * bound.max(), "rounding must be visible for this to mean much"
    for row in range(len(x)):
        np.testing.assert_array_equal(product(x[row : row + 1], *matrix, rounds=True)[0], rounded[row])


def test_a_row_of_zeros_is_zero() -> None:
    _, codes, scales = make_matrix(32, 64, 4, 32)
    matrix = unpack_panels(pack_panels(codes, scales), 32, 64, 4, 32)
    assert not product(np.zeros((1, 64), np.float32), *matrix, rounds=True).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_of_nan_is_nan_and_its_neighbour_is_not(bad: float) -> None:
    _, codes, scales = make_matrix(32, 64, 4, 32)
    matrix = unpack_panels(pack_panels(codes, scales), 32, 64, 4, 32)
    x = np.ones((2, 64), np.float32)
    x[0, 40] = bad
    y = product(x, *matrix, rounds=True)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


def test_attention_of_equal_keys_is_the_mean() -> None:
    values = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    np.testing.assert_allclose(
        attend(np.ones(8, np.float32), np.ones((5, 8), np.float32), values), values.mean(0), rtol=1e-6
    )
