"""Matrices as bitsandbytes stores them: NF4 and FP4, with scales that may be quantized themselves, and LLM.int8().

4 bits: blocks run over the rows laid end to end; of two codes in a byte the earlier one is in the high nibble. A scale
`absmax` is the largest magnitude of its block. 8 bits: int8 and one scale `SCB` for each row, its largest magnitude.

Source: bitsandbytes 0.50 `functional.py` (`QuantState`, `dequantize_4bit`), `backends/default/ops.py`, `nn/modules.py`;
Dettmers et al., arXiv 2305.14314 section 3 and arXiv 2208.07339.
"""

import json
import math
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import CheckpointError
from export.quantized_tensors import (
    FLOAT_TYPES,
    Float32,
    TensorReader,
    check_finite,
    expect,
    float16_scales,
    holds_codes,
    is_count,
    read_finite,
    reencode,
)
from quant.blockwise import BlockFormat, Blocks, Codes

QUANT_STATE = "quant_state.bitsandbytes__"
SUFFIXES_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{QUANT_STATE}nf4", f"{QUANT_STATE}fp4")
_FP4_HALF = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
CODE_BOOKS = {
    "nf4": np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ],
        np.float32,
    ),
    "fp4": np.concatenate([_FP4_HALF, -_FP4_HALF]).astype(np.float32),
}
BLOCK_SIZES = tuple(1 << power for power in range(5, 13))
FLOAT32_MAX = float(np.finfo(np.float32).max)
INVERSE_127 = np.float32(7.874015718698502e-3)  # as in int8_vectorwise_dequant


@dataclass(frozen=True, slots=True)
class NestedScales:
    """How scales are quantized themselves: code book [256], `block_size` of them share a scale, then the offset."""

    code_book: Float32
    block_size: int
    offset: np.float32


