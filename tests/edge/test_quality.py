"""edge-quality and the recipes on the demo pair: what they claim of each other, and lines for what cannot be used."""

import io
import json
import sys
from typing import Any

import pytest

import edge
from edge.export_cli import main as export
from edge.quality import measure
from edge.quality.progress import stage_bars
from edge.quality_cli import main as quality
from export.demo import corpus
from export.source import DEMO_FOLDER
from runtime.errors import EdgeError
from runtime.manifest import read_manifest
from tests.commands import assert_fails, run

DRAFTED: dict[str, Any] = {"max_tokens": 48, "temperature": 0.0, "num_draft_tokens": 3}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "held_out.txt"
    file.write_text("\n".join(corpus.documents(held_out=True)[::7])[:12_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(*options): an artifact of the demo."""
    made = {}

    def make(*options):
        if options not in made:
            made[options] = tmp_path_factory.mktemp("quality") / "artifact"
            assert run(export, ["demo", made[options], "--quiet", *options]) == 0
        return made[options]

    return make


@pytest.fixture(scope="module")
def measured(exported, text, tmp_path_factory):
    """measured(*options of edge-export): the values that edge-quality writes."""

    def measure(*options):
        folder = tmp_path_factory.mktemp("report")
        arguments = [exported(*options), "--reference", "demo", "--text", text, "--max-tokens", 1024]
        files = ["--json", folder / "quality.json", "--html", folder / "quality.html"]
        assert run(quality, [*arguments, *files]) == 0
        assert (folder / "quality.html").read_text(encoding="utf-8").startswith("<!doctype html>")
        return json.loads((folder / "quality.json").read_text(encoding="utf-8"))

    return measure


def test_the_default_recipe_costs_less_than_half_of_rounding_to_nearest(measured):
    mixed, nearest = measured(), measured("--bits", "4", "--block-size", "16")
    # README's 0.0055 against 0.0306, on fewer tokens; no smaller blocks exist that would spend as many bytes
    assert mixed["mean_kl_nats"] < 0.3 * nearest["mean_kl_nats"]
    assert mixed["top1_agreement"] > nearest["top1_agreement"]
    assert mixed["is_own_source"]
    assert {entry["method"] for entry in mixed["tensors"].values()} == {"gptq", "search"}
    assert mixed["acceptance"].keys() == {"1", "2", "3", "4"}


def test_the_default_recipe_keeps_acceptance(exported):
    def accepted(*options):
        prompts = json.loads((DEMO_FOLDER / "held_out.json").read_text(encoding="utf-8"))
        with edge.Runtime.load(exported(*options), profile="laptop") as runtime:
            made = [runtime.generate(prompt["text"], **DRAFTED).stats for prompt in prompts]
        return sum(stats.num_accepted for stats in made) / sum(stats.num_drafted for stats in made)

    # README's 71.3 % against 71.8 %, on shorter texts
    assert accepted() > accepted("--recipe", "fp32") - 0.02


def test_8_bits_cost_next_to_nothing(measured):
    found = measured("--recipe", "int8")
    assert found["mean_kl_nats"] < 1e-3
    assert found["artifact_perplexity"] == pytest.approx(found["reference_perplexity"], rel=0.01)


@pytest.fixture
def short_text(text, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text(text.read_text(encoding="utf-8")[:2_000], encoding="utf-8")
    return file


@pytest.fixture
def evaluated(tiny_checkpoint, short_text, tmp_path):
    """Arguments of an export that is evaluated."""
    source = tiny_checkpoint("one_shared").target
    return [source, tmp_path / "out", "--bits", "8", "--evaluate", short_text]


def test_an_export_that_is_evaluated(evaluated, capfd):
    source, artifact, *_, file = evaluated
    assert run(export, evaluated) == 0
    line, report = capfd.readouterr().out.split("\n", 1)
    assert line.startswith(f"{artifact}: ")
    assert run(quality, [artifact, "--reference", source, "--text", file]) == 0
    assert capfd.readouterr() == (report, "")


def test_an_artifact_stays_where_it_cannot_be_evaluated(evaluated, monkeypatch, capfd):
    def fail(*_, **__):
        raise EdgeError("no memory")

    monkeypatch.setattr(measure, "measure_quality", fail)
    assert run(export, evaluated) == 1
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    assert err == f"edge-export: {evaluated[1]} is exported and stays, but was not evaluated: no memory\n"
    assert read_manifest(evaluated[1]).layout == "native"


def test_a_conversion_is_not_evaluated(tiny_artifact, text, tmp_path, capfd):
    arguments = [tiny_artifact("one_shared", 4), tmp_path / "out", "--layout", "native", "--evaluate", text]
    match = "--evaluate: .* is an artifact, only --layout can change; export a checkpoint"
    assert_fails(export, arguments, match, capfd)
    assert not (tmp_path / "out").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "is_quiet", "shown"), [(Terminal, False, True), (Terminal, True, False), (io.StringIO, False, False)]
)
def test_progress_is_for_a_terminal(monkeypatch, stream, is_quiet, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    with stage_bars(is_quiet=is_quiet) as progress:
        for done in (0, 1, 3):
            progress("reference", done, 3)
        progress("artifact", 0, 5)
    printed = sys.stderr.getvalue()
    assert ("reference: 100%" in printed and "3/3" in printed and "artifact:   0%" in printed) is shown
    assert bool(printed) is shown


def test_auto_keeps_its_limit(tiny_checkpoint, short_text, tmp_path):
    def weights(name, *options):
        source = tiny_checkpoint("one_shared").target
        assert run(export, [source, tmp_path / name, "--quiet", "--calibration", short_text, *options]) == 0
        files = read_manifest(tmp_path / name).files.items()
        return sum(entry.size_bytes for name, entry in files if name.endswith((".data", ".bin")))

    least, most = weights("int4", "--bits", "4"), weights("int8", "--bits", "8")
    limit = (least + most) // 2
    assert least < weights("auto", "--recipe", "auto", "--max-bytes", limit) <= limit + 64 * 100  # gaps of matrices


@pytest.mark.parametrize("recipe", ["nf4", "zero_points"])
def test_portable_recipes_generate(exported, measured, tmp_path_factory, recipe):
    if recipe == "zero_points":
        file = tmp_path_factory.mktemp("recipe") / "zero_points.toml"
        rules = (
            '[[rule]]\ntensors = "*"\nbits = 4\nmethod = "nearest"\n[[rule]]\ntensors = "layers.*"\nzero_point = true\n'
        )
        file.write_text(rules, encoding="utf-8")
        recipe = str(file)
    found = measured("--recipe", recipe)
    assert 0 < found["mean_kl_nats"] < 0.1
    assert read_manifest(exported("--recipe", recipe)).layout == "portable"


def test_a_reference_that_does_not_belong(tiny_checkpoint, exported, text, capfd):
    match = "does not belong to .*: vocab_size is .*; pass the checkpoint that it was exported from as --reference"
    arguments = [exported(), "--reference", tiny_checkpoint("wide").target, "--text", text]
    assert_fails(quality, arguments, match, capfd)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "no such text file; pass a UTF-8 text such as the model is to write"),
        (b"\xff", "not UTF-8 at byte 0; save the text as UTF-8"),
        (b"short", "tokens, at least 256 needed; pass a longer text"),
    ],
)
def test_texts_that_cannot_be_used(exported, tmp_path, capfd, content, match):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    assert_fails(quality, [exported(), "--reference", "demo", "--text", file], match, capfd)
    assert_fails(export, ["demo", tmp_path / "out", "--calibration", file], match, capfd)
    assert_fails(export, ["demo", tmp_path / "out", "--evaluate", file], match, capfd)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--recipe", "auto"], "--recipe auto goes with one limit, --max-bytes or --max-kl"),
        (["--max-kl", "1"], "--recipe auto goes with one limit"),
        (["--recipe", "auto", "--max-kl", "-1"], "--max-kl -1: expected nats above 0"),
        (["--recipe", "auto", "--max-bytes", "x"], "--max-bytes: 'x' is no amount of memory"),
        (["--recipe", "auto", "--max-bytes", "1000"], "no mix of 4 and 8 bits keeps it, the smallest mix has"),
        (["--recipe", "none"], "--recipe none: no such recipe or file; choose fp16, .*, auto, or a TOML file"),
        (["--recipe", "int4", "--bits", "4"], "--bits and --recipe exclude each other"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, capfd, options, match):
    assert_fails(export, ["demo", tmp_path / "out", *options], match, capfd)


def test_a_method_without_its_text(tiny_checkpoint, tmp_path, capfd):
    file = tmp_path / "recipe.toml"
    file.write_text('[[rule]]\ntensors = "*"\nbits = 4\nmethod = "gptq"\n', encoding="utf-8")
    arguments = [tiny_checkpoint("wide").target, tmp_path / "out", "--recipe", file]
    assert_fails(export, arguments, "asks for method gptq, which needs a text to calibrate with; pass --calibra", capfd)


def test_a_recipe_that_does_not_go_with_one_tensor(tmp_path, capfd):
    file = tmp_path / "recipe.toml"
    rules = ['tensors = "*"\nbits = 4', 'tensors = "layers.0.mlp.down_proj"\ncodebook = "nf4"\nblock_size = 16']
    file.write_text("".join(f"[[rule]]\n{rule}\n" for rule in rules), encoding="utf-8")
    match = "layers.0.mlp.down_proj: codebook nf4 has blocks of 32, 64, 128, 256, not 16"
    assert_fails(export, ["demo", tmp_path / "out", "--recipe", file], match, capfd)
