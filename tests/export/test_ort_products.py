"""What stock ONNX Runtime multiplies with, and looks up, are the weights that our codes stand for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from export.errors import CheckpointError
from export.graph import DataFile, Graph
from export.linear import Matrix, PortableProduct, StoredMatrix, TensorRows, WeightStore
from export.quantizer import RecipeQuantizer
from export.tables import StoredTable, write_embed_graph
from quant.blockwise import BlockFormat, dequantize, quantize_rows
from quant.recipe import Recipe, Rule, WeightFormat

Float32 = npt.NDArray[np.float32]
UNIT = 2.0**-24  # half a unit in the last place of float32, relative
KINDS = pytest.mark.parametrize(("bits", "zero_point"), [(4, False), (4, True), (8, False), (8, True)])


@dataclass(frozen=True)
class OneTensor:
    """A checkpoint of one float tensor that comes in chunks of some rows."""

    weights: Float32
    num_rows: int
    folder: Path = Path("checkpoint")

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape

    def place(self, name: str) -> str:
        return f"checkpoint: tensor {name}"

    def rows(self, name: str, start: int, stop: int) -> Iterator[Float32]:
        for first in range(start, stop, self.num_rows):
            yield self.weights[first : min(first + self.num_rows, stop)]

    def quantized(self, name: str) -> None:
        return None


def keep(
    file: Path, weights: Float32, form: WeightFormat, method: str = "nearest", chunk_rows: int = 11, name: str = "m"
) -> StoredMatrix:
    """Stores weights in a file of their own, behind something else unless they are a table."""
    rule = Rule(("*",), form.bits, form.block_size or None, form.zero_point, form.codebook, method)  # type: ignore[arg-type]
    recipe = Recipe("r", "", "float32", (rule,))
    parts = (TensorRows("t", 0, len(weights)),)
    matrix = Matrix(name, OneTensor(weights, chunk_rows), parts, weights.shape[1])  # type: ignore[arg-type]
    with DataFile(file) as data:
        if not name.endswith("_table"):
            data.reserve((5,), np.uint8)
        return WeightStore(data, "portable", recipe, RecipeQuantizer(recipe), lambda _: None).keep(matrix)


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def multiply(folder: Path, stored: StoredMatrix, x: Float32) -> Float32:
    """x @ weights.T by a graph of the product alone, in float32."""
    graph = Graph("product")
    graph.input("x", np.float32, ["num_tokens", stored.width])
    product = PortableProduct("float32").emit(graph, "x", stored, "m")
    graph.output("y", np.float32, ["num_tokens", stored.num_rows])
    graph.node("Identity", [product], outputs=["y"])
    graph.save(folder / "product.onnx")
    (y,) = session(folder / "product.onnx").run(None, {"x": x})
    return np.asarray(y)


def gaussian(num_rows: int, width: int) -> Float32:
    return np.random.default_rng(num_rows * width).normal(scale=0.05, size=(num_rows, width)).astype(np.float32)


def assert_products(folder: Path, stored: StoredMatrix, weights: Float32, largest_term: Float32) -> None:
    """ONNX Runtime's products of an identity and of random rows are those of `weights`.

    Args:
        largest_term: for each weight, the largest product that enters its term of a sum, such as zero point * scale
    """
    # of the identity a row has one product that is not zero. A kernel may take code * scale and zero point * scale
    # apart: three roundings of at most the larger one
    found = multiply(folder, stored, np.eye(stored.width, dtype=np.float32)).T
    np.testing.assert_array_less(np.abs(found - weights), 3 * UNIT * np.abs(largest_term) + 1e-30)
    x = np.random.default_rng(0).normal(size=(5, stored.width)).astype(np.float32)
    exact = x.astype(np.float64) @ weights.T.astype(np.float64)
    # sums of `width` such terms, each addition rounded too
    bound = (stored.width + 3) * UNIT * (np.abs(x).astype(np.float64) @ np.abs(largest_term).T)
    assert (np.abs(multiply(folder, stored, x) - exact) <= bound).all()


@KINDS
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize(("num_rows", "width"), [(64, 256), (33, 200), (7, 40), (1, 300)])
def test_matmul_nbits(num_rows: int, width: int, block_size: int, bits: int, zero_point: bool, tmp_path: Path) -> None:
    form = BlockFormat(width, bits, block_size, zero_point)
    weights = gaussian(num_rows, width)
    weights[:, ::7] += 0.1  # ranges that are not about zero
    stored = keep(tmp_path / "data", weights, WeightFormat(bits, block_size, zero_point))
    assert stored.rows.offset > 0
    assert (stored.zero_points is not None) == zero_point
    blocks = quantize_rows(weights, form)
    scales = np.repeat(blocks.scales.astype(np.float32), block_size, axis=1)[:, :width]
    assert_products(tmp_path, stored, dequantize(blocks, form), 2 * form.middle * scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_nbits_of_searched_scales(bits: int, tmp_path: Path) -> None:
    """Negative ones, and codes that are clipped, are nothing else to it."""
    weights, form = gaussian(20, 100), BlockFormat(100, bits, 32)
    stored = keep(tmp_path / "data", weights, WeightFormat(bits, 32), "search")
    quantizer = RecipeQuantizer(Recipe("r", "", "float32", (Rule(("*",), bits, 32, method="search"),)))
    matrix = Matrix("m", OneTensor(weights, 20), (TensorRows("t", 0, 20),), 100)  # type: ignore[arg-type]
    (blocks,) = quantizer.blocks(matrix, form)
    scales = np.repeat(blocks.scales.astype(np.float32), 32, axis=1)[:, :100]
    assert_products(tmp_path, stored, dequantize(blocks, form), 2 * form.middle * scales)


@pytest.mark.parametrize("bits", [16, 32])
def test_gemm(bits: int, tmp_path: Path) -> None:
    weights = gaussian(33, 100)
    stored = keep(tmp_path / "data", weights, WeightFormat(bits, 0))
    rounded = weights.astype(f"f{bits // 8}").astype(np.float32)
    assert_products(tmp_path, stored, rounded, rounded)


# look-up


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("widths", [(256, 512), (72, 300), (15, 40)])
def test_gather_block_quantized(widths: tuple[int, int], block_size: int, bits: int, tmp_path: Path) -> None:
    tables, expected = [], []
    for name, width, multiplier in zip(("token_table", "ple_table"), widths, (1.0, 4.0), strict=True):
        form, weights = BlockFormat(width, bits, block_size), gaussian(37, width)
        stored = keep(tmp_path / name, weights, WeightFormat(bits, block_size), name=name)
        tables.append(StoredTable(stored, "portable", multiplier))
        # float16 as the scales are: one rounding, ours is exact until then
        rows = dequantize(quantize_rows(weights, form), form)
        expected.append(rows.astype(np.float16).astype(np.float32) * np.float32(multiplier))
    write_embed_graph(tmp_path / "embed.onnx", *tables)
    ids = np.array([36, 0, 5, 5, 17], np.int64)
    found = session(tmp_path / "embed.onnx").run(["inputs_embeds", "per_layer_inputs"], {"input_ids": ids})
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs[ids])


# NF4


def bitsandbytes_nf4(weights: Float32, block_size: int) -> tuple[npt.NDArray[np.uint8], Float32, Float32]:
    """Packed codes, scales and the weights that they stand for, all by bitsandbytes on the whole tensor at once."""
    codes, state = quantize_4bit(torch.from_numpy(weights), blocksize=block_size, quant_type="nf4")
    state.shape = torch.Size([weights.size])  # rows of odd width take a way that torch compiles first, for 20 s
    return codes.flatten().numpy(), state.absmax.numpy(), dequantize_4bit(codes, state).numpy().reshape(weights.shape)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
@pytest.mark.parametrize(
    ("num_rows", "width", "chunk_rows"), [(64, 256, 64), (64, 40, 11), (33, 256, 7), (256, 31, 100), (32, 8, 1)]
)
def test_matmul_bnb4(num_rows: int, width: int, chunk_rows: int, block_size: int, tmp_path: Path) -> None:
    weights = gaussian(num_rows, width)
    weights[0] = 0
    stored = keep(tmp_path / "data", weights, WeightFormat(4, block_size, codebook="nf4"), chunk_rows=chunk_rows)
    codes, scales, expected = bitsandbytes_nf4(weights, block_size)
    assert stored.scales is not None
    content = (tmp_path / "data").read_bytes()
    for region, array in ((stored.rows, codes), (stored.scales, scales)):
        assert content[region.offset : region.offset + region.length] == array.tobytes()
    of_weights = np.repeat(scales, block_size)[: weights.size].reshape(weights.shape)
    assert_products(tmp_path, stored, expected, of_weights)


def test_nf4_of_no_whole_blocks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint: tensor t: 3 rows of 40 are no whole blocks of 64; choose a"):
        keep(tmp_path / "data", gaussian(3, 40), WeightFormat(4, 64, codebook="nf4"))
