"""Quantized checkpoints that are damaged, or stored in a way that cannot be read: one line says what and where."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from export.errors import CheckpointError
from tests.quantized_files import BNB_CONFIG, Tensors, W, packed_config, packed_parts, save, scheme, whole

Change = Callable[[Tensors], object]


def without(part: str) -> Change:
    return lambda tensors: tensors.pop(part)


def put(part: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({part: tensor})


def last(part: str, value: float) -> Change:
    return lambda tensors: tensors[part].view(-1)[-1:].fill_(value)


def state(kind: str = "nf4", **fields: Any) -> Change:
    def change(tensors: Tensors) -> None:
        name = f"{W}.quant_state.bitsandbytes__nf4"
        content = json.loads(tensors.pop(name).numpy().tobytes()) | fields
        as_bytes = json.dumps(content).encode()
        tensors[f"{W}.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(bytearray(as_bytes), dtype=torch.uint8)

    return change


def four_bit_parts() -> Tensors:
    torch.manual_seed(0)
    codes, state_of_it = quantize_4bit(torch.randn(24, 64), blocksize=64, quant_type="nf4", compress_statistics=True)
    return {W: codes} | {f"{W}.{part}": tensor for part, tensor in state_of_it.as_dict(packed=True).items()}


FOUR_BIT_FAULTS: dict[str, tuple[Change, str]] = {
    "no-absmax": (
        without(f"{W}.absmax"),
        r"model.safetensors: tensor layer.weight is quantized, but there is no tensor layer.weight.absmax, expected U8 "
        r"\[24\] for a matrix of \[24, 64\]",
    ),
    "no-state": (
        without(f"{W}.quant_state.bitsandbytes__nf4"),
        "4 bits, but 0 tensors layer.weight.quant_state.* say how",
    ),
    "no-map": (without(f"{W}.quant_map"), r"no tensor layer.weight.quant_map, expected F32 \[16\] for"),
    "no-nested": (without(f"{W}.nested_absmax"), r"no tensor layer.weight.nested_absmax, expected F32 \[1\] for"),
    "absmax-short": (
        put(f"{W}.absmax", torch.zeros(23, dtype=torch.uint8)),
        r"tensor layer.weight.absmax is U8 \[23\], expected U8 \[24\] for a matrix of \[24, 64\]",
    ),
    "absmax-empty": (put(f"{W}.absmax", torch.zeros(0, dtype=torch.uint8)), r"is U8 \[0\], expected U8 \[24\]"),
    "absmax-float": (put(f"{W}.absmax", torch.zeros(24)), r"absmax is F32 \[24\], expected U8 \[24\]"),
    "nested-long": (put(f"{W}.nested_absmax", torch.zeros(2)), r"nested_absmax is F32 \[2\], expected F32 \[1\]"),
    "codes-short": (
        put(W, torch.zeros(767, 1, dtype=torch.uint8)),
        r"tensor layer.weight is U8 \[767, 1\], expected U8 \[768, 1\] for a matrix of \[24, 64\]",
    ),
    "codes-bf16": (put(W, torch.zeros(384, 1, dtype=torch.bfloat16)), r"is BF16 \[384, 1\], expected U8 \[768, 1\]"),
    "absmax-nan": (last(f"{W}.nested_absmax", np.nan), "tensor layer.weight.nested_absmax holds NaN or infinity"),
    "map-inf": (last(f"{W}.nested_quant_map", np.inf), "tensor layer.weight.nested_quant_map holds NaN or infinity"),
    "map-other": (last(f"{W}.quant_map", 2), "tensor layer.weight.quant_map is not the code book of nf4"),
    "map-of-fp4": (state(kind="fp4"), "tensor layer.weight.quant_map is not the code book of fp4"),
    "state-shape": (state(shape=[24]), r"bitsandbytes__nf4: shape is \[24\], expected two whole numbers above 0"),
    "state-shape-0": (state(shape=[24, 0]), r"shape is \[24, 0\], expected two whole numbers above 0"),
    "state-shape-huge": (state(shape=[24, 10**4000]), r"shape is \[24, 10*\.\.\.0*\], expected two whole numbers"),
    "state-block": (state(blocksize=48), "blocksize is 48, expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096"),
    "state-nested": (state(nested_blocksize="256"), "nested_blocksize is '256', expected a whole number above 0"),
    "state-offset": (state(nested_offset=1e39), r"nested_offset is 1e\+39, expected a finite number"),
    "state-cut": (
        put(f"{W}.quant_state.bitsandbytes__nf4", torch.tensor([123], dtype=torch.uint8)),
        "quant_state.bitsandbytes__nf4: not readable as JSON: Expecting property name",
    ),
    "state-list": (
        put(f"{W}.quant_state.bitsandbytes__nf4", torch.tensor([91, 93], dtype=torch.uint8)),
        "quant_state.bitsandbytes__nf4: holds a list, expected an object",
    ),
    "state-type": (
        put(f"{W}.quant_state.bitsandbytes__nf4", torch.zeros(3)),
        r"bitsandbytes__nf4 is F32 \[3\], expected U8 \[number of bytes\] of JSON",
    ),
}
INT8_FAULTS: dict[str, tuple[Change, str]] = {
    "no-scb": (
        without("layer.SCB"),
        r"tensor layer.weight is quantized, but there is no tensor layer.SCB, expected .* \[24\] for a matrix of",
    ),
    "scb-short": (put("layer.SCB", torch.ones(23)), r"tensor layer.SCB is F32 \[23\], expected .* or F32 .* \[24\]"),
    "scb-nan": (last("layer.SCB", np.nan), "tensor layer.SCB holds NaN or infinity; the checkpoint is damaged"),
    "codes-float": (put(W, torch.ones(24, 8)), r"layer.weight is F32 \[24, 8\], expected an I8 matrix to layer.SCB"),
    "codes-flat": (put(W, torch.ones(192, dtype=torch.int8)), r"layer.weight is I8 \[192\], expected an I8 matrix"),
    "order": (
        put("layer.weight_format", torch.tensor(2, dtype=torch.uint8)),
        "tensor layer.weight_format is 2, expected 0 for rows in order; load the checkpoint in bitsandbytes 0.45",
    ),
}
PACKED_FAULTS: dict[str, tuple[Change, str]] = {
    "no-scale": (
        without("layer.weight_scale"),
        r"tensor layer.weight_packed is quantized, but there is no tensor layer.weight_scale, expected .* \[24, 2\]",
    ),
    "no-shape": (
        without("layer.weight_shape"),
        r"layer.weight_packed: its layer.weight_shape is missing \[\], expected I64",
    ),
    "no-zero": (without("layer.weight_zero_point"), r"no tensor layer.weight_zero_point, expected I32 \[3, 2\] for a"),
    "shape-long": (put("layer.weight_shape", torch.ones(3).long()), r"weight_shape is I64 \[3\], expected I64 \[2\]"),
    "shape-0": (
        put("layer.weight_shape", torch.tensor([24, 0])),
        r"weight_shape holds \[24, 0\], expected numbers above",
    ),
    "shape-other": (
        put("layer.weight_shape", torch.tensor([24, 65])),
        r"tensor layer.weight_packed is I32 \[24, 8\], expected I32 \[24, 9\] for a matrix of \[24, 65\]",
    ),
    "codes-type": (
        put("layer.weight_packed", torch.zeros(24, 8)),
        r"weight_packed is F32 \[24, 8\], expected I32 \[24, 8\]",
    ),
    "scale-other": (
        put("layer.weight_scale", torch.ones(24, 4)),
        r"tensor layer.weight_scale is F32 \[24, 4\], expected .* \[24, 2\] for a matrix of \[24, 64\]",
    ),
    "scale-empty": (put("layer.weight_scale", torch.ones(0)), r"weight_scale is F32 \[0\], expected .* \[24, 2\]"),
    "scale-inf": (
        last("layer.weight_scale", np.inf),
        "tensor layer.weight_scale holds NaN or infinity; the checkpoint is",
    ),
    "zero-unpacked": (
        put("layer.weight_zero_point", torch.zeros(24, 2, dtype=torch.int8)),
        r"weight_zero_point is I8 \[24, 2\], expected I32 \[3, 2\]",
    ),
    "columns": (
        put("layer.weight_g_idx", torch.arange(64, dtype=torch.int32) % 2),
        "tensor layer.weight_g_idx orders columns by activation .actorder., which is not supported; quantize with",
    ),
    "g_idx-short": (put("layer.weight_g_idx", torch.zeros(3).int()), r"weight_g_idx is I32 \[3\], expected .* \[64\]"),
}


def refused(tmp_path: Path, tensors: Tensors, change: Change, config: Mapping[str, Any], match: str) -> None:
    change(tensors)
    checkpoint = save(tmp_path, tensors, config)
    with pytest.raises(CheckpointError, match=match) as error:
        whole(checkpoint)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("fault", FOUR_BIT_FAULTS)
def test_damaged_4_bits(fault: str, tmp_path: Path) -> None:
    refused(tmp_path, four_bit_parts(), FOUR_BIT_FAULTS[fault][0], BNB_CONFIG, FOUR_BIT_FAULTS[fault][1])


@pytest.mark.parametrize("fault", INT8_FAULTS)
def test_damaged_int8(fault: str, tmp_path: Path) -> None:
    tensors = {W: torch.ones(24, 8, dtype=torch.int8), "layer.SCB": torch.ones(24)}
    refused(tmp_path, tensors, INT8_FAULTS[fault][0], BNB_CONFIG, INT8_FAULTS[fault][1])


@pytest.mark.parametrize("fault", PACKED_FAULTS)
def test_damaged_packed(fault: str, tmp_path: Path) -> None:
    tensors = packed_parts(24, 64, 4, 32, symmetric=False)[0]
    config = packed_config(scheme(4, 32, symmetric=False))
    refused(tmp_path, tensors, PACKED_FAULTS[fault][0], config, PACKED_FAULTS[fault][1])


def test_tensors_that_config_json_contradicts(tmp_path: Path) -> None:
    asymmetric = packed_parts(24, 64, 4, 32, symmetric=False)[0]
    nothing: Change = lambda tensors: None  # noqa: E731
    refused(
        tmp_path,
        asymmetric,
        nothing,
        packed_config(scheme(4, 32)),
        "weight_zero_point is there, but the weights are symmetric, says config.json",
    )
    refused(
        tmp_path,
        asymmetric,
        nothing,
        packed_config(scheme(4, 48, symmetric=False)),
        "rows of 64 are no whole groups of 48, the group_size in config.json",
    )
    refused(
        tmp_path,
        four_bit_parts(),
        nothing,
        {},
        "layer.weight is stored as U8, expected one of BF16, F16, F32, F64, as config.json names no quantization of "
        "it; export the unquantized checkpoint, or one quantized with bitsandbytes to 4 or 8 bits, or with compressed-",
    )


def with_format(stored: str) -> dict[str, Any]:
    return packed_config(scheme(4, 32), format=stored)


REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "config.json: the checkpoint is stored as gptq, which cannot be exported; export the unquantized checkpoint,",
    ),
    "awq": ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "is stored as awq, which cannot be"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "is stored as fp8, which cannot be exported"),
    "unnamed": ({"quantization_config": {}}, "is stored as None, which cannot be exported"),
    "lines": ({"quantization_config": {"quant_method": "a\nb"}}, r"is stored as 'a\\nb', which"),
    "number": ({"quantization_config": 4}, "quantization_config is 4, expected an object"),
    "float-quantized": (
        with_format("float-quantized"),
        "is stored as compressed-tensors float-quantized, which cannot",
    ),
    "int-quantized": (with_format("int-quantized"), "is stored as compressed-tensors int-quantized, which cannot"),
    "nvfp4": (with_format("nvfp4-pack-quantized"), "is stored as compressed-tensors nvfp4-pack-quantized, which"),
    "mixed": (with_format("mixed-precision"), "is stored as compressed-tensors mixed-precision, which"),
    "3-bits": (packed_config(scheme(3, 32)), "pack-quantized with num_bits 3, which cannot be exported; export"),
    "float": (packed_config(scheme(8, 32, type="float")), "pack-quantized with type 'float', which"),
    "tensor": (packed_config(scheme(8, None, strategy="tensor")), "pack-quantized with strategy 'tensor', which"),
    "actorder": (packed_config(scheme(4, 32, actorder="group")), "pack-quantized with actorder 'group', which"),
    "symmetric": (packed_config(scheme(4, 32, symmetric="no")), "pack-quantized with symmetric 'no', which"),  # type: ignore[arg-type]
    "group-size": (packed_config(scheme(4, 0)), "group_size is 0, expected a whole number above 0"),
    "sparse": (
        packed_config(scheme(4, 32), sparsity_config={"format": "sparse-24-bitmask"}),
        "is stored as compressed-tensors sparse, which",
    ),
    "transformed": (
        packed_config(scheme(4, 32), transform_config={"config_groups": {"R1": {}}}),
        "is stored as compressed-tensors transformed, which",
    ),
    "no-groups": (packed_config(config_groups=None), "config_groups is None, expected an object of objects"),
    "no-weights": (packed_config(config_groups={}), "config_groups has no weights; export the unquantized"),
    "weights-list": (
        packed_config(config_groups={"a": {"weights": [1]}}),
        r"weights is \[1\], expected an object",
    ),
}


@pytest.mark.parametrize("fault", REFUSED_CONFIGS)
def test_quantizations_that_are_refused(fault: str, tmp_path: Path) -> None:
    config, match = REFUSED_CONFIGS[fault]
    with pytest.raises(CheckpointError, match=match) as error:
        save(tmp_path, packed_parts(24, 64, 4, 32)[0], config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": None},
        {"quantization_config": {"load_in_4bit": True}},
        packed_config(scheme(4, 32), sparsity_config={"format": "dense"}, transform_config={"config_groups": {}}),
        packed_config(scheme(4, 32), config_groups={"a": {"weights": scheme(4, 32), "format": "pack-quantized"}}),
    ],
)
def test_quantizations_that_are_not_in_use(config: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = save(tmp_path, {"norm.weight": torch.ones(3)}, config)
    np.testing.assert_array_equal(checkpoint.vector("norm.weight", 3), np.ones(3, np.float32))
