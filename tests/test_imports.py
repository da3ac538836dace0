"""Imports point downwards, the runtime's are light, and what `edge` and the distribution promise is there.

The table of packages is `BELOW`: edge -> export -> runtime -> profiles, and export -> quant.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import edge

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BELOW = {
    "edge": {"export", "quant", "runtime", "profiles"},
    "export": {"quant", "runtime", "profiles"},
    "runtime": {"profiles"},
    "quant": set[str](),
    "profiles": set[str](),
}
CORE = {"onnxruntime", "numpy", "tokenizers", "jinja2", "psutil"}
RUNTIME_FILES = sorted(
    file.relative_to(ROOT)
    for pattern in (
        "runtime/**/*.py",
        "profiles/**/*.py",
        "edge/__init__.py",
        "edge/chat_cli.py",
        "edge/chat_commands.py",
        "edge/command.py",
        "edge/generate_cli.py",
        "edge/generation_arguments.py",
        "edge/serve_cli.py",
        "edge/terminal.py",
        "edge/examples/*.py",
        "edge/bench/*.py",
    )
    for file in ROOT.glob(pattern)
)
EXTRA = sorted(
    re.split(r"[^\w-]", requirement)[0].replace("-", "_")
    for extra in ("constrain", "export", "serve")
    for requirement in PYPROJECT["project"]["optional-dependencies"][extra]
)
LATER = {Path("runtime/grammar_compiler.py"): {"llguidance"}}  # what a file may import where it is needed
PROMPT = ("--prompt-ids", "2,5,9", "--max-tokens", "6", "--temperature", "0", "--num-draft-tokens", "3", "--json")


def imported(file: Path) -> set[str]:
    """Top-level names of the modules that a file imports anywhere; relative imports stay in its own package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", BELOW)
def test_imports_point_downwards(package: str) -> None:
    forbidden = BELOW.keys() - BELOW[package] - {package}
    found = {str(file.relative_to(ROOT)): imported(file) & forbidden for file in (ROOT / package).rglob("*.py")}
    assert len(found) > 0
    assert not {file: names for file, names in found.items() if names}


@pytest.mark.parametrize("file", RUNTIME_FILES, ids=str)
def test_the_runtime_imports_only_the_core(file: Path) -> None:
    ours = {"edge", "runtime", "profiles"}
    assert imported(ROOT / file) <= sys.stdlib_module_names | CORE | ours | LATER.get(file, set())


def test_the_core_is_what_is_declared() -> None:
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in PYPROJECT["project"]["dependencies"]}
    assert declared == CORE


def test_edge_exports_what_it_imports() -> None:
    public = {name for name, value in vars(edge).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert edge.__all__ == sorted(public)


def test_the_distribution_has_every_package() -> None:
    folders = {file.parent for package in BELOW for file in (ROOT / package).rglob("__init__.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == names | {"optimum.commands.register"}


def run_python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_generating_loads_nothing_of_the_export(tiny_artifact: Callable[..., Path]) -> None:
    code = f"""if True:
        import sys
        from edge.generate_cli import main
        code = main()
        print([name for name in {EXTRA} if name in sys.modules])
        sys.exit(code)
    """
    result = run_python(code, tiny_artifact("wide", 4), *PROMPT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1] == "[]"


# An environment without the export extra: its modules are not found, as if they were not installed.
CORE_ALONE = f"""if True:
    import runpy, sys
    from importlib.machinery import PathFinder
    class Core(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name.partition(".")[0] in {EXTRA} else PathFinder.find_spec(name, path, target)
    sys.meta_path[:] = [Core if finder is PathFinder else finder for finder in sys.meta_path]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__")
"""


def test_the_core_alone_generates_with_drafts(tiny_artifact: Callable[..., Path]) -> None:
    result = run_python(CORE_ALONE, "edge.generate_cli", tiny_artifact("wide", 4), *PROMPT)
    assert result.returncode == 0, result.stderr
    generation = json.loads(result.stdout)
    assert len(generation["token_ids"]) == 6
    assert generation["stats"]["num_drafted"] > 0


def test_the_core_alone_says_what_an_export_needs(tmp_path: Path) -> None:
    result = run_python(CORE_ALONE, "edge.export_cli", tmp_path, tmp_path / "out")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    needed = "torch, safetensors, onnx, tqdm, transformers, bitsandbytes"
    assert line.endswith(f"{needed} not installed; run: pip install 'gemma-edge[export]'")


def test_the_core_alone_says_what_serving_needs(tmp_path: Path) -> None:
    result = run_python(CORE_ALONE, "edge.serve_cli", tmp_path)
    assert result.returncode == 1
    assert result.stderr == ("edge-serve: starlette, uvicorn not installed; run: pip install 'gemma-edge[serve]'\n")


def test_only_the_server_imports_what_serving_needs() -> None:
    users = {file for file in ROOT.glob("edge/**/*.py") if imported(file) & {"starlette", "uvicorn"}}
    assert {file.parent for file in users} == {ROOT / "edge" / "serve"}
