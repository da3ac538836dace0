"""A stack of Gemma 4 layers: its tensors, stored once, and the description that every layout's graph follows.

Which nodes a step becomes is an `Emitter`'s business. Emitters of several layouts share one `StackWeights`, so that
their graphs read the same stored matrices.

Source: transformers 5.22 `models/gemma4/modeling_gemma4.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from export.checkpoint import Checkpoint, Float32, Indices
from export.errors import CheckpointError
from export.graph import Graph, Region
from export.linear import Matrix, StoredMatrix, TensorRows, WeightStore
from runtime.model_config import LayerConfig, RopeConfig, StackConfig

LAST = 1 << 62  # an end index past any axis


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored matrix under the name that its initializers get."""

    name: str
    stored: StoredMatrix


@dataclass(frozen=True, slots=True)
class StackWeights:
    """Tensors of one stack. `prefix` leads their names in the checkpoint; matrices go to `store`, each one once."""

    checkpoint: Checkpoint
    prefix: str
    stack: StackConfig
    store: WeightStore

    # matrices

    def query(self, index: int) -> Weight:
        """Queries alone, of a layer that reads another layer's KV: [num_heads * head_dim, hidden_size]."""
        name, layer = f"layers.{index}.self_attn.q_proj", self.stack.layers[index]
        return self.linear(name, [(name, self.stack.num_heads * layer.head_dim)], self.stack.hidden_size)

    def query_key_value(self, index: int) -> Weight:
        """Queries, keys and values of a layer that owns KV, stacked."""
        name, layer = f"layers.{index}.self_attn", self.stack.layers[index]
        num_kv_rows = layer.num_kv_heads * layer.head_dim
        parts = [
            (f"{name}.q_proj", self.stack.num_heads * layer.head_dim),
            (f"{name}.k_proj", num_kv_rows),
            (f"{name}.v_proj", num_kv_rows),
        ]
        return self.linear(f"{name}.qkv_proj", parts, self.stack.hidden_size)

    def attention_output(self, index: int) -> Weight:
        """[hidden_size, num_heads * head_dim]"""
        name, width = f"layers.{index}.self_attn.o_proj", self.stack.num_heads * self.stack.layers[index].head_dim
        return self.linear(name, [(name, self.stack.hidden_size)], width)

    def gate_up(self, index: int) -> Weight:
        """Gate and up, stacked: [2 * intermediate_size, hidden_size]."""
        name, width = f"layers.{index}.mlp", self.stack.layers[index].intermediate_size
        parts = [(f"{name}.gate_proj", width), (f"{name}.up_proj", width)]
        return self.linear(f"{name}.gate_up_proj", parts, self.stack.hidden_size)

    def down(self, index: int) -> Weight:
        """[hidden_size, intermediate_size]"""
        name = f"layers.{index}.mlp.down_proj"
        return self.linear(name, [(name, self.stack.hidden_size)], self.stack.layers[index].intermediate_size)

    def linear(self, name: str, parts: Sequence[tuple[str, int]], width: int) -> Weight:
        """The given (tensor, number of rows), stacked."""
        rows = tuple(TensorRows(f"{self.prefix}{part}.weight", 0, num_rows) for part, num_rows in parts)
        return self.matrix(name, rows, width)

    def matrix(self, name: str, rows: tuple[TensorRows, ...], width: int, order: Indices | None = None) -> Weight:
        """Rows of the checkpoint, stored when first asked for."""
        return Weight(name, self.store.keep(Matrix(name, self.checkpoint, rows, width, order)))

    def table(self, name: str, values: Indices) -> Region:
        """Integers, stored when first asked for."""
        return self.store.keep_indices(name, values)

    # vectors

    def norm(self, name: str) -> Float32:
        """A norm's weight [hidden_size]."""
        return self.vector(name, self.stack.hidden_size)

    def vector(self, name: str, size: int) -> Float32:
        """A norm's weight [size]."""
        return self.checkpoint.vector(f"{self.prefix}{name}.weight", size)

    def layer_scalar(self, index: int) -> float:
        """The factor on a layer's output; 1 where the checkpoint has none."""
        name = f"{self.prefix}layers.{index}.layer_scalar"
        if name not in self.checkpoint:
            return 1.0
        scalar = float(self.checkpoint.vector(name, 1)[0])
        if scalar == 0:
            raise CheckpointError(f"{self.checkpoint.place(name)} is 0, which erases the layer's input")
        return scalar

    def frequencies(self) -> dict[str, Float32]:
        """Rotary frequencies [head_dim / 2] of each attention kind."""
        kinds = {layer.kind: layer.head_dim for layer in self.stack.layers}
        return {kind: inverse_frequencies(self.stack.rope[kind], head_dim) for kind, head_dim in sorted(kinds.items())}


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos and sin values [num_tokens, head_dim / 2] of the tokens at hand."""

    cos: str
    sin: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """What attention needs of the tokens at hand: all of a forward, or the kept ones.

    Of a sliding layer's rows a token sees its own and those before it, `window` in all; 0: whatever rows are passed.
    """

    rotations: Mapping[str, Rotation]
    window: int
    masks: Mapping[str, Mapping[int, str]]  # by kind and query heads for each KV head, where the emitter needs masks


class Emitter(Protocol):
    """Turns the steps of a model into nodes of one layout. Activations are [num_tokens, size]."""

    @property
    def graph(self) -> Graph:
        """Where nodes go."""
        ...

    @property
    def weights(self) -> StackWeights:
        """The stack's tensors."""
        ...

    def declare_cache(self, sources: Mapping[int, LayerConfig], window: int) -> None:
        """Declares inputs with the KV rows of `sources`, the layers of the target that own them; window as `Tokens`."""
        ...

    def tokens(self, position_ids: str, window: int) -> Tokens:
        """What attention needs of the tokens at int64 positions [num_tokens]."""
        ...

    def kept(self, tokens: Tokens, kept_from: str) -> Tokens:
        """The same of the last tokens; `kept_from` [1] is the negative index of the first."""
        ...

    def attention(self, index: int, normed: str, tokens: Tokens, *, owns_kv: bool) -> str:
        """Attention of a layer [num_tokens, num_heads * head_dim]; one that owns KV adds the tokens' rows first."""
        ...

    def multiply(self, x: str, weight: Weight) -> str:
        """x @ weight.T"""
        ...

    def gelu_glu(self, x: str, weight: Weight) -> str:
        """gelu(x @ gate.T) * (x @ up.T), gate and up stacked in the weight."""
        ...

    def gelu_mul(self, x: str, weight: Weight, other: str) -> str:
        """gelu(x @ weight.T) * other"""
        ...

    def multiply_groups(self, x: str, weight: Weight, groups: str, num_groups: int) -> str:
        """One token times each row of chosen groups, of the weight's `num_groups` equal ones; of any shape."""
        ...

    def rms_norm(self, x: str, weight: Float32) -> str:
        """RMSNorm over the last axis."""
        ...

    def norm_add(
        self, x: str, weight: Float32, residual: str, *, scale: float = 1.0, epsilon: float | None = None
    ) -> str:
        """scale * (residual + RMSNorm(x))"""
        ...

    def norm_add_norm(
        self, x: str, weight: Float32, residual: str, next_weight: Float32, *, scale: float = 1.0, is_last: bool = False
    ) -> tuple[str, str]:
        """(RMSNorm(total), total) of total = scale * (residual + RMSNorm(x)); the last total must not be used."""
        ...

    def logits(self, hidden: str, lm_head: StoredMatrix, softcap: float | None) -> None:
        """Appends the output `logits` and those that the layout derives from it."""
        ...


