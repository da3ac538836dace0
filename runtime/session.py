"""ONNX Runtime sessions and bindings over memory that this runtime owns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from profiles import DeviceProfile, threads_of
from runtime import native
from runtime.errors import ArtifactError, InferenceError
from runtime.layout import Layout
from runtime.signature import Signature

# the KV cache is written through one view and read through another in the same run: another device would copy both
CPU = "CPUExecutionProvider"

Array = npt.NDArray[Any]


def open_session(path: Path, profile: DeviceProfile, layout: Layout = "portable") -> ort.InferenceSession:
    """A session with the profile's threads on the CPU, the only provider that the KV cache works on so far.

    A native graph needs the native ops, which must be usable (`runtime.native`).

    Raises:
        ArtifactError: ONNX Runtime refuses the graph.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads_of(profile)
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # failures come as exceptions, once
    # one plan is kept for every length of the KV cache otherwise: measured 13 KiB a token on 8 layers, never freed
    options.enable_mem_pattern = False
    # an arena keeps a prefill's activations for good: measured 55 MB in E2B, for 2 % of its time
    options.enable_cpu_mem_arena = layout != "native"
    # threads of one session would go on spinning on the cores that the other one is about to use
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        if layout == "native":
            options.register_custom_ops_library(str(native.library_path()))
        return ort.InferenceSession(path, options, providers=[CPU])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise ArtifactError(f"{path}: onnxruntime refuses the graph: {_first_line(error)}") from error


def new_run_options() -> ort.RunOptions:
    """Options of runs that one call can terminate together."""
    options = ort.RunOptions()
    # onnxruntime's Python looks this up in every run, and finding nothing is an exception there: 0.05 ms of a drafter
    # step of 0.7; 0 is its default, which means something to CUDA alone
    options.add_run_config_entry("gpu_graph_id", "0")
    return options


def check_signature(path: Path, session: ort.InferenceSession, expected: Signature) -> None:
    """Raises ArtifactError where a graph has not the inputs and outputs of the model that the manifest describes."""
    for role, values, sizes in (
        ("input", session.get_inputs(), expected.inputs),
        ("output", session.get_outputs(), expected.outputs),
    ):
        found = {value.name: next((size for size in value.shape[-1:] if type(size) is int), 0) for value in values}
        for name in sorted(found.keys() | sizes.keys()):
            mine, due = found.get(name), sizes.get(name)
            if mine != due:
                raise ArtifactError(
                    f"{path}: {role} {name} is {_size(mine)}, by manifest.json it is {_size(due)}: the graph is of "
                    "another model; export target and drafter together"
                )


def _size(size: int | None) -> str:
    return {None: "not there", 0: "of any size"}.get(size, f"of size {size}")


class Binding:
    """Inputs and outputs of runs, bound by address; keeps the arrays alive."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._arrays: list[Array] = []

    def input(self, name: str, array: Array) -> None:
        """Binds a contiguous array as an input."""
        self._arrays.append(array)
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def output(self, name: str, array: Array, shape: Sequence[int] | None = None) -> None:
        """Binds a contiguous array as the memory of an output, under another shape if given."""
        self._arrays.append(array)
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, shape or array.shape, array.ctypes.data)

    def run(self, options: ort.RunOptions) -> None:
        """Runs the session; InferenceError where it fails."""
        try:
            self._session.run_with_iobinding(self._binding, options)
        except Exception as error:
            raise InferenceError(f"onnxruntime failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def float_buffer(*shape: int) -> npt.NDArray[np.float32]:
    """Uninitialized memory for an output."""
    return np.empty(shape, np.float32)
