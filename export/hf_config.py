"""Translates a Hugging Face `config.json` into the runtime's own configuration.

The one module that knows Hugging Face field names. It reads the JSON itself, because transformers' configuration
classes change between releases and forbid plain attribute access to sizes that differ between layers.
Both shapes are read: `global_head_dim` (before transformers 5.15) and `per_layer_config`.

Source: transformers 5.22 `models/gemma4/configuration_gemma4.py`, `models/gemma4_assistant/`.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from export.errors import CheckpointError
from runtime.errors import RequestError
from runtime.model_config import MAX_SIZE, AttentionKind, DrafterConfig, LayerConfig, ModelConfig, RopeConfig
from runtime.sampling import SamplingParams

MAX_LAYERS = 1 << 10
NUMBERS = (1e-30, 1e30)  # what graphs, which compute in float32, can hold
KINDS: dict[str, AttentionKind] = {"sliding_attention": "sliding", "full_attention": "full"}
DEFAULT_ROPE: dict[str, dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
UNSUPPORTED = {  # field -> the only value of E2B and E4B
    "attention_k_eq_v": False,
    "attention_bias": False,
    "enable_moe_block": False,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
PER_LAYER = {"head_dim", "num_key_value_heads"}  # fields that single layers may have of their own


def model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The target's configuration, from a multimodal (`gemma4`) or text-only (`gemma4_text`) config.json.

    Raises:
        CheckpointError: names `where` and the field that is missing, of the wrong type or out of range.
    """
    text = _Fields(_text_config(config, where, ("gemma4", "gemma4_text")), where)
    text.refuse_unsupported()
    if text.optional("use_bidirectional_attention", None) not in (None, "vision"):
        raise CheckpointError(f"{where}: use_bidirectional_attention is set: only causal text models can be exported")
    ple_size = text.integer("hidden_size_per_layer_input", 256, least=0)
    if ple_size == 0:
        raise CheckpointError(f"{where}: hidden_size_per_layer_input is 0: not a Gemma 4 E-series model")
    vocab_size = text.integer("vocab_size", 262_144)
    if (ple_vocab := text.integer("vocab_size_per_layer_input", 262_144)) != vocab_size:
        raise CheckpointError(f"{where}: vocab_size_per_layer_input is {ple_vocab}, vocab_size {vocab_size}")
    layers = text.layers(num_shared=text.integer("num_kv_shared_layers", 0, least=0))
    return ModelConfig(
        **text.stack(vocab_size),
        layers=layers,
        ple_size=ple_size,
        context_tokens=text.integer("max_position_embeddings", 131_072),
        logit_softcap=text.number_or_none("final_logit_softcapping"),
        bos_token_id=text.integer("bos_token_id", 2, least=0, below=vocab_size),
        eos_token_ids=text.token_ids("eos_token_id", (1,), vocab_size),
    )


def drafter_config(config: Mapping[str, Any], target: ModelConfig, where: str) -> DrafterConfig:
    """The MTP assistant's configuration, checked against the target whose KV it reads.

    Raises:
        CheckpointError: also where the drafter was made for another target.
    """
    text = _Fields(_text_config(config, where, ("gemma4_assistant",)), where)
    text.refuse_unsupported()
    outer = _Fields(config, where)
    backbone = outer.integer("backbone_hidden_size", 1536)
    if backbone != target.hidden_size:
        raise CheckpointError(
            f"{where}: the drafter was made for a target of hidden size {backbone}, this one has "
            f"{target.hidden_size}; pass the assistant that belongs to this model"
        )
    vocab_size = text.integer("vocab_size", 262_144)
    if vocab_size != target.vocab_size:
        raise CheckpointError(f"{where}: the drafter's vocabulary is {vocab_size}, the target's {target.vocab_size}")
    if (window := text.integer("sliding_window", 512)) != target.sliding_window:
        raise CheckpointError(
            f"{where}: the drafter's sliding_window is {window}, the target's {target.sliding_window}"
        )
    layers = tuple(_reading_target(layer, target, where) for layer in text.layers(num_shared=0))
    ordered = outer.boolean("use_ordered_embeddings", False)
    num_centroids = outer.integer("num_centroids", 2048) if ordered else 0
    if num_centroids and vocab_size % num_centroids:
        raise CheckpointError(f"{where}: vocab_size {vocab_size} is not a multiple of num_centroids {num_centroids}")
    num_active = outer.integer("centroid_intermediate_top_k", 32) if ordered else 0
    if num_active > num_centroids:
        raise CheckpointError(f"{where}: centroid_intermediate_top_k {num_active} exceeds {num_centroids} centroids")
    return DrafterConfig(
        **text.stack(vocab_size),
        layers=layers,
        backbone_hidden_size=backbone,
        num_centroids=num_centroids,
        num_active_centroids=num_active,
    )


