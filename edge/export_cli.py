"""`edge-export`: makes an artifact from a Gemma 4 checkpoint and its drafter."""

import sys
from collections.abc import Sequence

from edge.command import CommandParser, run_command
from export.cli import add_arguments, export


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = CommandParser(prog="edge-export", description="Export a Gemma 4 E-series model for the runtime.")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    return run_command("edge-export", lambda: export(options))


if __name__ == "__main__":
    sys.exit(main())
