"""What is expected of an export is what it writes, to the byte where bytes follow from the configuration."""

import pytest

from export.expected import NODE_BYTES, expected_manifest
from export.hf_config import drafter_config, model_config
from export.pipeline import export_artifact, open_source
from export.released import RELEASED
from quant.recipe import make_recipe
from runtime.layout import DECODER, DRAFTER
from runtime.manifest import read_manifest

EXACT = ("decoder.onnx.data", "drafter.onnx.data", "token_table.bin", "ple_table.bin")
RECIPES = [(4, 32, "native"), (4, 64, "portable"), (8, 32, "native"), (16, 32, "portable"), (32, 32, "portable")]


@pytest.mark.parametrize(("bits", "block_size", "layout"), RECIPES)
@pytest.mark.parametrize("shape", ["wide", "one_shared"])
def test_sizes_are_those_of_an_export(tiny_checkpoint, tmp_path, shape, bits, block_size, layout):
    checkpoint, recipe = tiny_checkpoint(shape), make_recipe(bits, block_size)
    source = open_source(checkpoint.target, checkpoint.assistant)
    export_artifact(source, tmp_path / "out", recipe, layout=layout, show_progress=False)
    written = read_manifest(tmp_path / "out")
    tokenizer_bytes = written.files["tokenizer.json"].size_bytes
    expected = expected_manifest(source.model, source.drafter_config, recipe, layout, tokenizer_bytes=tokenizer_bytes)
    assert {name: expected.files[name].size_bytes for name in EXACT} == {
        name: written.files[name].size_bytes for name in EXACT
    }
    key = repr
    assert sorted(expected.matrices, key=key) == sorted(written.matrices, key=key)
    for table in ("token_table", "ple_table"):
        mine, theirs = getattr(expected, table), getattr(written, table)
        assert (mine.file, mine.width, mine.bits, mine.layout) == (
            theirs.file,
            theirs.width,
            theirs.bits,
            theirs.layout,
        )


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name):
    released = RELEASED[name]
    model = model_config(released.target, name)
    drafter = drafter_config(released.assistant, model, name)
    expected = expected_manifest(model, drafter, make_recipe(4), "native", tokenizer_bytes=None)
    # as edge-export writes them from random weights of these sizes
    sizes = {"E2B": (1_076_355_072, 84_680_704, 1_321_205_760), "E4B": (2_275_983_360, 85_516_288, 1_585_446_912)}
    names = ("decoder.onnx.data", "drafter.onnx.data", "ple_table.bin")
    assert tuple(expected.files[name].size_bytes for name in names) == sizes[name]
    assert expected.files[DECODER].size_bytes > expected.files[DRAFTER].size_bytes > NODE_BYTES
