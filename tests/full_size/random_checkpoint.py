"""Writes full-size checkpoints of random bf16 weights, one tensor at a time; run as `random_checkpoint.py FOLDER`."""

import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np

from export.source import DEMO_FOLDER

POOL = 1 << 22
E2B = {
    "model_type": "gemma4_text",
    "vocab_size": 262_144,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size": 1536,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 6144,
    "use_double_wide_mlp": True,
    "num_hidden_layers": 35,
    "num_kv_shared_layers": 20,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 512,
    "layer_types": ["full_attention" if i % 5 == 4 else "sliding_attention" for i in range(35)],
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": 30.0,
    "eos_token_id": [1, 106, 50],
}
DRAFTER = {
    "model_type": "gemma4_text",
    "vocab_size": 262_144,
    "hidden_size": 256,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 512,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "max_position_embeddings": 131_072,
}
ASSISTANT = {
    "model_type": "gemma4_assistant",
    "backbone_hidden_size": 1536,
    "use_ordered_embeddings": True,
    "num_centroids": 2048,
    "centroid_intermediate_top_k": 32,
    "text_config": DRAFTER,
}


def layer_shapes(config: dict, index: int, *, owns_kv: bool, width: int, has_ple: bool) -> dict[str, tuple[int, ...]]:
    size, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["global_head_dim" if config["layer_types"][index] == "full_attention" else "head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (heads * dim, size),
        "self_attn.o_proj.weight": (size, heads * dim),
        "self_attn.q_norm.weight": (dim,),
        "mlp.gate_proj.weight": (width, size),
        "mlp.up_proj.weight": (width, size),
        "mlp.down_proj.weight": (size, width),
        "layer_scalar": (1,),
    }
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shapes[f"{norm}_layernorm.weight"] = (size,)
    if owns_kv:
        shapes |= {f"self_attn.{part}_proj.weight": (kv_heads * dim, size) for part in "kv"}
        shapes["self_attn.k_norm.weight"] = (dim,)
    if has_ple:
        ple = config["hidden_size_per_layer_input"]
        shapes |= {
            "per_layer_input_gate.weight": (ple, size),
            "per_layer_projection.weight": (size, ple),
            "post_per_layer_input_norm.weight": (size,),
        }
    return {f"layers.{index}.{name}": shape for name, shape in shapes.items()}


def target_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    size, ple, num_layers = config["hidden_size"], config["hidden_size_per_layer_input"], config["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config["vocab_size"], size),
        "embed_tokens_per_layer.weight": (config["vocab_size"], num_layers * ple),
        "per_layer_model_projection.weight": (num_layers * ple, size),
        "per_layer_projection_norm.weight": (ple,),
        "norm.weight": (size,),
    }
    first_shared = num_layers - config["num_kv_shared_layers"]
    for index in range(num_layers):
        width = config["intermediate_size"] * (2 if index >= first_shared and config["use_double_wide_mlp"] else 1)
        shapes |= layer_shapes(config, index, owns_kv=index < first_shared, width=width, has_ple=True)
    return {f"model.{name}": shape for name, shape in shapes.items()}


def drafter_shapes(assistant: dict) -> dict[str, tuple[int, ...]]:
    config, backbone = assistant["text_config"], assistant["backbone_hidden_size"]
    size, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, size), "model.norm.weight": (size,)}
    for index in range(config["num_hidden_layers"]):
        width = config["intermediate_size"]
        layer = layer_shapes(config, index, owns_kv=False, width=width, has_ple=False)
        shapes |= {f"model.{name}": shape for name, shape in layer.items()}
    return shapes | {
        "pre_projection.weight": (size, 2 * backbone),
        "post_projection.weight": (backbone, size),
        "masked_embedding.centroids.weight": (assistant["num_centroids"], size),
        "masked_embedding.token_ordering": (vocab,),
    }


def write_checkpoint(folder: Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """A checkpoint folder; norms and scalars near 1, matrices scaled to keep activations sane."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(DEMO_FOLDER / "target" / "tokenizer.json", folder)
    header, offset = {}, 0
    for name, shape in shapes.items():
        is_index = name.endswith("token_ordering")
        num_bytes = int(np.prod(shape)) * (8 if is_index else 2)
        header[name] = {
            "dtype": "I64" if is_index else "BF16",
            "shape": shape,
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    encoded = json.dumps(header).encode()
    pool = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            write_tensor(file, name, shape, pool)


def write_tensor(file, name: str, shape: tuple[int, ...], pool: np.ndarray) -> None:
    if name.endswith("token_ordering"):
        file.write(np.random.default_rng(1).permutation(shape[0]).astype(np.int64).tobytes())
        return
    values = 1 + 0.05 * pool if len(shape) == 1 else pool / np.float32(np.sqrt(shape[1]))
    bf16 = (values.view(np.uint32) >> 16).astype(np.uint16)
    # another start for each tensor: onnxruntime keeps equal packed weights once, which would flatter the memory
    bf16 = np.roll(bf16, zlib.crc32(name.encode()) % POOL)
    left = int(np.prod(shape))
    while left:
        file.write(bf16[:left].tobytes())
        left -= min(left, POOL)


def write_e2b(folder: Path) -> None:
    """An E2B target (9.3 GB) and its assistant under `folder`."""
    write_checkpoint(folder / "target", E2B, target_shapes(E2B))
    write_checkpoint(folder / "assistant", ASSISTANT, drafter_shapes(ASSISTANT))


if __name__ == "__main__":
    write_e2b(Path(sys.argv[1]))
