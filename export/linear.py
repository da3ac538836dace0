"""The quantized matrix product: how a weight matrix is stored and which node multiplies with it.

The one place to add another product (a native op with its own layout): a `Product` stores rows and emits nodes.

Source: onnxruntime ContribOperators, `MatMulNBits` (`accuracy_level` 4 computes in int8, 0 in float32).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from export.checkpoint import Checkpoint, Float32, Indices
from export.errors import CheckpointError
from export.graph import MICROSOFT, DataFile, Graph, Region
from quant.blockwise import BlockFormat
from quant.recipe import Activations, WeightFormat

ACCURACY_LEVELS: dict[Activations, int] = {"int8": 4, "float32": 0}
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


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Where a matrix lies: codes and scales, or plain floats and no scales."""

    form: WeightFormat
    num_rows: int
    width: int
    rows: Region
    scales: Region | None


Progress = Callable[[int], None]


def store(
    matrix: Matrix, form: WeightFormat, data: DataFile, progress: Progress, scale_type: type = np.float32
) -> StoredMatrix:
    """Writes a matrix in a format; `progress` hears of each chunk's number of weights."""
    matrix.check()
    if form.is_quantized:
        return _store_blocks(matrix, form, data, progress, scale_type)
    region = data.reserve((matrix.num_rows, matrix.width), np.float16 if form.bits == 16 else np.float32)
    first = 0
    for chunk in matrix.chunks():
        if form.bits == 16 and np.abs(chunk).max() > FLOAT16_MAX:
            raise _too_large(matrix, "float16")
        data.write(region, first, chunk)
        first += len(chunk)
        progress(chunk.size)
    return StoredMatrix(form, matrix.num_rows, matrix.width, region, None)


def _store_blocks(
    matrix: Matrix, form: WeightFormat, data: DataFile, progress: Progress, scale_type: type
) -> StoredMatrix:
    blocks = BlockFormat(matrix.width, form.bits, form.block_size)
    rows = data.reserve((matrix.num_rows, blocks.num_blocks, blocks.block_bytes), np.uint8)
    scales = data.reserve((matrix.num_rows, blocks.num_blocks), scale_type)
    first = 0
    for chunk in matrix.chunks():
        chunk_codes, chunk_scales = matrix.checkpoint.quantize(chunk, blocks, scale_type)
        if not np.isfinite(chunk_scales).all():
            raise _too_large(matrix, f"a scale of {np.dtype(scale_type).name}")
        data.write(rows, first, chunk_codes)
        data.write(scales, first, chunk_scales)
        first += len(chunk)
        progress(chunk.size)
    return StoredMatrix(form, matrix.num_rows, matrix.width, rows, scales)


def _too_large(matrix: Matrix, what: str) -> CheckpointError:
    return CheckpointError(f"{matrix.checkpoint.folder}: {matrix.name}: weights exceed {what}; export with --bits 32")


class Product(Protocol):
    """Multiplies activations with stored matrices."""

    def emit(self, graph: Graph, activations: str, weight: StoredMatrix, name: str) -> str:
        """Appends activations [..., width] @ weight.T -> [..., num_rows]."""
        ...


@dataclass(frozen=True, slots=True)
class PortableProduct:
    """Nodes of stock ONNX Runtime: `MatMulNBits` for 4 and 8 bits, `Gemm` for floats."""

    activations: Activations

    def emit(self, graph: Graph, activations: str, weight: StoredMatrix, name: str) -> str:
        """Appends activations [num_tokens, width] @ weight.T -> [num_tokens, num_rows]."""
        rows = graph.external(f"{name}.weight", weight.rows)
        if weight.scales is None:
            if weight.form.bits == 16:
                rows = graph.node("Cast", [rows], to=1)
            return graph.node("Gemm", [activations, rows], transB=1)
        scales = graph.external(f"{name}.scales", weight.scales)
        return graph.node(
            "MatMulNBits",
            [activations, rows, scales],
            domain=MICROSOFT,
            K=weight.width,
            N=weight.num_rows,
            bits=weight.form.bits,
            block_size=weight.form.block_size,
            accuracy_level=ACCURACY_LEVELS[self.activations],
        )
