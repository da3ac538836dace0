"""`edge-bench` from end to end on a tiny artifact, and its errors: one line each."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edge import bench_cli
from edge.bench.plan import Plan
from runtime import native
from tests.commands import Capture, assert_fails, run
from tests.layouts import needs_native
from tests.test_imports import CORE_ALONE, run_python

ROOT = Path(__file__).parents[2]
TINY = Plan(
    prompts=(8,),
    decode_contexts=(8,),
    verify_contexts=(8,),
    first_token_prompts=(8,),
    memory_context=8,
    memory_tokens=2,
    drafting_context=8,
    num_passes=1,
    num_repeats=1,
    num_loads=1,
    outside_tokens=4,
    stream_bytes=1,
)


class Ran(NamedTuple):
    """What one run printed and wrote."""

    table: str
    progress: str
    json: dict[str, Any]


@pytest.fixture(scope="module")
def ran(tiny_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    file = tmp_path_factory.mktemp("bench") / "report.json"
    prompts = file.with_name("prompts.json")
    prompts.write_text(json.dumps(["The first", {"text": "another prompt", "kind": "prose"}]))
    assumed = ["--assume-acceptance", "1", "--assume-acceptance", "0.0", "--prompts", str(prompts)]
    command = [sys.executable, "-m", "edge.bench_cli", str(tiny_artifact("wide", 4)), "--quick", "--threads", "1"]
    result = subprocess.run(
        [*command, *assumed, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return Ran(result.stdout, result.stderr, json.loads(file.read_text()))


EXPECTED = [
    *("roofline.stream", "roofline.product"),
    *(f"prefill.{size}" for size in (128, 512, 2048)),
    *(f"decode.{context}" for context in (128, 2048, 8192)),
    *(f"verify.{context}.{size}" for context in (128, 2048) for size in range(2, 9)),
    *(f"{name}.{context}" for context in (128, 2048) for name in ("drafter", "drafter_share")),
    "first_token.512",
    *(f"outside.{mode}" for mode in ("plain", "greedy", "sampled")),
    *(f"{name}.{acceptance}" for acceptance in (1, 0) for name in ("net", "tokens_per_round")),
    *(f"text_{name}.{drafts}" for drafts in ("adaptive", "fixed") for name in ("acceptance", "net", "round")),
    *(f"{name}.{kind}" for kind in ("cold", "warm") for name in ("load", "load_and_token")),
    "load.tokenizer",
    *(f"memory.{name}" for name in ("decode_anonymous", "decode_mapped", "prefill_anonymous", "loading_anonymous")),
    *(f"memory.{name}" for name in ("loaded_anonymous", "imported_anonymous")),
]
TOO_LONG = {"prefill.2048", "decode.2048", "decode.8192", "drafter.2048", "drafter_share.2048"} | {
    f"verify.2048.{size}" for size in range(2, 9)
}


def test_every_figure_is_there(ran: Ran) -> None:
    figures = ran.json["figures"]
    assert list(figures) == EXPECTED
    for key, entry in figures.items():
        assert entry["key"] == key
        assert entry["unit"]
        if key in TOO_LONG:
            assert (entry["value"], entry["note"]) == (None, "the context holds 2,048 tokens")
        elif key in ("load.cold", "text_acceptance.adaptive"):  # the policy may draft nothing
            assert entry["value"] is None or entry["value"] >= 0
        elif key == "text_acceptance.fixed":
            assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 100
        else:
            assert entry["value"] > 0
            assert entry["low"] <= entry["value"] <= entry["high"]
            assert entry["num_samples"] > 0


def test_shares_of_limits(ran: Ran) -> None:
    with_share = {key for key, entry in ran.json["figures"].items() if entry["limit_share"] is not None}
    assert with_share == {"prefill.128", "prefill.512", "decode.128"} | {f"verify.128.{size}" for size in range(2, 9)}


def test_simulated_figures_are_labelled(ran: Ran) -> None:
    simulated = {key for key, entry in ran.json["figures"].items() if entry["simulated"]}
    assert simulated == {"net.1", "tokens_per_round.1", "net.0", "tokens_per_round.0"}
    for line in ran.table.splitlines():
        assert ("(simulated)" in line) == ("at acceptance" in line)


def test_every_prompt_is_taken_once(ran: Ran) -> None:
    figures = ran.json["figures"]
    assert figures["text_net.adaptive"]["num_samples"] == figures["text_net.fixed"]["num_samples"] == 2
    accepted, drafted = map(int, re.findall("[0-9]+", figures["text_acceptance.fixed"]["note"]))
    rounds = figures["text_round.fixed"]
    assert 0 <= accepted <= drafted and drafted > 0
    assert 1 <= rounds["low"] <= rounds["high"] <= 4  # three drafts and the target's own token


def test_assumed_acceptance_decides_the_tokens_of_a_round(ran: Ran) -> None:
    figures = ran.json["figures"]
    # how many are drafted is the runtime's choice; each of them stands
    assert 1 < figures["tokens_per_round.1"]["value"] <= 1 + ran.json["about"]["num_draft_tokens"]
    assert figures["tokens_per_round.0"]["value"] == 1


def test_the_table_has_a_line_for_each(ran: Ran) -> None:
    lines = ran.table.splitlines()
    assert lines[0].split()[:3] == ["figure", "median", "unit"]
    assert len(lines) == 1 + len(EXPECTED)
    assert all(line.startswith("edge-bench: ") for line in ran.progress.splitlines())
    assert ran.json["about"]["num_threads"] == 1


def test_a_portable_artifact_has_no_instruction_set(ran: Ran) -> None:
    assert (ran.json["about"]["layout"], ran.json["about"]["instruction_set"]) == ("portable", None)
    assert "instruction set" not in ran.table


@needs_native
@pytest.mark.parametrize("forced", [None, "scalar"])
def test_the_report_names_the_instruction_set(
    forced: str | None,
    tiny_artifact: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Capture,
    best_instruction_set: str,
) -> None:
    monkeypatch.setattr(bench_cli, "quick", lambda: TINY)
    file = tmp_path / "report.json"
    options = [tiny_artifact("wide", 4, "int8", "native"), "--quick", "--quiet", "--threads", "1", "--json", file]
    assert run(bench_cli.main, [*options, *(["--instruction-set", forced] if forced else [])]) == 0
    name = forced or best_instruction_set
    assert capfd.readouterr().out.splitlines()[0] == f"layout native, instruction set {name}"
    about = json.loads(file.read_text())["about"]
    assert (about["layout"], about["instruction_set"]) == ("native", name)
    assert native.instruction_set() == name


@needs_native
@pytest.mark.parametrize("is_known", [False, True])
def test_an_instruction_set_that_is_not_there(is_known: bool, capfd: Capture, best_instruction_set: str) -> None:
    names = native.runnable_instruction_sets()
    name = next(name for name in native.INSTRUCTION_SETS if name not in names) if is_known else ""
    match = f"^edge-bench: --instruction-set {name}: this machine runs {', '.join(names)}; choose one of them$"
    assert_fails(bench_cli.main, ["none", "--instruction-set", name], match, capfd)
    assert native.instruction_set() == best_instruction_set


@needs_native
def test_an_instruction_set_for_a_portable_artifact(
    tiny_artifact: Callable[..., Path], capfd: Capture, best_instruction_set: str
) -> None:
    match = "^edge-bench: --instruction-set scalar: .*/artifact has the portable layout, which does not use the native"
    assert_fails(bench_cli.main, [tiny_artifact("wide", 4), "--instruction-set", "scalar"], match, capfd)


def test_an_instruction_set_without_native_ops(
    monkeypatch: pytest.MonkeyPatch, capfd: Capture, best_instruction_set: str
) -> None:
    match = "^edge-bench: --instruction-set scalar: the native ops cannot be used: they were not built"
    with monkeypatch.context() as patch:
        patch.setattr(native, "library_path", lambda: None)
        native._library.cache_clear()
        assert_fails(bench_cli.main, ["none", "--instruction-set", "scalar"], match, capfd)
    native._library.cache_clear()


@needs_native
def test_an_instruction_set_that_fails_the_self_test(
    monkeypatch: pytest.MonkeyPatch, capfd: Capture, best_instruction_set: str
) -> None:
    def outputs(path: Path) -> dict[str, Any]:
        found = run_self_test(path)
        return found | {"total": found["total"] + (native.instruction_set() == "scalar")}

    run_self_test = native._run_self_test
    monkeypatch.setattr(native, "_run_self_test", outputs)
    match = "^edge-bench: --instruction-set scalar: the native ops cannot be used: their self-test fails: total on scal"
    assert_fails(bench_cli.main, ["none", "--instruction-set", "scalar"], match, capfd)


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "one of the arguments ARTIFACT --dummy is required; see edge-bench --help"),
    "both": (["x", "--dummy", "E2B"], "argument --dummy: not allowed with argument ARTIFACT; see"),
    "no-artifact": (["none"], "none: No such file or directory; make an artifact with edge-export"),
    "no-size": (["--dummy", "E3B"], "argument --dummy: invalid choice: 'E3B'"),
    "bits": (["--dummy", "E2B", "--bits", "5"], "--bits 5: choose one of 4, 8, 16, 32"),
    "no-bits": (["--dummy", "E2B", "--bits", "0"], "--bits 0: choose one of 4, 8, 16, 32"),
    "block-size": (["--dummy", "E2B", "--block-size", "33"], "--block-size 33: choose one of 16, 32, 64, 128, 256"),
    "own-bits": (["x", "--bits", "4"], "--bits is for --dummy; an artifact has its own, made by edge-export --bits"),
    "own-layout": (["x", "--layout", "native"], "--layout is for --dummy; an artifact has its own"),
    "probability": (["x", "--assume-acceptance", "1.5"], "argument --assume-acceptance: 1.5 is no probability of 0"),
    "no-number": (["x", "--assume-acceptance", "often"], "argument --assume-acceptance: invalid .* value: 'often'"),
    "nan": (["x", "--assume-acceptance", "nan"], "argument --assume-acceptance: nan is no probability of 0 to 1"),
    "no-prompts": (["x", "--prompts", "none"], "--prompts none: No such file or directory; name a file that can be"),
    "threads": (["x", "--threads", "-1"], "num_threads is -1, expected an integer of 0 to 1,024"),
    "profile": (["x", "--profile", "labtop"], "unknown profile 'labtop', did you mean 'laptop'?"),
    "json-folder": (["x", "--json", "."], "--json .: is a folder; name a file"),
    "json-nowhere": (["x", "--json", "none/report"], "--json none/report: none is not a folder; create it or"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_cannot_be_served(case: str, capfd: Capture, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    options, match = BAD_OPTIONS[case]
    assert_fails(bench_cli.main, options, f"^edge-bench: {match}", capfd)


@pytest.mark.parametrize("content", ["[]", "{}", '["a", ""]', '["a", 1]', '[{"txt": "a"}]', "['a']", "\xff"])
def test_prompts_that_are_none(content: str, capfd: Capture, tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(content, encoding="latin-1")
    match = f"^edge-bench: --prompts {re.escape(str(file))}: .*expected a JSON list of texts"
    assert_fails(bench_cli.main, ["x", "--prompts", file], match, capfd)


def test_a_budget_that_is_too_small(tiny_artifact: Callable[..., Path], capfd: Capture) -> None:
    options = [tiny_artifact("wide", 4), "--memory-budget", "1 MB", "--quiet"]
    match = "^edge-bench: measuring load: laptop: artifact needs [0-9]+ MiB .* the budget is 1 MiB"
    assert_fails(bench_cli.main, options, match, capfd)


def test_help_lists_the_figures(capfd: Capture) -> None:
    assert run(bench_cli.main, ["--help"]) == 0
    printed = capfd.readouterr().out
    for name in ("stream bandwidth", "prefill", "decode", "verify", "drafter step", "simulated", "load", "memory"):
        assert re.search(rf"^  .*{name}", printed, re.M), name


def test_the_core_alone_says_what_a_dummy_needs() -> None:
    result = run_python(CORE_ALONE, "edge.bench_cli", "--dummy", "E2B")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line == "edge-bench: --dummy: torch is not installed; run: pip install 'gemma-edge[export]'"
