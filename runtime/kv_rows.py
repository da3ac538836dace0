"""What a row of the KV cache holds: one KV head's values of a token, in one of three types.

A row is opaque bytes to all but the graphs: `head_dim` floats, or as many halves, or `head_dim` int8 codes and behind
them a float16 scale for each block of `KV_BLOCK` values, the last of which may be shorter. In int8 a block's scale is
its largest absolute value / 127; a block with a NaN or an infinity has the scale NaN.

Source: `runtime/native/src/kernels.hpp` and `row_kernels.hpp`, which write and read them.
"""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from profiles import DeviceProfile, ProfileError
from runtime.layout import Layout

KVDtype = Literal["float32", "float16", "int8"]
KV_DTYPES: tuple[KVDtype, ...] = get_args(KVDtype)
KV_BLOCK = 64
CODE_MAX = 127
SCALE_BYTES = 2

Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.uint8]


def choose_kv_dtype(profile: DeviceProfile, layout: Layout, unusable_because: str | None = None) -> KVDtype:
    """The type that a profile asks for, of the graphs of a layout.

    Args:
        unusable_because: why a native artifact is read through its portable graphs, if it is

    Raises:
        ProfileError: the layout's graphs cannot read that type.
    """
    asked = profile.kv_dtype
    if layout == "native":
        return next((dtype for dtype in KV_DTYPES if dtype == asked), "float16")
    if asked in ("auto", "float32"):
        return "float32"
    found = f"its ops cannot be used here ({unusable_because})" if unusable_because else "the artifact is portable"
    raise ProfileError(
        f"profile {profile.name}: kv_dtype {asked!r} needs the native layout, {found}, and stock ONNX Runtime would "
        "make a dense float32 copy of each layer's rows in every forward; export or convert with --layout native where "
        "the ops run, or set kv_dtype to 'float32' or 'auto'"
    )


def row_bytes(head_dim: int, kv_dtype: KVDtype) -> int:
    """Bytes of one row of `head_dim` values."""
    if kv_dtype == "int8":
        return head_dim + SCALE_BYTES * -(-head_dim // KV_BLOCK)
    return head_dim * np.dtype(kv_dtype).itemsize


def encode_rows(values: Float32, kv_dtype: KVDtype) -> Rows:
    """Rows [num_rows, row_bytes] of values [num_rows, head_dim], rounded to the nearest."""
    if kv_dtype != "int8":
        with np.errstate(over="ignore"):  # beyond float16 is infinity
            return np.ascontiguousarray(values.astype(kv_dtype)).view(np.uint8)
    blocks = _blocks(values)
    largest = np.abs(blocks).max(-1)
    with np.errstate(over="ignore"):
        scales = np.where(np.isfinite(largest), largest / np.float32(CODE_MAX), np.float32(np.nan)).astype(np.float16)
    steps = scales.astype(np.float32)
    is_usable = np.isfinite(steps) & (steps > 0)
    inverse = np.divide(np.float32(1), steps, out=np.zeros_like(steps), where=is_usable)[..., None]
    codes = np.multiply(blocks, inverse, out=np.zeros_like(blocks), where=is_usable[..., None])
    codes = _rows(np.rint(codes.clip(-CODE_MAX, CODE_MAX)), values.shape[1]).astype(np.int8)
    return np.concatenate([codes.view(np.uint8), scales.view(np.uint8)], axis=1)


def decode_rows(rows: Rows, head_dim: int) -> Float32:
    """Values [num_rows, head_dim] of rows [num_rows, row_bytes], whose size tells their type."""
    for dtype in (np.float32, np.float16):
        if rows.shape[1] == head_dim * np.dtype(dtype).itemsize:
            return np.ascontiguousarray(rows).view(dtype).astype(np.float32)
    codes = _blocks(rows[:, :head_dim].view(np.int8).astype(np.float32))
    scales = np.ascontiguousarray(rows[:, head_dim:]).view(np.float16).astype(np.float32)
    return _rows(codes * scales[..., None], head_dim)


def _blocks(values: Float32) -> Float32:
    """[num_rows, num_blocks, KV_BLOCK], zeros behind the last value."""
    num_blocks = -(-values.shape[1] // KV_BLOCK)
    padded = np.zeros((len(values), num_blocks * KV_BLOCK), np.float32)
    padded[:, : values.shape[1]] = values
    return padded.reshape(len(values), num_blocks, KV_BLOCK)


def _rows(blocks: Float32, head_dim: int) -> Float32:
    """[num_rows, head_dim] of `_blocks`."""
    num_rows, num_blocks, size = blocks.shape
    return blocks.reshape(num_rows, num_blocks * size)[:, :head_dim]
