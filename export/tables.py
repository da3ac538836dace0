"""Token and PLE tables as files of rows outside the decoder, and embed.onnx over the same bytes.

The token table is also the output projection of decoder.onnx: one copy serves both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.graph import MICROSOFT, DataFile, Graph
from export.linear import Matrix, StoredMatrix, WeightStore
from runtime.layout import Layout
from runtime.matrix_spec import TableSpec

FLOAT = 1  # TensorProto.FLOAT


@dataclass(frozen=True, slots=True)
class StoredTable:
    """A table file: where its rows lie, in which layout, and what a looked-up row is multiplied with."""

    stored: StoredMatrix
    layout: Layout
    multiplier: float

    @property
    def spec(self) -> TableSpec:
        """The manifest's description, for readers of the file."""
        stored = self.stored
        assert stored.rows.offset == 0
        return TableSpec(
            file=stored.rows.location,
            num_rows=stored.num_rows,
            width=stored.width,
            bits=stored.form.bits,
            block_size=stored.form.block_size,
            layout=self.layout,
            multiplier=self.multiplier,
        )


def write_table(
    path: Path, matrix: Matrix, layout: Layout, multiplier: float, store: Callable[[DataFile, Layout], WeightStore]
) -> StoredTable:
    """Writes one table as a file of its own."""
    with DataFile(path) as data:
        return StoredTable(store(data, layout).keep(matrix), layout, multiplier)


def write_embed_graph(path: Path, token_table: StoredTable, ple_table: StoredTable) -> None:
    """embed.onnx: input_ids [num_tokens] -> inputs_embeds and per_layer_inputs, as decoder.onnx takes them.

    Works on the portable layout. Its look-up is float16 as the scales are: quantized rows are rounded to 11 bits, which
    the runtime's are not.
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
    gathered = graph.node("Cast", [gathered], to=FLOAT)
    if stored.width % form.block_size == 0:
        return gathered
    start, stop, axis = (graph.constant(np.array([value])) for value in (0, stored.width, 1))
    return graph.node("Slice", [gathered, start, stop, axis])


def embedding_multiplier(size: int) -> float:
    """sqrt(size) as the float32 that transformers multiplies embeddings with."""
    return float(np.float32(size**0.5))
