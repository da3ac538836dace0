"""The ops' tests once more, on a build that stops at any access out of bounds and any undefined behaviour."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "runtime/native/src"
FLAGS = ["-O1", "-g", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its sanitizer libraries")
@pytest.mark.sanitizers
def test_ops_keep_within_bounds(tmp_path: Path) -> None:
    library = tmp_path / "edge_ops_sanitized.so"
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    subprocess.run(["g++", *FLAGS, *SANITIZERS, "-w", *sources, "-o", str(library)], check=True)
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "EDGE_TEST_OPS_LIBRARY": str(library),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parent / "test_ops.py"),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=SOURCES.parents[2])
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert " passed" in result.stdout
