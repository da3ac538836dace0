"""`edge-export`: makes an artifact from a Gemma 4 checkpoint and its drafter."""

import argparse
import sys
from collections.abc import Sequence

from edge.command import CommandParser, run_command
from export.cli import add_arguments, export
from profiles import ProfileError
from runtime.errors import EdgeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = CommandParser(prog="edge-export", description="Export a Gemma 4 E-series model for the runtime.")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    return run_command("edge-export", lambda: export_and_evaluate(options))


def export_and_evaluate(options: argparse.Namespace, *, through_optimum: bool = False) -> None:
    """Runs `export.cli.export`, then measures the artifact against its checkpoint on the text of `--evaluate`.

    Raises:
        EdgeError: the export failed, or the artifact, which stays, could not be measured.
    """
    checkpoint = export(options, through_optimum=through_optimum)
    if checkpoint is None or options.evaluate is None:
        return
    from edge.quality.measure import measure_quality
    from edge.quality.progress import stage_bars
    from edge.quality.text import render_text

    try:
        with stage_bars(is_quiet=options.quiet) as progress:
            quality = measure_quality(options.output, checkpoint, options.evaluate, progress=progress)
    except (EdgeError, ProfileError, OSError) as error:
        raise EdgeError(f"{options.output} is exported and stays, but was not evaluated: {error}") from error
    print(render_text(quality, []))


if __name__ == "__main__":
    sys.exit(main())
