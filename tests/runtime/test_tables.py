"""Rows of tables: what was quantized comes back in either layout, embed.onnx agrees, and nothing stays in memory."""

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from quant.blockwise import BlockFormat, quantize_rows
from runtime.errors import ArtifactError
from runtime.layout import LAYOUTS, Layout
from runtime.manifest import read_manifest
from runtime.matrix_spec import TableSpec, padded_rows
from runtime.panels import pack
from runtime.session import open_session
from runtime.tables import RowTable
from tests.models import ONE_THREAD
from tests.page_residency import num_cached_pages

NUM_ROWS = 50
MULTIPLIER = 3.5
LAYOUTS_OF_BITS = [(4, "portable"), (4, "native"), (8, "portable"), (8, "native"), (16, "portable"), (32, "portable")]
Float32 = npt.NDArray[np.float32]


def write_table(folder: Path, weights: Float32, bits: int, block_size: int, layout: Layout) -> RowTable:
    """Writes and opens a table of `weights`."""
    if bits >= 16:
        content, block_size = weights.astype(f"f{bits // 8}").tobytes(), 0
    else:
        blocks = BlockFormat(weights.shape[1], bits, block_size)
        padded = np.zeros((padded_rows(len(weights)), weights.shape[1]), np.float32)
        padded[: len(weights)] = weights
        codes, scales, _ = quantize_rows(padded, blocks)
        if layout == "native":
            content = pack(codes.reshape(len(padded), blocks.num_blocks, -1), scales).tobytes()
        else:
            content = codes.tobytes() + scales.tobytes()
    (folder / "table.bin").write_bytes(content)
    spec = TableSpec("table.bin", *weights.shape, bits, block_size, layout, MULTIPLIER)
    spec.check(len(content))
    return RowTable(folder, spec)


@pytest.mark.parametrize(("bits", "layout"), LAYOUTS_OF_BITS)
@pytest.mark.parametrize(("width", "block_size"), [(64, 32), (72, 32), (7, 16), (300, 256)])
def test_rows_are_the_weights_that_were_stored(
    width: int, block_size: int, bits: int, layout: Layout, tmp_path: Path
) -> None:
    weights = np.random.default_rng(width).normal(size=(NUM_ROWS, width)).astype(np.float32)
    table = write_table(tmp_path, weights, bits, block_size, layout)
    token_ids = [7, 0, NUM_ROWS - 1, 7]
    rows = table.rows(token_ids)
    table.close()
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous  # it is bound to a session by address
    # half a scale, or a whole one at the clipped end; the scale is at most the largest weight / 2^(bits - 1), rounded
    # to 11 bits; of 16 bits half a unit in the last place
    largest = np.abs(weights).max()
    error = {4: largest / 8 * (1 + 2**-10), 8: largest / 128 * (1 + 2**-10), 16: largest * 2**-11, 32: 0}[bits]
    np.testing.assert_allclose(rows / np.float32(MULTIPLIER), weights[token_ids], rtol=2**-22, atol=error)


@pytest.mark.parametrize(("bits", "layout"), LAYOUTS_OF_BITS)
def test_a_row_is_the_same_alone_and_among_others(bits: int, layout: Layout, tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=(NUM_ROWS, 72)).astype(np.float32)
    table = write_table(tmp_path, weights, bits, 32, layout)
    together = table.rows(range(NUM_ROWS))
    for token_id in range(NUM_ROWS):
        np.testing.assert_array_equal(table.rows([token_id])[0], together[token_id])
    table.close()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_is_the_same_in_both_layouts(bits: int, tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=(NUM_ROWS, 72)).astype(np.float32)
    tables = []
    for layout in LAYOUTS:
        (tmp_path / layout).mkdir()
        tables.append(write_table(tmp_path / layout, weights, bits, 32, layout))
    np.testing.assert_array_equal(*(table.rows(range(NUM_ROWS)) for table in tables))
    for table in tables:
        table.close()


