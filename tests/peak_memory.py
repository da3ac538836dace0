"""The peak of anonymous memory of a child process, seen from outside: no thread in it runs while a library works."""

import os
import subprocess
import sys
from pathlib import Path

from edge.bench.memory_curve import MemoryCurve

ROOT = Path(__file__).parents[1]


def run_watched(code: str, *arguments: object) -> tuple[str, int]:
    """Runs Python code with arguments; returns what it printed and the most anonymous memory that it had, in bytes."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    curve = MemoryCurve()
    with (
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child,
        curve.watching(child.pid),
    ):
        printed, complaints = child.communicate(timeout=1800)
    assert child.returncode == 0, complaints
    return printed, curve.peak_anonymous(0, float("inf"))
