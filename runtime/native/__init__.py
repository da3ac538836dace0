"""The native ops: finds the library that the installation built, and decides by a self-test whether it may be used.

The library calls ONNX Runtime through its binary interface, so what counts is whether the two work together here and
now: a graph with every op must give the results that it carries. Without the ops, artifacts run on portable graphs.
"""

import ctypes
import hashlib
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
SELF_TEST = Path(__file__).parent / "self_test.onnx"
# All that there are, in the order in which `dispatch.cpp` prefers them.
INSTRUCTION_SETS = ("avx512vnni", "avxvnni", "avx2", "neon-i8mm", "neon-dotprod", "scalar", "avx512vl-vnni-256")
TOLERANCE = 1e-4  # of values near 1, sums of 32 products in float32


def library_path() -> Path | None:
    """The shared library; None where none was built."""
    path = Path(__file__).parent / f"edge_ops{SUFFIX}"
    return path if path.is_file() else None


@cache
def unusable_because() -> str | None:
    """Why the native ops cannot be used in this process; None where they can."""
    path = library_path()
    if path is None:
        return "they were not built, install gemma-edge where there is a C++ compiler"
    try:
        outputs = _run_self_test(path)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        return f"onnxruntime {ort.__version__} refuses them: {str(error).strip().partition(chr(10))[0]}"
    wrong = [name for name, value in outputs.items() if not _agrees(value, outputs.get(f"expected_{name}", value))]
    return f"their self-test fails: {', '.join(wrong)} on {instruction_set()}" if wrong else None


def _run_self_test(path: Path) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(path))
    session = ort.InferenceSession(SELF_TEST, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, self_test_inputs()), strict=True))


def self_test_inputs() -> dict[str, np.ndarray]:
    """What the self-test's graph is given."""
    x = np.linspace(-1, 1, 96, dtype=np.float32).reshape(3, 32) ** 3
    return {
        "x": x,
        "row": x[:1],
        "positions": np.arange(3, dtype=np.int64),
        "rows": np.array([0, 3, 0], np.int64),
        "keys": np.zeros((8, 16), np.uint8),  # rows of 8 halves
        "value_rows": np.zeros((8, 16), np.uint8),
    }


def _agrees(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@cache
def _library() -> ctypes.CDLL | None:
    path = library_path()
    if path is None:
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:  # of another machine, or damaged: `unusable_because` says so
        return None
    loaded.edge_instruction_set.restype = ctypes.c_char_p
    loaded.edge_force_instruction_set.argtypes = [ctypes.c_char_p]
    return loaded


@cache
def library_digest() -> str | None:
    """SHA-256 of the library's file, so that what one build was measured at is not taken for another's."""
    path = library_path()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else None


def instruction_set() -> str:
    """Name of the instruction set that the ops use; "none" without them."""
    loaded = _library()
    return str(loaded.edge_instruction_set().decode()) if loaded else "none"


def force_instruction_set(name: str | None) -> bool:
    """Forces an instruction set for the process, None for the best; False where this build or processor lacks it."""
    loaded = _library()
    return bool(loaded and loaded.edge_force_instruction_set(name.encode() if name else None))


def runnable_instruction_sets() -> tuple[str, ...]:
    """Names that can be forced here, none without the ops; forces each for a moment, so not while a session runs."""
    before = instruction_set()
    names = tuple(filter(force_instruction_set, INSTRUCTION_SETS))
    force_instruction_set(before)
    return names