def generation_defaults(given: Mapping[str, Any], model: ModelConfig, where: str) -> dict[str, Any]:
    """Sampling defaults and every end-of-sequence id, from generation_config.json over config.json.

    Raises:
        CheckpointError: names `where` and the field that is of the wrong type or out of range.
    """
    fields = _Fields({name: value for name, value in given.items() if value is not None}, where)
    sampling = {name: fields.values[name] for name in ("temperature", "top_k", "top_p") if name in fields.values}
    params = SamplingParams(**sampling)
    try:
        params.check()
    except RequestError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return {
        "temperature": float(params.temperature) if fields.boolean("do_sample", True) else 0.0,
        "top_k": params.top_k,
        "top_p": float(params.top_p),
        "eos_token_ids": sorted(set(fields.token_ids("eos_token_id", model.eos_token_ids, model.vocab_size))),
    }


def _text_config(config: Mapping[str, Any], where: str, expected: Sequence[str]) -> Mapping[str, Any]:
    kind = config.get("model_type")
    if kind not in expected:
        raise CheckpointError(f"{where}: model_type is {reprlib.repr(kind)}, expected {' or '.join(expected)}")
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise CheckpointError(f"{where}: text_config is not an object")
    return text


def _reading_target(layer: LayerConfig, target: ModelConfig, where: str) -> LayerConfig:
    """A drafter layer that reads the target's last KV of its kind; sizes must agree."""
    try:
        source = target.last_owner(layer.kind)
    except ValueError:
        raise CheckpointError(f"{where}: the target has no {layer.kind} layer for the drafter to read") from None
    owner = target.layers[source]
    mine, theirs = (layer.head_dim, layer.num_kv_heads), (owner.head_dim, owner.num_kv_heads)
    if mine != theirs:
        raise CheckpointError(
            f"{where}: drafter {layer.kind} layers have (head_dim, KV heads) {mine}, the target's {theirs}; "
            "pass the assistant that belongs to this model"
        )
    return LayerConfig(layer.kind, layer.head_dim, layer.num_kv_heads, layer.intermediate_size, source)


