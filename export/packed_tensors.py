"""Matrices as compressed-tensors stores them in its format `pack-quantized`: 4 or 8 bits, one scale for each group.

`weight_packed` holds codes around 2^(bits-1) along each row, the earliest in the lowest bits of an int32. Groups are of
equal size along a row, or the whole row. Zero points are codes too, packed down the columns.

Source: compressed-tensors 0.20 `compressors/pack_quantized/`, `quantization/lifecycle/forward_helpers.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.errors import CheckpointError
from export.quantized_tensors import (
    FLOAT_TYPES,
    Float32,
    TensorReader,
    expect,
    float16_scales,
    holds_codes,
    is_count,
    read_finite,
    reencode,
)
from quant.blockwise import BlockFormat, Blocks, Codes, unpack

PACKED = "weight_packed"
SUFFIXES_PACKED = (PACKED, "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a group of modules is quantized; `group_size` weights share a scale, None for all of a row."""

    bits: int
    group_size: int | None
    is_symmetric: bool

    def num_groups(self, width: int) -> int:
        """Groups of a row; a row that is shorter than a group is one."""
        return 1 if self.group_size is None else -(-width // self.group_size)


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """The matrix of a module; `module` ends with a dot."""

    reader: TensorReader
    module: str
    shape: tuple[int, ...]
    scheme: Scheme

    @property
    def nf4_block_size(self) -> int | None:
        """None."""
        return None

    def rows(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) dequantized in float32."""
        scales, zero_points = self._scales(start, stop), self._zero_points(start, stop)
        values = self._levels(start, stop).astype(np.float32, order="C")
        groups = values.reshape(stop - start, scales.shape[1], -1)
        groups -= 1 << (self.scheme.bits - 1) if zero_points is None else zero_points[..., None]
        groups *= scales[..., None]
        return values

    def fits(self, form: BlockFormat, start: int, stop: int) -> bool:
        """Whether `form` has no fewer bits, no block that crosses groups, zero points where these have, and scales."""
        scales = self._scales(start, stop)
        is_held = holds_codes(form, self.scheme.bits, scales.shape[1], is_symmetric=self.scheme.is_symmetric)
        return is_held and float16_scales(scales) is not None

    def blocks(self, form: BlockFormat, start: int, stop: int) -> Blocks | None:
        """The codes of rows [start, stop), where `form` fits."""
        scales, zero_points = self._scales(start, stop), self._zero_points(start, stop)
        return reencode(self._levels(start, stop), self.scheme.bits, scales, zero_points, form)

    def nf4_blocks(self, start: int, stop: int) -> tuple[Codes, Float32] | None:
        """None."""
        return None

    def _levels(self, start: int, stop: int) -> Codes:
        packed = self.reader.read(f"{self.module}{PACKED}", start, stop).numpy()
        return unpack(packed.view(np.uint8), self.scheme.bits)[:, : self.shape[1]]

    def _scales(self, start: int, stop: int) -> Float32:
        return read_finite(self.reader, f"{self.module}weight_scale", start, stop)

    def _zero_points(self, start: int, stop: int) -> Codes | None:
        if self.scheme.is_symmetric:
            return None
        in_word = 32 // self.scheme.bits
        words = self.reader.read(f"{self.module}weight_zero_point", start // in_word, -(-stop // in_word)).numpy()
        columns = np.ascontiguousarray(words.T).view(np.uint8)
        first = start % in_word
        return unpack(columns, self.scheme.bits)[:, first : first + stop - start].T


def open_packed(reader: TensorReader, name: str, schemes: Sequence[Scheme]) -> PackedTensor:
    """The matrix of a weight's name, by the one of the schemes that its tensors fit.

    Raises:
        CheckpointError: a tensor of it is missing, or of a wrong type, shape or content; its columns are reordered.
    """
    module = name.removesuffix("weight")
    shape = _shape(reader, module)
    problems: list[CheckpointError] = []
    for scheme in schemes:
        try:
            _check(reader, module, shape, scheme)
        except CheckpointError as problem:
            problems.append(problem)
            continue
        _check_order(reader, module, shape, scheme)
        return PackedTensor(reader, module, shape, scheme)
    raise problems[0]


def _shape(reader: TensorReader, module: str) -> tuple[int, int]:
    name = f"{module}weight_shape"
    kind, size = reader.stored(name) or ("missing", ())
    if kind not in ("I64", "I32") or size != (2,):
        raise CheckpointError(
            f"{reader.place(f'{module}{PACKED}')}: its {name} is {kind} {list(size)}, expected I64 [2]; "
            "download the checkpoint again"
        )
    num_rows, width = (int(value) for value in reader.read(name))
    if not is_count(num_rows) or not is_count(width):
        raise CheckpointError(
            f"{reader.place(name)} holds [{num_rows}, {width}], expected numbers above 0 and below 2^31"
        )
    return num_rows, width


def _check(reader: TensorReader, module: str, shape: tuple[int, int], scheme: Scheme) -> None:
    packed, zero_point = f"{module}{PACKED}", f"{module}weight_zero_point"
    num_rows, width = shape
    num_groups = scheme.num_groups(width)
    expect(reader, packed, {"I32"}, (num_rows, _words(width, scheme.bits)), packed, shape)
    if width % num_groups or (num_groups > 1 and width // num_groups != scheme.group_size):
        raise CheckpointError(
            f"{reader.place(packed)}: rows of {width} are no whole groups of {scheme.group_size}, "
            "the group_size in config.json"
        )
    expect(reader, f"{module}weight_scale", FLOAT_TYPES, (num_rows, num_groups), packed, shape)
    if not scheme.is_symmetric:
        expect(reader, zero_point, {"I32"}, (_words(num_rows, scheme.bits), num_groups), packed, shape)
    elif reader.stored(zero_point) is not None:
        raise CheckpointError(f"{reader.place(zero_point)} is there, but the weights are symmetric, says config.json")


def _words(num_codes: int, bits: int) -> int:
    """The int32 that so many codes fill."""
    return -(-num_codes * bits // 32)


def _check_order(reader: TensorReader, module: str, shape: tuple[int, int], scheme: Scheme) -> None:
    """Refuses columns that are in another order than their groups."""
    name, width = f"{module}weight_g_idx", shape[1]
    if reader.stored(name) is None:
        return
    expect(reader, name, {"I32", "I64"}, (width,), f"{module}{PACKED}", shape)
    groups = reader.read(name).numpy()
    in_order = np.arange(width) // (width // scheme.num_groups(width))
    if not (groups == -1).all() and not (groups == in_order).all():  # -1: no order was set
        raise CheckpointError(
            f"{reader.place(name)} orders columns by activation (actorder), which is not supported; "
            'quantize with actorder "weight" or none, or export the unquantized checkpoint'
        )
