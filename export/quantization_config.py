"""Finds which matrices of a checkpoint are stored quantized, and how, from config.json and the names of tensors.

The one module that reads a `quantization_config`.

Source: transformers 5.24 `quantizers/`; compressed-tensors 0.20 `quantization/quant_config.py`, `quant_args.py`.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from export.bitsandbytes_tensors import SUFFIXES_4BIT, open_four_bit, open_int8, scb_of
from export.errors import CheckpointError
from export.packed_tensors import PACKED, SUFFIXES_PACKED, Scheme, open_packed
from export.quantized_tensors import QuantizedTensor, TensorReader, is_count

WAY_OUT = (
    "export the unquantized checkpoint, or one quantized with bitsandbytes to 4 or 8 bits, "
    "or with compressed-tensors as pack-quantized"
)
PACK_QUANTIZED = "pack-quantized"
IN_PLACE = (None, False, "weight", "static")  # values of `actorder` that leave columns in their order


@dataclass(frozen=True, slots=True)
class Storage:
    """How one matrix is stored: the names that its tensors can have in the files, and what opens it by its own."""

    tensors: tuple[str, ...]
    open: Callable[[TensorReader, str], QuantizedTensor]


def find_storages(config: Mapping[str, Any], types: Mapping[str, str], where: str) -> dict[str, Storage]:
    """The quantized matrices by name.

    Args:
        config: of config.json
        types: of all tensors in the files, by name
        where: names config.json in messages

    Raises:
        CheckpointError: the checkpoint is quantized in a way that cannot be read.
    """
    fields = _quantization_config(config, where)
    if fields is None:
        return {}
    method = fields.get("quant_method")
    if method is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        method = "bitsandbytes"
    if method == "bitsandbytes":
        return dict(_bitsandbytes(types))
    if method == "compressed-tensors":
        opener = partial(open_packed, schemes=_schemes(fields, where))
        modules = [name.removesuffix(PACKED) for name in types if name.endswith(f".{PACKED}")]
        return {
            f"{module}weight": Storage(tuple(f"{module}{suffix}" for suffix in SUFFIXES_PACKED), opener)
            for module in modules
        }
    raise _refusal(where, _shown(method))


def _bitsandbytes(types: Mapping[str, str]) -> Iterator[tuple[str, Storage]]:
    for name, kind in types.items():
        if not name.endswith(".weight"):
            continue
        if kind == "I8" or scb_of(name) in types:
            yield name, Storage((name, scb_of(name), f"{name}_format"), open_int8)
        elif kind == "U8" or f"{name}.absmax" in types:
            yield name, Storage((name, *(f"{name}.{suffix}" for suffix in SUFFIXES_4BIT)), open_four_bit)


def _quantization_config(config: Mapping[str, Any], where: str) -> Mapping[str, Any] | None:
    """The object in config.json, at its top or in the part of the text model; older ones call it compression_config."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for field in ("quantization_config", "compression_config"):
            if (found := part.get(field)) is not None:
                if not isinstance(found, dict):
                    raise CheckpointError(f"{where}: {field} is {reprlib.repr(found)}, expected an object")
                return found
    return None


def _schemes(fields: Mapping[str, Any], where: str) -> tuple[Scheme, ...]:
    """What the config groups say of weights; tensors tell which of them is theirs."""
    for field, stored in (("sparsity_config", "sparse"), ("transform_config", "transformed")):
        extra = fields.get(field)
        if extra and (not isinstance(extra, dict) or _is_in_use(extra)):
            raise _refusal(where, f"compressed-tensors {stored}")
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{where}: config_groups is {reprlib.repr(groups)}, expected an object of objects")
    schemes = []
    for group in groups.values():
        form = group.get("format") or fields.get("format")
        if form != PACK_QUANTIZED:
            raise _refusal(where, f"compressed-tensors {_shown(form)}")
        if (weights := group.get("weights")) is not None:
            schemes.append(_scheme(weights, where))
    if not schemes:
        raise CheckpointError(f"{where}: config_groups has no weights; {WAY_OUT}")
    return tuple(dict.fromkeys(schemes))


def _is_in_use(extra: Mapping[str, Any]) -> bool:
    return bool(extra.get("config_groups")) or extra.get("format", "dense") != "dense"


def _scheme(weights: Any, where: str) -> Scheme:
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where}: weights is {reprlib.repr(weights)}, expected an object")
    bits, size = weights.get("num_bits", 8), weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    for field, found, supported in (
        ("num_bits", bits, (4, 8)),
        ("type", weights.get("type", "int"), ("int",)),
        ("strategy", strategy, ("group", "channel")),
        ("actorder", weights.get("actorder"), IN_PLACE),
        ("symmetric", weights.get("symmetric", True), (True, False)),
    ):
        if found not in supported:
            raise _refusal(where, f"compressed-tensors {PACK_QUANTIZED} with {field} {reprlib.repr(found)}")
    if strategy == "group" and not is_count(size):
        raise CheckpointError(f"{where}: group_size is {reprlib.repr(size)}, expected a whole number above 0")
    return Scheme(int(bits), size if strategy == "group" else None, bool(weights.get("symmetric", True)))


def _shown(value: Any) -> str:
    """A name as it is, on one line; anything else as Python shows it."""
    return value if isinstance(value, str) and len(value) < 40 and value.isprintable() else reprlib.repr(value)


def _refusal(where: str, stored: str) -> CheckpointError:
    return CheckpointError(f"{where}: the checkpoint is stored as {stored}, which cannot be exported; {WAY_OUT}")
