"""`optimum-cli export edge`: the same export as a command of optimum.

Installed as `optimum.commands.register.register_edge`, which is where optimum looks for commands; a namespace, so
without `__init__.py`. Imports nothing heavy, because optimum loads it whenever any of its commands starts.

Source: optimum 2.3 `commands/optimum_cli.py`.
"""

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from export.cli import add_arguments


class EdgeExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum ships no types
    """The command, in the form that optimum registers."""

    COMMAND = CommandInfo(name="edge", help="Export a Gemma 4 E-series model for the gemma-edge runtime.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Adds the options of `edge-export`."""
        add_arguments(parser)

    def run(self) -> None:
        """Runs the export and ends the process with its exit code."""
        from edge.command import run_command
        from edge.export_cli import export_and_evaluate

        sys.exit(run_command("optimum-cli export edge", lambda: export_and_evaluate(self.args, through_optimum=True)))


REGISTER_COMMANDS = [(EdgeExportCommand, ExportCommand)]
