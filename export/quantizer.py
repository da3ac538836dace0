"""Turns a checkpoint's matrices into codes as a recipe says, and remembers what each one's rounding cost.

What is quantized already is not quantized again: codes that the checkpoint stores are taken over where the format holds
them, and weights that lie on a 4-bit grid, as quantization-aware training leaves them, get exactly that grid.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from export.checkpoint import Float32
from export.errors import CheckpointError, ExportError
from export.graph import Array
from export.linear import Matrix
from quant.blockwise import BlockFormat, Blocks, quantize_rows
from quant.gptq import GPTQ, MomentError
from quant.qat import grid_blocks
from quant.recipe import Method, Recipe
from quant.scale_search import search_rows
from quant.tiles import in_tiles, joined, squared_sums

TAKEN_OVER, ON_GRID = "taken over", "grid"
GRID_BLOCK = 32  # weights that share a scale in quantization-aware checkpoints
GRID_PROBE = 1 << 13  # weights that are looked at before the others

Rounding = Callable[[Float32], Blocks]


class Moments(Protocol):
    """Second moments of the inputs that matrices are multiplied with, for those of the target."""

    def has(self, tensor: str) -> bool:
        """Whether a matrix has inputs that are known."""
        ...

    def moment(self, tensor: str) -> torch.Tensor:
        """E[x x^T], float32 [width, width], of a matrix's inputs; the caller may overwrite it, and asks once."""
        ...

    def mean_squares(self, tensor: str) -> Float32:
        """E[x^2], [width]."""
        ...


@dataclass(slots=True)
class _Record:
    """What became of one matrix: sums over its weights, and how its chunks were made."""

    squared_error: float = 0.0
    squared_weights: float = 0.0
    methods: set[str] = field(default_factory=set)

    def add(self, squared_error: float, squared_weights: float) -> None:
        """Adds the sums of a chunk."""
        self.squared_error += squared_error
        self.squared_weights += squared_weights


@dataclass(slots=True)
class RecipeQuantizer:
    """The quantizer of one export; `moments` are None without a calibration text."""

    recipe: Recipe
    moments: Moments | None = None
    _records: dict[str, _Record] = field(default_factory=dict)

    def blocks(self, matrix: Matrix, form: BlockFormat) -> Iterator[Blocks]:
        """The matrix's rows in order, a chunk at a time."""
        record = self._records[matrix.name] = _Record()
        if (stored := matrix.stored_blocks(form)) is not None:
            record.methods.add(TAKEN_OVER)
            yield from stored
            return
        made: tuple[str, Rounding] | None = None  # when first needed: factoring moments takes long, a grid needs none
        for chunk in matrix.chunks():
            found, how = on_grid(chunk, form), ON_GRID
            if found is None:
                made = made or self._rounding(matrix, form)
                how, found = made[0], made[1](chunk)
            record.methods.add(how)
            record.add(*squared_sums(chunk, found, form))
            yield found

    def nf4(self, matrix: Matrix, block_size: int) -> Iterator[tuple[Array, Array]]:
        """Its weights end to end as NF4, a chunk of whole blocks at a time."""
        from export.nf4 import nf4_chunks

        record = self._records[matrix.name] = _Record()
        for found in nf4_chunks(matrix, block_size):
            record.methods.add(TAKEN_OVER if found.is_stored else "nearest")
            record.add(found.squared_error, found.squared_weights)
            yield found.codes, found.scales

    def tensors(self) -> dict[str, dict[str, Any]]:
        """For the manifest: of each quantized matrix its format, how it was made, and its relative error.

        The relative error is |W - dequantized| / |W| in Frobenius norms; 0 where stored codes were taken over.
        """
        return {
            name: {
                "format": str(self.recipe.choose(name).form),
                "method": " and ".join(sorted(record.methods)),
                "relative_error": float(f"{np.sqrt(record.squared_error / (record.squared_weights or 1)):.6g}"),
            }
            for name, record in self._records.items()
        }

    def _rounding(self, matrix: Matrix, form: BlockFormat) -> tuple[str, Rounding]:
        """The method's name and what it does with a chunk of rows."""
        method = self.recipe.choose(matrix.name).method
        if method == "best":
            method = "gptq" if self.moments is not None and self.moments.has(matrix.name) else "search"
        if method in ("nearest", "search"):
            return method, in_parallel(quantize_rows if method == "nearest" else search_rows, form)
        moments = self._known_moments(matrix, method)
        if method == "importance":
            return method, in_parallel(partial(search_rows, mean_squares=moments.mean_squares(matrix.name)), form)
        try:
            gptq = GPTQ.of_moment(moments.moment(matrix.name))
        except MomentError as error:
            raise ExportError(
                f"{matrix.name}: {error}: the calibration text is too short or the checkpoint damaged; "
                "pass a longer --calibration"
            ) from error
        return method, lambda chunk: gptq.quantize(chunk, form)

    def _known_moments(self, matrix: Matrix, method: Method) -> Moments:
        if self.moments is None:
            raise ExportError(
                f"{matrix.name}: recipe {self.recipe.name} asks for method {method}, which needs a text to calibrate "
                'with; pass --calibration FILE, or a recipe with method "search"'
            )
        if not self.moments.has(matrix.name):
            raise CheckpointError(
                f"{matrix.name}: recipe {self.recipe.name} asks for method {method}, but the inputs of this tensor are "
                'not collected (tables but for the output projection, and the drafter); say method "search" for it'
            )
        return self.moments


def in_parallel(quantize: Callable[[Float32, BlockFormat], Blocks], form: BlockFormat) -> Rounding:
    """A quantizer of rows that works on tiles of them."""
    return lambda chunk: joined(in_tiles(lambda rows: quantize(chunk[rows], form), chunk))


def on_grid(chunk: Float32, form: BlockFormat) -> Blocks | None:
    """Exact codes where all of a chunk lies on a 4-bit grid."""
    if form.zero_point or form.block_size != GRID_BLOCK:
        return None
    if grid_blocks(chunk[: max(1, GRID_PROBE // chunk.shape[1])], form) is None:
        return None
    tiles = in_tiles(lambda rows: grid_blocks(chunk[rows], form), chunk)
    whole = [Blocks(*tile) for tile in tiles if tile is not None]
    return joined(whole) if len(whole) == len(tiles) else None
