"""GPTQ loses less of the product than rounding each weight alone, and nothing of weights that are on its grid."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quant.blockwise import BlockFormat, Blocks, dequantize, quantize_rows, unpack
from quant.gptq import GPTQ, MomentError
from quant.recipe import BLOCK_SIZES
from quant.scale_search import search_rows

Float32 = npt.NDArray[np.float32]
FORMATS = st.builds(
    BlockFormat, st.integers(1, 100), st.sampled_from([4, 8]), st.sampled_from(BLOCK_SIZES), st.booleans()
)
KINDS = pytest.mark.parametrize(("bits", "zero_point"), [(4, False), (8, False), (4, True), (8, True)])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The matrices are small; threads that wait for each other take longer on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def correlated(width: int, seed: int, rank: int = 8, noise: float = 0.3) -> torch.Tensor:
    """E[x x^T] of inputs that are a few directions and noise, with channels of different size."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(4 * width, rank)) @ rng.normal(size=(rank, width)) / rank**0.5
    inputs += noise * rng.normal(size=inputs.shape)
    inputs *= np.exp(rng.normal(scale=0.5, size=width))
    return torch.from_numpy((inputs.T @ inputs / len(inputs)).astype(np.float32))


def gptq(moment: torch.Tensor) -> GPTQ:
    return GPTQ.of_moment(moment.clone())


def gaussian(num_rows: int, width: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).normal(scale=0.03, size=(num_rows, width)).astype(np.float32)


def objective(weights: Float32, blocks: Blocks, form: BlockFormat, moment: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q)^T), the mean square that the product is off."""
    errors = weights.astype(np.float64) - dequantize(blocks, form)
    return float(np.einsum("ri,ij,rj->", errors, moment.double().numpy(), errors, optimize=True))


def assert_same(found: Blocks, expected: Blocks) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


# what it reduces to


@settings(max_examples=40, deadline=None)
@given(FORMATS, st.integers(0, 1 << 32), st.sampled_from([1e-6, 1.0, 1e6]))
def test_inputs_that_are_alike_and_independent_leave_a_scale_search(form: BlockFormat, seed: int, size: float) -> None:
    """Bit for bit, padding included: no column can make up for another's error."""
    weights = gaussian(3, form.width, seed)
    assert_same(gptq(size * torch.eye(form.width)).quantize(weights, form), search_rows(weights, form))


def test_independent_inputs_leave_a_search_that_knows_their_squares() -> None:
    form, rng = BlockFormat(100, 4, 32), np.random.default_rng(0)
    weights, squares = gaussian(50, 100), rng.exponential(size=100).astype(np.float32)
    moment = torch.diag(torch.from_numpy(squares))
    damped = squares + 0.01 * squares.mean()
    mine, searched = (
        objective(weights, blocks, form, moment)
        for blocks in (gptq(moment).quantize(weights, form), search_rows(weights, form, damped))
    )
    # which of two equal candidates wins is up to float32's rounding
    assert mine == pytest.approx(searched, rel=1e-4)


# what it is for


@KINDS
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [96, 200])
def test_correlated_inputs_lose_less_of_the_product(width: int, seed: int, bits: int, zero_point: bool) -> None:
    form, moment = BlockFormat(width, bits, 32, zero_point), correlated(width, seed)
    weights = gaussian(40, width, seed)
    mine = objective(weights, gptq(moment).quantize(weights, form), form, moment)
    squares = moment.diagonal().numpy()
    for other in (quantize_rows(weights, form), search_rows(weights, form), search_rows(weights, form, squares)):
        # measured: 0.07 to 0.23 of the other's, over 12 seeds
        assert mine < 0.3 * objective(weights, other, form, moment)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_so_they_do_in_blocks_of_any_size(block_size: int) -> None:
    form, moment = BlockFormat(200, 4, block_size), correlated(200, 1)
    weights = gaussian(40, 200)
    mine = objective(weights, gptq(moment).quantize(weights, form), form, moment)
    assert mine < 0.3 * objective(weights, search_rows(weights, form), form, moment)


@KINDS
def test_inputs_that_are_never_there_cost_nothing(bits: int, zero_point: bool) -> None:
    form, moment = BlockFormat(100, bits, 32, zero_point), correlated(100, 0)
    dead = np.arange(0, 100, 3)
    moment[dead], moment[:, dead] = 0, 0
    weights = gaussian(20, 100)
    blocks = gptq(moment).quantize(weights, form)
    nearest = quantize_rows(weights, form)
    assert np.isfinite(dequantize(blocks, form)).all()
    assert objective(weights, blocks, form, moment) < 0.3 * objective(weights, nearest, form, moment)


# what it keeps


@settings(max_examples=30, deadline=None)
@given(FORMATS, st.integers(0, 1 << 32))
def test_weights_on_its_grid_are_kept(form: BlockFormat, seed: int) -> None:
    """There is no error that others would make up for."""
    weights = dequantize(quantize_rows(gaussian(3, form.width, seed), form), form)
    expected = quantize_rows(weights, form)
    # else a block has lost its last code; see test_blockwise
    assume(not form.zero_point or (dequantize(expected, form) == weights).all())
    assert_same(gptq(correlated(form.width, 0)).quantize(weights, form), expected)


