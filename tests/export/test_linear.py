"""Weights are stored once in either layout, and the portable product costs what it did before scales were float16."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

from export.graph import DataFile
from export.linear import Matrix, StoredMatrix, TensorRows, WeightStore
from export.quantizer import RecipeQuantizer
from quant.blockwise import BlockFormat, quantize_rows
from quant.recipe import Recipe, Rule
from runtime.layout import LAYOUTS, Layout
from runtime.matrix_spec import ALIGNMENT
from runtime.panels import pack

RECIPE = Recipe("r", "", "int8", (Rule(("*",), bits=4, method="nearest"), Rule(("floats",), bits=16)))


@dataclass(frozen=True)
class InChunks:
    """A checkpoint of one tensor that comes in chunks of some rows."""

    weights: npt.NDArray[np.float32]
    num_rows: int

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape

    def rows(self, name: str, start: int, stop: int) -> Iterator[npt.NDArray[np.float32]]:
        for first in range(start, stop, self.num_rows):
            yield self.weights[first : min(first + self.num_rows, stop)]

    def quantized(self, name: str) -> None:
        return None


def matrix(weights: npt.NDArray[np.float32], chunk_rows: int, name: str = "m") -> Matrix:
    checkpoint = InChunks(weights, chunk_rows)
    return Matrix(name, checkpoint, (TensorRows("t", 0, len(weights)),), weights.shape[1])  # type: ignore[arg-type]


def weight_store(data: DataFile, layout: Layout, progress: Callable[[int], None], scope: str = "") -> WeightStore:
    return WeightStore(data, layout, RECIPE, RecipeQuantizer(RECIPE), progress, scope)


def stored(
    folder: Path, weights: npt.NDArray[np.float32], layout: Layout, chunk_rows: int
) -> tuple[bytes, StoredMatrix]:
    with DataFile(folder / layout) as data:
        data.reserve((5,), np.uint8)  # something before it
        kept = weight_store(data, layout, lambda _: None).keep(matrix(weights, chunk_rows))
    assert kept.panels is not None
    content = (folder / layout).read_bytes()
    assert kept.panels.offset == ALIGNMENT
    assert len(content) == kept.panels.offset + kept.panels.length == kept.spec.offset + kept.spec.num_bytes
    return content[kept.panels.offset :], kept


@pytest.mark.parametrize("chunk_rows", [1, 7, 32, 50, 1000])
@pytest.mark.parametrize("num_rows", [1, 31, 32, 33, 100])
def test_both_layouts_are_the_bytes_that_are_drawn(num_rows: int, chunk_rows: int, tmp_path: Path) -> None:
    weights = np.random.default_rng(num_rows).normal(size=(num_rows, 72)).astype(np.float32)
    blocks = BlockFormat(72, 4, 32)
    codes, scales, _ = quantize_rows(weights, blocks)
    missing = -num_rows % 32
    codes = np.concatenate([codes, np.full((missing, blocks.row_bytes), 0x88, np.uint8)])  # codes of zero
    scales = np.concatenate([scales, np.zeros((missing, 3), np.float16)])
    portable, native = (stored(tmp_path, weights, layout, chunk_rows) for layout in LAYOUTS)
    assert portable[0] == codes.tobytes() + scales.tobytes()
    assert native[0] == pack(codes.reshape(-1, 3, 16), scales).tobytes()
    for _, kept in (portable, native):
        assert kept.scales is not None
        assert (kept.rows.shape, kept.scales.shape) == ((num_rows, 3, 16), (num_rows, 3))
        assert kept.scales.offset == ALIGNMENT + codes.nbytes


def test_a_matrix_is_stored_once(tmp_path: Path) -> None:
    weights = np.ones((40, 64), np.float32)
    heard: list[int] = []
    with DataFile(tmp_path / "data") as data:
        store = weight_store(data, "native", heard.append)
        first = store.keep(matrix(weights, 10))
        floats = store.keep(matrix(weights, 10, "floats"))
        indices = store.keep_indices("order", np.arange(8))
        size = data.reserve((0,), np.uint8).offset
        assert store.keep(matrix(weights, 10)) is first
        assert store.keep(matrix(weights, 10, "floats")) is floats
        assert store.keep_indices("order", np.arange(8)) is indices
        assert data.reserve((0,), np.uint8).offset == size
        with pytest.raises(AssertionError, match="m: .* is not what is stored"):
            store.keep(matrix(weights[:39], 10))
    assert sum(heard) == 2 * weights.size
    assert store.matrices == [first, floats]


def test_the_recipe_sees_the_scope_before_a_matrix_s_name(tmp_path: Path) -> None:
    weights = np.ones((40, 64), np.float32)
    with DataFile(tmp_path / "data") as data:
        in_scope = weight_store(data, "portable", lambda _: None, "drafter.").keep(matrix(weights, 10, "floats"))
        outside = weight_store(data, "portable", lambda _: None).keep(matrix(weights, 10, "floats"))
    assert (in_scope.form.bits, outside.form.bits) == (4, 16)


def test_casts_of_scales_are_folded_at_load(tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    """So each `MatMulNBits` has constant float32 scales, without which onnxruntime does not pack its weights."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4  # the optimized graph is of this machine alone, it says
    folder = tiny_artifact("wide", 4)
    for name in ("decoder.onnx", "drafter.onnx"):
        ort.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
        constants = {initializer.name for initializer in graph.initializer}
        products = [node for node in graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]
        assert len(products) > 5
        assert all(node.input[2] in constants for node in products)
