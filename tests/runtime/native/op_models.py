"""One-node models of the native ops, and numpy references of what they compute."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper

from runtime import native

Array = npt.NDArray[Any]
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
}


def library() -> Path:
    """The library under test: the installed one, or a build with sanitizers."""
    given = os.environ.get("EDGE_TEST_OPS_LIBRARY")
    path = Path(given) if given else native.library_path()
    assert path is not None, "the native ops are not built: pip install -e . with a C++ compiler"
    return path


class OpModel:
    """A session of one node. Arrays are bound where they lie, so an op may write into its inputs."""

    def __init__(
        self,
        op: str,
        inputs: Mapping[str, Array | None],
        outputs: Mapping[str, str],
        threads: int = 2,
        **attributes: Any,
    ) -> None:
        names = [name if array is not None else "" for name, array in inputs.items()]
        node = helper.make_node(op, names, list(outputs), domain="edge", **attributes)
        infos = [
            helper.make_tensor_value_info(name, TYPES[array.dtype.name], [None] * array.ndim)
            for name, array in inputs.items()
            if array is not None
        ]
        results = [helper.make_tensor_value_info(name, TYPES[dtype], None) for name, dtype in outputs.items()]
        graph = helper.make_graph([node], op, infos, results)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edge", 1)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.register_custom_ops_library(str(library()))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, Array | None]) -> list[Array]:
        """The node's outputs."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            if array is not None:
                assert array.flags.c_contiguous
                binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for output in self._session.get_outputs():
            binding.bind_output(output.name)
        self._session.run_with_iobinding(binding)
        return list(binding.copy_outputs_to_cpu())


def run(op: str, inputs: Mapping[str, Array | None], outputs: Mapping[str, str], **attributes: Any) -> list[Array]:
    """One run of a one-node model."""
    return OpModel(op, inputs, outputs, **attributes).run(inputs)


def aligned(content: Array, offset: int = 0) -> Array:
    """A copy at an address that is `offset` past a multiple of 64, with nothing behind it."""
    room = np.empty(content.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset
    copy = room[start : start + content.nbytes].view(content.dtype).reshape(content.shape)
    copy[...] = content
    return copy


def pack_panels(codes: Array, scales: Array, bits: int, block_size: int) -> Array:
    """Panels of codes uint8 [num_rows, width] and scales [num_rows, num_blocks], as the format is described."""
    num_rows, width = codes.shape
    num_blocks = -(-width // block_size)
    padded_rows = -(-num_rows // 32) * 32
    padded = np.full((padded_rows, num_blocks * block_size), 1 << (bits - 1), np.uint8)
    padded[:num_rows, :width] = codes
    padded_scales = np.zeros((padded_rows, num_blocks), np.float16)
    padded_scales[:num_rows] = scales
    packed = padded if bits == 8 else padded[:, 0::2] | (padded[:, 1::2] << 4)
    content = bytearray()
    for panel in range(0, padded_rows, 32):
        for block in range(num_blocks):
            content += padded_scales[panel : panel + 32, block].tobytes()
            block_bytes = block_size * bits // 8
            part = packed[panel : panel + 32, block * block_bytes : (block + 1) * block_bytes]
            for word in range(0, block_bytes, 4):
                content += part[:, word : word + 4].tobytes()
    return aligned(np.frombuffer(bytes(content), np.uint8))


def quantized_product(x: Array, codes: Array, scales: Array, bits: int, block_size: int) -> Array:
    """x @ W.T with x rounded to int8 for each row and block, float64 behind that."""
    num_rows, width = codes.shape
    num_blocks = scales.shape[1]
    values = np.zeros((len(x), num_blocks * block_size), np.float32)
    values[:, :width] = x
    blocks = values.reshape(len(x), num_blocks, block_size)
    largest = np.abs(blocks).max(-1)
    x_scales = (largest / np.float32(127)).astype(np.float64)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    rounded = np.rint(blocks * inverse[..., None]).astype(np.float64)
    weights = np.zeros((num_rows, num_blocks * block_size))
    weights[:, :width] = codes.astype(np.float64) - (1 << (bits - 1))
    sums = np.einsum("mkb,nkb->mnk", rounded, weights.reshape(num_rows, num_blocks, block_size))
    return np.asarray(np.einsum("mnk,nk,mk->mn", sums, scales.astype(np.float64), x_scales))


def gelu(x: Array) -> Array:
    """GELU by its tanh approximation."""
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def rms_norm(x: Array, epsilon: float = 1e-6) -> Array:
    """RMSNorm without a weight over the last axis."""
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon))


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of [..., head_dim] by halves."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
