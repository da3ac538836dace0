"""E2B at its real size with random weights: `pytest -m full_size`. Needs 13 GB of disk, 4 GB of memory, minutes.

Set EDGE_FULL_SIZE to a folder to keep the checkpoint between runs.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import edge
from runtime.memory import memory_usage
from tests.full_size.random_checkpoint import write_e2b

pytestmark = pytest.mark.full_size

MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    kept = os.environ.get("EDGE_FULL_SIZE")
    folder = Path(kept) / "e2b" if kept else tmp_path_factory.mktemp("full") / "e2b"
    if not folder.exists():
        write_e2b(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint, tmp_path_factory):
    """An export in a child process, whose peak memory must not follow the size of the model."""
    folder = tmp_path_factory.mktemp("artifact") / "e2b"
    arguments = [checkpoint / "target", folder, "--drafter", checkpoint / "assistant", "--bits", "4", "--quiet"]
    subprocess.run([sys.executable, "-m", "edge.export_cli", *map(str, arguments)], check=True)
    return folder


def test_export_stays_small(artifact):
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 1024 * MIB, "torch alone takes some 300 MiB, a chunk in flight some 200; the model has 9.3 GB"
    size = sum(file.stat().st_size for file in artifact.iterdir())
    assert 2.6e9 < size < 3.0e9


def test_drafts_verify_and_tables_stay_on_disk(artifact):
    prompt = [2 + 97 * i for i in range(2000)]  # past the window of 512, in four chunks
    before = memory_usage().anonymous_bytes  # of what the other tests have imported
    with edge.Runtime.load(artifact) as runtime:
        plain = runtime.generate(prompt, max_tokens=8, temperature=0.0, num_draft_tokens=0)
        drafted = runtime.generate(prompt, max_tokens=8, temperature=0.0, num_draft_tokens=3)
        usage = memory_usage()
        planned = runtime.plan.peak_bytes
    assert len(plain.token_ids) == len(drafted.token_ids) == 8
    assert drafted.stats.num_drafted > 0
    assert drafted.stats.peak_anonymous_bytes - before <= planned
    # the weights are mapped; the PLE table has 1.3 GB: 4,000 looked-up rows must not make it resident
    weights = sum((artifact / name).stat().st_size for name in {matrix.file for matrix in runtime.manifest.matrices})
    assert weights < 1.5e9
    assert usage.mapped_bytes < weights + 128 * MIB
