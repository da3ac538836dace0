"""`edge-quality`: measures what an artifact costs against the checkpoint that it was exported from."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edge.command import CommandParser, run_command
from edge.whole_file import check_destination, write_whole
from runtime.errors import EdgeError

if TYPE_CHECKING:
    from edge.quality.measure import Progress
    from export.sensitivity import Sensitivity

NAME = "edge-quality"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = CommandParser(prog=NAME, description="Measure what an artifact costs against its checkpoint.")
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help="folder made by edge-export")
    parser.add_argument("--reference", required=True, metavar="SOURCE", help="its checkpoint: folder, 'demo' or hub id")
    parser.add_argument("--text", required=True, metavar="FILE", type=Path, help="a text that nothing was tuned on")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens to measure on, at most (default: 4,096)")
    parser.add_argument("--sensitivity", action="store_true", help="also what 4 bits of each tensor alone would cost")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(arguments)
    return run_command(NAME, lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    from export.cli import check_installed

    check_installed()
    for option, path in (("--html", options.html), ("--json", options.json)):
        if path is not None:
            check_destination(path, option)
    from edge.quality.measure import DEFAULT_TOKENS, measure_quality
    from edge.quality.progress import stage_bars
    from edge.quality.text import render_page, render_text
    from export.source import resolve_source

    max_tokens = DEFAULT_TOKENS if options.max_tokens is None else options.max_tokens
    if max_tokens < 1:
        raise EdgeError(f"--max-tokens {max_tokens}: expected at least 1")
    target, _ = resolve_source(options.reference, None)
    with stage_bars(is_quiet=options.quiet) as progress:
        quality = measure_quality(options.artifact, target, options.text, max_tokens=max_tokens, progress=progress)
        tensors = _sensitivities(target, options.text, progress) if options.sensitivity else []
    print(render_text(quality, tensors), flush=True)
    if options.json:
        content = quality.to_json() | {"sensitivity": [asdict(tensor) for tensor in tensors]}
        write_whole(options.json, json.dumps(content, indent=1, allow_nan=False) + "\n", "--json")
    if options.html:
        write_whole(options.html, render_page(quality, tensors), "--html")


def _sensitivities(target: Path, text: Path, progress: "Progress") -> "list[Sensitivity]":
    from export.pipeline import open_source
    from export.sensitivity import sensitivities

    source, done = open_source(target, None), 0

    def behind(num_layers: int) -> None:
        nonlocal done
        done += num_layers
        progress("sensitivity", done, len(source.model.layers))

    behind(0)
    return sensitivities(source.target, source.prefix, source.model, text, behind)


if __name__ == "__main__":
    sys.exit(main())
