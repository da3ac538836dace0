"""Token and PLE tables as files of rows outside the decoder, and embed.onnx over the same bytes.

The token table is also the output projection of decoder.onnx: one copy serves both.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.graph import MICROSOFT, DataFile, Graph
from export.linear import Matrix, Progress, StoredMatrix, store
from quant.recipe import WeightFormat
from runtime.manifest import TableSpec

FLOAT = 1  # TensorProto.FLOAT


@dataclass(frozen=True, slots=True)
class StoredTable:
    """A table file: where its rows lie, and what a looked-up row is multiplied with."""

    stored: StoredMatrix
    multiplier: float

    @property
    def spec(self) -> TableSpec:
        """The manifest's description, for readers that map the file."""
        rows, scales, form = self.stored.rows, self.stored.scales, self.stored.form
        assert rows.offset == 0
        return TableSpec(
            file=rows.location,
            num_rows=self.stored.num_rows,
            width=self.stored.width,
            bits=form.bits,
            block_size=form.block_size,
            scale_offset=scales.offset if scales else 0,
            scale_dtype=scales.dtype.name if scales else "",
            multiplier=self.multiplier,
        )


def write_table(
    path: Path, matrix: Matrix, form: WeightFormat, scale_type: type, multiplier: float, progress: Progress
) -> StoredTable:
    """Writes one table file, rows first, scales behind them."""
    with DataFile(path) as data:
        return StoredTable(store(matrix, form, data, progress, scale_type), multiplier)


def write_embed_graph(path: Path, token_table: StoredTable, ple_table: StoredTable) -> None:
    """embed.onnx: input_ids [num_tokens] -> inputs_embeds and per_layer_inputs, as decoder.onnx takes them.

    Where scales are float16, so is the graph's look-up: its rows are rounded to 11 bits, which the runtime's are not.
    """
    graph = Graph("embed")
    graph.input("input_ids", np.int64, ["num_tokens"])
    for name, table in (("inputs_embeds", token_table), ("per_layer_inputs", ple_table)):
        graph.output(name, np.float32, ["num_tokens", table.stored.width])
        rows = _gather(graph, name, table.stored)
        graph.node("Mul", [rows, graph.constant(np.float32(table.multiplier))], outputs=[name])
    graph.save(path)


def _gather(graph: Graph, name: str, stored: StoredMatrix) -> str:
    """Rows of the table as float32 [num_tokens, width]."""
    form = stored.form
    rows = graph.external(f"{name}.rows", stored.rows.folded(stored.num_rows))
    if stored.scales is None:
        gathered = graph.node("Gather", [rows, "input_ids"], axis=0)
        return gathered if form.bits == 32 else graph.node("Cast", [gathered], to=FLOAT)
    scales = graph.external(f"{name}.scales", stored.scales)
    gathered = graph.node(
        "GatherBlockQuantized",
        [rows, "input_ids", scales],
        domain=MICROSOFT,
        bits=form.bits,
        block_size=form.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    if stored.scales.dtype != np.float32:
        gathered = graph.node("Cast", [gathered], to=FLOAT)
    if stored.width % form.block_size == 0:
        return gathered
    start, stop, axis = (graph.constant(np.array([value])) for value in (0, stored.width, 1))
    return graph.node("Slice", [gathered, start, stop, axis])


def embedding_multiplier(size: int) -> float:
    """sqrt(size) as the float32 that transformers multiplies embeddings with."""
    return float(np.float32(size**0.5))
