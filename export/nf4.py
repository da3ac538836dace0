"""NF4 as bitsandbytes quantizes it, bit for bit, in the layout that ONNX Runtime's `MatMulBnb4` reads.

Blocks run over a tensor's rows laid end to end, each with a float32 scale; the code book is bitsandbytes' own.

Source: Dettmers et al., arXiv 2305.14314 section 3; onnxruntime ContribOperators `MatMulBnb4`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from export.checkpoint import Float32
from export.errors import CheckpointError
from export.graph import Array
from export.linear import Matrix, StoredChunk


@dataclass(frozen=True, slots=True)
class NF4Chunk:
    """Whole blocks: packed codes uint8 and float32 scales, and what their rounding cost."""

    codes: Array
    scales: Array
    squared_error: float
    squared_weights: float
    is_stored: bool


def nf4_chunks(matrix: Matrix, block_size: int) -> Iterator[NF4Chunk]:
    """A matrix's weights end to end; codes that the checkpoint stores so are taken over.

    Raises:
        CheckpointError: a part is no whole number of blocks.
    """
    for part in matrix.parts:
        if (part.stop - part.start) * matrix.width % block_size:
            raise CheckpointError(
                f"{matrix.checkpoint.place(part.name)}: {part.stop - part.start} rows of {matrix.width} are no whole "
                f"blocks of {block_size}; choose a smaller block_size, or bits 8 for this tensor"
            )
    stored = matrix.stored_chunks(block_size // math.gcd(block_size, matrix.width))
    if stored is not None and all(_begins_a_block(chunk, block_size) for chunk in stored):
        for tensor, rows in stored:
            blocks = tensor.nf4_blocks(*rows)
            assert blocks is not None
            yield NF4Chunk(*blocks, 0.0, 0.0, True)
        return
    yield from (_quantized(chunk, block_size) for chunk in _whole_blocks(matrix.chunks(), block_size))


def _begins_a_block(chunk: StoredChunk, block_size: int) -> bool:
    tensor, (start, _) = chunk
    return tensor.nf4_block_size == block_size and start * tensor.shape[1] % block_size == 0


def _quantized(weights: torch.Tensor, block_size: int) -> NF4Chunk:
    codes, state = quantize_4bit(weights, blocksize=block_size, quant_type="nf4")
    errors = dequantize_4bit(codes, state).float() - weights
    return NF4Chunk(
        codes.flatten().numpy(),
        state.absmax.float().numpy(),
        float(errors.square().sum()),
        float(weights.square().sum()),
        False,
    )


def _whole_blocks(chunks: Iterator[Float32], block_size: int) -> Iterator[torch.Tensor]:
    """The same weights end to end, in pieces of whole blocks; the last one is whole too."""
    held = torch.empty(0)
    for chunk in chunks:
        held = torch.cat([held, torch.from_numpy(chunk).flatten()])
        whole = len(held) // block_size * block_size
        yield held[:whole]
        held = held[whole:]
    assert not len(held)
