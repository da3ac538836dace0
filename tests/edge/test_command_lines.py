"""Both command lines: one line and exit code 1 for what a user can mend, and nothing else on standard error."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge import ClosedError, EdgeError, ProfileError, Runtime, export_cli, generate_cli
from edge.command import run_command
from runtime import errors
from tests.commands import Capture, assert_fails, contents, run

ROOT = Path(__file__).parents[2]
SHAPE = ("one_shared", 4)
GREEDY = ["--prompt-ids", "2,45,100", "--max-tokens", "20", "--temperature", "0", "--profile", "phone-arm"]


@pytest.fixture
def artifact(tiny_artifact: Callable[..., Path]) -> Path:
    return tiny_artifact(*SHAPE)


# Options

BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "no-prompt": ([], "one of the arguments --prompt --prompt-ids --chat is required; see edge-generate --help"),
    "two-prompts": (["--prompt", "a", "--chat", "b"], "argument --chat: not allowed with argument --prompt; see"),
    "unknown": (["--prompt", "a", "--nonsense"], "unrecognized arguments: --nonsense; see edge-generate --help"),
    "empty": (["--prompt", ""], "the prompt is empty; pass at least one token"),  # 60
    "empty-ids": (["--prompt-ids", ""], "--prompt-ids '': expected integers separated by commas"),  # 60
    "long": (["--prompt", "a1" * 50_000], "the prompt has [0-9,]+ tokens, the context holds [0-9,]+ and needs"),  # 61
    "negative-id": (["--prompt-ids", "2,-1"], "prompt token 1 is -1, expected an integer 0-511"),  # 62
    "large-id": (["--prompt-ids", "2,512"], "prompt token 1 is 512, expected an integer 0-511"),  # 62
    "half-id": (["--prompt-ids", "2,1.5"], "--prompt-ids '2,1.5': expected integers separated by commas"),  # 62
    "endless-ids": (["--prompt-ids", "2," * 30_000], r"--prompt-ids '2,.*\.\.\..*': expected integers"),  # 62
    "endless-id": (["--prompt-ids", "9" * 9000], r"--prompt-ids '9+\.\.\.9+': expected integers"),  # 62
    "surrogate": (["--prompt", "\udcff"], "text: character 0 is a lone surrogate and no Unicode text"),  # 53
    "max-tokens-0": (["--prompt", "a", "--max-tokens", "0"], "max_tokens is 0, expected an integer >= 1"),  # 63
    "max-tokens-negative": (["--prompt", "a", "--max-tokens", "-1"], "max_tokens is -1, expected an integer >= 1"),
    "max-tokens-half": (
        ["--prompt", "a", "--max-tokens", "1.5"],
        "argument --max-tokens: invalid int value: '1.5'; see",
    ),
    "temperature-nan": (
        ["--prompt", "a", "--temperature", "nan"],
        "temperature must be a finite number >= 0 .*got nan",
    ),
    "temperature-hot": (
        ["--prompt", "a", "--temperature", "hot"],
        "argument --temperature: invalid float value: 'hot'; see",
    ),
    "top-p-0": (["--prompt", "a", "--top-p", "0"], "top_p must be a number above 0 and at most 1 .*got 0.0"),
    "top-k-negative": (["--prompt", "a", "--top-k", "-1"], "top_k must be a whole number >= 0 .*got -1"),
    "seed-negative": (["--prompt", "a", "--seed", "-1"], "seed is -1, expected an integer >= 0"),
    "stop-empty": (["--prompt", "a", "--stop", ""], "stop 0 must be a non-empty string, got ''"),
    "drafts-17": (["--prompt", "a", "--num-draft-tokens", "17"], "num_draft_tokens is 17, expected an integer 0-16"),
    "policy": (
        ["--prompt", "a", "--context-policy", "shift"],
        r"argument --context-policy: invalid choice: 'shift' \(choose from '?stop'?, '?slide'?\); see edge-generate",
    ),
    "long-slide": (
        ["--prompt", "a1" * 50_000, "--context-policy", "slide"],
        "the prompt has ([0-9,]+) tokens, \\1 of them outside the turns that may be dropped, the context holds",  # 61
    ),
    "profile": (["--prompt", "a", "--profile", "labtop"], "unknown profile 'labtop', did you mean 'laptop'?"),
    "profile-file": (
        ["--prompt", "a", "--profile", "none.toml"],
        "none.toml: no such profile file; known profiles are",
    ),
    "budget": (
        ["--prompt", "a", "--memory-budget", "much"],
        "memory budget: 'much' is no amount of memory; write it like '6 GiB'",
    ),
    "small-budget": (
        ["--prompt", "a", "--memory-budget", "1 MB"],
        "laptop: artifact needs [0-9]+ MiB .* the budget is 1 MiB",
    ),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_cannot_be_served(artifact: Path, capfd: Capture, case: str) -> None:
    options, match = BAD_OPTIONS[case]
    before = contents(artifact)
    assert_fails(generate_cli.main, [artifact, *options], f"^edge-generate: {match}", capfd)
    assert contents(artifact) == before


def test_a_chat_without_a_template(tiny_checkpoint: Callable[[str], Any], tmp_path: Path, capfd: Capture) -> None:
    source = tiny_checkpoint("one_shared").target
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (bare / name).symlink_to(source / name)  # as in the hub's cache
    assert run(export_cli.main, [bare, tmp_path / "out"]) == 0
    match = r"the artifact has no chat template; use generate\(\) with a prompt of your own"
    assert_fails(generate_cli.main, [tmp_path / "out", "--chat", "hello"], match, capfd)


@pytest.mark.parametrize("command", [generate_cli.main, export_cli.main])
def test_help_is_no_fault(command: Callable[[Sequence[str]], int], capfd: Capture) -> None:
    assert run(command, ["--help"]) == 0
    printed = capfd.readouterr()
    assert printed.out.startswith("usage: edge-")
    assert printed.err == ""


# What is printed


def test_text_is_what_json_holds(artifact: Path, capfd: Capture) -> None:
    assert run(generate_cli.main, [artifact, *GREEDY, "--json"]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out)
    with Runtime.load(artifact, profile="phone-arm") as runtime:
        generation = runtime.generate([2, 45, 100], max_tokens=20, temperature=0)
    assert (found["token_ids"], found["text"]) == (generation.token_ids, generation.text)
    assert found["finish_reason"] == generation.finish_reason
    assert found["context_full"] is generation.context_full is False
    assert found["stats"]["num_generated_tokens"] == len(found["token_ids"])
    assert run(generate_cli.main, [artifact, *GREEDY]) == 0
    assert capfd.readouterr() == (f"{found['text']}\n", "")


def test_a_chat_is_answered(artifact: Path, capfd: Capture) -> None:
    assert run(generate_cli.main, [artifact, "--chat", "hello", "--max-tokens", "3", "--seed", "1"]) == 0
    assert capfd.readouterr().err == ""


def test_a_prompt_in_turns_may_slide(artifact: Path, tmp_path: Path, capfd: Capture) -> None:
    profile = tmp_path / "small.toml"
    text = (ROOT / "profiles" / "phone-arm.toml").read_text(encoding="utf-8")
    text = re.sub("context_tokens = .*", "context_tokens = 60", text)
    profile.write_text(re.sub("chunk_tokens = .*", "chunk_tokens = 60", text), encoding="utf-8")
    turns = "<|turn>user\nhello<turn|>\n<|turn>model\nhi<turn|>\n" * 4 + "<|turn>user\nhello<turn|>\n<|turn>model\n"
    options = [artifact, "--prompt", turns, "--profile", str(profile), "--max-tokens", "3", "--json"]
    assert_fails(generate_cli.main, options, '.* the context holds 60 .* with context_policy="slide"', capfd)
    assert run(generate_cli.main, [*options, "--context-policy", "slide"]) == 0
    stats = json.loads(capfd.readouterr().out)["stats"]
    assert stats["num_slides"] == 1
    assert stats["num_prompt_tokens"] - stats["num_dropped_tokens"] == stats["num_prefilled_tokens"] <= 57


# Errors


@pytest.mark.parametrize(
    "error",
    [kind for kind in vars(errors).values() if isinstance(kind, type)] + [ProfileError],
    ids=lambda kind: kind.__name__,
)
def test_every_error_of_a_user_is_one_line(error: type[Exception], capfd: Capture) -> None:
    assert issubclass(error, ValueError)

    def fail() -> None:
        raise error("of two\n lines  and\ttabs" + "x" * 10**6)

    assert run_command("edge-test", fail) == 1
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("edge-test: of two lines and tabsxxx")
    assert len(printed.err) < 2100
    assert printed.err.count("\n") == 1


def test_an_error_of_the_system_names_its_file(tmp_path: Path, capfd: Capture) -> None:
    assert run_command("edge-test", lambda: (tmp_path / "none").open().close()) == 1
    assert capfd.readouterr() == ("", f"edge-test: {tmp_path}/none: No such file or directory\n")


def test_a_bug_keeps_its_traceback() -> None:
    def fail() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_command("edge-test", fail)


def test_an_interrupt_is_one_line(capfd: Capture) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert run_command("edge-test", interrupt) == 130
    assert capfd.readouterr() == ("", "edge-test: interrupted\n")


def test_public_errors_are_all_of_one_family() -> None:
    assert issubclass(ClosedError, EdgeError)
    assert not issubclass(ProfileError, EdgeError)  # profiles import no package of ours


# Processes of their own


def start(arguments: Sequence[object], module: str = "generate_cli", **options: Any) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= options.pop("env", {}) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"edge.{module}", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, **options)


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, (out or b"").decode(), err.decode()


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_behind_standard_output(artifact: Path, options: list[str]) -> None:  # 84
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a descriptor to hand on
        process = start([artifact, *GREEDY, *options], stdout=full)
    assert finish(process) == (1, "", "edge-generate: input/output: No space left on device\n")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_has_gone(artifact: Path, options: list[str]) -> None:
    reading, writing = os.pipe()
    process = start([artifact, *GREEDY, *options], stdout=writing)
    os.close(writing)
    os.close(reading)
    assert finish(process) == (1, "", "")


def test_no_standard_output_at_all(artifact: Path) -> None:
    process = start([artifact, *GREEDY], preexec_fn=lambda: os.close(1))
    assert finish(process) == (0, "", "")


def test_a_terminal_that_knows_ascii_only(artifact: Path) -> None:  # 53
    with Runtime.load(artifact, profile="phone-arm") as runtime:
        text = runtime.generate([2, 45, 100], max_tokens=20, temperature=0).text
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    code, out, err = finish(start([artifact, *GREEDY], stdout=subprocess.PIPE, env=ascii_only))
    assert (code, out, err) == (0, text.encode("ascii", "replace").decode() + "\n", "")


def test_an_interrupted_generation(artifact: Path) -> None:  # 33, 70
    options = ["--prompt-ids", "2,45", "--temperature", "0", "--profile", "phone-arm"]
    process = start([artifact, *options], stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err) == (130, "edge-generate: interrupted\n")


def test_an_export_in_a_process_of_its_own(  # 32: and with other hashes
    tiny_checkpoint: Callable[[str], Any], artifact: Path, tmp_path: Path
) -> None:
    pair = tiny_checkpoint(SHAPE[0])
    arguments = [pair.target, tmp_path / "out", "--drafter", pair.assistant, "--layout", "portable", "--bits", 4]
    code, out, err = finish(start(arguments, "export_cli", stdout=subprocess.PIPE, env={"PYTHONHASHSEED": "7"}))
    assert (code, err) == (0, "")
    assert out.endswith(" MB, 4 bits in blocks of 32, portable, with drafter\n")
    assert contents(tmp_path / "out") == contents(artifact)
    assert finish(start(arguments, "export_cli", stdout=subprocess.PIPE)) == (
        1,
        "",
        f"edge-export: destination {tmp_path}/out is not empty; remove it or choose another\n",
    )
