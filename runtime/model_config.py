"""What the runtime must know of a Gemma 4 text model and its drafter; stored in the manifest.

Knows no Hugging Face field names: `export.hf_config` translates them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from runtime.errors import ArtifactError

AttentionKind = Literal["sliding", "full"]


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
        """Raises ArtifactError where a size is not a positive integer or a layer reads KV that does not exist."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (type(value) is not int or value < 0):
                raise ArtifactError(f"manifest.json: {field.name} is {value!r}, expected an integer >= 0")
        for index, layer in enumerate(self.layers):
            sizes = (layer.head_dim, layer.num_kv_heads, layer.intermediate_size)
            if layer.kind not in self.rope or any(type(size) is not int or size < 1 for size in sizes):
                raise ArtifactError(f"manifest.json: layer {index} is not usable: {layer}")


@dataclass(frozen=True, slots=True)
class ModelConfig(StackConfig):
    """The target: a stack with per-layer embeddings of `ple_size` and tied input and output embeddings."""

    ple_size: int
    context_tokens: int
    logit_softcap: float | None
    bos_token_id: int
    eos_token_ids: tuple[int, ...]

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
