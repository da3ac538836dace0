"""config.json in both of its shapes, the real sizes of E2B and E4B, and one line for whatever cannot be exported."""

import re
from typing import Any

import pytest
from transformers import Gemma4TextConfig

from export.errors import CheckpointError
from export.hf_config import drafter_config, generation_defaults, model_config
from runtime.kv_cache import full_bytes_per_token, sliding_bytes
from runtime.kv_rows import KV_BLOCK, KVDtype
from runtime.model_config import ModelConfig, RopeConfig

SLIDING, FULL = "sliding_attention", "full_attention"
SIZES: dict[KVDtype, float] = {"float32": 4, "float16": 2, "int8": 1 + 2 / KV_BLOCK}
E2B: dict[str, Any] = {
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
    "layer_types": [*[SLIDING] * 4, FULL] * 7,
    "sliding_window": 512,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": None,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
}
E4B = E2B | {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "use_double_wide_mlp": False,
    "num_hidden_layers": 42,
    "num_kv_shared_layers": 18,
    "num_key_value_heads": 2,
    "layer_types": [*[SLIDING] * 5, FULL] * 7,
}
ASSISTANT_TEXT = E2B | {
    "hidden_size": 256,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "intermediate_size": 2048,
    "use_double_wide_mlp": False,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 4,
    "num_attention_heads": 4,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
    "final_logit_softcapping": None,
}
ASSISTANT = {
    "model_type": "gemma4_assistant",
    "text_config": ASSISTANT_TEXT,
    "backbone_hidden_size": 1536,
    "use_ordered_embeddings": True,
    "num_centroids": 2048,
    "centroid_intermediate_top_k": 32,
}


