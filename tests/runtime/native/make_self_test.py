"""Makes runtime/native/self_test.onnx: `python -m tests.runtime.native.make_self_test`.

One graph with every native op over fixed inputs; what numpy makes of them stands beside each result, as an output
`expected_*`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper

from runtime import native
from tests.runtime.native.op_models import TYPES, pack_panels, quantized_product, rms_norm, rotate

Array = npt.NDArray[Any]
HEADS, HEAD_DIM, WIDTH, EPSILON, CAP = 2, 8, 32, 1e-6, 5.0


def expected_attention(qkv: Array, norms: Array, cos: Array, sin: Array) -> Array:
    """[3, HEADS * HEAD_DIM] of three tokens over one KV head, each seeing itself and the one before."""
    heads = qkv.reshape(3, HEADS + 2, HEAD_DIM)
    queries = rotate(rms_norm(heads[:, :HEADS], EPSILON) * norms[0], cos[:, None], sin[:, None])
    keys = rotate(rms_norm(heads[:, HEADS], EPSILON) * norms[1], cos, sin).astype(np.float16).astype(np.float64)
    values = rms_norm(heads[:, HEADS + 1], EPSILON).astype(np.float16).astype(np.float64)
    tokens = np.arange(3)
    visible = (tokens[None] <= tokens[:, None]) & (tokens[None] > tokens[:, None] - 2)
    outputs = []
    for head in range(HEADS):
        weights = np.exp(np.where(visible, queries[:, head] @ keys.T, -np.inf))
        outputs.append(weights / weights.sum(-1, keepdims=True) @ values)
    return np.stack(outputs, 1).reshape(3, -1)


def model_bytes() -> bytes:
    """The model, the same bytes at each call."""
    rng = np.random.default_rng(7)
    size = HEADS * HEAD_DIM
    codes4, codes8 = rng.integers(0, 16, (WIDTH, WIDTH)), rng.integers(0, 256, (64, WIDTH))
    scales4, scales8 = (rng.uniform(0.05, 0.2, (n, 1)).astype(np.float16) for n in (WIDTH, 64))
    panels4 = pack_panels(codes4.astype(np.uint8), scales4, 4, 32)
    panels8 = pack_panels(codes8.astype(np.uint8), scales8, 8, 32)
    constants: dict[str, Array] = {
        "panels_4": panels4,
        "panels_8": panels8,
        "norms": rng.uniform(0.5, 1.5, (2, HEAD_DIM)).astype(np.float32),
        "frequencies": np.array([1.0, 0.3, 0.1, 0.0], np.float32),
        "weight": rng.uniform(0.5, 1.5, size).astype(np.float32),
        "next_weight": rng.uniform(0.5, 1.5, size).astype(np.float32),
        "groups": np.array([3, 0], np.int64),
    }
    inputs = native.self_test_inputs()
    x, rows = inputs["x"], inputs["rows"]
    angles = inputs["positions"][:, None] * constants["frequencies"].astype(np.float64)
    qkv = CAP * np.tanh(quantized_product(x, codes4, scales4, 4, 32) / CAP)
    attention = expected_attention(qkv, constants["norms"], np.cos(angles), np.sin(angles))
    total = 0.5 * (attention + rms_norm(attention, EPSILON) * constants["weight"])
    normed = rms_norm(total, EPSILON) * constants["next_weight"]
    order = np.argsort(-normed, axis=1, kind="stable")[:, :3]
    selected = quantized_product(x[:1], codes8, scales8, 8, 32).reshape(4, 16)[[3, 0]].ravel()
    expected: dict[str, Array] = {
        "total": total.astype(np.float32),
        "values": np.take_along_axis(normed, order, 1).astype(np.float32),
        "ids": order.astype(np.int64),
        "selected": selected.astype(np.float32),
    }
    assert rows.tolist() == [0, 3, 0]

    def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
        return helper.make_node(op, inputs, outputs, domain="edge", **attributes)

    product = {"bits": 4, "block_size": 32, "K": WIDTH, "N": WIDTH, "epilogue": 3, "softcap": CAP}
    nodes = [
        node("QuantizedMatMul", ["x", "panels_4"], ["qkv"], **product),
        node("Rotary", ["positions", "frequencies"], ["cos", "sin"]),
        node(
            "CachedAttention",
            ["qkv", "norms", "cos", "sin", "rows", "keys", "value_rows"],
            ["attention"],
            num_heads=HEADS,
            num_kv_heads=1,
            window=2,
            epsilon=EPSILON,
        ),
        node(
            "NormAdd",
            ["attention", "weight", "attention", "next_weight"],
            ["total", "normed"],
            epsilon=EPSILON,
            next_epsilon=EPSILON,
            scale=0.5,
        ),
        node("TopLogits", ["normed"], ["values", "ids"], k=3),
        node(
            "SelectedMatMul",
            ["row", "panels_8", "groups"],
            ["selected"],
            bits=8,
            block_size=32,
            K=32,
            N=64,
            group_size=16,
        ),
    ]
    infos = [
        helper.make_tensor_value_info(name, TYPES[array.dtype.name], array.shape) for name, array in inputs.items()
    ]
    outputs = [
        helper.make_tensor_value_info(prefix + name, TYPES[array.dtype.name], array.shape)
        for prefix in ("", "expected_")
        for name, array in expected.items()
    ]
    constants |= {f"expected_{name}": array for name, array in expected.items()}
    initializers = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "self_test", infos, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edge", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="gemma-edge")
    return bytes(model.SerializeToString(deterministic=True))


if __name__ == "__main__":
    native.SELF_TEST.write_bytes(model_bytes())
