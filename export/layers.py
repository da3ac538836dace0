"""The portable layout's nodes: Gemma 4 layers on stock ONNX Runtime.

Fused where ONNX Runtime has a fused kernel, so that its optimizer has nothing left to do. Attention folds the query
heads of one KV head into the rows of a plain product, which on a CPU beats `GroupQueryAttention`. New KV rows are graph
outputs and all KV rows graph inputs over the same memory: the query depends on the nodes that write the new rows, so
they are written before they are read.

Source: onnxruntime ContribOperators.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.checkpoint import Float32
from export.graph import MICROSOFT, Graph
from export.linear import Product, StoredMatrix
from export.stack import Rotation, StackWeights, Tokens, Weight, kept_rotations, last_rows
from runtime.model_config import LayerConfig
from runtime.signature import (
    key_name,
    key_view_name,
    kv_view_names,
    mask_name,
    value_name,
    value_view_name,
)

FLOAT = 1  # TensorProto.FLOAT


@dataclass(frozen=True, slots=True)
class LayerEmitter:
    """An `export.stack.Emitter` for the portable layout."""

    graph: Graph
    weights: StackWeights
    product: Product

    # products

    def multiply(self, x: str, weight: Weight) -> str:
        """x @ weight.T"""
        return self.product.emit(self.graph, x, weight.stored, weight.name)

    def gelu_glu(self, x: str, weight: Weight) -> str:
        """gelu(x @ gate.T) * (x @ up.T), gate and up in one product."""
        width = weight.stored.num_rows // 2
        gate, up = self.graph.split(self.multiply(x, weight), [width, width])
        return self.graph.node("Mul", [self._gelu(gate), up])

    def gelu_mul(self, x: str, weight: Weight, other: str) -> str:
        """gelu(x @ weight.T) * other"""
        return self.graph.node("Mul", [self._gelu(self.multiply(x, weight)), other])

    def _gelu(self, x: str) -> str:
        """GELU by its tanh approximation."""
        return self.graph.node("FastGelu", [x], domain=MICROSOFT)

    def multiply_groups(self, x: str, weight: Weight, groups: str, num_groups: int) -> str:
        """One token times each row of chosen groups, of the weight's `num_groups` equal ones; of any shape."""
        rows = self._gather_groups(weight, groups, num_groups)
        return self.graph.node("MatMul", [rows, self.graph.reshape(x, [weight.stored.width, 1])])

    def _gather_groups(self, weight: Weight, groups: str, num_groups: int) -> str:
        """Rows of the chosen groups, as floats [rows of the groups, width]."""
        graph, stored = self.graph, weight.stored
        rows = graph.external(f"{weight.name}.weight", stored.rows.folded(num_groups))
        if stored.scales is None:
            gathered = graph.node("Gather", [rows, groups], axis=0)
            gathered = gathered if stored.form.bits == 32 else graph.node("Cast", [gathered], to=FLOAT)
            return graph.reshape(gathered, [-1, stored.width])
        scales = graph.node(
            "Cast", [graph.external(f"{weight.name}.scales", stored.scales.folded(num_groups))], to=FLOAT
        )
        gathered = graph.node(
            "GatherBlockQuantized",
            [rows, groups, scales],
            domain=MICROSOFT,
            bits=stored.form.bits,
            block_size=stored.form.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        padded_width = -(-stored.width // stored.form.block_size) * stored.form.block_size
        padded = graph.reshape(gathered, [-1, padded_width])
        if padded_width == stored.width:
            return padded
        start, stop, axis = (graph.constant(np.array([value])) for value in (0, stored.width, 1))
        return graph.node("Slice", [padded, start, stop, axis])

    def logits(self, hidden: str, lm_head: StoredMatrix, softcap: float | None) -> None:
        """Appends the output `logits`."""
        graph, weight = self.graph, Weight("lm_head", lm_head)
        graph.output("logits", np.float32, ["num_kept", lm_head.num_rows])
        if softcap is None:
            graph.node("Identity", [self.multiply(hidden, weight)], outputs=["logits"])
            return
        # softcap * tanh(logits / softcap), the division on the smaller side of the product
        cap = graph.constant(np.float32(softcap))
        logits = self.multiply(graph.node("Div", [hidden, cap]), weight)
        graph.node("Mul", [graph.node("Tanh", [logits]), cap], outputs=["logits"])

    # norms

    def rms_norm(self, x: str, weight: Float32, epsilon: float | None = None) -> str:
        """RMSNorm over the last axis."""
        epsilon = self.weights.stack.rms_norm_eps if epsilon is None else epsilon
        return self.graph.node(
            "SimplifiedLayerNormalization", [x, self.graph.constant(weight)], axis=-1, epsilon=epsilon, stash_type=1
        )

    def norm_add(
        self, x: str, weight: Float32, residual: str, *, scale: float = 1.0, epsilon: float | None = None
    ) -> str:
        """scale * (residual + RMSNorm(x))"""
        total = self.graph.node("Add", [self.rms_norm(x, weight, epsilon), residual])
        return total if scale == 1.0 else self._scaled(total, scale)

    def norm_add_norm(
        self, x: str, weight: Float32, residual: str, next_weight: Float32, *, scale: float = 1.0, is_last: bool = False
    ) -> tuple[str, str]:
        """(RMSNorm(total), total) of total = scale * (residual + RMSNorm(x)); the last total is not scaled.

        In the second norm the factor is folded into epsilon and the weight's sign.
        """
        normed, total = self.graph.fresh("normed"), self.graph.fresh("sum")
        self.graph.node(
            "SkipSimplifiedLayerNormalization",
            [self.rms_norm(x, weight), residual, self.graph.constant(next_weight * np.float32(np.sign(scale)))],
            outputs=[normed, "", "", total],
            domain=MICROSOFT,
            epsilon=self.weights.stack.rms_norm_eps / scale**2,
        )
        return normed, total if is_last or scale == 1.0 else self._scaled(total, scale)

    def _scaled(self, x: str, scale: float) -> str:
        return self.graph.node("Mul", [x, self.graph.constant(np.float32(scale))])

    # positions and visible rows

    def declare_cache(self, sources: Mapping[int, LayerConfig], window: int) -> None:
        """Declares the KV rows of `sources` as inputs [num_keys, head_dim], and masks where tokens see part of them."""
        if window:
            for kind in sorted({layer.kind for layer in sources.values()}):
                self.graph.input(mask_name(kind), np.float32, ["num_tokens", f"num_{kind}_keys"])
        for index, layer in sources.items():
            for name in kv_view_names(index, layer):
                self.graph.input(name, np.float32, [f"num_{layer.kind}_keys", layer.head_dim])

    def tokens(self, position_ids: str, window: int) -> Tokens:
        """What attention needs of the tokens at int64 positions [num_tokens]."""
        positions = self.graph.reshape(self.graph.node("Cast", [position_ids], to=FLOAT), [-1, 1])
        rotations = {
            kind: self._rotation(positions, frequencies) for kind, frequencies in self.weights.frequencies().items()
        }
        return Tokens(rotations, window, self._masks(None) if window else {})

    def kept(self, tokens: Tokens, kept_from: str) -> Tokens:
        """The same of the last tokens; `kept_from` [1] is the negative index of the first."""
        masks = self._masks(kept_from) if tokens.window else {}
        return Tokens(kept_rotations(self.graph, tokens, kept_from), tokens.window, masks)

    def _rotation(self, positions: str, frequencies: Float32) -> Rotation:
        angles = self.graph.node("Mul", [positions, self.graph.constant(frequencies[None])])
        return Rotation(self.graph.node("Cos", [angles]), self.graph.node("Sin", [angles]))

    def _masks(self, kept_from: str | None) -> dict[str, dict[int, str]]:
        """Each kind's mask with its rows repeated for the query heads that share a KV head."""
        masks: dict[str, dict[int, str]] = {}
        for layer in self.weights.stack.layers:
            repeats = self.weights.stack.num_heads // layer.num_kv_heads
            by_repeats = masks.setdefault(layer.kind, {})
            if repeats not in by_repeats:
                mask = mask_name(layer.kind)
                mask = mask if kept_from is None else last_rows(self.graph, mask, kept_from)
                by_repeats[repeats] = self._repeat_rows(mask, repeats)
        return masks

    def _repeat_rows(self, mask: str, repeats: int) -> str:
        if repeats == 1:
            return mask
        apart = self.graph.node("Unsqueeze", [mask, self.graph.constant(np.array([1]))])
        zeros = self.graph.constant(np.zeros((1, repeats, 1), np.float32))
        return self.graph.node("Flatten", [self.graph.node("Add", [apart, zeros])], axis=2)

    # attention

    def attention(self, index: int, normed: str, tokens: Tokens, *, owns_kv: bool) -> str:
        """Attention of a layer [num_tokens, num_heads * head_dim]; one that owns KV adds the tokens' rows first."""
        layer = self.weights.stack.layers[index]
        project = self._query_and_new_rows if owns_kv else self._query
        queries = project(index, normed, tokens.rotations[layer.kind])
        masks = tokens.masks.get(layer.kind, {})
        return self._attend(layer, queries, masks.get(self.weights.stack.num_heads // layer.num_kv_heads))

    def _query_and_new_rows(self, index: int, normed: str, rotation: Rotation) -> list[str]:
        """Projects q, k and v of a layer that owns KV; k and v become graph outputs.

        Returns:
            for each KV head its queries [1, num_tokens, heads per KV head * head_dim]
        """
        weights, layer, name = self.weights, self.weights.stack.layers[index], f"layers.{index}.self_attn"
        num_heads, num_kv, dim = weights.stack.num_heads, layer.num_kv_heads, layer.head_dim
        qkv = self.multiply(normed, weights.query_key_value(index))
        heads = self.rms_norm(self.graph.reshape(qkv, [1, -1, num_heads + 2 * num_kv, dim]), np.ones(dim, np.float32))
        head_weights = np.ones((num_heads + 2 * num_kv, dim), np.float32)
        head_weights[:num_heads] = weights.vector(f"{name}.q_norm", dim)
        head_weights[num_heads : num_heads + num_kv] = weights.vector(f"{name}.k_norm", dim)
        heads = self.graph.node("Mul", [heads, self.graph.constant(head_weights)])
        heads = self.graph.reshape(heads, [1, -1, (num_heads + 2 * num_kv) * dim])
        values = [self._new_rows(value_name(index, head), dim) for head in range(num_kv)]
        unrotated = self.graph.fresh("queries_and_keys")
        self.graph.split(heads, [(num_heads + num_kv) * dim] + [dim] * num_kv, [unrotated, *values])
        keys = [self._new_rows(key_name(index, head), dim) for head in range(num_kv)]
        queries = [self.graph.fresh("queries") for _ in range(num_kv)]
        rotated = self._rotate(unrotated, rotation)
        self.graph.split(rotated, [num_heads // num_kv * dim] * num_kv + [dim] * num_kv, [*queries, *keys])
        return queries

    def _new_rows(self, name: str, head_dim: int) -> str:
        return self.graph.output(name, np.float32, [1, "num_tokens", head_dim])

    def _query(self, index: int, normed: str, rotation: Rotation) -> list[str]:
        """Projects q alone, for a layer that reads another layer's KV; shapes as `_query_and_new_rows` returns."""
        layer, num_heads = self.weights.stack.layers[index], self.weights.stack.num_heads
        dim = layer.head_dim
        q = self.graph.reshape(self.multiply(normed, self.weights.query(index)), [1, -1, num_heads, dim])
        q = self.rms_norm(q, self.weights.vector(f"layers.{index}.self_attn.q_norm", dim))
        q = self._rotate(self.graph.reshape(q, [1, -1, num_heads * dim]), rotation)
        return self.graph.split(q, [num_heads // layer.num_kv_heads * dim] * layer.num_kv_heads)

    def _rotate(self, heads: str, rotation: Rotation) -> str:
        """Applies a rotation to heads [1, num_tokens, num_heads * head_dim]."""
        first_row = self.graph.constant(np.zeros(1, np.int64))
        return self.graph.node("RotaryEmbedding", [heads, first_row, rotation.cos, rotation.sin], domain=MICROSOFT)

    def _attend(self, layer: LayerConfig, queries: Sequence[str], mask: str | None) -> str:
        """Attention of each KV head's queries over its rows -> [num_tokens, num_heads * head_dim].

        Args:
            mask: additive, [num_tokens * heads per KV head, num_keys]; None where every row is visible
        """
        width = self.weights.stack.num_heads // layer.num_kv_heads * layer.head_dim
        outputs = []
        for head, query in enumerate(queries):
            rows = self.graph.reshape(query, [-1, layer.head_dim])
            keys, values = key_view_name(layer.kv_source, head), value_view_name(layer.kv_source, head)
            scores = self.graph.node("FusedMatMul", [rows, keys], domain=MICROSOFT, transB=1)
            if mask is not None:
                scores = self.graph.node("Add", [scores, mask])
            weights = self.graph.node("Softmax", [scores], axis=-1)
            outputs.append(self.graph.reshape(self.graph.node("MatMul", [weights, values]), [-1, width]))
        return outputs[0] if len(outputs) == 1 else self.graph.node("Concat", outputs, axis=-1)