@dataclass(frozen=True, slots=True)
class FourBitTensor:
    """NF4 or FP4; `kind` says which."""

    reader: TensorReader
    name: str
    shape: tuple[int, ...]
    kind: str
    block_size: int
    nested: NestedScales | None

    @property
    def nf4_block_size(self) -> int | None:
        """Weights that share a scale; None for FP4."""
        return self.block_size if self.kind == "nf4" else None

    def rows(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) dequantized in float32."""
        width, size = self.shape[1], self.block_size
        first, last = start * width // size, -(-stop * width // size)
        packed = self._packed(first * size, min(last * size, math.prod(self.shape)))
        book = CODE_BOOKS[self.kind]
        pairs = np.stack([book[np.arange(256) >> 4], book[np.arange(256) & 15]], axis=-1)
        values = np.zeros((last - first, size // 2, 2), np.float32)  # the tensor's last block may be shorter
        np.take(pairs, packed, axis=0, out=values.reshape(-1, 2)[: len(packed)], mode="clip")  # none is out of range
        values *= self._scales(first, last)[:, None, None]
        begin = start * width - first * size
        return values.reshape(-1)[begin : begin + (stop - start) * width].reshape(stop - start, width)

    def fits(self, form: BlockFormat, start: int, stop: int) -> bool:
        """False."""
        return False

    def blocks(self, form: BlockFormat, start: int, stop: int) -> Blocks | None:
        """None: the code books are not uniform."""
        return None

    def nf4_blocks(self, start: int, stop: int) -> tuple[Codes, Float32] | None:
        """Packed codes and float32 scales of rows [start, stop) laid end to end; None unless these are whole blocks."""
        begin, end, size = start * self.shape[1], stop * self.shape[1], self.block_size
        if self.kind != "nf4" or begin % size or end % size:
            return None
        return self._packed(begin, end), self._scales(begin // size, end // size)

    def _packed(self, begin: int, end: int) -> Codes:
        """Bytes of the weights [begin, end), of which the first is even."""
        packed: Codes = self.reader.read(self.name, begin // 2, (end + 1) // 2).numpy().reshape(-1)
        return packed

    def _scales(self, first: int, last: int) -> Float32:
        """Scales of the blocks [first, last)."""
        name = f"{self.name}.absmax"
        if self.nested is None:
            return read_finite(self.reader, name, first, last)
        size = self.nested.block_size
        outer = read_finite(self.reader, f"{self.name}.nested_absmax", first // size, -(-last // size))
        scales: Float32 = self.nested.code_book[self.reader.read(name, first, last).numpy()]
        scales *= outer[np.arange(first, last) // size - first // size]
        scales += self.nested.offset
        check_finite(self.reader, name, scales)
        return scales


@dataclass(frozen=True, slots=True)
class Int8Tensor:
    """LLM.int8(): a weight is code * SCB / 127."""

    reader: TensorReader
    name: str
    shape: tuple[int, ...]

    @property
    def nf4_block_size(self) -> int | None:
        """None."""
        return None

    def rows(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) dequantized in float32."""
        values: Float32 = self._codes(start, stop).astype(np.float32)
        values *= self._scb(start, stop)
        values *= INVERSE_127
        return values

    def fits(self, form: BlockFormat, start: int, stop: int) -> bool:
        """Whether `form` has 8 bits, and float16 the rows' scales."""
        return holds_codes(form, 8, 1, is_symmetric=True) and float16_scales(self._scales(start, stop)) is not None

    def blocks(self, form: BlockFormat, start: int, stop: int) -> Blocks | None:
        """The codes of rows [start, stop) around 128, if `form` has 8 bits."""
        levels = self._codes(start, stop).view(np.uint8) ^ np.uint8(0x80)
        return reencode(levels, 8, self._scales(start, stop), None, form)

    def nf4_blocks(self, start: int, stop: int) -> tuple[Codes, Float32] | None:
        """None."""
        return None

    def _codes(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        codes: npt.NDArray[np.int8] = self.reader.read(self.name, start, stop).numpy()
        return codes

    def _scales(self, start: int, stop: int) -> Float32:
        return self._scb(start, stop) * INVERSE_127

    def _scb(self, start: int, stop: int) -> Float32:
        return read_finite(self.reader, scb_of(self.name), start, stop)[:, None]


def scb_of(name: str) -> str:
    """The name of an 8-bit weight's scales."""
    return f"{name.removesuffix('weight')}SCB"


def open_int8(reader: TensorReader, name: str) -> Int8Tensor:
    """The 8-bit matrix of a weight's name.

    Raises:
        CheckpointError: a tensor of it is missing, or of a wrong type, shape or order.
    """
    kind, shape = reader.stored(name) or ("", ())
    if kind != "I8" or len(shape) != 2:
        raise CheckpointError(f"{reader.place(name)} is {kind} {list(shape)}, expected an I8 matrix to {scb_of(name)}")
    expect(reader, scb_of(name), FLOAT_TYPES, shape[:1], name, shape)
    order = f"{name}_format"
    if reader.stored(order) is not None and (number := int(reader.read(order).reshape(-1)[0])) != 0:
        raise CheckpointError(
            f"{reader.place(order)} is {number}, expected 0 for rows in order; "
            "load the checkpoint in bitsandbytes 0.45 or later and save it again"
        )
    return Int8Tensor(reader, name, shape)


def open_four_bit(reader: TensorReader, name: str) -> FourBitTensor:
    """The 4-bit matrix of a weight's name.

    Raises:
        CheckpointError: a tensor of it is missing, or of a wrong type, shape or content.
    """
    kinds = [kind for kind in CODE_BOOKS if reader.stored(f"{name}.{QUANT_STATE}{kind}") is not None]
    if len(kinds) != 1:
        raise CheckpointError(
            f"{reader.place(name)} is quantized to 4 bits, but {len(kinds)} tensors {name}.{QUANT_STATE}nf4 or fp4 say "
            "how, expected 1; download the checkpoint again"
        )
    state = _State(reader, f"{name}.{QUANT_STATE}{kinds[0]}")
    shape, block_size = state.shape(), state.number("blocksize", BLOCK_SIZES)
    num_weights = math.prod(shape)
    num_blocks = -(-num_weights // block_size)
    is_nested = "nested_blocksize" in state.values
    expect(reader, name, {"U8"}, ((num_weights + 1) // 2, 1), name, shape)
    expect(reader, f"{name}.absmax", {"U8"} if is_nested else {"F32"}, (num_blocks,), name, shape)
    expect(reader, f"{name}.quant_map", {"F32"}, (16,), name, shape)
    if not np.allclose(reader.read(f"{name}.quant_map").numpy(), CODE_BOOKS[kinds[0]], rtol=0, atol=1e-4):
        raise CheckpointError(f"{reader.place(f'{name}.quant_map')} is not the code book of {kinds[0]}")
    nested = _nested_scales(reader, name, state, num_blocks) if is_nested else None
    return FourBitTensor(reader, name, shape, kinds[0], block_size, nested)


def _nested_scales(reader: TensorReader, name: str, state: "_State", num_blocks: int) -> NestedScales:
    size = state.number("nested_blocksize")
    code_book = f"{name}.nested_quant_map"
    expect(reader, f"{name}.nested_absmax", {"F32"}, (-(-num_blocks // size),), name, state.shape())
    expect(reader, code_book, {"F32"}, (256,), name, state.shape())
    return NestedScales(read_finite(reader, code_book), size, state.finite("nested_offset"))


class _State:
    """The JSON object in a `quant_state` tensor."""

    def __init__(self, reader: TensorReader, name: str) -> None:
        self._place = reader.place(name)
        kind, shape = reader.stored(name) or ("", ())
        if kind != "U8" or len(shape) != 1:
            raise CheckpointError(f"{self._place} is {kind} {list(shape)}, expected U8 [number of bytes] of JSON")
        try:
            self.values = json.loads(reader.read(name).numpy().tobytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self._place}: not readable as JSON: {error}") from error
        if not isinstance(self.values, dict):
            raise CheckpointError(f"{self._place}: holds a {type(self.values).__name__}, expected an object")

    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        found = self.values.get("shape")
        if not isinstance(found, list) or len(found) != 2 or not all(map(is_count, found)):
            raise self._unexpected("shape", "two whole numbers above 0 and below 2^31")
        return found[0], found[1]

    def number(self, field: str, choices: tuple[int, ...] = ()) -> int:
        """A whole number above 0."""
        found: Any = self.values.get(field)
        if not is_count(found) or (choices and found not in choices):
            expected = "one of " + ", ".join(map(str, choices)) if choices else "a whole number above 0 and below 2^31"
            raise self._unexpected(field, expected)
        return int(found)

    def finite(self, field: str) -> np.float32:
        """A number that float32 holds."""
        found = self.values.get(field)
        if type(found) not in (int, float) or not abs(found) <= FLOAT32_MAX:
            raise self._unexpected(field, "a finite number")
        return np.float32(found)

    def _unexpected(self, field: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._place}: {field} is {reprlib.repr(self.values.get(field))}, expected {expected}")
