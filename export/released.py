"""Sizes of the released models, as the `config.json` of target and assistant have them.

Source: google/gemma-4-E2B-it and -E4B-it and their assistants.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
_BOTH = {"vocab_size": 262_144, "head_dim": 256, "global_head_dim": 512, "sliding_window": 512}
_TARGET = _BOTH | {
    "model_type": "gemma4_text",
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": 30.0,
    "eos_token_id": [1, 106, 50],
}


@dataclass(frozen=True, slots=True)
class ReleasedModel:
    """A pair's sizes, as the `config.json` of the target and of the assistant have them."""

    name: str
    target: Mapping[str, Any]
    assistant: Mapping[str, Any]


def _assistant(backbone_hidden_size: int, num_kv_heads: int) -> dict[str, Any]:
    text = _BOTH | {
        "model_type": "gemma4_text",
        "hidden_size": 256,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": num_kv_heads,
        "layer_types": [SLIDING] * 3 + [FULL],
    }
    return {
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": backbone_hidden_size,
        "use_ordered_embeddings": True,
        "num_centroids": 2048,
        "centroid_intermediate_top_k": 32,
        "text_config": text,
    }


_E2B = _TARGET | {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "use_double_wide_mlp": True,
    "num_hidden_layers": 35,
    "num_kv_shared_layers": 20,
    "num_key_value_heads": 1,
    "layer_types": [*[SLIDING] * 4, FULL] * 7,
}
_E4B = _TARGET | {
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "use_double_wide_mlp": False,
    "num_hidden_layers": 42,
    "num_kv_shared_layers": 18,
    "num_key_value_heads": 2,
    "layer_types": [*[SLIDING] * 5, FULL] * 7,
}
RELEASED = {
    "E2B": ReleasedModel("E2B", _E2B, _assistant(1536, num_kv_heads=1)),
    "E4B": ReleasedModel("E4B", _E4B, _assistant(2560, num_kv_heads=2)),
}
