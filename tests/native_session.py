"""A session over a native graph without the native library: ONNX's reference evaluator on `tests.native_reference`.

It takes the place of `onnxruntime.InferenceSession` under `runtime.session.Binding`, by address as the real one does.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator

from tests.native_reference import reference_ops

Array = npt.NDArray[Any]


class ReferenceBinding:
    """Memory by name, as `onnxruntime.IOBinding` takes it."""

    def __init__(self) -> None:
        self.inputs: dict[str, Array] = {}
        self.outputs: dict[str, Array] = {}

    def bind_input(self, name: str, device: str, _: int, dtype: Any, shape: Sequence[int], address: int) -> None:
        assert device == "cpu"
        self.inputs[name] = array_at(address, dtype, shape)

    def bind_output(self, name: str, device: str, _: int, dtype: Any, shape: Sequence[int], address: int) -> None:
        assert device == "cpu"
        self.outputs[name] = array_at(address, dtype, shape)


class ReferenceSession:
    """Runs a graph file; `rounds`: activations are rounded to int8 as by the real ops."""

    def __init__(self, path: Path, *, rounds: bool = True) -> None:
        self._evaluator = ReferenceEvaluator(onnx.load(path), new_ops=list(reference_ops(rounds=rounds)))
        graph = self._evaluator.proto_.graph
        self._inputs, self._outputs = (list(map(_argument, values)) for values in (graph.input, graph.output))

    def get_inputs(self) -> list[SimpleNamespace]:
        return self._inputs

    def get_outputs(self) -> list[SimpleNamespace]:
        return self._outputs

    def io_binding(self) -> ReferenceBinding:
        return ReferenceBinding()

    def run_with_iobinding(self, binding: ReferenceBinding, _: object = None) -> None:
        assert binding.inputs.keys() == {value.name for value in self._inputs}
        assert binding.outputs.keys() == {value.name for value in self._outputs}
        names = list(binding.outputs)
        for name, found in zip(names, self.run(names, binding.inputs), strict=True):
            due = binding.outputs[name]
            assert found.dtype == due.dtype and found.shape == due.shape, (name, found.dtype, found.shape, due.shape)
            due[...] = found

    def run(self, names: list[str], feeds: dict[str, Array]) -> list[Array]:
        return self._evaluator.run(names, feeds)  # type: ignore[no-any-return]


def _argument(value: onnx.ValueInfoProto) -> SimpleNamespace:
    dimensions = value.type.tensor_type.shape.dim
    return SimpleNamespace(name=value.name, shape=[size.dim_param or size.dim_value for size in dimensions])


def array_at(address: int, dtype: Any, shape: Sequence[int]) -> Array:
    """The memory at an address as an array."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype).reshape(shape)
