"""The native ops: finds the library that the installation built, and decides by a self-test whether it may be used.

Without it an artifact runs on the portable graph.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path

SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def library_path() -> Path | None:
    """The shared library; None where none was built."""
    path = Path(__file__).parent / f"edge_ops{SUFFIX}"
    return path if path.is_file() else None


@cache
def library() -> ctypes.CDLL | None:
    """The library's own functions."""
    path = library_path()
    if path is None:
        return None
    loaded = ctypes.CDLL(str(path))
    loaded.edge_instruction_set.restype = ctypes.c_char_p
    loaded.edge_force_instruction_set.argtypes = [ctypes.c_char_p]
    loaded.edge_read_stream.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    loaded.edge_read_stream.restype = ctypes.c_uint64
    return loaded


def instruction_set() -> str:
    """Name of the instruction set that the ops use."""
    loaded = library()
    return loaded.edge_instruction_set().decode() if loaded else "none"


def force_instruction_set(name: str | None) -> bool:
    """Forces an instruction set for the whole process, None for the best; False where it is not there."""
    loaded = library()
    return bool(loaded and loaded.edge_force_instruction_set(name.encode() if name else None))
