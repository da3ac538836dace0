"""What is stored quantized is read a chunk of rows at a time, dequantized or taken over, and chunks change nothing."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from export import checkpoint as checkpoint_module
from export.checkpoint import Checkpoint
from export.linear import Matrix, TensorRows
from export.nf4 import nf4_chunks
from quant.blockwise import BlockFormat
from tests.quantized_files import BNB, W, packed_config, packed_parts, save, save_bnb, save_packed, scheme, whole

DOWN = "model.layers.0.mlp.down_proj.weight"  # [64, 96], of no whole 4-bit blocks
GATE = "model.layers.0.mlp.gate_proj.weight"  # [96, 64]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    @cache
    def make(kind: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp(kind) / "target"
        return Checkpoint(save_packed(folder) if kind == "packed" else save_bnb(folder, BNB[kind]))

    return make


def spy_on_reads(monkeypatch: pytest.MonkeyPatch, chunk_weights: int) -> list[int]:
    """Makes chunks that small, and gives the bytes of each read from now on."""
    monkeypatch.setattr(checkpoint_module, "CHUNK_WEIGHTS", chunk_weights)
    sizes: list[int] = []
    read = Checkpoint.read

    def spied(self: Checkpoint, *arguments: Any) -> torch.Tensor:
        sizes.append((tensor := read(self, *arguments)).nbytes)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", spied)
    return sizes


@pytest.mark.parametrize("kind", ["nf4-nested", "int8", "packed"])
def test_a_chunk_at_a_time(kind: str, stored: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, name = stored(kind), GATE
    expected = whole(checkpoint, name)
    most = 7 * 64 + 5
    sizes = spy_on_reads(monkeypatch, most)
    chunks = list(checkpoint.rows(name, 3, 90))
    assert max(chunk.size for chunk in chunks) == 7 * 64
    assert max(sizes) <= most
    np.testing.assert_array_equal(np.concatenate(chunks), expected[3:90])
    order = np.random.default_rng(0).permutation(96)
    ordered = list(checkpoint.rows_in_order(name, order))
    assert max(chunk.size for chunk in ordered) == 7 * 64
    np.testing.assert_array_equal(np.concatenate(ordered), expected[order])
    np.testing.assert_array_equal(checkpoint.single_rows(name, [8, 3], 1, 5), expected[[8, 3], 1:5])


def taken_over(matrix: Matrix) -> list[list[npt.NDArray[Any]]]:
    """Chunks of stored codes and scales, in the format of the checkpoint."""
    if matrix.checkpoint.quantized(matrix.parts[0].name).nf4_block_size:  # type: ignore[union-attr]
        chunks = list(nf4_chunks(matrix, 64))
        assert all(chunk.is_stored for chunk in chunks)
        return [[chunk.codes, chunk.scales] for chunk in chunks]
    blocks = matrix.stored_blocks(BlockFormat(matrix.width, 8, 32))
    assert blocks is not None
    return [[chunk.codes, chunk.scales] for chunk in blocks]


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "int8", "packed"])
@pytest.mark.parametrize("name", [DOWN, GATE])
def test_codes_are_taken_over_a_chunk_at_a_time(
    kind: str, name: str, stored: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = stored(kind)
    num_rows, width = checkpoint.shape(name)
    matrix = Matrix("m", checkpoint, (TensorRows(name, 0, num_rows), TensorRows(name, 6, num_rows)), width)
    whole_parts = taken_over(matrix)
    assert len(whole_parts) == 2
    most = 5 * width + 3  # DOWN begins a block of NF4 with every other row
    sizes = spy_on_reads(monkeypatch, most)
    chunks = taken_over(matrix)
    assert max(sizes) <= most
    step = 4 if name == DOWN and "nf4" in kind else 5
    assert len(chunks) == -(-num_rows // step) + -(-(num_rows - 6) // step)
    for part in (0, 1):
        whole, pieces = (np.concatenate([found[part] for found in each]) for each in (whole_parts, chunks))
        np.testing.assert_array_equal(pieces, whole)


def test_one_scale_that_does_not_fit_keeps_all_codes_from_being_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = packed_parts(96, 64, 4, 32)[0]
    tensors["layer.weight_scale"][-1, -1] = 1e-9
    checkpoint = save(tmp_path, tensors, packed_config(scheme(4, 32)))
    spy_on_reads(monkeypatch, 5 * 64)
    form = BlockFormat(64, 4, 32)
    assert Matrix("m", checkpoint, (TensorRows(W, 0, 90),), 64).stored_blocks(form) is not None
    assert Matrix("m", checkpoint, (TensorRows(W, 0, 96),), 64).stored_blocks(form) is None
