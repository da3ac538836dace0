"""A converted artifact is the one that an export in that layout makes, and converting back gives the first one."""

import errno
import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime import convert
from runtime.convert import convert_artifact
from runtime.errors import ArtifactError, DestinationError, EdgeError, RequestError
from runtime.layout import LAYOUTS, other_layout
from runtime.manifest import read_manifest, verify_digests
from runtime.matrix_spec import MatrixSpec
from runtime.tables import RowTable
from tests.commands import contents
from tests.layouts import ExportBoth

CASES = [("one_shared", 4, 32), ("wide", 8, 64), ("irregular", 4, 32), ("narrow", 4, 128)]
TEXTS = {"tokenizer.json", "generation_config.json", "chat_template.jinja", "manifest.json"}
DATA = {"decoder.onnx.data", "drafter.onnx.data", "token_table.bin", "ple_table.bin"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_conversion_is_an_export_and_is_undone(both_layouts: ExportBoth, case, layout, tmp_path: Path) -> None:
    exported = both_layouts(*case)
    other = other_layout(layout)
    manifest = convert_artifact(exported[layout], tmp_path / "there", other)
    assert contents(tmp_path / "there") == contents(exported[other])
    assert manifest == read_manifest(tmp_path / "there")
    convert_artifact(tmp_path / "there", tmp_path / "back", layout)
    assert contents(tmp_path / "back") == contents(exported[layout])


def test_both_layouts_have_the_same_sizes_and_names_that_tell_graphs_apart(both_layouts: ExportBoth) -> None:
    exported = both_layouts("wide")
    names = {layout: {path.name for path in folder.iterdir()} for layout, folder in exported.items()}
    graphs = {"decoder.onnx", "drafter.onnx"}
    assert names["portable"] == TEXTS | DATA | graphs | {"embed.onnx", "decoder.onnx.native", "drafter.onnx.native"}
    twins = {"embed.onnx.portable", "decoder.onnx.portable", "drafter.onnx.portable"}
    assert names["native"] == TEXTS | DATA | graphs | twins
    for name in DATA:
        portable, native = (folder / name for folder in exported.values())
        assert portable.stat().st_size == native.stat().st_size
        assert (portable.read_bytes() == native.read_bytes()) == (name == "ple_table.bin")
        assert sorted(portable.read_bytes()) == sorted(native.read_bytes())


def test_only_native_graphs_know_the_native_operators(both_layouts: ExportBoth) -> None:
    exported = both_layouts("wide")
    for layout, folder in exported.items():
        for graph in ("decoder.onnx", "drafter.onnx"):
            domains = {opset.domain for opset in onnx.load(folder / graph, load_external_data=False).opset_import}
            assert ("edge" in domains) == (layout == "native")


@pytest.mark.parametrize("case", CASES)
def test_rows_of_the_token_table_are_the_same(both_layouts: ExportBoth, case: tuple[str, int, int]) -> None:
    found = []
    for folder in both_layouts(*case).values():
        manifest = read_manifest(folder)
        table = RowTable(folder, manifest.token_table)
        found.append(table.rows(range(manifest.model.vocab_size)))
        table.close()
    np.testing.assert_array_equal(*found)


def test_matrices_of_many_chunks(both_layouts: ExportBoth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "CHUNK_BYTES", 5000)  # one panel or a few at a time
    exported = both_layouts("wide")
    for layout in LAYOUTS:
        convert_artifact(exported[layout], tmp_path / layout, other_layout(layout))
        assert contents(tmp_path / layout) == contents(exported[other_layout(layout)])


def test_memory_does_not_follow_the_size(tmp_path: Path) -> None:
    matrix = MatrixSpec("weights", 4096, 200_000, 48, 16)  # 173 MB
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(matrix.offset + matrix.num_bytes + (100 << 20))
    for layout in LAYOUTS:
        tracemalloc.start()
        convert._permute(tmp_path / "weights", tmp_path / layout, [matrix], layout)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 50 << 20
        assert (tmp_path / layout).stat().st_size == (tmp_path / "weights").stat().st_size


# Refusals: one line, and nothing is left


@pytest.fixture
def artifact(both_layouts: ExportBoth, tmp_path: Path) -> Path:
    shutil.copytree(both_layouts("one_shared")["native"], tmp_path / "artifact")
    return tmp_path / "artifact"


def refuses(folder: Path, error: type[EdgeError], match: str, layout: str = "portable", out: str = "out") -> None:
    before = contents(folder.parent)
    with pytest.raises(error, match=match) as caught:
        convert_artifact(folder, folder.parent / out, layout)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert contents(folder.parent) == before


def test_the_layout_that_it_has(artifact: Path) -> None:
    refuses(artifact, RequestError, "artifact is in the native layout already; copy the folder", "native")


@pytest.mark.parametrize("recipe", [(16,), (4, "float32")])
def test_an_artifact_of_one_layout(tiny_artifact, recipe: tuple[object, ...], tmp_path: Path) -> None:
    shutil.copytree(tiny_artifact("one_shared", *recipe), tmp_path / "artifact")
    match = "has the portable layout alone; export it again with 4 or 8 bits, int8 activations and a block size of 32"
    refuses(tmp_path / "artifact", RequestError, match, "native")


@pytest.mark.parametrize("name", ["decoder.onnx.data", "decoder.onnx.portable", "ple_table.bin", "tokenizer.json"])
@pytest.mark.parametrize("place", [0, 1000, -1])
def test_a_flipped_bit_is_not_taken_over(artifact: Path, name: str, place: int) -> None:
    content = bytearray((artifact / name).read_bytes())
    content[place] ^= 1
    (artifact / name).write_bytes(content)
    refuses(artifact, ArtifactError, f"{re.escape(name)} has SHA-256 .*damaged or exchanged")


def test_a_truncated_file(artifact: Path) -> None:
    os.truncate(artifact / "token_table.bin", 1000)
    refuses(artifact, ArtifactError, "token_table.bin is 1,000 bytes, expected [0-9,]+: truncated")


def test_a_file_that_is_cut_meanwhile(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "check_files", lambda *_: os.truncate(artifact / "token_table.bin", 1000))
    with pytest.raises(ArtifactError, match="token_table.bin ends before byte [0-9,]+: it was cut meanwhile"):
        convert_artifact(artifact, artifact.parent / "out", "portable")
    assert list(artifact.parent.iterdir()) == [artifact]


def test_destinations_that_cannot_be_used(artifact: Path) -> None:
    refuses(artifact, DestinationError, "is the source .*artifact; choose a folder apart from it", out="artifact")
    refuses(artifact, DestinationError, "lies inside the source", out="artifact/out")
    (artifact.parent / "out").mkdir()
    (artifact.parent / "out/mine").touch()
    refuses(artifact, DestinationError, "out is not empty; remove it or choose another")


@pytest.mark.parametrize("writer", ["_write", "shutil.copyfile"])
def test_a_disk_that_fills_up(artifact: Path, writer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"runtime.convert.{writer}", fail)
    refuses(
        artifact, DestinationError, "/out: No space left on device; the conversion was given up, mend that and conv"
    )


def test_a_converted_artifact_is_verified_as_any(artifact: Path, tmp_path: Path) -> None:
    manifest = convert_artifact(artifact, tmp_path / "out", "portable")
    verify_digests(tmp_path / "out", manifest, cache=None)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["layout"] == "portable"
