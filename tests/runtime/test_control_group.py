"""In a control group of the plan's size nothing is killed; in a smaller one the error comes before the load."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from profiles.budget import KERNEL_BYTES

ROOT = Path(__file__).parents[2]
GROUPS = Path("/sys/fs/cgroup")
OVERHEAD = 2 << 20  # of shared libraries, which the group may drop and read again

CHILD = """
import dataclasses, os, sys
open(sys.argv[2], "w").write(str(os.getpid()))  # from here on everything is charged to the group
from edge import Runtime, load_profile
profile = dataclasses.replace(load_profile("laptop"), memory_fraction=1.0)
try:
    with Runtime.load(sys.argv[1], profile=profile, context_tokens=int(sys.argv[3])) as runtime:
        prompt = [2 + 7 * i % 2000 for i in range(runtime.context_tokens - 40)]
        for options in ({"num_draft_tokens": 16, "temperature": 0}, {"top_k": 0, "top_p": 0.95}):
            assert runtime.generate(prompt, max_tokens=30, **options).stats.num_generated_tokens
        print(runtime.plan.peak_bytes)
except ValueError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Path]]:
    """Makes a control group with a limit; returns the file that a process writes its id to."""
    is_v2 = (GROUPS / "cgroup.controllers").exists()
    parent = GROUPS if is_v2 else GROUPS / "memory"
    folder = parent / f"gemma-edge-test-{os.getpid()}"
    try:
        folder.mkdir()
        limit = folder / ("memory.max" if is_v2 else "memory.limit_in_bytes")
        limit.write_text(limit.read_text())
    except OSError:
        pytest.skip("no permission to make a control group with a memory limit")

    def limited(num_bytes: int) -> Path:
        limit.write_text(str(num_bytes))
        return folder / "cgroup.procs"

    yield limited
    folder.rmdir()


def run(artifact: Path, group: Path, context_tokens: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(artifact), str(group), str(context_tokens)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_group_of_the_plans_size(demo_artifact: Callable[..., Path], group: Callable[[int], Path]) -> None:  # 47
    artifact = demo_artifact(4, "native")
    planned = int(run(artifact, group(1 << 30), 1024).stdout)
    done = run(artifact, group(planned + KERNEL_BYTES + OVERHEAD), 1024)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == planned


def test_a_group_that_is_too_small(demo_artifact: Callable[..., Path], group: Callable[[int], Path]) -> None:  # 46, 47
    done = run(demo_artifact(4, "native"), group(44 << 20), 1024)
    assert done.returncode == 1, "neither killed nor loaded"
    assert done.stderr.startswith("MemoryBudgetError: laptop: "), done.stderr
    assert "the budget is " in done.stderr
