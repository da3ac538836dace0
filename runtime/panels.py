"""The native layout of a quantized matrix: a permutation of its bytes, in numpy, for a chunk of rows at a time.

Of a matrix of N rows (a multiple of 32) and KB blocks a row, each of `block_bytes` bytes of codes and a float16 scale,
KB * (block_bytes + 2) bytes a row in both layouts:

    portable    codes  [N, KB, block_bytes]         row by row, as `MatMulNBits` reads them
                scales [N, KB]                      directly behind all codes

    native      panels [N / 32, KB] of              32 rows side by side, read front to back
                +------------------------------+
                | scales of rows 0 .. 31       |    64 bytes
                +------------------------------+
                | word 0 of rows 0 .. 31       |    128 bytes: a word is 4 bytes of a row's codes
                | word 1 of rows 0 .. 31       |
                | ...                          |    block_bytes / 4 words
                +------------------------------+
"""

import numpy as np
import numpy.typing as npt

PANEL_ROWS = 32
SCALE_BYTES = 2
WORD_BYTES = 4
_SCALE_WORDS = PANEL_ROWS * SCALE_BYTES // WORD_BYTES

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
Scales = npt.NDArray[np.float16]


def pack(codes: Bytes, scales: Scales) -> Bytes:
    """Panels [num_panels, panel_bytes] of whole panels of rows.

    Args:
        codes: [num_rows, num_blocks, block_bytes], contiguous
        scales: [num_rows, num_blocks]
    """
    num_rows, num_blocks, block_bytes = codes.shape
    num_panels, num_words = num_rows // PANEL_ROWS, block_bytes // WORD_BYTES
    assert num_panels * PANEL_ROWS == num_rows, f"{num_rows} rows are no whole panels"
    panels = np.empty((num_panels, num_blocks, _SCALE_WORDS + num_words * PANEL_ROWS), np.uint32)
    words = codes.view(np.uint32).reshape(num_panels, PANEL_ROWS, num_blocks, num_words)
    code_words(panels)[...] = words.transpose(0, 2, 3, 1)
    panel_scales(panels)[...] = scales.reshape(num_panels, PANEL_ROWS, num_blocks).transpose(0, 2, 1)
    return panels.view(np.uint8).reshape(num_panels, -1)


def unpack(panels: Bytes, num_blocks: int) -> tuple[Bytes, Scales]:
    """The codes [num_rows, num_blocks, block_bytes] and scales [num_rows, num_blocks] that `pack` took."""
    num_rows = len(panels) * PANEL_ROWS
    words = panels.view(np.uint32).reshape(len(panels), num_blocks, -1)
    codes = np.ascontiguousarray(code_words(words).transpose(0, 3, 1, 2)).view(np.uint8)
    scales = np.ascontiguousarray(panel_scales(words).transpose(0, 2, 1))
    return codes.reshape(num_rows, num_blocks, -1), scales.reshape(num_rows, num_blocks)


def code_words(panels: Words) -> Words:
    """Codes [num_panels, num_blocks, block_bytes / 4, PANEL_ROWS]: a view of panels [num_panels, num_blocks, words]."""
    num_panels, num_blocks, _ = panels.shape
    words: Words = panels[:, :, _SCALE_WORDS:]
    return words.reshape(num_panels, num_blocks, -1, PANEL_ROWS)  # splits the last axis, which copies nothing


def panel_scales(panels: Words) -> Scales:
    """Scales [num_panels, num_blocks, PANEL_ROWS]: a view of panels [num_panels, num_blocks, words]."""
    return panels.view(np.float16)[:, :, :PANEL_ROWS]
