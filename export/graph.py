"""A thin builder of ONNX graphs: named nodes, small constants inline, weights in external files.

Knows no model. Names come from counters, so that the same calls give the same bytes.

Source: ONNX IR specification, external data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.matrix_spec import ALIGNMENT

OPSET = 21
IR_VERSION = 10
MICROSOFT = "com.microsoft"
EDGE = "edge"  # the domain of the runtime's own operators
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Region:
    """A stored array: `length` bytes at `offset` of the file `location` beside the graph."""

    location: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def length(self) -> int:
        """Bytes that shape and dtype stand for."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def folded(self, num_rows: int) -> "Region":
        """The same bytes as a matrix of `num_rows` rows."""
        num_elements = self.length // self.dtype.itemsize
        return replace(self, shape=(num_rows, num_elements // num_rows))


class DataFile:
    """A file of arrays, each at an aligned offset, filled chunk by chunk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._end = 0

    def reserve(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Region:
        """Room for an array, to be filled by `write`."""
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        region = Region(self.path.name, offset, tuple(shape), np.dtype(dtype))
        self._end = offset + region.length
        return region

    def write(self, region: Region, first_row: int, rows: Array) -> None:
        """Rows of a reserved array from `first_row` on."""
        row_bytes = region.length // max(region.shape[0], 1)
        self._file.seek(region.offset + first_row * row_bytes)
        self._file.write(np.ascontiguousarray(rows, region.dtype).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._file.truncate(self._end)


class Graph:
    """An ONNX graph under construction."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._num_names = 0

    def fresh(self, stem: str) -> str:
        """A value name that is not in use."""
        self._num_names += 1
        return f"{stem}_{self._num_names}"

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declares a graph input; strings are symbolic dimensions."""
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declares a graph output; a node must produce it under this name."""
        self._outputs.append(_value_info(name, dtype, shape))
        return name

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        *,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Appends a node and returns its first output."""
        names = list(outputs) if outputs else [self.fresh(op)]
        node = helper.make_node(op, list(inputs), names, name=self.fresh(f"node_{op}"), domain=domain, **attributes)
        self._nodes.append(node)
        return names[0]

    def split(self, value: str, sizes: Sequence[int], names: Sequence[str] | None = None) -> list[str]:
        """Splits the last axis; a single part is the value itself unless it must have a name."""
        if len(sizes) == 1 and names is None:
            return [value]
        parts = list(names) if names else [self.fresh("part") for _ in sizes]
        self.node("Split", [value, self.constant(np.array(sizes, np.int64))], outputs=parts, axis=-1)
        return parts

    def reshape(self, value: str, shape: Sequence[int]) -> str:
        """Reshapes a value; -1 is inferred."""
        return self.node("Reshape", [value, self.constant(np.array(shape, np.int64))])

    def constant(self, value: npt.ArrayLike) -> str:
        """A small array as an initializer, stored once."""
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.fresh("constant")
            self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
            self._constants[key] = name
        return self._constants[key]

    def external(self, name: str, region: Region) -> str:
        """An initializer whose bytes lie in a data file."""
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(region.dtype), dims=region.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", region.location), ("offset", region.offset), ("length", region.length)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers.append(tensor)
        return name

    def save(self, path: Path) -> None:
        """Writes the model file; the data files stay where they are."""
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, self._initializers)
        domains = sorted({MICROSOFT, *(node.domain for node in self._nodes)} - {""})
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="gemma-edge")
        path.write_bytes(model.SerializeToString(deterministic=True))


def _value_info(name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
