"""`edge-quality`: measures what an artifact costs against the checkpoint that it was exported from."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from edge.command import CommandParser, run_command
from edge.whole_file import check_destination, write_whole
from runtime.errors import EdgeError

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
    from edge.quality.text import render_page, render_text
    from export.pipeline import open_source
    from export.sensitivity import sensitivities
    from export.source import resolve_source

    max_tokens = DEFAULT_TOKENS if options.max_tokens is None else options.max_tokens
    if max_tokens < 1:
        raise EdgeError(f"--max-tokens {max_tokens}: expected at least 1")
    target, _ = resolve_source(options.reference, None)
    show = sys.stderr.isatty() and not options.quiet

    def progress(what: str, done: int, total: int) -> None:
        if show:
            print(f"\r{what} {done}/{total} ", end="\n" if done == total else "", file=sys.stderr, flush=True)

    quality = measure_quality(options.artifact, target, options.text, max_tokens=max_tokens, progress=progress)
    tensors = []
    if options.sensitivity:
        source, behind = open_source(target, None), [0]

        def layer_behind(num_layers: int) -> None:
            behind[0] += num_layers
            progress("sensitivity", behind[0], len(source.model.layers))

        tensors = sensitivities(source.target, source.prefix, source.model, options.text, layer_behind)
    print(render_text(quality, tensors), flush=True)
    if options.json:
        content = quality.to_json() | {"sensitivity": [asdict(tensor) for tensor in tensors]}
        write_whole(options.json, json.dumps(content, indent=1, allow_nan=False) + "\n", "--json")
    if options.html:
        write_whole(options.html, render_page(quality, tensors), "--html")


if __name__ == "__main__":
    sys.exit(main())
