"""Laws of the methods: each is no worse than the simpler one by what it minimizes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.blockwise import BlockFormat, dequantize, quantize_rows
from quant.gptq import GPTQ, MomentError
from quant.scale_search import search_rows
from quant.tiles import in_tiles, joined, squared_sums


def gaussian(seed, num_rows=12, width=72):
    return np.random.default_rng(seed).normal(scale=0.05, size=(num_rows, width)).astype(np.float32)


def correlated_moment(seed, width):
    mixing = np.random.default_rng(seed).normal(size=(width // 8, width))
    return torch.from_numpy((mixing.T @ mixing / width + 0.05 * np.eye(width)).astype(np.float32))


def objective(weights, blocks, form, moment):
    errors = weights - dequantize(blocks, form)
    return float(np.einsum("nk,kl,nl->", errors, moment.numpy(), errors))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([16, 32, 64, 128]), st.booleans())
def test_a_search_is_never_worse_than_nearest(seed, block_size, is_weighted):
    weights, form = gaussian(seed), BlockFormat(72, 4, block_size)
    importance = np.random.default_rng(seed).exponential(size=72).astype(np.float32) if is_weighted else None

    def error(blocks):
        return (((weights - dequantize(blocks, form)) ** 2) * (1 if importance is None else importance)).sum()

    assert error(search_rows(weights, form, importance)) <= error(quantize_rows(weights, form)) * (1 + 1e-5)


def test_a_search_gains_on_gaussian_weights():
    weights, form = gaussian(0, 64, 512), BlockFormat(512, 4, 32)
    gained = squared_sums(weights, search_rows(weights, form), form)[0]
    assert gained < 0.9 * squared_sums(weights, quantize_rows(weights, form), form)[0]


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_lowers_the_error_of_the_product(seed, bits, zero_point):
    weights, form = gaussian(seed, 24, 120), BlockFormat(120, bits, 32, zero_point)
    moment = correlated_moment(seed, 120)
    gptq = GPTQ.of_moment(moment.clone())
    found = gptq.quantize(weights, form)
    assert objective(weights, found, form, moment) < 0.8 * objective(weights, search_rows(weights, form), form, moment)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_moments_that_cannot_be_used(value):
    with pytest.raises(MomentError, match="second moment"):
        GPTQ.of_moment(torch.eye(32) * value)


def test_tiles_are_the_whole():
    weights, form = gaussian(0, 3000, 72), BlockFormat(72, 4, 32)
    tiled, whole = (
        joined(in_tiles(lambda rows: quantize_rows(weights[rows], form), weights)),
        quantize_rows(weights, form),
    )
    np.testing.assert_array_equal(tiled.codes, whole.codes)
    errors = weights - dequantize(whole, form)
    assert squared_sums(weights, whole, form) == pytest.approx(((errors**2).sum(), (weights**2).sum()), rel=1e-4)
