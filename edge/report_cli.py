"""`edge-report`: one page about one model: what fits which device, what was measured here, what is projected."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge.command import CommandParser, run_command
from edge.measured import add_acceptance_options, add_recipe_options, progress_lines, prompt_texts
from edge.report.content import DEFINITIONS, build_report
from edge.report.measure import Measured, Sizes, measure_subject
from edge.report.page import render_page
from edge.report.subject import Subject, subject_of
from edge.report.text import render_text
from edge.whole_file import check_destination, write_whole
from profiles import MODELS, DeviceProfile, available_profiles, detect_profile, load_profile
from runtime.errors import EdgeError

NAME = "edge-report"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    return run_command(NAME, lambda: _report(options, shlex.join([NAME, *given])))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=NAME,
        description="Report which devices a model fits, how fast it is here, and what to expect elsewhere.",
        epilog="figures:\n" + "\n".join(f"  {name}: {text}" for name, text in DEFINITIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("artifact", nargs="?", metavar="ARTIFACT", help="folder made by edge-export")
    what.add_argument("--dummy", choices=MODELS, help="random weights of this model's size, kept in the cache")
    what.add_argument("--model", choices=MODELS, help="no weights at all: plan and projection only")
    add_recipe_options(parser, "--dummy or --model")
    parser.add_argument(
        "--profile",
        action="append",
        metavar="P",
        help=f"device to plan for, {', '.join(available_profiles())} or a TOML file; repeatable (default: all of them)",
    )
    add_acceptance_options(parser)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and samples")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _report(options: argparse.Namespace, command: str) -> None:
    """Everything that can be refused is refused before minutes of measuring."""
    for option, path in (("--html", options.html), ("--json", options.json)):
        if path is not None:
            check_destination(path, option)
    if options.html is not None and options.html == options.json:
        raise EdgeError(f"--html and --json both name {options.html}; name two files")
    _check_acceptance(options)
    profiles = [load_profile(name) for name in dict.fromkeys(options.profile or available_profiles())]
    here = detect_profile()
    sizes = Sizes.of(is_quick=options.quick)
    texts = () if options.prompts is None else prompt_texts(options.prompts)
    subject = subject_of(options)
    measured = None if subject.manifest is None else _measure(subject, here, sizes, texts, options)
    _write(build_report(subject, profiles, measured, here, sizes, command), options)


def _check_acceptance(options: argparse.Namespace) -> None:
    if options.model is not None and (options.assume_acceptance or options.prompts):
        option = "--prompts" if options.prompts else "--assume-acceptance"
        raise EdgeError(f"{option} is for measuring, --model measures nothing; use --dummy {options.model}")
    if options.dummy is not None and options.prompts:
        raise EdgeError("--prompts: random weights tell no acceptance; use --assume-acceptance with --dummy")


def _measure(
    subject: Subject, here: DeviceProfile, sizes: Sizes, texts: tuple[str, ...], options: argparse.Namespace
) -> Measured:
    plan = sizes.plan(is_quick=options.quick, prompt_texts=texts)
    acceptances = tuple(dict.fromkeys(options.assume_acceptance))
    return measure_subject(subject, here, sizes, plan, acceptances, progress_lines(NAME, is_quiet=options.quiet))


def _write(report: dict[str, Any], options: argparse.Namespace) -> None:
    print(render_text(report), flush=True)
    if options.json:
        write_whole(options.json, json.dumps(report, indent=1, allow_nan=False) + "\n", "--json")
    if options.html:
        write_whole(options.html, render_page(report), "--html")


if __name__ == "__main__":
    sys.exit(main())
