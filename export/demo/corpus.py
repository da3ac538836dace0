"""Text that the demo pair is trained on: the Python standard library's sources, plain and as chat turns.

Knows nothing of models; every list is a pure function of the running Python's standard library.
"""

import ast
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {
    *("test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "ensurepip"),
    *("pydoc_data", "__phello__", "distutils", "site-packages", "dist-packages", "__pycache__"),
}
MAX_FUNCTION_CHARS = 1200
SYSTEM_TURN = "You are a terse assistant that answers with Python."


def source_files() -> list[Path]:
    """Modules of the standard library in a fixed order, without tests and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(f for f in root.rglob("*.py") if not LEFT_OUT & set(f.relative_to(root).parts))


def is_held_out(file: Path) -> bool:
    """One file in 24, by a digest of its name, is never trained on."""
    return zlib.crc32(file.name.encode()) % 24 == 0


def texts(*, held_out: bool) -> list[str]:
    """Whole source files as text, `held_out` ones or the others."""
    files = [f for f in source_files() if is_held_out(f) == held_out]
    return [f.read_text(encoding="utf-8", errors="ignore") for f in files]


def turns(system: str | None, user: str, model: str) -> str:
    """One exchange in Gemma 4's turn format, without `<bos>`."""
    head = f"<|turn>system\n{system}<turn|>\n" if system else ""
    return f"{head}<|turn>user\n{user}<turn|>\n<|turn>model\n{model}<turn|>\n"


def chats(source: str) -> Iterator[str]:
    """Questions about each documented function of a source text, answered with its code or its docstring."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node)
        code = ast.unparse(node) if docstring else ""
        if not docstring or len(code) > MAX_FUNCTION_CHARS:
            continue
        summary = docstring.splitlines()[0]
        system = SYSTEM_TURN if zlib.crc32(code.encode()) % 3 == 0 else None
        yield turns(system, f"Write `{node.name}`. {summary}", code)
        if zlib.crc32(code.encode()) % 2:
            yield turns(None, f"What does `{node.name}` do?", summary)


def documents(*, held_out: bool) -> list[str]:
    """Every document of one side of the split: plain files and the chats made from them."""
    plain = texts(held_out=held_out)
    return plain + [chat for text in plain for chat in chats(text)]
