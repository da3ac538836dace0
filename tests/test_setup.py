"""The installation: a wheel with the native ops where there is a compiler, and one without where there is none.

What is compiled is one function in place of the real sources, which takes no time.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.layouts import needs_native

ROOT = Path(__file__).parents[1]
SOURCE = 'extern "C" int RegisterCustomOps() { return 0; }\n'
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what an installation reads, without what an earlier build left."""
    pytest.importorskip("setuptools", minversion="77")
    ignored = shutil.ignore_patterns("__pycache__", "edge_ops.*", "checkpoint", "src")
    for package in ("edge", "export", "quant", "runtime", "profiles"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "runtime/native/src").mkdir()
    (tmp_path / "runtime/native/src/library.cpp").write_text(SOURCE)
    return tmp_path


def set_up(project: Path, *arguments: str, **environment: str) -> str:
    """Runs setup.py; what it prints."""
    command = [sys.executable, "setup.py", "-q", *arguments]
    done = subprocess.run(command, cwd=project, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wheel_names(project: Path) -> tuple[str, set[str]]:
    """The wheel's own name, and those of the files in it."""
    (wheel,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, set(archive.namelist())


@needs_native
def test_a_wheel_holds_the_library_for_every_python_3(project: Path) -> None:
    assert "no native ops" not in set_up(project, "bdist_wheel")
    name, files = wheel_names(project)
    assert "-py3-none-" in name and not name.endswith("-any.whl")
    libraries = {file for file in files if file.startswith("runtime/native/edge_ops.")}
    assert len(libraries) == 1
    assert {"runtime/native/self_test.onnx", "profiles/laptop.toml", "edge/bench/suite.py"} <= files


@needs_native
def test_a_build_in_place_puts_the_library_where_the_runtime_looks(project: Path) -> None:
    set_up(project, "build_ext", "--inplace")
    (library,) = (project / "runtime/native").glob("edge_ops.*")
    assert library.suffix in (".so", ".dylib", ".dll")


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is not chosen by CC and CXX")
@pytest.mark.parametrize("command", [["bdist_wheel"], ["build_ext", "--inplace"]], ids=" ".join)
def test_without_a_compiler_the_rest_is_installed_and_one_line_says_so(project: Path, command: list[str]) -> None:
    (line,) = set_up(project, *command, **NO_COMPILER).splitlines()
    assert line.startswith("gemma-edge: no native ops, artifacts run slower: install GCC or Clang and try again (")
    assert not list((project / "runtime/native").glob("edge_ops.*"))
    if command == ["bdist_wheel"]:
        _, files = wheel_names(project)
        assert {"runtime/engine.py", "runtime/native/self_test.onnx", "profiles/laptop.toml"} <= files
        assert not [file for file in files if "edge_ops" in file]
