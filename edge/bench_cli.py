"""`edge-bench`: measures an artifact, or one of a model's size with random weights, beside the machine's own limits."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edge.bench.plan import Plan, quick
from edge.bench.suite import run_bench
from edge.command import CommandParser, run_command
from edge.measured import (
    add_acceptance_options,
    add_recipe_options,
    artifact_folder,
    progress_lines,
    prompt_texts,
)
from edge.whole_file import check_destination, write_whole
from profiles import MODELS, available_profiles, load_profile
from runtime import native
from runtime.errors import EdgeError
from runtime.manifest import read_manifest

NAME = "edge-bench"
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
    what.add_argument("--dummy", choices=MODELS, help="random weights of this model's size, kept in the cache")
    add_recipe_options(parser, "--dummy")
    parser.add_argument("--profile", default="laptop", help=f"{', '.join(available_profiles())} or a TOML file")
    parser.add_argument("--memory-budget", metavar="BYTES", help='such as "2 GiB" (default: the profile\'s)')
    parser.add_argument("--threads", type=int, metavar="N", help="threads instead of the profile's")
    parser.add_argument(
        "--instruction-set", metavar="NAME", help=f"force the native ops to one of {', '.join(native.INSTRUCTION_SETS)}"
    )
    add_acceptance_options(parser)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON too")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _bench(options: argparse.Namespace) -> None:
    acceptances = tuple(dict.fromkeys(options.assume_acceptance))
    plan = replace(quick() if options.quick else Plan(), acceptances=acceptances)
    if options.prompts is not None:
        plan = replace(plan, prompt_texts=prompt_texts(options.prompts))
    profile = load_profile(options.profile)
    if options.threads is not None:
        profile = replace(profile, num_threads=options.threads)
    if options.json:
        check_destination(options.json, "--json")
    if options.instruction_set is not None:
        _force_instruction_set(options.instruction_set)
    artifact = artifact_folder(options)
    if options.instruction_set is not None:
        _check_layout(artifact, options.instruction_set)
    report = run_bench(artifact, profile, options.memory_budget, plan, progress_lines(NAME, is_quiet=options.quiet))
    if report.about["layout"] == "native":
        print(f"layout native, instruction set {report.about['instruction_set']}")
    print(report.table(), flush=True)
    if options.json:
        write_whole(options.json, report.to_text(), "--json")


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


if __name__ == "__main__":
    sys.exit(main())
