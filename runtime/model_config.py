"""What the runtime must know of a Gemma 4 text model and its drafter; stored in the manifest.

Knows no Hugging Face field names: `export.hf_config` translates them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from runtime.errors import ArtifactError

AttentionKind = Literal["sliding", "full"]
MAX_SIZE = 1 << 31


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One decoder layer. `kv_source` is the layer whose KV rows it reads: its own index where it owns KV."""

    kind: AttentionKind
    head_dim: int
    num_kv_heads: int
    intermediate_size: int
    kv_source: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of one attention kind: `rotated_fraction` < 1 leaves the upper frequencies at zero (p-RoPE)."""

    theta: float
    rotated_fraction: float


@dataclass(frozen=True, slots=True)
class StackConfig:
    """A stack of Gemma 4 layers: the target's or the drafter's."""

    vocab_size: int
    hidden_size: int
    num_heads: int
    sliding_window: int
    rms_norm_eps: float
    rope: Mapping[str, RopeConfig]
    layers: tuple[LayerConfig, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The configuration of a manifest entry; raises ArtifactError where a field is missing or unknown."""
        try:
            values = dict(value)
            values["rope"] = {kind: RopeConfig(**rope) for kind, rope in values["rope"].items()}
            values["layers"] = tuple(LayerConfig(**layer) for layer in values["layers"])
            if "eos_token_ids" in values:
                values["eos_token_ids"] = tuple(values["eos_token_ids"])
            config = cls(**values)
        except (TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"manifest.json: {cls.__name__}: {error}; re-export the model") from error
        config.check()
        return config

    def to_json(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)

    def check(self) -> None:
        """Raises ArtifactError where a number is out of range or a layer is not usable."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or not 0 <= value < MAX_SIZE):
                raise ArtifactError(f"manifest.json: {field.name} is {value!r}, expected an integer >= 0; re-export")
        numbers = [self.rms_norm_eps] + [
            number for rope in self.rope.values() for number in (rope.theta, rope.rotated_fraction)
        ]
        if not all(isinstance(number, float) and 0 < number < float("inf") for number in numbers):
            raise ArtifactError(f"manifest.json: rms_norm_eps or rope is not usable: {numbers}; re-export")
        for index, layer in enumerate(self.layers):
            sizes = (layer.head_dim, layer.num_kv_heads, layer.intermediate_size)
            is_sized = all(type(size) is int and 0 < size < MAX_SIZE for size in sizes)
            if not is_sized or layer.kind not in self.rope or type(layer.kv_source) is not int:
                raise ArtifactError(f"manifest.json: layer {index} is not usable: {layer}; re-export")


@dataclass(frozen=True, slots=True)
class ModelConfig(StackConfig):
    """The target: a stack with per-layer embeddings of `ple_size` and tied input and output embeddings."""

    ple_size: int
    context_tokens: int
    logit_softcap: float | None
    bos_token_id: int
    eos_token_ids: tuple[int, ...]

    def check(self) -> None:  # a dataclass with slots is made anew: super() would not find it
        """Raises ArtifactError as the stack does, and where a layer reads KV that no layer of its kind owns."""
        StackConfig.check(self)
        for index, layer in enumerate(self.layers):
            owner = self.layers[layer.kv_source] if 0 <= layer.kv_source <= index else None
            if owner is None or owner.kv_source != layer.kv_source or owner.kind != layer.kind:
                raise ArtifactError(f"manifest.json: layer {index} reads KV of layer {layer.kv_source}; re-export")
        if not self.layers:
            raise ArtifactError("manifest.json: model.layers is empty; re-export")
        for token in (self.bos_token_id, *self.eos_token_ids):
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ArtifactError(
                    f"manifest.json: BOS or EOS token {token!r} is no id below {self.vocab_size:,}; re-export"
                )

    @property
    def num_owned_layers(self) -> int:
        """Layers that own KV; those behind them read it."""
        return sum(layer.kv_source == index for index, layer in enumerate(self.layers))

    @property
    def owned_layers(self) -> tuple[int, ...]:
        """Indices of the layers that own KV."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.kv_source == index)

    def last_owner(self, kind: AttentionKind) -> int:
        """The layer whose KV the shared layers and the drafter read for this attention kind."""
        return max(index for index in self.owned_layers if self.layers[index].kind == kind)


@dataclass(frozen=True, slots=True)
class DrafterConfig(StackConfig):
    """The MTP drafter: query-only layers over the target's KV. `num_centroids` 0 means a dense head.

    `kv_source` of its layers is the target's layer that owns the KV they read.
    """

    backbone_hidden_size: int
    num_centroids: int
    num_active_centroids: int

    @property
    def num_candidates(self) -> int:
        """Tokens that one draft is chosen from."""
        if not self.num_centroids:
            return self.vocab_size
        return self.num_active_centroids * (self.vocab_size // self.num_centroids)

    def check_pairing(self, target: ModelConfig) -> None:
        """Raises ArtifactError where the drafter cannot read this target's hidden state, vocabulary or KV."""
        mine, theirs = (self.backbone_hidden_size, self.vocab_size), (target.hidden_size, target.vocab_size)
        if mine != theirs:
            raise ArtifactError(
                f"manifest.json: the drafter is for (hidden size, vocabulary) {mine}, the model has {theirs}; "
                "export them together"
            )
        for index, layer in enumerate(self.layers):
            owner = target.layers[layer.kv_source] if 0 <= layer.kv_source < len(target.layers) else None
            same = owner and (owner.head_dim, owner.num_kv_heads, owner.kind) == (
                layer.head_dim,
                layer.num_kv_heads,
                layer.kind,
            )
            if not owner or not same or owner.kv_source != layer.kv_source:
                raise ArtifactError(
                    f"manifest.json: drafter layer {index} cannot read layer {layer.kv_source}'s KV; re-export"
                )
