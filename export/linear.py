"""The quantized matrix product: how a weight matrix is stored, once for all graphs, and which node multiplies with it.

Source: onnxruntime ContribOperators, `MatMulNBits` (`accuracy_level` 4 computes in int8, 0 in float32).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from export.checkpoint import Checkpoint, Float32, Indices
from export.errors import CheckpointError
from export.graph import MICROSOFT, Array, DataFile, Graph, Region
from export.quantized_tensors import QuantizedTensor
from quant.blockwise import BlockFormat, Blocks, pack
from quant.recipe import Activations, Recipe, WeightFormat
from runtime.layout import Layout
from runtime.matrix_spec import MatrixSpec, padded_rows
from runtime.panels import PANEL_ROWS
from runtime.panels import pack as pack_panels

ACCURACY_LEVELS: dict[Activations, int] = {"int8": 4, "float32": 0}
NF4 = 1  # MatMulBnb4's number of the code book
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class TensorRows:
    """Rows [start, stop) of a checkpoint tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [num_rows, width]: rows of checkpoint tensors stacked, or one whole tensor in an `order`."""

    name: str
    checkpoint: Checkpoint
    parts: tuple[TensorRows, ...]
    width: int
    order: Indices | None = None

    @property
    def num_rows(self) -> int:
        """Rows of all parts together."""
        return sum(part.stop - part.start for part in self.parts)

    def check(self) -> None:
        """Raises CheckpointError where a part has not the width or too few rows."""
        for part in self.parts:
            shape = self.checkpoint.shape(part.name)
            if len(shape) != 2 or shape[1] != self.width or shape[0] < part.stop:
                raise CheckpointError(
                    f"{self.checkpoint.place(part.name)} has shape {list(shape)}, "
                    f"expected [{part.stop}, {self.width}] from config.json"
                )

    def chunks(self) -> Iterator[Float32]:
        """Its rows in order, as chunks [n, width]."""
        if self.order is not None:
            yield from self.checkpoint.rows_in_order(self.parts[0].name, self.order)
            return
        for part in self.parts:
            yield from self.checkpoint.rows(part.name, part.start, part.stop)

    def stored_blocks(self, form: BlockFormat) -> Iterator[Blocks] | None:
        """Its rows in chunks as the checkpoint has them quantized; None unless all are, and the format holds them."""
        chunks = self.stored_chunks()
        if chunks is None or not all(tensor.fits(form, *rows) for tensor, rows in chunks):
            return None
        return _taken_over(chunks, form)

    def stored_chunks(self, multiple: int = 1) -> "list[StoredChunk] | None":
        """Its rows in order, as chunks of quantized tensors; None unless all of it is stored so.

        Args:
            multiple: of rows in a chunk, but for the last one of a tensor
        """
        chunks: list[StoredChunk] = []
        for part in self.parts:
            tensor = self.checkpoint.quantized(part.name)
            if tensor is None or self.order is not None:
                return None
            rows = self.checkpoint.row_chunks(part.name, part.start, part.stop, multiple)
            chunks += [(tensor, chunk) for chunk in rows]
        return chunks


StoredChunk = tuple[QuantizedTensor, tuple[int, int]]  # rows [start, stop)


def _taken_over(chunks: Iterable[StoredChunk], form: BlockFormat) -> Iterator[Blocks]:
    for tensor, rows in chunks:
        blocks = tensor.blocks(form, *rows)
        assert blocks is not None
        yield blocks


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Where a matrix lies.

    Plain floats: `rows` [num_rows, width] alone. Quantized, whatever the layout of the bytes: `rows` [num_rows,
    num_blocks, block_bytes] and `scales` [num_rows, num_blocks] for portable graphs, for native ones all as `panels`;
    asymmetric ones have `zero_points` [num_rows, bytes] too. NF4: `rows` [bytes] and float32 `scales` [num_blocks],
    with blocks over the rows laid end to end, as bitsandbytes has them.
    """

    form: WeightFormat
    num_rows: int
    width: int
    rows: Region
    scales: Region | None = None
    panels: Region | None = None
    zero_points: Region | None = None

    @property
    def spec(self) -> MatrixSpec:
        """The manifest's description of a quantized matrix."""
        assert self.panels is not None
        return _spec(self.panels.location, self.panels.offset, self.num_rows, self.width, self.form)


def _spec(file: str, offset: int, num_rows: int, width: int, form: WeightFormat) -> MatrixSpec:
    blocks = BlockFormat(width, form.bits, form.block_size)
    return MatrixSpec(file, offset, num_rows, blocks.num_blocks, blocks.block_bytes)


Progress = Callable[[int], None]


