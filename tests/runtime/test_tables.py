"""Rows of mapped tables: what was quantized comes back, embed.onnx agrees, and the mapping stays small in memory."""

import json
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from quant.blockwise import BlockFormat, quantize_rows
from runtime.manifest import TableSpec, read_manifest
from runtime.session import open_session
from runtime.tables import RESIDENT_BYTES, RowTable
from tests.models import ONE_THREAD

NUM_ROWS = 50
MULTIPLIER = 3.5
Float32 = npt.NDArray[np.float32]


def write_table(folder: Path, weights: Float32, bits: int, block_size: int, scale_type: type, gap: int) -> RowTable:
    """Writes and maps a table of `weights`, its scales `gap` bytes behind the rows."""
    if bits >= 16:
        content, scale_offset = weights.astype(f"f{bits // 8}").tobytes(), 0
    else:
        codes, scales = quantize_rows(weights, BlockFormat(weights.shape[1], bits, block_size), scale_type)
        scale_offset = codes.nbytes + gap
        content = codes.tobytes() + bytes(gap) + scales.tobytes()
    (folder / "table.bin").write_bytes(content)
    quantized = {"block_size": block_size, "scale_offset": scale_offset, "scale_dtype": np.dtype(scale_type).name}
    plain = {"block_size": 0, "scale_offset": 0, "scale_dtype": ""}
    spec = TableSpec("table.bin", *weights.shape, bits, **(quantized if bits < 16 else plain), multiplier=MULTIPLIER)
    spec.check(len(content))
    return RowTable(folder, spec)


@pytest.mark.parametrize("scale_type", [np.float16, np.float32])
@pytest.mark.parametrize(("bits", "gap"), [(4, 0), (4, 4096), (8, 0), (8, 12), (16, 0), (32, 0)])
@pytest.mark.parametrize(("width", "block_size"), [(64, 32), (72, 32), (7, 16), (300, 256)])
def test_rows_are_the_weights_that_were_stored(
    width: int, block_size: int, bits: int, gap: int, scale_type: type, tmp_path: Path
) -> None:
    weights = np.random.default_rng(width).normal(size=(NUM_ROWS, width)).astype(np.float32)
    table = write_table(tmp_path, weights, bits, block_size, scale_type, gap)
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


def test_a_row_is_the_same_alone_and_among_others(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=(NUM_ROWS, 72)).astype(np.float32)
    table = write_table(tmp_path, weights, 4, 32, np.float16, 0)
    together = table.rows(range(NUM_ROWS))
    for token_id in range(NUM_ROWS):
        np.testing.assert_array_equal(table.rows([token_id])[0], together[token_id])
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
        # with float16 scales GatherBlockQuantized gives float16: half a unit in the last place of 11 bits
        rounding = 2**-11 if spec.scale_dtype == "float16" else 0
        np.testing.assert_allclose(by_name[name], rows, rtol=rounding, atol=0)


# residency

# The PLE table of E2B at 4 bits, as a file without content. Its first 192 MiB are read in one go, as a digest is
# computed: then they lie in the kernel's cache in the largest folios it has, and one touch maps a whole folio.
CHILD = """
import json, sys
from pathlib import Path

import numpy as np

from runtime.manifest import TableSpec
from runtime.memory import memory_usage
from runtime.tables import RowTable

file, is_limited = Path(sys.argv[1]), sys.argv[2] == "limited"
spec = TableSpec(file.name, 262_144, 8960, 4, 32, 262_144 * 4480, "float16", 16.0)
cached_rows = (192 << 20) // spec.row_bytes
with file.open("r+b") as stream:
    stream.truncate(spec.scale_offset + spec.scale_bytes)
    stream.read(192 << 20)
    stream.seek(spec.scale_offset)
    stream.read(cached_rows * spec.num_blocks * 2)
table = RowTable(file.parent, spec)
if not is_limited:
    table._make_room = lambda num_rows: None
rng, before, peak = np.random.default_rng(0), memory_usage().mapped_bytes, 0
for num_rows in [1] * 4000 + [512] * 10:
    table.rows(rng.integers(cached_rows, size=num_rows))
    peak = max(peak, memory_usage().mapped_bytes - before)
print(json.dumps({"file_bytes": file.stat().st_size, "peak_bytes": peak}))
"""
SLACK_BYTES = 16 << 20  # libraries that are first used while rows are read


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system cannot drop a mapping's pages")
def test_the_mapping_stays_small_in_memory(tmp_path: Path) -> None:
    limited, unlimited = (run_child(tmp_path / "table.bin", mode) for mode in ("limited", "unlimited"))
    assert limited["file_bytes"] > 1 << 30
    assert limited["peak_bytes"] < RESIDENT_BYTES + SLACK_BYTES
    assert unlimited["peak_bytes"] > RESIDENT_BYTES + SLACK_BYTES  # so the limit is what keeps it small


def run_child(file: Path, mode: str) -> dict[str, int]:
    file.touch()
    done = subprocess.run([sys.executable, "-c", CHILD, file, mode], check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found
