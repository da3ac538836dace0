"""The native layout is a permutation of the portable bytes: as drawn, and undone by unpacking."""

import numpy as np
import pytest

from runtime.panels import PANEL_ROWS, pack, unpack

SIZES = [(32, 1, 16), (64, 3, 16), (96, 2, 32), (32, 5, 128), (32, 2, 256)]


def matrix(num_rows: int, num_blocks: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_rows)
    codes = rng.integers(256, size=(num_rows, num_blocks, block_bytes), dtype=np.uint8)
    return codes, rng.normal(size=(num_rows, num_blocks)).astype(np.float16)


@pytest.mark.parametrize("size", SIZES)
def test_unpacking_undoes_packing(size: tuple[int, int, int]) -> None:
    codes, scales = matrix(*size)
    panels = pack(codes, scales)
    assert panels.shape == (size[0] // PANEL_ROWS, PANEL_ROWS * size[1] * (size[2] + 2))
    found_codes, found_scales = unpack(panels, size[1])
    np.testing.assert_array_equal(found_codes, codes)
    np.testing.assert_array_equal(found_scales, scales)


@pytest.mark.parametrize("size", SIZES)
def test_packing_undoes_unpacking(size: tuple[int, int, int]) -> None:
    panel_bytes = PANEL_ROWS * size[1] * (size[2] + 2)
    panels = np.random.default_rng(1).integers(256, size=(size[0] // PANEL_ROWS, panel_bytes), dtype=np.uint8)
    np.testing.assert_array_equal(pack(*unpack(panels, size[1])), panels)


def test_panels_are_as_drawn() -> None:
    codes, scales = matrix(64, 3, 16)
    expected = b"".join(
        scales[panel : panel + 32, block].tobytes()
        + b"".join(
            codes[row, block, word : word + 4].tobytes() for word in range(0, 16, 4) for row in range(panel, panel + 32)
        )
        for panel in (0, 32)
        for block in range(3)
    )
    assert pack(codes, scales).tobytes() == expected


def test_a_chunk_of_panels_is_packed_as_the_whole() -> None:
    codes, scales = matrix(128, 4, 32)
    whole = pack(codes, scales)
    np.testing.assert_array_equal(pack(codes[32:96], scales[32:96]), whole[1:3])
