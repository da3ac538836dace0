"""Tiny random Gemma 4 pairs in Hugging Face's form, one for each shape that the exporter must get right.

Imports torch and transformers, so fixtures import it only when a test asks for a checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GenerationConfig,
)

from export.demo.tokenizer import train_tokenizer

CHAT_TEMPLATE = Path(__file__).parents[1] / "export" / "demo" / "chat_template.jinja"
TOKENIZER_TOKENS = 400  # the models' vocabularies are larger, as a tokenizer may leave ids unused
EOS_TOKEN_IDS = [1, 5]  # <eos>, <turn|>
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class Shape:
    """A pair's sizes: of both stacks, of the target's alone and of the assistant's."""

    both: Mapping[str, Any]
    target: Mapping[str, Any]
    layer_scalars: Sequence[float]
    num_centroids: int = 0  # 0: a dense head
    num_active_centroids: int = 0
    dtype: torch.dtype = torch.float32
    assistant_layers: Mapping[str, Any] = field(default_factory=dict)


SHAPES = {
    # E2B's traits: 4:1, double-wide MLP on shared layers, softcap, centroids; but 2 KV heads
    "wide": Shape(
        both={"vocab_size": 1024, "num_key_value_heads": 2, "sliding_window": 16},
        target={
            "hidden_size": 64,
            "num_hidden_layers": 10,
            "num_kv_shared_layers": 5,
            "use_double_wide_mlp": True,
            "layer_types": [*[SLIDING] * 4, FULL] * 2,
            "final_logit_softcapping": 30.0,
        },
        layer_scalars=[0.6 + 0.05 * index for index in range(10)],
        num_centroids=64,
        num_active_centroids=8,
    ),
    # E4B's traits: 5:1; a vocabulary that no power of two divides, bf16 as released, 1 KV head
    "narrow": Shape(
        both={"vocab_size": 1000, "num_key_value_heads": 1, "sliding_window": 12},
        target={
            "hidden_size": 96,
            "num_hidden_layers": 12,
            "num_kv_shared_layers": 6,
            "layer_types": [*[SLIDING] * 5, FULL] * 2,
            "final_logit_softcapping": 30.0,
        },
        layer_scalars=[1.0] * 12,
        num_centroids=125,
        num_active_centroids=10,
        dtype=torch.bfloat16,
    ),
    # nothing is round: no shared layers, no softcap, sizes that fill no block, KV heads that differ between layers
    "irregular": Shape(
        both={
            "vocab_size": 777,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "sliding_window": 11,
            "rms_norm_eps": 1e-5,
        },
        target={
            "hidden_size": 72,
            "intermediate_size": 100,
            "hidden_size_per_layer_input": 12,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 0,
            "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING, FULL],
            "per_layer_config": {index: {"head_dim": 32, "num_key_value_heads": 2} for index in (0, 3, 5)},
        },
        layer_scalars=[-0.8, 1.0, 0.9, -1.2, 1.1, -0.7],
        assistant_layers={"per_layer_config": {3: {"head_dim": 32, "num_key_value_heads": 2}}},
    ),
    # the least sharing there is: one layer
    "one_shared": Shape(
        both={"vocab_size": 512, "num_key_value_heads": 4, "sliding_window": 8},
        target={
            "hidden_size": 40,
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 1,
            "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
        },
        layer_scalars=[1.3, 0.5, -0.9, 1.0, 0.8],
    ),
}
COMMON = {
    "num_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True, slots=True)
class TinyCheckpoint:
    """Folders of a saved pair."""

    target: Path
    assistant: Path


def make_tokenizer() -> Tokenizer:
    """A BPE of a few hundred tokens, trained on this file."""
    return train_tokenizer([Path(__file__).read_text(encoding="utf-8")], TOKENIZER_TOKENS)


def save_pair(shape: Shape, tokenizer: Tokenizer, folder: Path) -> TinyCheckpoint:
    """Writes both checkpoints under `folder`, as the hub has them."""
    target, assistant = make_target(shape), make_assistant(shape)
    target.generation_config = GenerationConfig(do_sample=True, top_k=64, top_p=0.95, eos_token_id=EOS_TOKEN_IDS)
    target.to(shape.dtype).save_pretrained(folder / "target")
    assistant.to(shape.dtype).save_pretrained(folder / "assistant")
    tokenizer.save(str(folder / "target" / "tokenizer.json"))
    (folder / "target" / "chat_template.jinja").write_bytes(CHAT_TEMPLATE.read_bytes())
    return TinyCheckpoint(folder / "target", folder / "assistant")


def make_target(shape: Shape) -> Gemma4ForCausalLM:
    """A target of random weights with layer scalars of its own."""
    sizes = COMMON | {"hidden_size_per_layer_input": 16} | shape.both | shape.target
    config = Gemma4TextConfig(**sizes, vocab_size_per_layer_input=sizes["vocab_size"])
    torch.manual_seed(0)
    target = Gemma4ForCausalLM(config).eval()
    _randomize(target)
    for layer, scalar in zip(target.model.layers, shape.layer_scalars, strict=True):
        layer.layer_scalar.fill_(scalar)
    return target


def make_assistant(shape: Shape) -> Gemma4AssistantForCausalLM:
    """An assistant of random weights; its token ordering is a random permutation."""
    sizes = COMMON | {"hidden_size": 32, "intermediate_size": 64} | shape.both | shape.assistant_layers
    config = Gemma4TextConfig(
        **sizes,
        vocab_size_per_layer_input=0,
        hidden_size_per_layer_input=0,
        num_hidden_layers=4,
        num_kv_shared_layers=4,
        layer_types=[SLIDING, SLIDING, SLIDING, FULL],
    )
    ordered = {"num_centroids": shape.num_centroids, "centroid_intermediate_top_k": shape.num_active_centroids}
    torch.manual_seed(1)
    assistant = Gemma4AssistantForCausalLM(
        Gemma4AssistantConfig(
            text_config=config,
            backbone_hidden_size=shape.target["hidden_size"],
            use_ordered_embeddings=bool(shape.num_centroids),
            **(ordered if shape.num_centroids else {}),
        )
    ).eval()
    _randomize(assistant)
    if shape.num_centroids:
        assistant.masked_embedding.token_ordering.copy_(torch.randperm(config.vocab_size))
    return assistant


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    """Norm weights around 1, and the others wide enough that logits differ by tens."""
    for name, weight in model.named_parameters():
        noise = torch.randn_like(weight)
        weight.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
