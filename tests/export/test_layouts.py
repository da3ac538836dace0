"""`edge-export --layout`: the layout of an export, and the conversion of an artifact."""

from pathlib import Path

import pytest

from edge.export_cli import main
from quant.recipe import make_recipe
from runtime.manifest import read_manifest
from tests.commands import Capture, assert_fails, contents, run
from tests.faulty import Pair
from tests.layouts import ExportBoth


@pytest.mark.parametrize(
    ("recipe", "allowed"),
    [
        ({"bits": 4}, True),
        ({"bits": 8, "block_size": 256}, True),
        ({"bits": 4, "block_size": 16}, False),
        ({"bits": 4, "activations": "float32"}, False),
        ({"bits": 16}, False),
        ({"bits": 32}, False),
    ],
)
def test_recipes_that_have_the_native_layout(recipe: dict[str, object], allowed: bool) -> None:
    tensors = ("layers.0.mlp.down_proj", "token_table", "ple_table")
    assert make_recipe(**recipe).allows_native(tensors) == allowed  # type: ignore[arg-type]  # of several types


# Exports


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ([], "native"),
        (["--layout", "native"], "native"),
        (["--layout", "portable"], "portable"),
        (["--bits", "16"], "portable"),
        (["--block-size", "16"], "portable"),
        (["--activations", "float32"], "portable"),
    ],
)
def test_native_where_the_recipe_allows_it(pair: Pair, options: list[str], layout: str) -> None:
    assert pair.export(*options) == 0
    assert f", {layout}, without drafter" in pair.capture.readouterr().out
    manifest = read_manifest(pair.out)
    assert manifest.layout == layout
    assert manifest.is_convertible == (not options or "--layout" in options)
    assert any(name.startswith("decoder.onnx.") and name != "decoder.onnx.data" for name in manifest.files) == (
        manifest.is_convertible
    )


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--bits", "16"], "float16 for token_table"),
        (["--block-size", "16"], "int4 in blocks of 16 for token_table"),
        (["--activations", "float32"], "one with float32 activations"),
    ],
)
def test_native_where_there_is_none(pair: Pair, options: list[str], found: str) -> None:
    match = (
        "--layout native: only 4- and 8-bit weights in blocks of a multiple of 32 with int8 activations have it, "
        f"this is {found}; change that or export with --layout portable"
    )
    pair.refused(match, "--layout", "native", *options)


def test_a_layout_that_is_none(pair: Pair) -> None:
    pair.refused("--layout panels: choose portable or native", "--layout", "panels")


# Conversions


def test_an_artifact_is_converted(both_layouts: ExportBoth, tmp_path: Path, capfd: Capture) -> None:
    exported = both_layouts("one_shared")
    assert run(main, [exported["native"], tmp_path / "out", "--layout", "portable", "--quiet"]) == 0
    assert contents(tmp_path / "out") == contents(exported["portable"])
    out, err = capfd.readouterr()
    assert out.endswith(" MB, 4 bits in blocks of 32, portable, with drafter\n")
    assert err == ""


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ([], "is an artifact; say what to convert it to: --layout portable or native"),
        (["--layout", "native"], "is in the native layout already; copy the folder, or pass the other --layout"),
        (["--layout", "x"], "--layout x: choose portable or native"),
        (
            ["--layout", "portable", "--bits", "4"],
            "--bits: .* is an artifact, only --layout can change; export",
        ),
        (["--layout", "portable", "--block-size", "32"], "--block-size: .* is an artifact, only --layout can change"),
        (["--layout", "portable", "--activations", "int8"], "--activations: .* is an artifact, only --layout can"),
        (["--layout", "portable", "--drafter", "x"], "--drafter: .* is an artifact, only --layout can change"),
    ],
)
def test_options_that_make_no_sense_for_an_artifact(
    both_layouts: ExportBoth, tmp_path: Path, capfd: Capture, options: list[str], match: str
) -> None:
    artifact = both_layouts("one_shared")["native"]
    assert_fails(main, [artifact, tmp_path / "out", *options], f"^edge-export: .*{match}", capfd)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_artifact_is_not_converted(tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact/manifest.json").write_text("{}")
    arguments = [tmp_path / "artifact", tmp_path / "out", "--layout", "portable"]
    assert_fails(main, arguments, "^edge-export: manifest.json: format_version is None", capfd)
