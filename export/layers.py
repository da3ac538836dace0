"""Gemma 4 layers as ONNX nodes, for the target and the drafter alike.

Activations are two-dimensional, [num_tokens, size]. Fused where ONNX Runtime has a fused kernel, so that its optimizer
has nothing left to do. Attention folds the query heads of one KV head into the rows of a plain product, which on a CPU
beats `GroupQueryAttention`. New KV rows are graph outputs and all KV rows graph inputs over the same memory: the query
depends on the nodes that write the new rows, so they are written before they are read.

Source: transformers 5.22 `models/gemma4/modeling_gemma4.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.checkpoint import Checkpoint, Float32
from export.errors import CheckpointError
from export.graph import MICROSOFT, Graph
from export.linear import Matrix, Product, StoredMatrix, TensorRows, WeightStore
from quant.recipe import WeightFormat
from runtime.model_config import LayerConfig, RopeConfig, StackConfig
from runtime.signature import key_name, key_view_name, kv_view_names, value_name, value_view_name

LAST = 1 << 62  # an end index past any axis


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos and sin values [num_tokens, head_dim / 2] of the tokens at hand."""

    cos: str
    sin: str


@dataclass(frozen=True, slots=True)
class LayerEmitter:
    """Appends layers of one stack to a graph. `prefix` leads every tensor name of the stack in the checkpoint."""

    graph: Graph
    checkpoint: Checkpoint
    prefix: str
    stack: StackConfig
    product: Product
    form: WeightFormat
    weights: WeightStore

    # weights

    def linear(self, x: str, name: str, parts: Sequence[tuple[str, int]], width: int) -> str:
        """x [num_tokens, width] times the given (tensor, number of rows), stacked."""
        rows = tuple(TensorRows(f"{self.prefix}{part}.weight", 0, num_rows) for part, num_rows in parts)
        return self.multiply(x, name, rows, width, self.form)

    def multiply(self, x: str, name: str, rows: tuple[TensorRows, ...], width: int, form: WeightFormat) -> str:
        """x [num_tokens, width] times stored rows, in a format of their own."""
        return self.product.emit(self.graph, x, self.keep(name, rows, width, form), name)

    def keep(self, name: str, rows: tuple[TensorRows, ...], width: int, form: WeightFormat) -> StoredMatrix:
        """Stores rows of the checkpoint, or finds them stored for another graph."""
        return self.weights.keep(Matrix(name, self.checkpoint, rows, width), form)

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

    # norms

    def rms_norm(self, x: str, weight: Float32, eps: float | None = None) -> str:
        """RMSNorm over the last axis."""
        eps = self.stack.rms_norm_eps if eps is None else eps
        return self.graph.node(
            "SimplifiedLayerNormalization", [x, self.graph.constant(weight)], axis=-1, epsilon=eps, stash_type=1
        )

    def add_and_norm(self, x: str, residual: str, weight: Float32, scalar: float = 1.0) -> tuple[str, str]:
        """(RMSNorm(scalar * (x + residual)), x + residual); the factor is folded into epsilon and the weight's sign."""
        normed, total = self.graph.fresh("normed"), self.graph.fresh("sum")
        self.graph.node(
            "SkipSimplifiedLayerNormalization",
            [x, residual, self.graph.constant(weight * np.float32(np.sign(scalar)))],
            outputs=[normed, "", "", total],
            domain=MICROSOFT,
            epsilon=self.stack.rms_norm_eps / scalar**2,
        )
        return normed, total

    # positions

    def rotations(self, position_ids: str) -> dict[str, Rotation]:
        """cos and sin of int64 positions [num_tokens], for each attention kind of the stack."""
        positions = self.graph.reshape(self.graph.node("Cast", [position_ids], to=1), [-1, 1])
        kinds = {layer.kind: layer.head_dim for layer in self.stack.layers}
        return {kind: self._rotation(positions, self.stack.rope[kind], dim) for kind, dim in sorted(kinds.items())}

    def _rotation(self, positions: str, rope: RopeConfig, head_dim: int) -> Rotation:
        frequencies = self.graph.constant(inverse_frequencies(rope, head_dim)[None])
        angles = self.graph.node("Mul", [positions, frequencies])
        return Rotation(self.graph.node("Cos", [angles]), self.graph.node("Sin", [angles]))

    def rotate(self, heads: str, rotation: Rotation) -> str:
        """Applies a rotation to heads [1, num_tokens, num_heads * head_dim]."""
        first_row = self.graph.constant(np.zeros(1, np.int64))
        return self.graph.node("RotaryEmbedding", [heads, first_row, rotation.cos, rotation.sin], domain=MICROSOFT)

    # attention

    def query_and_new_rows(self, index: int, normed: str, rotation: Rotation) -> list[str]:
        """Projects q, k and v of a layer that owns KV; k and v become graph outputs.

        Returns:
            for each KV head its queries [1, num_tokens, heads per KV head * head_dim]
        """
        layer, num_heads, name = self.stack.layers[index], self.stack.num_heads, f"layers.{index}.self_attn"
        num_kv, dim = layer.num_kv_heads, layer.head_dim
        sizes = [
            (f"{name}.q_proj", num_heads * dim),
            (f"{name}.k_proj", num_kv * dim),
            (f"{name}.v_proj", num_kv * dim),
        ]
        qkv = self.linear(normed, f"{name}.qkv_proj", sizes, self.stack.hidden_size)
        heads = self.rms_norm(self.graph.reshape(qkv, [1, -1, num_heads + 2 * num_kv, dim]), np.ones(dim, np.float32))
        weights = np.ones((num_heads + 2 * num_kv, dim), np.float32)
        weights[:num_heads] = self.vector(f"{name}.q_norm", dim)
        weights[num_heads : num_heads + num_kv] = self.vector(f"{name}.k_norm", dim)
        heads = self.graph.node("Mul", [heads, self.graph.constant(weights)])
        heads = self.graph.reshape(heads, [1, -1, (num_heads + 2 * num_kv) * dim])
        values = [self._new_rows(value_name(index, head), dim) for head in range(num_kv)]
        unrotated = self.graph.fresh("queries_and_keys")
        self.graph.split(heads, [(num_heads + num_kv) * dim] + [dim] * num_kv, [unrotated, *values])
        keys = [self._new_rows(key_name(index, head), dim) for head in range(num_kv)]
        queries = [self.graph.fresh("queries") for _ in range(num_kv)]
        rotated = self.rotate(unrotated, rotation)
        self.graph.split(rotated, [num_heads // num_kv * dim] * num_kv + [dim] * num_kv, [*queries, *keys])
        return queries

    def _new_rows(self, name: str, head_dim: int) -> str:
        return self.graph.output(name, np.float32, [1, "num_tokens", head_dim])

    def query(self, index: int, normed: str, rotation: Rotation) -> list[str]:
        """Projects q alone, for a layer that reads another layer's KV; shapes as `query_and_new_rows` returns."""
        layer, num_heads, name = self.stack.layers[index], self.stack.num_heads, f"layers.{index}.self_attn"
        dim = layer.head_dim
        q = self.linear(normed, f"{name}.q_proj", [(f"{name}.q_proj", num_heads * dim)], self.stack.hidden_size)
        q = self.rms_norm(self.graph.reshape(q, [1, -1, num_heads, dim]), self.vector(f"{name}.q_norm", dim))
        q = self.rotate(self.graph.reshape(q, [1, -1, num_heads * dim]), rotation)
        return self.graph.split(q, [num_heads // layer.num_kv_heads * dim] * layer.num_kv_heads)

    def kv_views(self, source: int, layer: LayerConfig) -> None:
        """Declares the KV rows of a layer as graph inputs [num_keys, head_dim], one for each KV head."""
        num_keys = f"num_{layer.kind}_keys"
        for name in kv_view_names(source, layer):
            self.graph.input(name, np.float32, [num_keys, layer.head_dim])

    def attend(self, index: int, queries: Sequence[str], mask: str | None) -> str:
        """Attention of each KV head's queries over its rows, then the output projection -> [num_tokens, hidden_size].

        Args:
            mask: additive, [num_tokens * heads per KV head, num_keys]; None where every row is visible
        """
        layer, num_heads = self.stack.layers[index], self.stack.num_heads
        width = num_heads // layer.num_kv_heads * layer.head_dim
        outputs = []
        for head, query in enumerate(queries):
            rows = self.graph.reshape(query, [-1, layer.head_dim])
            keys, values = key_view_name(layer.kv_source, head), value_view_name(layer.kv_source, head)
            scores = self.graph.node("FusedMatMul", [rows, keys], domain=MICROSOFT, transB=1)
            if mask is not None:
                scores = self.graph.node("Add", [scores, mask])
            weights = self.graph.node("Softmax", [scores], axis=-1)
            outputs.append(self.graph.reshape(self.graph.node("MatMul", [weights, values]), [-1, width]))
        joined = outputs[0] if len(outputs) == 1 else self.graph.node("Concat", outputs, axis=-1)
        name = f"layers.{index}.self_attn.o_proj"
        return self.linear(joined, name, [(name, self.stack.hidden_size)], num_heads * layer.head_dim)

    # the rest of a layer

    def after_attention(self, index: int, attention: str, residual: str) -> tuple[str, str]:
        """Post-attention norm, residual, MLP and its post norm; returns (MLP output, residual to add it to)."""
        name, size = f"layers.{index}", self.stack.hidden_size
        attention = self.rms_norm(attention, self.vector(f"{name}.post_attention_layernorm", size))
        pre_mlp = self.vector(f"{name}.pre_feedforward_layernorm", size)
        normed, residual = self.add_and_norm(attention, residual, pre_mlp)
        output = self.mlp(index, normed)
        return self.rms_norm(output, self.vector(f"{name}.post_feedforward_layernorm", size)), residual

    def mlp(self, index: int, x: str) -> str:
        """down(gelu(gate(x)) * up(x)), gate and up in one product."""
        width, size, name = self.stack.layers[index].intermediate_size, self.stack.hidden_size, f"layers.{index}.mlp"
        both = self.linear(x, f"{name}.gate_up_proj", [(f"{name}.gate_proj", width), (f"{name}.up_proj", width)], size)
        gate, up = self.graph.split(both, [width, width])
        gated = self.graph.node("Mul", [self.gelu(gate), up])
        return self.linear(gated, f"{name}.down_proj", [(f"{name}.down_proj", size)], width)

    def gelu(self, x: str) -> str:
        """GELU by its tanh approximation."""
        return self.graph.node("FastGelu", [x], domain=MICROSOFT)

    def finish_layer(self, index: int, update: str, residual: str) -> tuple[str, str | None]:
        """Adds a layer's last update and applies its scalar.

        Returns:
            the next layer's normed input (behind the last layer: the final norm) and its residual (None behind it)
        """
        is_last = index + 1 == len(self.stack.layers)
        next_norm = "norm" if is_last else f"layers.{index + 1}.input_layernorm"
        scalar = self.layer_scalar(index)
        normed, total = self.add_and_norm(update, residual, self.vector(next_norm, self.stack.hidden_size), scalar)
        if is_last or scalar == 1.0:
            return normed, None if is_last else total
        return normed, self.graph.node("Mul", [total, self.graph.constant(np.float32(scalar))])


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float32:
    """Rotary frequencies [head_dim / 2]; zero (cos 1, sin 0) for the slots that p-RoPE leaves unrotated.

    Computed in float32, as transformers does.
    """
    num_rotated = int(rope.rotated_fraction * head_dim // 2)
    exponents = np.arange(0, 2 * num_rotated, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.zeros(head_dim // 2, np.float32)
    frequencies[:num_rotated] = np.float32(1) / np.float32(rope.theta) ** exponents
    return frequencies
