"""One quantized matrix product as the bytes of an ONNX model, so that measuring it needs no onnx package.

Source: onnx/onnx.proto (field numbers), https://protobuf.dev/programming-guides/encoding.
"""

import numpy as np
import numpy.typing as npt

FLOAT, INT8 = 1, 3
OPSET, IR_VERSION = 21, 10
MICROSOFT = "com.microsoft"


def quantized_product(num_rows: int, weights: npt.NDArray[np.int8]) -> bytes:
    """A model with input x [num_rows, K] and output y [num_rows, N]: `DynamicQuantizeMatMul` with weights [K, N]."""
    width, num_columns = weights.shape
    names = [_text(1, name) for name in ("x", "weights", "scale")]
    node = b"".join([*names, _text(2, "y"), _text(4, "DynamicQuantizeMatMul"), _text(7, MICROSOFT)])
    graph = [
        _field(1, node),
        _text(2, "product"),
        _field(5, _tensor("weights", INT8, weights.shape, weights.tobytes())),
        _field(5, _tensor("scale", FLOAT, (1,), np.float32(0.01).tobytes())),
        _field(11, _value("x", (num_rows, width))),
        _field(12, _value("y", (num_rows, num_columns))),
    ]
    opsets = [_field(8, _text(1, domain) + _number(2, version)) for domain, version in (("", OPSET), (MICROSOFT, 1))]
    return b"".join([_number(1, IR_VERSION), _field(7, b"".join(graph)), *opsets])


def _tensor(name: str, data_type: int, shape: tuple[int, ...], content: bytes) -> bytes:
    dims = b"".join(_number(1, size) for size in shape)
    return dims + _number(2, data_type) + _text(8, name) + _field(9, content)


def _value(name: str, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(_field(1, _number(1, size)) for size in shape)
    tensor_type = _number(1, FLOAT) + _field(2, dims)
    return _text(1, name) + _field(2, _field(1, tensor_type))


def _text(field: int, value: str) -> bytes:
    return _field(field, value.encode())


def _field(field: int, content: bytes) -> bytes:
    """A field of wire type 2: its length, then its bytes."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