def attention_and_mlp(
    emitter: Emitter, index: int, normed: str, residual: str, tokens: Tokens, *, owns_kv: bool
) -> tuple[str, str]:
    """A layer up to its MLP: (MLP output, yet to be normed, and the residual to add it to)."""
    weights, name = emitter.weights, f"layers.{index}"
    attended = emitter.attention(index, normed, tokens, owns_kv=owns_kv)
    output = emitter.multiply(attended, weights.attention_output(index))
    post_norm = weights.norm(f"{name}.post_attention_layernorm")
    pre_mlp = weights.norm(f"{name}.pre_feedforward_layernorm")
    normed, residual = emitter.norm_add_norm(output, post_norm, residual, pre_mlp)
    return emitter.multiply(emitter.gelu_glu(normed, weights.gate_up(index)), weights.down(index)), residual


def finish_layer(emitter: Emitter, index: int, update: str, post_norm: str, residual: str) -> tuple[str, str]:
    """Adds a layer's last update, normed, and applies its scalar.

    Returns:
        the next layer's normed input (behind the last layer: the final norm) and its residual
    """
    weights = emitter.weights
    is_last = index + 1 == len(weights.stack.layers)
    next_norm = weights.norm("norm" if is_last else f"layers.{index + 1}.input_layernorm")
    scale = weights.layer_scalar(index)
    return emitter.norm_add_norm(
        update, weights.norm(f"layers.{index}.{post_norm}"), residual, next_norm, scale=scale, is_last=is_last
    )


def last_rows(graph: Graph, value: str, kept_from: str) -> str:
    """Rows of a value from the negative index `kept_from` [1] on."""
    end, axis = graph.constant(np.array([LAST])), graph.constant(np.array([0]))
    return graph.node("Slice", [value, kept_from, end, axis])


def columns(graph: Graph, value: str, start: int, stop: int = LAST) -> str:
    """Columns [start, stop) of a value [num_rows, size]."""
    place = [graph.constant(np.array([number])) for number in (start, stop, 1)]
    return graph.node("Slice", [value, *place])


def kept_rotations(graph: Graph, tokens: Tokens, kept_from: str) -> dict[str, Rotation]:
    """Rotations of the last tokens; `kept_from` as `last_rows` takes it."""
    return {
        kind: Rotation(last_rows(graph, rotation.cos, kept_from), last_rows(graph, rotation.sin, kept_from))
        for kind, rotation in tokens.rotations.items()
    }


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float32:
    """Rotary frequencies [head_dim / 2]; zero (cos 1, sin 0) for the slots that p-RoPE leaves unrotated.

    Computed in float32, as transformers does.
    """
    num_rotated = int(rope.rotated_fraction * head_dim // 2)
    exponents = np.arange(0, 2 * num_rotated, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.zeros(head_dim // 2, np.float32)
    frequencies[:num_rotated] = np.float32(1) / np.float32(rope.theta) ** exponents
    return frequencies