@pytest.mark.parametrize(("bits", "layout"), LAYOUTS_OF_BITS)
def test_a_file_cut_while_it_is_open(bits: int, layout: Layout, tmp_path: Path) -> None:  # a bus error if mapped
    weights = np.random.default_rng(0).normal(size=(NUM_ROWS, 72)).astype(np.float32)
    table = write_table(tmp_path, weights, bits, 32, layout)
    with (tmp_path / "table.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match="table.bin ends before byte [0-9,]+: it was cut while in use; load it"):
        table.rows([NUM_ROWS - 1])
    table.close()


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("shape", ["wide", "irregular"])  # of whole blocks, and padded
def test_embed_graph_gives_the_same_rows(shape: str, bits: int, tiny_artifact: Callable[..., Path]) -> None:
    folder = tiny_artifact(shape, bits)
    manifest = read_manifest(folder)
    token_ids = [2, 0, manifest.model.vocab_size - 1, 9, 9]
    session = open_session(folder / "embed.onnx", ONE_THREAD)
    by_name = dict(
        zip(
            [output.name for output in session.get_outputs()],
            session.run(None, {"input_ids": np.array(token_ids)}),
            strict=True,
        )
    )
    for name, spec in (("inputs_embeds", manifest.token_table), ("per_layer_inputs", manifest.ple_table)):
        assert (spec.width % 32 != 0) == (shape == "irregular")
        table = RowTable(folder, spec)
        rows = table.rows(token_ids)
        table.close()
        # GatherBlockQuantized gives float16, as its scales are: half a unit in the last place of 11 bits
        rounding = 2**-11 if spec.is_quantized else 0
        np.testing.assert_allclose(by_name[name], rows, rtol=rounding, atol=0)


# residency

# The PLE table of E2B at 4 bits, as a file without content, a third of it in the kernel's cache.
CHILD = """
import json, sys
from pathlib import Path

import numpy as np

from runtime.matrix_spec import TableSpec
from runtime.memory import memory_usage
from runtime.tables import RowTable

file = Path(sys.argv[1])
spec = TableSpec(file.name, 262_144, 8960, 4, 32, "portable", 16.0)
with file.open("r+b") as stream:
    stream.truncate(spec.matrix.num_bytes)
    stream.read(400 << 20)
table = RowTable(file.parent, spec)
rng, before, peak = np.random.default_rng(0), memory_usage().mapped_bytes, 0
for num_rows in [1] * 4000 + [512] * 10:
    table.rows(rng.integers(80_000, size=num_rows))
    peak = max(peak, memory_usage().mapped_bytes - before)
print(json.dumps({"file_bytes": file.stat().st_size, "peak_bytes": peak}))
"""
SLACK_BYTES = 16 << 20  # libraries that are first used while rows are read


def test_nothing_of_a_table_stays_resident(tmp_path: Path) -> None:
    file = tmp_path / "table.bin"
    file.touch()
    done = subprocess.run([sys.executable, "-c", CHILD, file], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["file_bytes"] > 1 << 30
    assert found["peak_bytes"] < SLACK_BYTES


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not list open files")
@pytest.mark.parametrize("close", [RowTable.close, lambda table: None], ids=["closed", "dropped"])
def test_the_file_is_given_back_once(close: Callable[[RowTable], None], tmp_path: Path) -> None:
    table = write_table(tmp_path, np.ones((NUM_ROWS, 64), np.float32), 4, 32, "portable")
    assert str(tmp_path / "table.bin") in open_files()
    close(table)
    close(table)
    del table
    assert str(tmp_path / "table.bin") not in open_files()


def open_files() -> list[str]:
    links = list(Path("/proc/self/fd").iterdir())  # the listing's own is gone by now
    return [str(link.readlink()) for link in links if link.is_symlink()]


def test_a_bounded_table_leaves_few_pages_in_the_systems_cache(tmp_path: Path) -> None:
    num_rows, width, bound = 4096, 1024, 64 * mmap.PAGESIZE
    file = tmp_path / "table.bin"
    file.write_bytes(bytes(num_rows * width * 4))
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if num_cached_pages(file):
        pytest.skip("this file system keeps files in the page cache")
    spec = TableSpec(file.name, num_rows, width, 32, 0, "portable", 1.0)
    tables = [RowTable(tmp_path, spec, cached_bytes=cached_bytes) for cached_bytes in (bound, None)]
    most = []
    for table in tables:
        seen = []
        for token_id in np.random.default_rng(0).integers(num_rows, size=400).tolist():
            table.rows([token_id])
            seen.append(num_cached_pages(file) * mmap.PAGESIZE)
        most.append(max(seen))
        table.close()
    assert bound // 2 < most[0] <= bound < 4 * bound < most[1]
    RowTable(tmp_path, spec, cached_bytes=bound).close()
    assert num_cached_pages(file) == 0, "what was there when it was opened is dropped"