def test_searched_weights_are_kept() -> None:
    """In rows all of whose blocks use an end of the range, which the search finds again; see test_scale_search."""
    form = BlockFormat(192, 4, 32)
    blocks = search_rows(gaussian(40, 192), form)
    levels = np.abs(unpack(blocks.codes, 4).reshape(40, 6, 32).astype(int) - 8).max(-1)
    weights = dequantize(blocks, form)[(levels >= 7).all(1)]
    assert len(weights) > 30
    np.testing.assert_array_equal(dequantize(gptq(correlated(192, 0)).quantize(weights, form), form), weights)


@KINDS
def test_rows_do_not_depend_on_each_other(bits: int, zero_point: bool) -> None:
    """Codes of any chunk are those of all rows at once, but where products of other shapes round a sum otherwise.

    That moves a weight to its other neighbour if it lay within 1e-6 of half-way, and some behind it in its row.
    """
    form, quantizer, weights = BlockFormat(100, bits, 32, zero_point), gptq(correlated(100, 0)), gaussian(32, 100)
    whole = quantizer.quantize(weights, form)
    for step in (1, 7):
        parts = [quantizer.quantize(weights[first : first + step], form) for first in range(0, 32, step)]
        for mine, theirs in zip(zip(*parts, strict=True), whole, strict=True):
            if theirs is not None:
                differ = (np.concatenate(mine) != theirs).any(1)
                assert differ.mean() <= 0.1


@settings(max_examples=30, deadline=None)
@given(FORMATS, st.integers(0, 1 << 32), st.integers(1, 5))
def test_sizes_are_those_of_the_format(form: BlockFormat, seed: int, num_rows: int) -> None:
    weights = gaussian(num_rows, form.width, seed)
    before = weights.copy()
    blocks = gptq(correlated(form.width, 0)).quantize(weights, form)
    np.testing.assert_array_equal(weights, before)
    assert (blocks.codes.shape, blocks.codes.dtype.type) == ((num_rows, form.row_bytes), np.uint8)
    assert (blocks.scales.shape, blocks.scales.dtype.type) == ((num_rows, form.num_blocks), np.float16)
    assert (blocks.zero_points is not None) == form.zero_point
    if blocks.zero_points is not None:
        assert (blocks.zero_points.shape, blocks.zero_points.dtype.type) == (blocks.scales.shape, np.uint8)
    whole = BlockFormat(form.num_blocks * form.block_size, form.bits, form.block_size, form.zero_point)
    assert not dequantize(blocks, whole)[:, form.width :].any()


@KINDS
def test_zero_weights_stay_zero(bits: int, zero_point: bool) -> None:
    form, weights = BlockFormat(100, bits, 32, zero_point), gaussian(4, 100)
    weights[1], weights[2, :64] = 0, 0
    found = dequantize(gptq(correlated(100, 0)).quantize(weights, form), form)
    assert not found[1].any()
    assert not found[2, :64].any()
    assert found[2, 64:].any()


# moments


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.zeros(4, 4), "the inputs' second moment has a mean of 0.0"),
        (torch.full((4, 4), torch.nan), "the inputs' second moment has a mean of nan"),
        (torch.diag(torch.tensor([1.0, torch.inf])), "the inputs' second moment has a mean of inf"),
        (torch.diag(torch.tensor([3e38, 3e38])), "the inputs' second moment has a mean of inf"),
        (-torch.eye(4), "the inputs' second moment has a mean of -1.0"),
        (torch.diag(torch.tensor([1.0, -0.5])), "the inputs' second moment is not positive definite"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "the inputs' second moment is not positive definite"),
        (torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), "the inputs' second moment is not positive definite"),
        (torch.tensor([[1.0, torch.inf], [torch.inf, 1.0]]), "the inputs' second moment is not positive definite"),
    ],
)
def test_moments_that_nothing_can_be_done_with(moment: torch.Tensor, message: str) -> None:
    with pytest.raises(MomentError, match=message):
        GPTQ.of_moment(moment)


@pytest.mark.parametrize("num_inputs", [1, 10])
def test_fewer_inputs_than_channels_will_do(num_inputs: int) -> None:
    inputs = np.random.default_rng(0).normal(size=(num_inputs, 128)).astype(np.float32)
    moment = torch.from_numpy(inputs.T @ inputs / num_inputs)
    form, weights = BlockFormat(128, 4, 32), gaussian(20, 128)
    mine = objective(weights, gptq(moment).quantize(weights, form), form, moment)
    assert mine < 0.05 * objective(weights, search_rows(weights, form), form, moment)


def test_the_factor_is_of_the_damped_inverse() -> None:
    moment = correlated(64, 0)
    damped = moment.double() + 0.01 * moment.diagonal().double().mean() * torch.eye(64)
    factor = gptq(moment).factor.double()
    assert torch.equal(factor, factor.triu())
    # float32 under a condition number of some 1e4
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(64).double(), rtol=0, atol=1e-3)
