"""Every instruction set's arithmetic, by tests/native/kernels_test.cpp: built, sanitized and for another processor."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "runtime/native/src"
FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
GCC_HEADER_NOISE = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # of GCC 12's own AVX-512 headers
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"

needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_arm = pytest.mark.skipif(
    shutil.which(ARM_COMPILER) is None or shutil.which(ARM_EMULATOR) is None,
    reason=f"needs {ARM_COMPILER} and {ARM_EMULATOR}: Debian packages g++-aarch64-linux-gnu and qemu-user-static",
)


def kernel_sources() -> list[str]:
    """The instruction sets and what chooses between them."""
    return sorted(str(path) for path in [*SOURCES.glob("kernels_*.cpp"), SOURCES / "dispatch.cpp"])


def build(compiler: str, options: list[str], folder: Path) -> str:
    """Compiles the test program; a warning is an error."""
    program = str(folder / "kernels_test")
    sources = [str(ROOT / "tests/native/kernels_test.cpp"), *kernel_sources()]
    command = [compiler, *FLAGS, *GCC_HEADER_NOISE, *options, "-I", str(SOURCES), *sources, "-o", program]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return program


def run(command: list[str]) -> list[str]:
    """Names of the instruction sets that held."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout.split()


@needs_gcc
@pytest.mark.parametrize(
    "options",
    [pytest.param(["-O3"], id="optimized"), pytest.param(SANITIZED, id="sanitized", marks=pytest.mark.sanitizers)],
)
def test_kernels_keep_their_laws(options: list[str], tmp_path: Path) -> None:
    assert "scalar" in run([build("g++", options, tmp_path)])


@pytest.mark.arm
@needs_arm
@pytest.mark.parametrize(
    ("processor", "best"), [("max", "neon-i8mm"), ("cortex-a76", "neon-dotprod"), ("cortex-a53", "scalar")]
)
def test_kernels_keep_their_laws_on_arm(processor: str, best: str, tmp_path: Path) -> None:
    program = build(ARM_COMPILER, ["-O3", "-static"], tmp_path)
    assert run([ARM_EMULATOR, "-cpu", processor, program])[:2] == [best, "(best)"]


@needs_gcc
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_instruction_sets_define_nothing_but_their_table(tmp_path: Path) -> None:
    """An inline function compiled for AVX-512 could be the copy that the linker keeps for all callers."""
    for source in SOURCES.glob("kernels_*.cpp"):
        target = tmp_path / f"{source.stem}.o"
        subprocess.run(["g++", "-O1", *FLAGS, *GCC_HEADER_NOISE, "-c", str(source), "-o", str(target)], check=True)
        symbols = subprocess.run(
            ["nm", "-g", "--defined-only", str(target)], check=True, capture_output=True, text=True
        )
        names = [line.split()[-1] for line in symbols.stdout.splitlines()]
        assert len(names) == 1 and names[0].startswith("_ZN4edge"), f"{source.name}: {names}"