class Quantizer(Protocol):
    """Turns matrices into codes. It hears of every matrix that is stored, in the order in which they are."""

    def blocks(self, matrix: Matrix, form: BlockFormat) -> Iterator[Blocks]:
        """The matrix's rows in order, in chunks of any size."""
        ...

    def nf4(self, matrix: Matrix, block_size: int) -> Iterator[tuple[Array, Array]]:
        """Its weights end to end as NF4: packed codes and float32 scales, in chunks of whole blocks and bytes."""
        ...

    def tensors(self) -> dict[str, dict[str, Any]]:
        """For the manifest: what became of each quantized matrix, by its name."""
        ...


class WeightStore:
    """The weights of one data file in one layout: each is stored once, however many graphs read it.

    Args:
        scope: leads the matrices' names in the recipe
        progress: hears of each chunk's number of weights
    """

    def __init__(
        self, data: DataFile, layout: Layout, recipe: Recipe, quantizer: Quantizer, progress: Progress, scope: str = ""
    ) -> None:
        self._data = data
        self._layout = layout
        self._recipe = recipe
        self._quantizer = quantizer
        self._progress = progress
        self._scope = scope
        self._kept: dict[str, tuple[Matrix, StoredMatrix]] = {}
        self._indices: dict[str, Region] = {}

    @property
    def matrices(self) -> list[StoredMatrix]:
        """What is stored, in its order."""
        return [stored for _, stored in self._kept.values()]

    def keep(self, matrix: Matrix) -> StoredMatrix:
        """Stores a matrix as the recipe says unless one of its name is there.

        Raises:
            CheckpointError: the matrix cannot be stored so.
        """
        if matrix.name in self._kept:
            same, stored = self._kept[matrix.name]
            asked, kept = (matrix.parts, matrix.width), (same.parts, same.width)
            assert asked == kept, f"{matrix.name}: {asked} is not what is stored, {kept}"
            return stored
        matrix.check()
        scoped = replace(matrix, name=f"{self._scope}{matrix.name}")
        form = self._recipe.choose(scoped.name).form
        if not form.is_quantized:
            stored = self._store_floats(scoped, form)
        elif form.codebook == "nf4":
            stored = self._store_nf4(scoped, form)
        else:
            stored = self._store_blocks(scoped, form)
        self._kept[matrix.name] = (matrix, stored)
        return stored

    def keep_indices(self, name: str, values: Indices) -> Region:
        """Stores an array of indices unless one of its name is there."""
        if name not in self._indices:
            self._indices[name] = self._data.reserve(values.shape, np.int64)
            self._data.write(self._indices[name], 0, values)
        return self._indices[name]

    def _store_floats(self, matrix: Matrix, form: WeightFormat) -> StoredMatrix:
        region = self._data.reserve((matrix.num_rows, matrix.width), np.float16 if form.bits == 16 else np.float32)
        first = 0
        for chunk in matrix.chunks():
            if form.bits == 16 and np.abs(chunk).max() > FLOAT16_MAX:
                raise _too_large(matrix, "float16")
            self._data.write(region, first, chunk)
            first += len(chunk)
            self._progress(chunk.size)
        return StoredMatrix(form, matrix.num_rows, matrix.width, region)

    def _store_nf4(self, matrix: Matrix, form: WeightFormat) -> StoredMatrix:
        num_weights = matrix.num_rows * matrix.width
        rows = self._data.reserve((-(-num_weights // 2),), np.uint8)
        scales = self._data.reserve((-(-num_weights // form.block_size),), np.float32)
        first = 0
        for codes, chunk_scales in self._quantizer.nf4(matrix, form.block_size):
            self._data.write(rows, first * form.block_size // 2, codes)
            self._data.write(scales, first, chunk_scales)
            first += len(chunk_scales)
            self._progress(2 * len(codes))
        return StoredMatrix(form, matrix.num_rows, matrix.width, rows, scales)

    def _store_blocks(self, matrix: Matrix, form: WeightFormat) -> StoredMatrix:
        blocks = BlockFormat(matrix.width, form.bits, form.block_size, form.zero_point)
        size = _spec("", 0, matrix.num_rows, matrix.width, form)
        whole = self._data.reserve((size.num_bytes,), np.uint8)
        panels = replace(whole, shape=(size.padded_rows // PANEL_ROWS, size.panel_bytes))
        rows = replace(whole, shape=(size.padded_rows, size.num_blocks, size.block_bytes))
        scales = replace(
            whole,
            offset=whole.offset + size.scale_offset,
            shape=(size.padded_rows, size.num_blocks),
            dtype=np.dtype(np.float16),
        )
        zero_points = (
            self._data.reserve((size.padded_rows, blocks.zero_point_bytes), np.uint8) if form.zero_point else None
        )
        first = 0
        for chunk in in_whole_panels(self._quantized(matrix, blocks), blocks):
            codes = chunk.codes.reshape(len(chunk.codes), blocks.num_blocks, blocks.block_bytes)
            if self._layout == "native":
                self._data.write(panels, first // PANEL_ROWS, pack_panels(codes, chunk.scales))
            else:
                self._data.write(rows, first, codes)
                self._data.write(scales, first, chunk.scales)
            if zero_points is not None:
                self._data.write(zero_points, first, packed_zero_points(chunk, blocks))
            first += len(codes)
        used = replace(rows, shape=(matrix.num_rows, *rows.shape[1:]))
        used_scales = replace(scales, shape=(matrix.num_rows, *scales.shape[1:]))
        if zero_points is not None:
            zero_points = replace(zero_points, shape=(matrix.num_rows, *zero_points.shape[1:]))
        native = whole if form.allows_native else None
        return StoredMatrix(form, matrix.num_rows, matrix.width, used, used_scales, native, zero_points)

    def _quantized(self, matrix: Matrix, blocks: BlockFormat) -> Iterator[Blocks]:
        for chunk in self._quantizer.blocks(matrix, blocks):
            if not np.isfinite(chunk.scales).all():
                raise _too_large(matrix, "a scale of float16")
            yield chunk
            self._progress(len(chunk.codes) * blocks.width)


def packed_zero_points(chunk: Blocks, blocks: BlockFormat) -> Array:
    """Zero points [num_rows, zero_point_bytes] as `MatMulNBits` takes them."""
    assert chunk.zero_points is not None
    odd = chunk.zero_points.shape[1] % 2 if blocks.bits == 4 else 0
    return pack(np.pad(chunk.zero_points, ((0, 0), (0, odd))), blocks.bits)


def in_whole_panels(chunks: Iterable[Blocks], blocks: BlockFormat) -> Iterator[Blocks]:
    """The same rows in chunks of whole panels; behind the last row, rows of zero weights fill its panel."""
    held = _filling(0, blocks)
    for chunk in chunks:
        held = _behind(held, chunk) if len(held.codes) else chunk
        whole = len(held.codes) // PANEL_ROWS * PANEL_ROWS
        if whole:
            yield _cut(held, slice(whole))
        held = _cut(held, slice(whole, None))
    missing = padded_rows(len(held.codes)) - len(held.codes)
    if missing:
        yield _behind(held, _filling(missing, blocks))


def _filling(num_rows: int, blocks: BlockFormat) -> Blocks:
    codes = np.full((num_rows, blocks.row_bytes), blocks.zero_byte, np.uint8)
    zero_points = np.full((num_rows, blocks.num_blocks), blocks.middle, np.uint8) if blocks.zero_point else None
    return Blocks(codes, np.zeros((num_rows, blocks.num_blocks), np.float16), zero_points)


def _behind(held: Blocks, chunk: Blocks) -> Blocks:
    pairs = zip(held, chunk, strict=True)
    return Blocks(*(None if a is None or b is None else np.concatenate([a, b]) for a, b in pairs))  # type: ignore[arg-type]


def _cut(held: Blocks, rows: slice) -> Blocks:
    return Blocks(*(None if part is None else part[rows] for part in held))  # type: ignore[arg-type]


def _too_large(matrix: Matrix, what: str) -> CheckpointError:
    return CheckpointError(f"{matrix.checkpoint.folder}: {matrix.name}: weights exceed {what}; export with --bits 32")


class Product(Protocol):
    """Multiplies activations with stored matrices."""

    def emit(self, graph: Graph, activations: str, weight: StoredMatrix, name: str) -> str:
        """Appends activations [..., width] @ weight.T -> [..., num_rows]."""
        ...


@dataclass(frozen=True, slots=True)
class PortableProduct:
    """Nodes of stock ONNX Runtime: `MatMulNBits` for integers, `MatMulBnb4` for NF4, `Gemm` for floats."""

    activations: Activations

    def emit(self, graph: Graph, activations: str, weight: StoredMatrix, name: str) -> str:
        """Appends activations [num_tokens, width] @ weight.T -> [num_tokens, num_rows]."""
        rows = graph.external(f"{name}.weight", weight.rows)
        if weight.scales is None:
            if weight.form.bits == 16:
                rows = graph.node("Cast", [rows], to=1)
            return graph.node("Gemm", [activations, rows], transB=1)
        scales = graph.external(f"{name}.scales", weight.scales)
        sizes: dict[str, Any] = {"K": weight.width, "N": weight.num_rows, "block_size": weight.form.block_size}
        if weight.form.codebook == "nf4":
            inputs = [activations, rows, scales]
            return graph.node("MatMulBnb4", inputs, domain=MICROSOFT, quant_type=NF4, training_mode=0, **sizes)
        # MatMulNBits takes float32; onnxruntime folds the cast when it loads the graph
        inputs = [activations, rows, graph.node("Cast", [scales], to=1)]
        if weight.zero_points is not None:
            inputs.append(graph.external(f"{name}.zero_points", weight.zero_points))
        level = ACCURACY_LEVELS[self.activations]
        return graph.node("MatMulNBits", inputs, domain=MICROSOFT, bits=weight.form.bits, accuracy_level=level, **sizes)