def with_per_layer_config(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers writes it since 5.15: indices padded with zeros."""
    changed = {name: value for name, value in config.items() if name != "global_head_dim"}
    indices = [index for index, kind in enumerate(config["layer_types"]) if kind == FULL]
    return changed | {"per_layer_config": {f"{index:02}": {"head_dim": 512} for index in indices}}


def parse(config: dict[str, Any]) -> ModelConfig:
    return model_config(config, "config.json")


SHAPES = pytest.mark.parametrize("as_written", [dict, with_per_layer_config], ids=["global_head_dim", "per_layer"])


# what is read


@SHAPES
def test_e2b(as_written: Any) -> None:
    model = parse(as_written(E2B))
    assert model.owned_layers == tuple(range(15))
    assert [index for index, layer in enumerate(model.layers) if layer.kind == "full"] == list(range(4, 35, 5))
    for index, layer in enumerate(model.layers):
        is_full, is_shared = index % 5 == 4, index >= 15
        assert layer.head_dim == (512 if is_full else 256)
        assert layer.num_kv_heads == 1
        assert layer.intermediate_size == (12288 if is_shared else 6144)
        assert layer.kv_source == ((14 if is_full else 13) if is_shared else index)
    # keys and values: 3 full layers of 512, 12 sliding ones of 256
    for kv_dtype, size in SIZES.items():
        assert full_bytes_per_token(model, kv_dtype) == 3 * 2 * 512 * size
        assert sliding_bytes(model, kv_dtype, 511, 1 << 20) == 12 * 2 * 256 * size * 1024


@SHAPES
def test_e4b(as_written: Any) -> None:
    model = parse(as_written(E4B))
    assert model.owned_layers == tuple(range(24))
    for index, layer in enumerate(model.layers):
        is_full, is_shared = index % 6 == 5, index >= 24
        assert layer.head_dim == (512 if is_full else 256)
        assert layer.num_kv_heads == 2
        assert layer.intermediate_size == 10240
        assert layer.kv_source == ((23 if is_full else 22) if is_shared else index)
    for kv_dtype, size in SIZES.items():
        assert full_bytes_per_token(model, kv_dtype) == 4 * 2 * 2 * 512 * size
        assert sliding_bytes(model, kv_dtype, 511, 1 << 20) == 20 * 2 * 2 * 256 * size * 1024


def test_the_other_fields() -> None:
    model = parse(E2B)
    assert (model.vocab_size, model.hidden_size, model.ple_size, model.num_heads) == (262_144, 1536, 256, 8)
    assert (model.sliding_window, model.context_tokens, model.rms_norm_eps) == (512, 131_072, 1e-6)
    assert (model.logit_softcap, model.bos_token_id, model.eos_token_ids) == (30.0, 2, (1, 106))
    assert model.rope == {"sliding": RopeConfig(1e4, 1.0), "full": RopeConfig(1e6, 0.25)}


def test_a_multimodal_config_holds_the_same_text_config() -> None:
    multimodal = {"model_type": "gemma4", "text_config": E2B, "vision_config": {"hidden_size": 768}}
    assert parse(multimodal) == parse(E2B)


def test_what_is_left_out_is_transformers_default() -> None:
    written = {"model_type": "gemma4_text", **Gemma4TextConfig().to_dict()}
    assert parse(written) == parse({"model_type": "gemma4_text"})


def test_the_last_layer_is_full_as_transformers_makes_it() -> None:
    kinds = [SLIDING, FULL, SLIDING, SLIDING]
    model = parse(E2B | {"layer_types": kinds, "num_hidden_layers": 4, "num_kv_shared_layers": 2})
    assert [layer.kind for layer in model.layers] == ["sliding", "full", "sliding", "full"]
    assert [layer.kv_source for layer in model.layers] == [0, 1, 0, 1]
    assert model.layers[3].head_dim == 512


@pytest.mark.parametrize("per_layer", [None, {}])
def test_a_per_layer_config_without_layers_leaves_them_equal(per_layer: dict[str, Any] | None) -> None:
    model = parse(E2B | {"per_layer_config": per_layer})
    assert {layer.head_dim for layer in model.layers} == {256}


def test_layers_may_differ_in_kv_heads_by_kind() -> None:
    layers = {f"{index}": {"head_dim": 512, "num_key_value_heads": 2} for index in range(4, 35, 5)}
    model = parse(E2B | {"per_layer_config": layers})
    assert {(layer.kind, layer.head_dim, layer.num_kv_heads) for layer in model.layers} == {
        ("sliding", 256, 1),
        ("full", 512, 2),
    }


@pytest.mark.parametrize(("target", "num_kv_heads"), [(E2B, 1), (E4B, 2)], ids=["e2b", "e4b"])
@SHAPES
def test_assistant(target: dict[str, Any], num_kv_heads: int, as_written: Any) -> None:
    text = as_written(ASSISTANT_TEXT | {"num_key_value_heads": num_kv_heads})
    config = ASSISTANT | {"text_config": text, "backbone_hidden_size": target["hidden_size"]}
    model = parse(target)
    drafter = drafter_config(config, model, "config.json")
    sliding, full = (13, 14) if target is E2B else (22, 23)
    assert [layer.kv_source for layer in drafter.layers] == [sliding, sliding, sliding, full]
    assert [layer.head_dim for layer in drafter.layers] == [256, 256, 256, 512]
    assert {layer.intermediate_size for layer in drafter.layers} == {2048}
    assert (drafter.num_centroids, drafter.num_active_centroids) == (2048, 32)
    assert (drafter.hidden_size, drafter.backbone_hidden_size) == (256, target["hidden_size"])


def test_without_ordered_embeddings_there_are_no_centroids() -> None:
    drafter = drafter_config(ASSISTANT | {"use_ordered_embeddings": False}, parse(E2B), "config.json")
    assert (drafter.num_centroids, drafter.num_active_centroids) == (0, 0)


# what is refused

REFUSED = [
    # not this family
    ({"model_type": "gemma3_text"}, "model_type is 'gemma3_text', expected gemma4 or gemma4_text"),
    ({"text_config": [1]}, "text_config is not an object"),
    ({"enable_moe_block": True}, "enable_moe_block is True, expected False"),
    ({"attention_k_eq_v": True}, "attention_k_eq_v is True, expected False"),
    ({"attention_bias": True}, "attention_bias is True, expected False"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is False, expected True"),
    ({"hidden_activation": "silu"}, "hidden_activation is 'silu', expected 'gelu_pytorch_tanh'"),
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is set"),
    ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input is 0"),
    # numbers
    ({"hidden_size": "1536"}, "hidden_size is '1536', expected an integer >= 1"),
    ({"hidden_size": 0}, "hidden_size is 0, expected an integer >= 1"),
    ({"num_attention_heads": 8.0}, "num_attention_heads is 8.0, expected an integer"),
    ({"num_key_value_heads": True}, "num_key_value_heads is True, expected an integer"),
    ({"max_position_embeddings": 1 << 31}, "max_position_embeddings is 2147483648, expected an integer"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number above 0"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected a number above 0"),
    ({"final_logit_softcapping": "30"}, "final_logit_softcapping is '30', expected a number above 0"),
    ({"final_logit_softcapping": -30.0}, "final_logit_softcapping is -30.0, expected a number above 0"),
    ({"vocab_size_per_layer_input": 262_208}, "vocab_size_per_layer_input is 262208, vocab_size 262144"),
    # token ids
    ({"eos_token_id": "1"}, "eos_token_id is '1', expected a token id"),
    ({"eos_token_id": True}, "eos_token_id is True, expected a token id"),
    ({"eos_token_id": None}, "eos_token_id is None, expected a token id"),
    ({"eos_token_id": []}, r"eos_token_id is \[\], expected a token id"),
    ({"eos_token_id": [1, 106.0]}, r"eos_token_id is \[1, 106.0\], expected a token id"),
    ({"eos_token_id": [1, 262_144]}, r"eos_token_id is \[1, 262144\], expected a token id below 262,144"),
    ({"bos_token_id": -2}, "bos_token_id is -2, expected an integer >= 0"),
    # layers
    ({"num_hidden_layers": 36}, "layer_types has 35 entries, num_hidden_layers is 36"),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention', expected a list of 35 names"),
    ({"layer_types": ["linear"] * 35}, "layer_types has 'linear', expected one of sliding_attention, full_attention"),
    ({"num_kv_shared_layers": 35}, "num_kv_shared_layers 35 leaves none of 35 with KV"),
    ({"num_kv_shared_layers": 40}, "num_kv_shared_layers 40 leaves none of 35 with KV"),
    ({"num_kv_shared_layers": 32}, "layer 4 shares full KV, but no earlier layer owns any"),
    ({"head_dim": 255}, "layer 0 has head_dim 255 and 8 heads over 1 KV heads; the first must be even"),
    ({"global_head_dim": 511}, "layer 4 has head_dim 511"),
    ({"num_key_value_heads": 3}, "8 heads over 3 KV heads; the first must be even, the heads a multiple"),
    ({"use_double_wide_mlp": 1}, "use_double_wide_mlp is 1, expected true or false"),
    # single layers
    ({"per_layer_config": [512]}, r"per_layer_config is \[512\], expected an object"),
    ({"per_layer_config": {"4": 512}}, "per_layer_config: 4 is 512, expected an object"),
    ({"per_layer_config": {"35": {}}}, "per_layer_config: 35: no such layer, there are 35"),
    ({"per_layer_config": {"-1": {}}}, "per_layer_config: -1: no such layer, there are 35"),
    ({"per_layer_config": {"4": {"head_dim": "512"}}}, "per_layer_config: 4: head_dim is '512', expected an integer"),
    ({"per_layer_config": {"4": {"skip": ["mlp"]}}}, "per_layer_config: 4: skip of a single layer cannot be exported"),
    (
        {"per_layer_config": {"4": {"head_dim": 512}}},
        "layer 9 has head_dim 256 and 1 KV heads, the first full layer 512 and 1; layers of one kind must agree",
    ),
    # positions
    ({"rope_parameters": [1e4]}, r"rope_parameters is \[10000.0\], expected an object"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters: sliding_attention is None, expected an object"),
    ({"rope_parameters": {SLIDING: {"rope_type": "yarn"}, FULL: {}}}, "sliding_attention: rope_type is 'yarn'"),
    ({"rope_parameters": {SLIDING: {"factor": 8.0}, FULL: {}}}, "rope_type is 'default' with factor 8.0"),
    ({"rope_parameters": {SLIDING: {"rope_theta": -1}, FULL: {}}}, "rope_theta is -1, expected a number above 0"),
    (
        {"rope_parameters": {SLIDING: {}, FULL: {"rope_type": "proportional", "partial_rotary_factor": 1.5}}},
        "full_attention: partial_rotary_factor is 1.5, expected at most 1",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^here/config.json: .*{message}") as caught:
        model_config(E2B | changes, "here/config.json")
    assert "\n" not in str(caught.value)


DRAFTER_REFUSED = [
    ({"model_type": "gemma4"}, {}, "model_type is 'gemma4', expected gemma4_assistant"),
    ({"backbone_hidden_size": 2560}, {}, "for a target of hidden size 2560, this one has 1536; pass the assistant"),
    ({}, {"vocab_size": 262_208}, "the drafter's vocabulary is 262208, the target's 262144"),
    ({}, {"sliding_window": 1024}, "the drafter's sliding_window is 1024, the target's 512"),
    (
        {},
        {"num_key_value_heads": 2},
        r"drafter sliding layers .* \(256, 2\), the target's \(256, 1\)",
    ),
    (
        {},
        {"global_head_dim": 256},
        r"drafter full layers .* \(256, 1\), the target's \(512, 1\)",
    ),
    ({"num_centroids": 1000}, {}, "vocab_size 262144 is not a multiple of num_centroids 1000"),
    ({"num_centroids": 16}, {}, "centroid_intermediate_top_k 32 exceeds 16 centroids"),
    ({"use_ordered_embeddings": "yes"}, {}, "use_ordered_embeddings is 'yes', expected true or false"),
    ({}, {"enable_moe_block": True}, "enable_moe_block is True, expected False"),
]


@pytest.mark.parametrize(("outer", "text", "message"), DRAFTER_REFUSED, ids=lambda value: str(value)[:50])
def test_drafter_refused(outer: dict[str, Any], text: dict[str, Any], message: str) -> None:
    config = ASSISTANT | {"text_config": ASSISTANT_TEXT | text} | outer
    with pytest.raises(CheckpointError, match=f"^here/config.json: .*{message}"):
        drafter_config(config, parse(E2B), "here/config.json")


def test_drafter_of_a_target_without_its_kind_of_layer() -> None:
    target = parse(E2B | {"layer_types": [FULL] * 35})
    with pytest.raises(CheckpointError, match="the target has no sliding layer for the drafter to read"):
        drafter_config(ASSISTANT, target, "config.json")


# generation_config.json


def test_generation_defaults() -> None:
    model = parse(E2B)
    assert generation_defaults({}, model, "") == {
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
        "eos_token_ids": [1, 106],
    }
    given = {"do_sample": False, "temperature": 0.7, "top_k": None, "eos_token_id": [106, 1, 50]}
    found = generation_defaults(given, model, "")
    assert (found["temperature"], found["top_k"], found["eos_token_ids"]) == (0.0, 64, [1, 50, 106])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1}, "temperature must be a finite number >= 0"),
        ({"top_k": 1.5}, "top_k must be a whole number >= 0"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1"),
        ({"do_sample": "no"}, "do_sample is 'no', expected true or false"),
        ({"eos_token_id": 262_144}, "eos_token_id is 262144, expected a token id below 262,144"),
    ],
    ids=str,
)
def test_generation_defaults_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^generation_config.json: {re.escape(message)}"):
        generation_defaults(given, parse(E2B), "generation_config.json")
