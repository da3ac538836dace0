"""The native layout's nodes: Gemma 4 layers on the ops of the `edge` domain, ten of them for a layer.

Every op computes each token on its own, so that a token's logits do not depend on how many are computed with it.
`CachedAttention` writes new KV rows into its inputs, the whole KV arrays; a layer that reads another layer's rows
depends on that layer's output, so they are written before they are read. Rows are bytes: one graph serves every type.

Source: `runtime/native/`, where the ops are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from export.checkpoint import Float32
from export.errors import CheckpointError
from export.graph import EDGE, Graph
from export.linear import StoredMatrix
from export.stack import Rotation, StackWeights, Tokens, Weight, kept_rotations
from runtime.model_config import LayerConfig
from runtime.signature import kv_view_names, num_top_logits, rows_name

# what `QuantizedMatMul` does behind its product
PLAIN, GELU_GLU, GELU_MUL, SOFTCAP = range(4)


@dataclass(frozen=True, slots=True)
class NativeLayerEmitter:
    """An `export.stack.Emitter` for the native layout; every matrix must be stored in panels."""

    graph: Graph
    weights: StackWeights

    # products

    def multiply(self, x: str, weight: Weight) -> str:
        """x @ weight.T"""
        return self._multiply(x, weight, PLAIN)

    def gelu_glu(self, x: str, weight: Weight) -> str:
        """gelu(x @ gate.T) * (x @ up.T), gate and up stacked in the weight."""
        return self._multiply(x, weight, GELU_GLU)

    def gelu_mul(self, x: str, weight: Weight, other: str) -> str:
        """gelu(x @ weight.T) * other"""
        return self._multiply(x, weight, GELU_MUL, other)

    def multiply_groups(self, x: str, weight: Weight, groups: str, num_groups: int) -> str:
        """One token times each row of chosen groups, of the weight's `num_groups` equal ones; of any shape."""
        group_size = weight.stored.num_rows // num_groups
        inputs = [x, self._panels(weight), groups]
        return self.graph.node("SelectedMatMul", inputs, domain=EDGE, group_size=group_size, **_sizes(weight.stored))

    def logits(self, hidden: str, lm_head: StoredMatrix, softcap: float | None) -> None:
        """Appends the outputs `logits`, `top_logits` and `top_ids`."""
        graph, num_top = self.graph, num_top_logits(lm_head.num_rows)
        graph.output("logits", np.float32, ["num_kept", lm_head.num_rows])
        epilogue = PLAIN if softcap is None else SOFTCAP
        self._multiply(hidden, Weight("lm_head", lm_head), epilogue, softcap=softcap or 0.0, name="logits")
        graph.output("top_logits", np.float32, ["num_kept", num_top])
        graph.output("top_ids", np.int64, ["num_kept", num_top])
        graph.node("TopLogits", ["logits"], outputs=["top_logits", "top_ids"], domain=EDGE, k=num_top)

    def _multiply(
        self, x: str, weight: Weight, epilogue: int, *others: str, softcap: float = 0.0, name: str | None = None
    ) -> str:
        return self.graph.node(
            "QuantizedMatMul",
            [x, self._panels(weight), *others],
            outputs=[name] if name else None,
            domain=EDGE,
            epilogue=epilogue,
            softcap=float(softcap),
            **_sizes(weight.stored),
        )

    def _panels(self, weight: Weight) -> str:
        assert weight.stored.panels is not None, f"{weight.name} is not stored in panels"
        return self.graph.external(f"{weight.name}.panels", weight.stored.panels)

    # norms

    def rms_norm(self, x: str, weight: Float32) -> str:
        """RMSNorm over the last axis."""
        epsilon = self.weights.stack.rms_norm_eps
        return self.graph.node(
            "SimplifiedLayerNormalization", [x, self.graph.constant(weight)], axis=-1, epsilon=epsilon, stash_type=1
        )

    def norm_add(
        self, x: str, weight: Float32, residual: str, *, scale: float = 1.0, epsilon: float | None = None
    ) -> str:
        """scale * (residual + RMSNorm(x))"""
        total = self.graph.fresh("total")
        epsilon = self.weights.stack.rms_norm_eps if epsilon is None else epsilon
        self._norm_add([x, self.graph.constant(weight), residual], [total], scale, epsilon)
        return total

    def norm_add_norm(
        self, x: str, weight: Float32, residual: str, next_weight: Float32, *, scale: float = 1.0, is_last: bool = False
    ) -> tuple[str, str]:
        """(RMSNorm(total), total) of total = scale * (residual + RMSNorm(x))."""
        normed, total = self.graph.fresh("normed"), self.graph.fresh("total")
        inputs = [x, self.graph.constant(weight), residual, self.graph.constant(next_weight)]
        self._norm_add(inputs, [total, normed], scale, self.weights.stack.rms_norm_eps)
        return normed, total

    def _norm_add(self, inputs: list[str], outputs: list[str], scale: float, epsilon: float) -> None:
        next_epsilon = self.weights.stack.rms_norm_eps
        self.graph.node(
            "NormAdd", inputs, outputs=outputs, domain=EDGE, epsilon=epsilon, scale=scale, next_epsilon=next_epsilon
        )

    # positions and attention

    def declare_cache(self, sources: Mapping[int, LayerConfig], window: int) -> None:
        """Declares the whole KV arrays of `sources` as inputs, and which rows of each kind the last token may see."""
        for kind in sorted({layer.kind for layer in sources.values()}):
            self.graph.input(rows_name(kind), np.int64, [3])
        for index, layer in sources.items():
            for name in kv_view_names(index, layer):
                self.graph.input(name, np.uint8, [f"{layer.kind}_capacity", f"{layer.kind}_row_bytes"])

    def tokens(self, position_ids: str, window: int) -> Tokens:
        """What attention needs of the tokens at int64 positions [num_tokens]."""
        rotations = {}
        for kind, frequencies in self.weights.frequencies().items():
            rotation = Rotation(self.graph.fresh("cos"), self.graph.fresh("sin"))
            inputs = [position_ids, self.graph.constant(frequencies)]
            self.graph.node("Rotary", inputs, outputs=[rotation.cos, rotation.sin], domain=EDGE)
            rotations[kind] = rotation
        return Tokens(rotations, window, {})

    def kept(self, tokens: Tokens, kept_from: str) -> Tokens:
        """The same of the last tokens; `kept_from` [1] is the negative index of the first."""
        return replace(tokens, rotations=kept_rotations(self.graph, tokens, kept_from))

    def attention(self, index: int, normed: str, tokens: Tokens, *, owns_kv: bool) -> str:
        """Attention of a layer [num_tokens, num_heads * head_dim]; one that owns KV adds the tokens' rows first."""
        weights, layer, name = self.weights, self.weights.stack.layers[index], f"layers.{index}.self_attn"
        heads = self.multiply(normed, weights.query_key_value(index) if owns_kv else weights.query(index))
        norms = [weights.vector(f"{name}.{part}_norm", layer.head_dim) for part in ("qk" if owns_kv else "q")]
        if owns_kv:
            self._check_keys(f"{weights.prefix}{name}.k_norm.weight", norms[1])
        rotation = tokens.rotations[layer.kind]
        cache = [rows_name(layer.kind), *kv_view_names(layer.kv_source, layer)]
        return self.graph.node(
            "CachedAttention",
            [heads, self.graph.constant(np.stack(norms)), rotation.cos, rotation.sin, *cache],
            domain=EDGE,
            num_heads=weights.stack.num_heads,
            num_kv_heads=layer.num_kv_heads,
            window=tokens.window if layer.kind == "sliding" else 0,
            epsilon=weights.stack.rms_norm_eps,
        )

    def _check_keys(self, name: str, weight: Float32) -> None:
        """Raises CheckpointError unless every key fits: infinite ones could be ignored, which no one would notice."""
        # a row's norm is sqrt(head_dim) before the weight, and a rotation keeps that of each pair
        largest = np.sqrt(weight.size) * float(np.abs(weight).max())
        if largest > np.finfo(np.float16).max:
            place = self.weights.checkpoint.place(name)
            raise CheckpointError(
                f"{place}: keys of up to {largest:,.0f} exceed float16; export with --activations float32"
            )


def _sizes(stored: StoredMatrix) -> dict[str, Any]:
    form = stored.form
    return {"K": stored.width, "N": stored.num_rows, "bits": form.bits, "block_size": form.block_size}
