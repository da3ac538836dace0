"""`edge-report` from end to end on a tiny artifact, and its errors: one line each."""

import errno
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edge import report_cli
from edge.report import fits
from profiles import available_profiles, load_profile
from tests.commands import Capture, assert_fails, run
from tests.layouts import needs_native
from tests.pictures import parsed
from tests.report_fakes import MIB, fake_plan, stated_profile

STATED = {
    "phone": {"memory_gb_per_s": 20.0, "int8_tops": 1.0, "storage_gb_per_s": 1.0, "device_memory_bytes": 8192 * MIB},
    "bare": {},
}


def made_up_profile(name: str) -> Any:
    """A stated profile of this file, or a real one."""
    return stated_profile(name, **STATED[name]) if name in STATED else load_profile(name)


def made_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fits, "memory_plan", fake_plan)
    patch.setattr(report_cli, "load_profile", made_up_profile)


class Ran(NamedTuple):
    """What one run wrote."""

    json: dict[str, Any]
    html: str


@pytest.fixture(scope="module")
def ran(tiny_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("report")
    files = {name: folder / f"report.{name}" for name in ("json", "html")}
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps(["The first", "another prompt"]))
    arguments = [tiny_artifact("wide", 4), "--quick", "--quiet", "--prompts", prompts, "--profile", "phone"]
    arguments += ["--profile", "bare", "--json", files["json"], "--html", files["html"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_cli, "load_profile", made_up_profile)  # the plan is a real one
        assert run(report_cli.main, arguments) == 0
    return Ran(json.loads(files["json"].read_text()), files["html"].read_text())


EXPECTED = [
    *("roofline.stream", "roofline.product"),
    *(f"{name}.{size}" for name in ("first_token", "prefill") for size in (128, 512)),
    *(f"decode.{context}" for context in (128, 2048)),
]
TOO_LONG = "the context holds 2,048 tokens"


def test_every_figure_is_there(ran: Ran) -> None:
    figures = ran.json["measured"]["figures"]
    assert list(figures)[: len(EXPECTED)] == EXPECTED
    for key in EXPECTED[:-1]:
        assert figures[key]["value"] > 0, key
    for kind in ("cold", "warm"):
        for name in ("token", "ple_row", "load"):
            assert figures[f"{name}.{kind}"]["value"] > 0
    assert figures["memory.prefill_anonymous"]["value"] > 10


def test_a_size_that_the_context_does_not_hold_is_a_dash_with_its_reason(ran: Ran) -> None:
    figures = ran.json["measured"]["figures"]
    assert (figures["decode.2048"]["value"], figures["decode.2048"]["note"]) == (None, TOO_LONG)
    row = re.search(r'<tr data-key="decode\.2048">.*?</tr>', ran.html)
    assert row and TOO_LONG in row[0] and '<td class="n">-</td>' in row[0]


def test_drafting_is_simulated_with_the_acceptance_of_the_prompts(ran: Ran) -> None:
    measured = ran.json["measured"]
    assert measured["acceptance_source"] == "measured on the prompts"
    (acceptance,) = measured["acceptances"]
    assert 0 <= acceptance <= 1
    drafted = measured["figures"][f"drafted.128.{acceptance:g}"]
    assert drafted["simulated"] and drafted["value"] > 0
    assert measured["figures"][f"drafted.2048.{acceptance:g}"]["note"] == TOO_LONG
    assert 0 <= measured["figures"]["text_acceptance.fixed"]["value"] <= 100


def test_memory_is_a_curve_with_its_phases(ran: Ran) -> None:
    curve = ran.json["measured"]["memory"]["curve"]
    phases = curve["phases"]
    assert [phase["name"] for phase in phases] == ["load", "prefill", "decode"]
    assert [phase["seconds"] for phase in phases] == sorted(phase["seconds"] for phase in phases)
    assert 10e6 < max(curve["anonymous"]) < 2e9
    assert len(curve["seconds"]) == len(curve["anonymous"]) == len(curve["mapped"]) > 0
    assert ran.json["measured"]["setup"]["swap_total_bytes"] >= 0


def test_the_real_plan_is_shown_part_by_part(ran: Ran) -> None:
    plan = ran.json["measured"]["plan"]
    kinds = {part["kind"] for part in plan["parts"]}
    assert kinds <= {"anonymous", "mapped", "cached"} and "anonymous" in kinds
    assert sum(part["num_bytes"] for part in plan["parts"] if part["kind"] == "anonymous") == plan["anonymous_bytes"]
    for part in plan["parts"]:
        assert part["name"] in ran.html
    assert plan["budget_bytes"] > plan["peak_bytes"] > 0


def test_this_machine_stands_first_and_profiles_as_they_were_named(ran: Ran) -> None:
    verdict = ran.json["verdict"]
    assert [entry["where"] for entry in verdict] == ["this machine", "phone", "bare"]
    assert [entry["speed_kind"] for entry in verdict] == ["measured", "projected", None]
    figures = ran.json["measured"]["figures"]
    assert verdict[0]["decode_tokens_per_s"] == figures["decode.128"]["value"], "2,048 could not be measured"
    assert verdict[0]["first_token_s"] == pytest.approx(figures["first_token.512"]["value"] / 1e3)
    share = figures["decode.128"]["limit_share"]
    assert {point["share"] for point in ran.json["projections"][0]["decode"]} == {share}
    assert ran.json["projections"][0]["at_most"] is False


def test_the_footnotes_say_where_and_with_what(ran: Ran) -> None:
    about = ran.json["about"]
    assert about["command"].startswith("edge-report ") and "--quick" in about["command"]
    assert about["memory_bytes"] > 0 and about["cpu"] and about["instruction_set"]
    assert {"gemma-edge", "onnxruntime", "numpy"} <= about["versions"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", about["date"])
    for text in (about["date"], about["versions"]["numpy"], *ran.json["definitions"]):
        assert text in ran.html


def test_every_picture_is_well_formed(ran: Ran) -> None:
    pictures = re.findall(r"<svg .*?</svg>", ran.html, re.S)
    labels = [parsed(picture).attrib["aria-label"] for picture in pictures]
    assert {"Decode", "Prefill", "Anonymous memory over time", "PROJECTION: decode"} <= set(labels)


def test_portable_rows_have_one_type_and_no_section(ran: Ran) -> None:
    assert ran.json["measured"]["kv_effect"] == []
    assert "kv-effect" not in ran.html and "What narrower KV rows change" not in ran.html


@needs_native
def test_narrower_rows_are_compared_on_the_prompts(
    tiny_artifact: Callable[..., Path], tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_cli, "load_profile", made_up_profile)
    sizes = replace(report_cli.Sizes.of(is_quick=True), prompts=(8,), contexts=(8,), num_cold_tokens=1)
    monkeypatch.setattr(report_cli.Sizes, "of", lambda **_: sizes)
    files = {name: tmp_path / f"report.{name}" for name in ("prompts", "json", "html")}
    too_long, left_out = "x " * 3000, "the fifth prompt"
    files["prompts"].write_text(json.dumps(["The first", "another prompt", "The first again", too_long, left_out]))
    arguments = [tiny_artifact("wide", 4, "int8", "native"), "--quick", "--quiet", "--prompts", files["prompts"]]
    arguments += ["--profile", "phone", "--json", files["json"], "--html", files["html"]]
    assert run(report_cli.main, arguments) == 0
    effects = json.loads(files["json"].read_text())["measured"]["kv_effect"]
    html, printed = files["html"].read_text(), capfd.readouterr().out
    assert [effect["kv_dtype"] for effect in effects] == ["float16", "int8"]
    for effect in effects:
        assert (effect["context_tokens"], effect["num_positions"]) == (2048, 512), "all that the model holds"
        assert effect["generated_tokens"] == [32, 32, 32], "the fourth does not fit, --quick takes no more"
        assert 0 < effect["mean_kl_nats"] < effect["max_kl_nats"]
        cells = re.findall("<td.*?>(.*?)</td>", _row(html, f"kv_effect.{effect['kv_dtype']}"))
        assert cells == [
            effect["kv_dtype"],
            f"{effect['mean_kl_nats']:.2g}",
            f"{effect['max_kl_nats']:.2g}",
            f"{effect['same_best_share']:.1%}",
            f"{effect['acceptance_rate']:.1%}, float32 {effect['float32_acceptance_rate']:.1%}",
            f"{effect['num_equal_prompts']} of 3 prompts",
            f"{sum(effect['equal_tokens'])} of 96",
        ]
        assert re.search("^" + " +".join(map(re.escape, cells)) + "$", printed, re.M)
    for text in (html, printed):
        assert "the last 512 positions of a context of 2,048 tokens" in text
    assert "0 is no difference" in html[html.index('id="kv-effect"') : html.index('id="projections"')]


def _row(html: str, key: str) -> str:
    (row,) = re.findall(rf'<tr data-key="{re.escape(key)}">.*?</tr>', html)
    return str(row)


def test_a_model_without_weights(tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch)
    files = [tmp_path / "report.html", tmp_path / "report.json"]
    arguments = ["--model", "E2B", "--bits", "8", "--profile", "phone", "--html", files[0], "--json", files[1]]
    assert run(report_cli.main, arguments) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert re.search(
        r"^phone +yes +[0-9,]+ .* at most [0-9.]+ tokens/s at 2,048 .*PROJECTION, at most$", printed.out, re.M
    )
    report = json.loads(files[1].read_text())
    assert (report["measured"], report["verdict"][0]["plan"]["bits"]) == (None, 8)
    assert "PLAN AND PROJECTION ONLY" in files[0].read_text()


def test_all_profiles_are_planned_for_unless_some_are_named(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch)
    monkeypatch.setattr(report_cli, "load_profile", lambda name: stated_profile(name))
    assert run(report_cli.main, ["--model", "E4B"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert tuple(line.split()[0] for line in lines[2 : 2 + len(available_profiles())]) == available_profiles()


def test_a_full_disk_leaves_what_was_there(  # 84
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch)
    for option in ("--json", "--html"):
        file = tmp_path / "report"
        file.write_text("old")
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", _disk_full)
            assert run(report_cli.main, ["--model", "E2B", "--profile", "phone", option, file]) == 1
        printed = capfd.readouterr()
        assert (
            printed.err
            == f"edge-report: {option} {file}: No space left on device; the figures above are all there are\n"
        )
        assert printed.out.startswith("E2B\n")
        assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def _disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_child_that_fails_is_one_line(
    tiny_artifact: Callable[..., Path], capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch)
    small = replace(load_profile("laptop"), memory_fraction=None, memory_budget_bytes=1_000_000)
    monkeypatch.setattr(report_cli, "detect_profile", lambda: small)
    match = "^edge-report: measuring load: laptop: artifact needs [0-9]+ MiB .* the budget is 1 MiB"
    assert_fails(report_cli.main, [tiny_artifact("wide", 4), "--quick", "--quiet"], match, capfd)


def test_without_prompts_and_assumption_nothing_is_said_of_drafts(
    tiny_artifact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge.report.measure import NO_ACCEPTANCE, Sizes

    made_up(monkeypatch)
    sizes = Sizes(prompts=(8,), contexts=(8,), num_cold_tokens=1)
    monkeypatch.setattr(report_cli.Sizes, "of", lambda **_: sizes)
    file = tmp_path / "report.json"
    arguments = [tiny_artifact("wide", 4), "--quick", "--quiet", "--profile", "phone", "--json", file]
    assert run(report_cli.main, arguments) == 0
    measured = json.loads(file.read_text())["measured"]
    assert (measured["acceptances"], measured["acceptance_source"]) == ([], NO_ACCEPTANCE)
    assert measured["figures"]["drafted"]["note"] == NO_ACCEPTANCE


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "one of the arguments ARTIFACT --dummy --model is required; see edge-report --help"),
    "two": (["x", "--model", "E2B"], "argument --model: not allowed with argument ARTIFACT; see"),
    "no-artifact": (["none"], "none: No such file or directory; make an artifact with edge-export"),
    "no-size": (["--model", "E3B"], "argument --model: invalid choice: 'E3B'"),
    "bits": (["--model", "E2B", "--bits", "5"], "--bits 5: choose one of 4, 8, 16, 32"),
    "own-bits": (["x", "--bits", "4"], "--bits is for --dummy; an artifact has its own"),
    "nothing-measured": (
        ["--model", "E2B", "--assume-acceptance", "1"],
        "--assume-acceptance is for measuring, ",
    ),
    "no-text": (["--model", "E4B", "--prompts", "p"], "--prompts is for measuring, .*; use --dummy E4B$"),
    "random-text": (["--dummy", "E2B", "--prompts", "p"], "--prompts: random weights tell no acceptance; use --assume"),
    "probability": (["x", "--assume-acceptance", "1.5"], "argument --assume-acceptance: 1.5 is no probability of 0"),
    "no-prompts": (["x", "--prompts", "none"], "--prompts none: No such file or directory; name a file that can be"),
    "profile": (["x", "--profile", "labtop"], "unknown profile 'labtop', did you mean 'laptop'?"),
    "html-folder": (["x", "--html", "."], "--html .: is a folder; name a file"),
    "json-nowhere": (["x", "--json", "none/report"], "--json none/report: none is not a folder; create it or"),
    "one-file": (["x", "--json", "r", "--html", "r"], "--html and --json both name r; name two files"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_cannot_be_served(case: str, capfd: Capture, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    options, match = BAD_OPTIONS[case]
    assert_fails(report_cli.main, options, f"^edge-report: {match}", capfd)


def test_help_defines_the_figures(capfd: Capture) -> None:
    assert run(report_cli.main, ["--help"]) == 0
    printed = capfd.readouterr().out
    for name in report_cli.DEFINITIONS:
        assert re.search(rf"^  {re.escape(name)}: ", printed, re.M), name
