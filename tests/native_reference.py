"""The ops of the `edge` domain in numpy: what the native library is held to, and what runs native graphs without it.

Every op computes each row on its own: one row gives the same bits whatever the others are and however many there are.
Sums of floats therefore run over fixed shapes (numpy's own reductions, no BLAS), and those of `QuantizedMatMul` over
integers below 2^24, which float32 holds exactly in any order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx.reference.op_run import OpRun

from runtime.kv_rows import KV_DTYPES, decode_rows, encode_rows, row_bytes

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Rows = npt.NDArray[np.uint8]  # of a KV array

PANEL_ROWS = 32
PLAIN, GELU_GLU, GELU_MUL, SOFTCAP = range(4)


# the panels of a matrix


def pack_panels(codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
    """Bytes of the native layout.

    Args:
        codes: [num_rows, num_blocks, block_bytes], num_rows a multiple of 32
        scales: [num_rows, num_blocks]
    """
    num_rows, num_blocks, block_bytes = codes.shape
    words = np.ascontiguousarray(codes).view(np.uint32).reshape(-1, PANEL_ROWS, num_blocks, block_bytes // 4)
    words = np.ascontiguousarray(words.transpose(0, 2, 3, 1))
    panel_scales = np.ascontiguousarray(scales.reshape(-1, PANEL_ROWS, num_blocks).transpose(0, 2, 1))
    blocks = [part.view(np.uint8).reshape(num_rows // PANEL_ROWS, num_blocks, -1) for part in (panel_scales, words)]
    return np.concatenate(blocks, axis=-1).ravel()


def unpack_panels(
    panels: npt.NDArray[np.uint8], num_rows: int, width: int, bits: int, block_size: int
) -> tuple[Float32, Float32]:
    """(codes [num_rows, num_blocks, block_size] around 0, scales [num_rows, num_blocks]), both as floats."""
    num_blocks, block_bytes = -(-width // block_size), block_size * bits // 8
    num_panels = -(-num_rows // PANEL_ROWS)
    expected = num_panels * PANEL_ROWS * num_blocks * (block_bytes + 2)
    assert panels.shape == (expected,), f"expected {expected} bytes, got {panels.shape}"
    blocks = panels.reshape(num_panels, num_blocks, -1)
    scales = np.ascontiguousarray(blocks[..., : 2 * PANEL_ROWS]).view(np.float16).transpose(0, 2, 1)
    words = np.ascontiguousarray(blocks[..., 2 * PANEL_ROWS :]).view(np.uint32)
    words = words.reshape(num_panels, num_blocks, block_bytes // 4, PANEL_ROWS).transpose(0, 3, 1, 2)
    codes = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    codes = codes.reshape(-1, num_blocks, block_size)[:num_rows].astype(np.float32) - (1 << (bits - 1))
    return codes, scales.reshape(-1, num_blocks)[:num_rows].astype(np.float32)


# activations


def quantize_activations(x: Float32, block_size: int) -> tuple[Float32, Float32]:
    """(int8 values [num_rows, num_blocks, block_size] as floats, scales [num_rows, num_blocks]); width padded by 0.

    A block of zeros has scale 0, one with a NaN or an infinity the scale NaN.
    """
    blocks = _blocks(x, block_size)
    largest = np.abs(blocks).max(-1)
    is_usable = np.isfinite(largest) & (largest > np.float32(1e-30))
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(is_usable, np.float32(127) / largest, np.float32(0))
        rounded = np.where(is_usable[..., None], np.rint(blocks * inverse[..., None]), np.float32(0))
    scales = np.where(is_usable, largest / np.float32(127), np.float32(0))
    scales[~np.isfinite(largest)] = np.nan
    return rounded, scales


def _blocks(x: Float32, block_size: int) -> Float32:
    num_blocks = -(-x.shape[1] // block_size)
    padded = np.zeros((len(x), num_blocks * block_size), np.float32)
    padded[:, : x.shape[1]] = x
    return padded.reshape(len(x), num_blocks, block_size)


def product(x: Float32, codes: Float32, scales: Float32, *, rounds: bool) -> Float32:
    """x [M, K] @ weight.T for a weight as `unpack_panels` gives it; `rounds`: with activations in int8."""
    block_size = codes.shape[2]
    if not rounds:
        weight = (codes * scales[..., None]).reshape(len(codes), -1)[:, : x.shape[1]]
        return (x.astype(np.float64) @ weight.T.astype(np.float64)).astype(np.float32)
    values, steps = quantize_activations(x, block_size)
    # [num_blocks, M, N]: below 128 * 127 * 256 = 2^22, so exact in float32 whatever the order
    dots = values.transpose(1, 0, 2) @ codes.transpose(1, 2, 0)
    total = np.zeros((len(x), len(codes)), np.float32)
    for block, dot in enumerate(dots):
        total += dot * (steps[:, block, None] * scales[None, :, block])
    return total


def gelu(x: Float32) -> Float32:
    """GELU by its tanh approximation."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def rms(x: Float32, epsilon: float) -> Float32:
    """x / sqrt(mean(x^2) + epsilon) over the last axis."""
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    return x / np.sqrt(mean + np.float32(epsilon))


