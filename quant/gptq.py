"""GPTQ: rounds a matrix column by column, and lets the columns that are not rounded yet make up for each error.

Minimizes E|(W - Q) x|^2 for the second moment of the inputs, H = E[x x^T]. The scale of a block is searched when its
turn comes, over weights that already make up for the blocks before it, each weight's error times how much of it no
later column can make up for.

Written here because the maintained ones (GPTQModel, llm-compressor, torchao) take whole transformers models on a GPU
and write formats of their own; this takes one matrix a time, of a checkpoint that is never in memory, into our blocks.

Source: Frantar et al., arXiv 2210.17323, algorithm 1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quant.blockwise import BlockFormat, Blocks, Float32, pack, quantize_rows
from quant.scale_search import search_rows

DAMPING = 0.01  # of the mean diagonal, added to it; as the paper has it


class MomentError(ValueError):
    """Second moments that GPTQ cannot work with, such as of too few or infinite inputs."""


@dataclass(frozen=True, slots=True)
class GPTQ:
    """The quantizer of one matrix: rows may come in any chunks, since none depends on another."""

    factor: torch.Tensor  # upper triangle U of H^-1 = U^T U, float32 [width, width]

    @classmethod
    def of_moment(cls, moment: torch.Tensor) -> "GPTQ":
        """Factors the inverse of a second moment [width, width], which it overwrites.

        Raises:
            MomentError: it is not finite, or zero throughout.
        """
        diagonal = moment.diagonal()
        mean = float(diagonal.mean())
        if not np.isfinite(mean) or mean <= 0:
            raise MomentError(f"the inputs' second moment has a mean of {mean}")
        diagonal.add_(DAMPING * mean)
        failed = torch.empty((), dtype=torch.int32)
        # all in place: of width 12,288, the widest there is, one such matrix takes 604 MB
        torch.linalg.cholesky_ex(moment, out=(moment, failed))
        if int(failed) != 0:
            raise MomentError("the inputs' second moment is not positive definite")
        torch.cholesky_inverse(moment, out=moment)
        torch.linalg.cholesky_ex(moment, upper=True, out=(moment, failed))
        if int(failed) != 0:
            raise MomentError("the inverse of the inputs' second moment is not positive definite")
        return cls(moment.float())

    def quantize(self, weights: Float32, form: BlockFormat) -> Blocks:
        """Quantizes rows [num_rows, width]."""
        rows = torch.from_numpy(np.array(weights, np.float32))
        num_rows, width = rows.shape
        levels = torch.full((num_rows, form.num_blocks * form.block_size), form.middle, dtype=torch.uint8)
        scales = np.ones((num_rows, form.num_blocks), np.float16)
        zero_points = np.full((num_rows, form.num_blocks), form.middle, np.uint8)
        for block in range(form.num_blocks):
            start, stop = block * form.block_size, min((block + 1) * form.block_size, width)
            found = self._block_scales(rows[:, start:stop].numpy(), start, form)
            scales[:, block] = found.scales[:, 0]
            if found.zero_points is not None:
                zero_points[:, block] = found.zero_points[:, 0]
            errors = self._round(rows, levels, start, stop, scales[:, block], zero_points[:, block], form)
            rows[:, stop:] -= errors @ self.factor[start:stop, stop:]
        levels[:, width:] = torch.from_numpy(zero_points[:, -1:])  # the padding, zero as it is elsewhere
        packed = pack(levels.numpy(), form.bits)
        return Blocks(packed, scales, zero_points if form.zero_point else None)

    def _block_scales(self, weights: Float32, start: int, form: BlockFormat) -> Blocks:
        own = BlockFormat(weights.shape[1], form.bits, form.block_size, form.zero_point)
        if form.bits == 8 or form.zero_point:
            return quantize_rows(weights, own)
        remaining = self.factor.diagonal()[start : start + own.width].numpy() ** -2.0
        return search_rows(weights, own, remaining / remaining.mean())

    def _round(
        self,
        rows: torch.Tensor,
        levels: torch.Tensor,
        start: int,
        stop: int,
        scales: npt.NDArray[np.float16],
        zero_points: npt.NDArray[np.uint8],
        form: BlockFormat,
    ) -> torch.Tensor:
        """Rounds a block's columns in their order; returns each one's error over its diagonal [num_rows, columns]."""
        steps, zeros = _column(scales), _column(zero_points)
        errors = torch.zeros((len(rows), stop - start))
        for column in range(start, stop):
            weight = rows[:, column : column + 1]
            level = torch.clamp(torch.round(weight / steps) + zeros, 0, 2 * form.middle - 1)
            levels[:, column : column + 1] = level.to(torch.uint8)
            error = (weight - (level - zeros) * steps) / self.factor[column, column]
            rows[:, column + 1 : stop] -= error * self.factor[column, column + 1 : stop]
            errors[:, column - start : column - start + 1] = error
        return errors


def _column(values: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))[:, None]
