"""drafter.onnx: one step of the MTP drafter, from (token row, hidden state) to candidate tokens.

Query-only layers over the target's KV, no mask: the runtime passes exactly the rows a step may see. With ordered
embeddings only the rows of the best centroids are scored; the output table is stored centroid by centroid, so that a
centroid's tokens are one row.

Source: transformers 5.22 `models/gemma4_assistant/modeling_gemma4_assistant.py`.
"""

from dataclasses import dataclass, replace

import numpy as np

from export.checkpoint import Checkpoint, Indices
from export.errors import CheckpointError
from export.linear import TensorRows
from export.stack import Emitter, StackWeights, Weight, attention_and_mlp, finish_layer
from runtime.model_config import DrafterConfig

TABLE = "model.embed_tokens.weight"
TOKEN_ORDERING = "masked_embedding.token_ordering"


@dataclass(slots=True)
class DrafterGraph:
    """Emits the drafter; the emitter's prefix is that of its text model."""

    emitter: Emitter
    drafter: DrafterConfig

    def emit(self) -> None:
        """Appends everything between the graph's inputs and its outputs."""
        graph, drafter = self.emitter.graph, self.drafter
        backbone, size = drafter.backbone_hidden_size, drafter.hidden_size
        graph.input("inputs_embeds", np.float32, [1, 2 * backbone])
        graph.input("position_ids", np.int64, [1])
        self.emitter.declare_cache({layer.kv_source: layer for layer in drafter.layers}, window=0)
        pre = self._outer.linear("pre_projection", [("pre_projection", size)], 2 * backbone)
        hidden = self._layers(self.emitter.multiply("inputs_embeds", pre))
        graph.output("projected_state", np.float32, [1, backbone])
        post = self._outer.linear("post_projection", [("post_projection", backbone)], size)
        graph.node("Identity", [self.emitter.multiply(hidden, post)], outputs=["projected_state"])
        logits = self._centroid_head(hidden) if drafter.num_centroids else self._dense_head(hidden)
        graph.output("candidate_logits", np.float32, [drafter.num_candidates])
        graph.node("Reshape", [logits, graph.constant(np.array([-1]))], outputs=["candidate_logits"])

    @property
    def _outer(self) -> StackWeights:
        """Tensors around the text model."""
        return replace(self.emitter.weights, prefix="")

    def _layers(self, residual: str) -> str:
        """The stack on the projected input [1, hidden_size]; returns the final norm's output."""
        emitter = self.emitter
        tokens = emitter.tokens("position_ids", window=0)
        normed = emitter.rms_norm(residual, emitter.weights.norm("layers.0.input_layernorm"))
        for index in range(len(self.drafter.layers)):
            output, residual = attention_and_mlp(emitter, index, normed, residual, tokens, owns_kv=False)
            normed, residual = finish_layer(emitter, index, output, "post_feedforward_layernorm", residual)
        return normed

    def _dense_head(self, hidden: str) -> str:
        rows = (TensorRows(TABLE, 0, self.drafter.vocab_size),)
        table = self._outer.matrix("embed_tokens", rows, self.drafter.hidden_size)
        return self.emitter.multiply(hidden, table)

    def _centroid_head(self, hidden: str) -> str:
        graph, drafter = self.emitter.graph, self.drafter
        name = "masked_embedding.centroids"
        centroids = self._outer.linear(name, [(name, drafter.num_centroids)], drafter.hidden_size)
        scores = graph.reshape(self.emitter.multiply(hidden, centroids), [-1])
        best = graph.fresh("centroids")
        num_active = graph.constant(np.array([drafter.num_active_centroids]))
        graph.node("TopK", [scores, num_active], outputs=[graph.fresh("scores"), best], axis=-1, sorted=0)
        ordering = token_ordering(self._outer.checkpoint, drafter)
        graph.output("candidate_ids", np.int64, [drafter.num_candidates])
        table = graph.external("token_ordering", self._outer.table("token_ordering", ordering))
        ids = graph.node("Gather", [table, best], axis=0)
        graph.node("Reshape", [ids, graph.constant(np.array([-1]))], outputs=["candidate_ids"])
        return self.emitter.multiply_groups(hidden, self._ordered_rows(ordering), best, drafter.num_centroids)

    def _ordered_rows(self, ordering: Indices) -> Weight:
        """The output table, centroid by centroid."""
        drafter = self.drafter
        rows = (TensorRows(TABLE, 0, drafter.vocab_size),)
        return self._outer.matrix("embed_tokens", rows, drafter.hidden_size, ordering.ravel())


def token_ordering(checkpoint: Checkpoint, drafter: DrafterConfig) -> Indices:
    """Token ids int64 [num_centroids, tokens per centroid]; CheckpointError unless each id occurs once."""
    ordering = checkpoint.indices(TOKEN_ORDERING, drafter.vocab_size)
    if not np.array_equal(np.sort(ordering), np.arange(drafter.vocab_size)):
        raise CheckpointError(f"{checkpoint.place(TOKEN_ORDERING)} is no permutation of {drafter.vocab_size} tokens")
    return ordering.reshape(drafter.num_centroids, -1)