def rotate(heads: Float32, cos: Float32, sin: Float32) -> Float32:
    """Rotary embedding of heads [num_tokens, num_heads, head_dim]: pairs are the halves' same elements."""
    first, second = np.split(heads, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(query: Float32, keys: Float32, values: Float32) -> Float32:
    """softmax(query @ keys.T) @ values of one query [head_dim] over the rows it sees."""
    scores = (keys * query).sum(-1, dtype=np.float32)
    weights = np.exp(scores - scores.max())
    return (weights[:, None] * values).sum(0, dtype=np.float32) / weights.sum(dtype=np.float32)


# the ops


class QuantizedMatMul(OpRun):
    op_domain = "edge"
    rounds = True

    def _run(self, x: Float32, panels: npt.NDArray[np.uint8], *others: Float32, **_: Any) -> tuple[Float32]:
        codes, scales = unpack_panels(panels, self.N, self.K, self.bits, self.block_size)
        assert x.shape[1] == self.K
        y = product(x, codes, scales, rounds=self.rounds)
        if self.epilogue == GELU_GLU:
            return (gelu(y[:, : self.N // 2]) * y[:, self.N // 2 :],)
        if self.epilogue == GELU_MUL:
            return (gelu(y) * others[0],)
        if self.epilogue == SOFTCAP:
            cap = np.float32(self.softcap)
            return (cap * np.tanh(y / cap),)
        return (y,)


class SelectedMatMul(OpRun):
    op_domain = "edge"
    rounds = True

    def _run(self, x: Float32, panels: npt.NDArray[np.uint8], groups: Int64, **_: Any) -> tuple[Float32]:
        codes, scales = unpack_panels(panels, self.N, self.K, self.bits, self.block_size)
        assert x.shape == (1, self.K)
        rows = (groups[:, None] * self.group_size + np.arange(self.group_size)).ravel()
        return (product(x, codes[rows], scales[rows], rounds=self.rounds)[0],)


class NormAdd(OpRun):
    op_domain = "edge"

    def _run(
        self, x: Float32, weight: Float32, residual: Float32, next_weight: Float32 | None = None, **_: Any
    ) -> tuple[Float32, ...]:
        total = np.float32(self.scale) * (residual + rms(x, self.epsilon) * weight)
        if next_weight is None:
            return (total,)
        return total, rms(total, self.next_epsilon) * next_weight


class Rotary(OpRun):
    op_domain = "edge"

    def _run(self, position_ids: Int64, frequencies: Float32, **_: Any) -> tuple[Float32, Float32]:
        angles = position_ids.astype(np.float32)[:, None] * frequencies
        return np.cos(angles), np.sin(angles)


class CachedAttention(OpRun):
    """New rows are rounded to the KV rows' type, which their size tells, and attended to as they are there."""

    op_domain = "edge"

    def _run(
        self, x: Float32, norms: Float32, cos: Float32, sin: Float32, rows: Int64, *cache: Rows, **_: Any
    ) -> tuple[Float32]:
        num_rows, (start, stop) = len(x), rows[:2].tolist()
        keys, values = cache[0::2], cache[1::2]
        assert len(keys) == len(values) == self.num_kv_heads
        heads = x.reshape(num_rows, -1, norms.shape[1])
        queries = rotate(rms(heads[:, : self.num_heads], self.epsilon) * norms[0], cos, sin)
        if len(norms) == 2:
            new_keys, new_values = np.split(heads[:, self.num_heads :], 2, axis=1)
            new_keys = rotate(rms(new_keys, self.epsilon) * norms[1], cos, sin)
            kv_dtype = next(dtype for dtype in KV_DTYPES if keys[0].shape[1] == row_bytes(norms.shape[1], dtype))
            for head in range(self.num_kv_heads):
                keys[head][stop - num_rows : stop] = encode_rows(new_keys[:, head], kv_dtype)
                values[head][stop - num_rows : stop] = encode_rows(rms(new_values[:, head], self.epsilon), kv_dtype)
        y = np.empty((num_rows, self.num_heads, norms.shape[1]), np.float32)
        seen_keys, seen_values = (
            [decode_rows(array[start:stop], norms.shape[1]) for array in arrays] for arrays in (keys, values)
        )
        for row in range(num_rows):
            end = stop - num_rows + row + 1 - start
            seen = slice(max(0, end - self.window) if self.window else 0, end)
            for head in range(self.num_heads):
                source = head // (self.num_heads // self.num_kv_heads)
                y[row, head] = attend(queries[row, head], seen_keys[source][seen], seen_values[source][seen])
        return (y.reshape(num_rows, -1),)


class TopLogits(OpRun):
    op_domain = "edge"

    def _run(self, logits: Float32, **_: Any) -> tuple[Float32, Int64]:
        ids = np.argsort(-logits, axis=-1, kind="stable")[:, : self.k].astype(np.int64)
        values = np.take_along_axis(logits, ids, axis=-1)
        values[np.isnan(logits).any(-1)] = np.nan
        return values, ids


OPS = (QuantizedMatMul, SelectedMatMul, NormAdd, Rotary, CachedAttention, TopLogits)


# what ONNX Runtime has and the reference evaluator has not


class SimplifiedLayerNormalization(OpRun):
    op_domain = ""

    def _run(self, x: Float32, weight: Float32, **_: Any) -> tuple[Float32]:
        return (rms(x, self.epsilon) * weight,)


def reference_ops(*, rounds: bool = True) -> Sequence[type[OpRun]]:
    """Everything a native graph needs beside ONNX; `rounds`: activations are rounded to int8 as by the real ops."""
    products = [type(op.__name__, (op,), {"rounds": rounds}) for op in (QuantizedMatMul, SelectedMatMul)]
    return [*products, NormAdd, Rotary, CachedAttention, TopLogits, SimplifiedLayerNormalization]
