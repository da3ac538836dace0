"""Checkpoints that are stored quantized, as the libraries save them, and matrices packed from the specification."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import numpy.typing as npt
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

from export.bitsandbytes_tensors import INVERSE_127
from export.checkpoint import Checkpoint
from export.quantized_tensors import QuantizedTensor
from tests.checkpoints import SHAPES, make_target

Tensors = dict[str, torch.Tensor]
Codes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

W = "layer.weight"
BNB: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
BNB_CONFIG = {"quantization_config": {"quant_method": "bitsandbytes"}}


def quantized_linear(linear: torch.nn.Linear, options: Mapping[str, Any]) -> torch.nn.Module:
    sizes = (linear.in_features, linear.out_features, False)
    weight = linear.weight.detach()
    if options.get("load_in_8bit"):
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        return made
    nested, kind = options.get("bnb_4bit_use_double_quant", False), options["bnb_4bit_quant_type"]
    made = bnb.nn.Linear4bit(*sizes, compress_statistics=nested, quant_type=kind)
    made.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=nested, quant_type=kind, module=made
    ).to("cpu")
    return made


def save_bnb(folder: Path, options: Mapping[str, Any]) -> Path:
    """As transformers does it on a machine that has accelerate; see the test that holds it to that."""
    model = make_target(SHAPES["wide"])
    model.to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, quantized_linear(module, options))
    model.config.quantization_config = BitsAndBytesConfig(**options)
    model.save_pretrained(folder)
    return folder


def flat_dequantized(tensors: Tensors, name: str) -> Float32:
    """What bitsandbytes dequantizes to in float32.

    As a matrix of one row: with bitsandbytes 0.50.2, its kernel for CPUs takes other scales where rows are no whole
    blocks, unlike its own quantizer and its kernels for GPUs.
    """
    parts = {part.removeprefix(f"{name}."): tensor for part, tensor in tensors.items() if part.startswith(f"{name}.")}
    state = QuantState.from_dict(dict(parts), torch.device("cpu"))
    shape, state.shape, state.dtype = state.shape, torch.Size([1, state.shape.numel()]), torch.float32
    values: Float32 = dequantize_4bit(tensors[name], state).reshape(shape).numpy()
    return values


def save_packed(folder: Path) -> Path:
    """As compressed-tensors does it with 4 bits in groups of 32, but for PLE projections, whose rows are shorter.

    Source: compressed-tensors 0.20 `quantization/utils/helpers.py`, `quantization/quant_config.py`.
    """
    model = make_target(SHAPES["wide"]).to(torch.bfloat16)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    ignored = ["lm_head"]
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        if "per_layer" in name:
            ignored.append(name)
            continue
        groups = tensors.pop(f"{name}.weight").unflatten(-1, (-1, 32))
        scales = groups.abs().amax(-1) / 7.5
        levels = (groups / scales[..., None]).round().clamp(-8, 7).flatten(1).float() + 8
        tensors[f"{name}.weight_packed"] = pack_words(levels.numpy().astype(np.uint8), 4)
        tensors[f"{name}.weight_scale"] = scales
        tensors[f"{name}.weight_shape"] = torch.tensor(module.weight.shape)
    weights = {"dynamic": False} | scheme(4, 32)
    group = {"format": "pack-quantized", "input_activations": None, "output_activations": None, "targets": ["Linear"]}
    stored = {"config_groups": {"group_0": group | {"weights": weights}}, "format": "pack-quantized"}
    more = {"ignore": ignored, "kv_cache_scheme": None, "quantization_status": "compressed", "version": "0.20.1"}
    quantization = {"quant_method": "compressed-tensors"} | stored | more
    save(folder, tensors, model.config.to_dict() | {"quantization_config": quantization})
    return folder


def library_values(tensors: Tensors, name: str) -> Float32 | None:
    """What the library that wrote the tensors dequantizes a matrix to, with float16 for scales that are no float32.

    None where it is not quantized.
    """
    module = name.removesuffix("weight")
    if f"{name}.quant_map" in tensors:
        return flat_dequantized(tensors, name)
    if (scb := tensors.get(f"{module}SCB")) is not None:
        codes = tensors[name].numpy().astype(np.float32)
        return codes * (scb.numpy() * INVERSE_127).astype(np.float16).astype(np.float32)[:, None]
    if (packed := tensors.get(f"{module}weight_packed")) is not None:
        words = packed.numpy().view(np.uint32)
        levels = (words[..., None] >> np.arange(0, 32, 4, np.uint32) & 15).astype(np.uint8)
        scales = tensors[f"{module}weight_scale"].float().numpy()
        return dequantized(levels.reshape(len(words), -1), scales, None, 4)
    return None


def save(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder)


def quantized(checkpoint: Checkpoint, name: str = W) -> QuantizedTensor:
    found = checkpoint.quantized(name)
    assert found is not None
    return found


def whole(checkpoint: Checkpoint, name: str = W) -> Float32:
    return np.concatenate(list(checkpoint.rows(name, 0, checkpoint.shape(name)[0])))


def packed_config(*groups: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    config_groups = {f"group_{index}": {"weights": dict(group)} for index, group in enumerate(groups)}
    content = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": config_groups}
    return {"quantization_config": content | fields}


def scheme(bits: int, group_size: int | None, symmetric: bool = True, **fields: Any) -> dict[str, Any]:
    strategy = "channel" if group_size is None else "group"
    same = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group_size}
    return same | fields


def pack_words(levels: Codes, bits: int) -> torch.Tensor:
    """[n, k] codes around 2^(bits-1) -> int32 [n, ceil(k * bits / 32)], the earliest code in the lowest bits."""
    in_word = 32 // bits
    padded = np.zeros((len(levels), -(-levels.shape[1] // in_word) * in_word), np.uint32)
    padded[:, : levels.shape[1]] = levels
    shifts = np.arange(in_word, dtype=np.uint32) * np.uint32(bits)
    words = np.bitwise_or.reduce(padded.reshape(len(levels), -1, in_word) << shifts, axis=-1)
    return torch.from_numpy(words.view(np.int32))


def packed_parts(
    num_rows: int,
    width: int,
    bits: int,
    group_size: int | None,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensors, Codes, Float32, Codes | None]:
    """Tensors of one matrix, and the codes, scales and zero points in them."""
    rng = np.random.default_rng(0)
    num_groups = 1 if group_size is None else width // group_size
    levels = rng.integers(0, 1 << bits, (num_rows, width), np.uint8)
    scales = torch.from_numpy(rng.uniform(1e-3, 1e-2, (num_rows, num_groups)).astype(np.float32)).to(dtype)
    zeros = None if symmetric else rng.integers(0, 1 << bits, (num_rows, num_groups), np.uint8)
    tensors = {
        "layer.weight_packed": pack_words(levels, bits),
        "layer.weight_scale": scales,
        "layer.weight_shape": torch.tensor([num_rows, width]),
    }
    if zeros is not None:
        tensors["layer.weight_zero_point"] = pack_words(zeros.T.copy(), bits).T
    return tensors, levels, scales.float().numpy(), zeros


def dequantized(levels: Codes, scales: Float32, zeros: Codes | None, bits: int) -> Float32:
    grouped = levels.reshape(len(levels), scales.shape[1], -1).astype(np.float32)
    zero = np.float32(1 << (bits - 1)) if zeros is None else zeros[..., None].astype(np.float32)
    values: Float32 = ((grouped - zero) * scales[..., None]).reshape(levels.shape)
    return values