class _Fields:
    """Typed access to a parsed config.json, with errors that name the file and the field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def optional(self, name: str, default: Any) -> Any:
        return self.values.get(name, default)

    def refused(self, name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} is {reprlib.repr(self.values.get(name))}, expected {expected}")

    def integer(self, name: str, default: int, *, least: int = 1, below: int = MAX_SIZE) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or not least <= value < below:
            raise self.refused(name, f"an integer >= {least} and < {below:,}")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.refused(name, "true or false")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not NUMBERS[0] < value < NUMBERS[1]:
            raise self.refused(name, "a number above 0 that float32 holds")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.number(name, 0)

    def object(self, name: str) -> "_Fields":
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.refused(name, "an object")
        return _Fields(value, f"{self.where}: {name:.40}")

    def token_ids(self, name: str, default: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
        value = self.values.get(name, default)
        ids = value if isinstance(value, list | tuple) else [value]
        if not ids or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
            raise self.refused(name, f"a token id below {vocab_size:,} or a list of them")
        return tuple(ids)

    def refuse_unsupported(self) -> None:
        for name, only in UNSUPPORTED.items():
            if self.optional(name, only) != only:
                raise self.refused(name, f"{only!r} as in Gemma 4 E-series models")

    def stack(self, vocab_size: int) -> dict[str, Any]:
        """The fields target and drafter share."""
        return {
            "vocab_size": vocab_size,
            "hidden_size": self.integer("hidden_size", 2304),
            "num_heads": self.integer("num_attention_heads", 8),
            "sliding_window": self.integer("sliding_window", 512),
            "rms_norm_eps": self.number("rms_norm_eps", 1e-6),
            "rope": self.rope(),
        }

    def rope(self) -> dict[str, RopeConfig]:
        if self.optional("rope_parameters", None) is None:
            given = _Fields(DEFAULT_ROPE, f"{self.where}: rope_parameters")
        else:
            given = self.object("rope_parameters")
        return {kind: given.object(name).rope_of_one_kind(DEFAULT_ROPE[name]) for name, kind in KINDS.items()}

    def rope_of_one_kind(self, default: Mapping[str, Any]) -> RopeConfig:
        rope_type, factor = self.optional("rope_type", "default"), self.optional("factor", 1.0)
        if rope_type not in ("default", "proportional") or factor != 1:
            raise CheckpointError(
                f"{self.where}: rope_type is {reprlib.repr(rope_type)} with factor {reprlib.repr(factor)}, expected "
                "default or proportional with factor 1"
            )
        rotated = self.number("partial_rotary_factor", 1.0) if rope_type == "proportional" else 1.0
        if rotated > 1:
            raise CheckpointError(f"{self.where}: partial_rotary_factor is {rotated}, expected at most 1")
        theta = self.number("rope_theta", default["rope_theta"])
        if theta < 1:
            raise self.refused("rope_theta", "a number of at least 1")
        return RopeConfig(theta=theta, rotated_fraction=rotated)

    def layers(self, num_shared: int) -> tuple[LayerConfig, ...]:
        """Every layer's shape; the last `num_shared` read the KV of the last owner of their kind."""
        kinds = self.layer_kinds()
        first_shared = len(kinds) - num_shared
        if first_shared < 1:
            raise CheckpointError(
                f"{self.where}: num_kv_shared_layers {num_shared} leaves none of {len(kinds)} with KV"
            )
        per_layer = self.per_layer(kinds)
        width = self.integer("intermediate_size", 9216)
        double = 2 if self.boolean("use_double_wide_mlp", False) else 1
        owners: dict[AttentionKind, int] = {}
        layers = []
        for index, kind in enumerate(kinds):
            if index < first_shared:
                owners[kind] = index
            if kind not in owners:
                raise CheckpointError(f"{self.where}: layer {index} shares {kind} KV, but no earlier layer owns any")
            head_dim, num_kv_heads = self.attention_sizes(index, per_layer.get(index, self))
            layer_width = width * (double if index >= first_shared else 1)
            layers.append(LayerConfig(kind, head_dim, num_kv_heads, layer_width, owners[kind]))
            first = next(layer for layer in layers if layer.kind == kind)
            if (head_dim, num_kv_heads) != (first.head_dim, first.num_kv_heads):
                raise CheckpointError(
                    f"{self.where}: layer {index} has head_dim {head_dim} and {num_kv_heads} KV heads, the first "
                    f"{kind} layer {first.head_dim} and {first.num_kv_heads}; layers of one kind must agree"
                )
        return tuple(layers)

    def layer_kinds(self) -> list[AttentionKind]:
        num_layers = self.integer("num_hidden_layers", 30, below=MAX_LAYERS)
        names = self.optional("layer_types", None)
        if names is None:
            names = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(num_layers)]
        if not isinstance(names, list):
            raise self.refused("layer_types", f"a list of {num_layers} names")
        if len(names) != num_layers:
            raise CheckpointError(
                f"{self.where}: layer_types has {len(names)} entries, num_hidden_layers is {num_layers}"
            )
        if unknown := [name for name in names if name not in tuple(KINDS)]:
            found = reprlib.repr(unknown[0])
            raise CheckpointError(f"{self.where}: layer_types has {found}, expected one of {', '.join(KINDS)}")
        return [*(KINDS[name] for name in names[:-1]), "full"]  # transformers forces the last layer to full attention

    def per_layer(self, kinds: Sequence[AttentionKind]) -> dict[int, "_Fields"]:
        """What single layers have of their own, by index."""
        if "per_layer_config" not in self.values:
            full = _Fields({"head_dim": self.integer("global_head_dim", 512)}, self.where)
            return {index: full for index, kind in enumerate(kinds) if kind == "full"}
        # transformers reads null as no layer, and writes "05" beside "11"
        given = self.object("per_layer_config") if self.values["per_layer_config"] is not None else _Fields({}, "")
        layers = {}
        for key in given.values:
            fields = given.object(key)
            if not key.isdecimal() or len(key) > 9 or int(key) >= len(kinds):
                raise CheckpointError(f"{fields.where}: no such layer, there are {len(kinds)}")
            if unknown := sorted(fields.values.keys() - PER_LAYER):
                raise CheckpointError(f"{fields.where}: {unknown[0]:.40} of a single layer cannot be exported")
            layers[int(key)] = fields
        return layers

    def attention_sizes(self, index: int, layer: "_Fields") -> tuple[int, int]:
        """(head_dim, number of KV heads) of one layer: its own fields, or else the stack's."""
        head_dim = layer.integer("head_dim", self.integer("head_dim", 256))
        num_kv_heads = layer.integer("num_key_value_heads", self.integer("num_key_value_heads", 4))
        num_heads = self.integer("num_attention_heads", 8)
        if head_dim % 2 or num_heads % num_kv_heads:
            raise CheckpointError(
                f"{self.where}: layer {index} has head_dim {head_dim} and {num_heads} heads over {num_kv_heads} KV "
                "heads; the first must be even, the heads a multiple of the KV heads"
            )
        return head_dim, num_kv_heads
