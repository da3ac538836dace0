"""`edge-bench`: measures an artifact, or one of a model's size with random weights, beside the machine's own limits."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edge.bench.figures import Report
from edge.bench.plan import Plan, quick
from edge.bench.suite import run_bench
from edge.command import CommandParser, run_command
from profiles import available_profiles, load_profile
from runtime import native
from runtime.errors import EdgeError
from runtime.manifest import read_manifest

NAME = "edge-bench"
LAYOUTS = ("native", "portable")
FIGURES = """\
figures (medians over interleaved passes, with their range):
  stream bandwidth, int8 product rate    the machine's limits, measured in the same run
  prefill                                tokens/s of 128, 512 and 2,048 tokens; share of the product rate
  decode                                 tokens/s at contexts 128, 2,048 and 8,192; share of the bandwidth: every
                                         weight and every cached row that a token sees is read once
  verify                                 a forward of M = 2..8 tokens relative to M = 1, contexts 128 and 2,048
  drafter step                           ms, and its part of a target step
  time to first token                    ms, prompt of 512 tokens
  outside sessions a round               ms of Python and sampling: no drafts, drafts greedy, drafts sampled
  net speed at acceptance P (simulated)  drafting relative to none where each draft stands with probability P;
                                         tokens a round beside it. All work is done, acceptance alone is made up
  drafting on prompts                    with --prompts: drafts that stood, and the speed of decoding relative to no
                                         drafts: as many drafts as pay, and a fixed number. One sample a prompt, greedy
  load                                   s, cold (files dropped from the page cache) and warm, in a fresh process
                                         that need not verify digests; also up to a first token, and the
                                         tokenizer alone
  memory                                 MB, anonymous and mapped, decoding at context 2,048 in a fresh process;
                                         the peak that a thread sees every 3 ms

A figure whose context does not fit is "-", with the reason.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(NAME, lambda: _bench(options))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=NAME,
        description="Measure an edge artifact on this machine.",
        epilog=FIGURES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("artifact", nargs="?", metavar="ARTIFACT", help="folder made by edge-export")
    what.add_argument("--dummy", choices=("E2B", "E4B"), help="random weights of this model's size, kept in the cache")
    parser.add_argument("--bits", type=int, metavar="4|8|16|32", help="with --dummy: bits of a weight (default: 4)")
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="with --dummy: weights that share a scale (default: 32)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, help="with --dummy: how weights lie in their files")
    parser.add_argument("--profile", default="laptop", help=f"{', '.join(available_profiles())} or a TOML file")
    parser.add_argument("--memory-budget", metavar="BYTES", help='such as "2 GiB" (default: the profile\'s)')
    parser.add_argument("--threads", type=int, metavar="N", help="threads instead of the profile's")
    parser.add_argument(
        "--instruction-set", metavar="NAME", help=f"force the native ops to one of {', '.join(native.INSTRUCTION_SETS)}"
    )
    parser.add_argument(
        "--assume-acceptance",
        type=_probability,
        action="append",
        default=[],
        metavar="P",
        help="also simulate that each draft stands with probability P; repeatable",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='also measure drafting on real text: a JSON list of texts, or of objects with a "text"',
    )
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON too")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no probability of 0 to 1")
    return value


def _bench(options: argparse.Namespace) -> None:
    acceptances = tuple(dict.fromkeys(options.assume_acceptance))
    plan = replace(quick() if options.quick else Plan(), acceptances=acceptances)
    if options.prompts is not None:
        plan = replace(plan, prompt_texts=_prompt_texts(options.prompts))
    profile = load_profile(options.profile)
    if options.threads is not None:
        profile = replace(profile, num_threads=options.threads)
    if options.json:
        _check_destination(options.json)
    if options.instruction_set is not None:
        _force_instruction_set(options.instruction_set)
    artifact = _artifact(options)
    if options.instruction_set is not None:
        _check_layout(artifact, options.instruction_set)
    report = run_bench(artifact, profile, options.memory_budget, plan, _silence if options.quiet else _progress)
    if report.about["layout"] == "native":
        print(f"layout native, instruction set {report.about['instruction_set']}")
    print(report.table(), flush=True)
    if options.json:
        _write_json(options.json, report)


def _prompt_texts(path: Path) -> tuple[str, ...]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EdgeError(f"--prompts {path}: {error.strerror}; name a file that can be read") from error
    except ValueError as error:  # no UTF-8, or no JSON
        raise EdgeError(f"--prompts {path}: {error}; expected a JSON list of texts") from error
    if isinstance(entries, list):
        found = [entry.get("text") if isinstance(entry, dict) else entry for entry in entries]
        texts = [text for text in found if isinstance(text, str) and text]
        if texts and len(texts) == len(found):
            return tuple(texts)
    raise EdgeError(f'--prompts {path}: expected a JSON list of texts, or of objects with a "text", and at least one')


def _force_instruction_set(name: str) -> None:
    """Comes before anything runs the self-test: it holds for the instruction set that it ran on."""
    names = native.runnable_instruction_sets()
    if names and name not in names:
        raise EdgeError(f"--instruction-set {name}: this machine runs {', '.join(names)}; choose one of them")
    native.force_instruction_set(name)
    if reason := native.unusable_because():
        raise EdgeError(f"--instruction-set {name}: the native ops cannot be used: {reason}")


def _check_layout(artifact: Path, instruction_set: str) -> None:
    if read_manifest(artifact).layout != "native":
        raise EdgeError(
            f"--instruction-set {instruction_set}: {artifact} has the portable layout, which does not use the native "
            "ops; leave the option out or measure one of the native layout"
        )


def _artifact(options: argparse.Namespace) -> Path:
    if options.artifact is not None:
        for name in ("bits", "block_size", "layout"):
            if getattr(options, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise EdgeError(f"{option} is for --dummy; an artifact has its own, made by edge-export {option}")
        return Path(options.artifact)
    from export.cli import NEEDED
    from quant.recipe import RecipeError, make_recipe

    try:
        from export.dummy import dummy_artifact
        from export.released import RELEASED
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise EdgeError(f"--dummy: {error.name} is not installed; run: pip install 'gemma-edge[export]'") from error
    try:
        recipe = make_recipe(
            4 if options.bits is None else options.bits, 32 if options.block_size is None else options.block_size
        )
    except RecipeError as error:
        raise EdgeError(str(error)) from error
    dummy, show_progress = RELEASED[options.dummy], not options.quiet
    return dummy_artifact(dummy, recipe, layout=options.layout, show_progress=show_progress)


def _progress(line: str) -> None:
    print(f"{NAME}: {line}", file=sys.stderr, flush=True)


def _silence(line: str) -> None:
    pass


def _check_destination(path: Path) -> None:
    """Told before minutes of measuring, not behind them."""
    if path.is_dir():
        raise EdgeError(f"--json {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise EdgeError(f"--json {path}: {path.parent} is not a folder; create it or choose another")


def _write_json(path: Path, report: Report) -> None:
    """Replaces the file whole; what is no regular file, such as a pipe, is written to."""
    text = json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n"
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        finally:
            with contextlib.suppress(OSError):
                Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise EdgeError(f"--json {path}: {error.strerror or error}; the figures above are all there are") from error


if __name__ == "__main__":
    sys.exit(main())
