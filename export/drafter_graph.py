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
from export.graph import MICROSOFT
from export.layers import LayerEmitter
from export.linear import Matrix, TensorRows
from runtime.model_config import DrafterConfig

TABLE = "model.embed_tokens.weight"
TOKEN_ORDERING = "masked_embedding.token_ordering"


@dataclass(slots=True)
class DrafterGraph:
    """Emits the drafter; the emitter's prefix is that of its text model."""

    emitter: LayerEmitter
    drafter: DrafterConfig

    def emit(self) -> None:
        """Appends everything between the graph's inputs and its outputs."""
        graph, drafter = self.emitter.graph, self.drafter
        backbone = drafter.backbone_hidden_size
        graph.input("inputs_embeds", np.float32, [1, 2 * backbone])
        graph.input("position_ids", np.int64, [1])
        for kind in sorted({layer.kind for layer in drafter.layers}):
            layer = next(layer for layer in drafter.layers if layer.kind == kind)
            self.emitter.kv_views(layer.kv_source, layer)
        outer = replace(self.emitter, prefix="")
        state = [("pre_projection", drafter.hidden_size)]
        residual: str | None = outer.linear("inputs_embeds", "pre_projection", state, 2 * backbone)
        assert residual is not None
        hidden = self._layers(residual)
        graph.output("projected_state", np.float32, [1, backbone])
        projected = outer.linear(hidden, "post_projection", [("post_projection", backbone)], drafter.hidden_size)
        graph.node("Identity", [projected], outputs=["projected_state"])
        if drafter.num_centroids:
            self._centroid_head(outer, hidden)
        else:
            self._dense_head(outer, hidden)

    def _layers(self, embedded: str) -> str:
        """The stack on the projected input [1, hidden_size]; returns the final norm's output."""
        emitter = self.emitter
        rotations = emitter.rotations("position_ids")
        residual: str | None = embedded
        normed = emitter.rms_norm(embedded, emitter.vector("layers.0.input_layernorm", self.drafter.hidden_size))
        for index, layer in enumerate(self.drafter.layers):
            assert residual is not None
            queries = emitter.query(index, normed, rotations[layer.kind])
            output, residual = emitter.after_attention(index, emitter.attend(index, queries, None), residual)
            normed, residual = emitter.finish_layer(index, output, residual)
        return normed

    def _dense_head(self, outer: LayerEmitter, hidden: str) -> None:
        graph, drafter = self.emitter.graph, self.drafter
        graph.output("candidate_logits", np.float32, [drafter.vocab_size])
        rows = (TensorRows(TABLE, 0, drafter.vocab_size),)
        logits = outer.multiply(hidden, "lm_head", rows, drafter.hidden_size, outer.form)
        graph.node("Reshape", [logits, graph.constant(np.array([-1]))], outputs=["candidate_logits"])

    def _centroid_head(self, outer: LayerEmitter, hidden: str) -> None:
        graph, drafter = self.emitter.graph, self.drafter
        num_candidates = drafter.num_candidates
        graph.output("candidate_logits", np.float32, [num_candidates])
        graph.output("candidate_ids", np.int64, [num_candidates])
        name = "masked_embedding.centroids"
        scores = outer.linear(hidden, name, [(name, drafter.num_centroids)], drafter.hidden_size)
        best = graph.fresh("centroids")
        num_active = graph.constant(np.array([drafter.num_active_centroids]))
        scores = graph.reshape(scores, [-1])
        graph.node("TopK", [scores, num_active], outputs=[graph.fresh("scores"), best], axis=-1, sorted=0)
        ordering = token_ordering(outer.checkpoint, drafter)
        ids = graph.node("Gather", [self._ordering_table(ordering), best], axis=0)
        graph.node("Reshape", [ids, graph.constant(np.array([-1]))], outputs=["candidate_ids"])
        rows = self._gather_rows(outer, ordering, best)
        logits = graph.node("MatMul", [rows, graph.reshape(hidden, [drafter.hidden_size, 1])])
        graph.node("Reshape", [logits, graph.constant(np.array([-1]))], outputs=["candidate_logits"])

    def _ordering_table(self, ordering: Indices) -> str:
        return self.emitter.graph.external(
            "token_ordering", self.emitter.weights.keep_indices("token_ordering", ordering)
        )

    def _gather_rows(self, outer: LayerEmitter, ordering: Indices, best: str) -> str:
        """Table rows of the chosen centroids' tokens, as floats [num_candidates, hidden_size]."""
        graph, form, size = self.emitter.graph, outer.form, self.drafter.hidden_size
        every_row = (TensorRows(TABLE, 0, self.drafter.vocab_size),)
        matrix = Matrix("embed_tokens", outer.checkpoint, every_row, size, order=ordering.ravel())
        stored = outer.weights.keep(matrix, form)
        rows = graph.external("embed_tokens.weight", stored.rows.folded(self.drafter.num_centroids))
        if stored.scales is None:
            gathered = graph.node("Gather", [rows, best], axis=0)
            gathered = gathered if form.bits == 32 else graph.node("Cast", [gathered], to=1)
            return graph.reshape(gathered, [self.drafter.num_candidates, size])
        scales = graph.external("embed_tokens.scales", stored.scales.folded(self.drafter.num_centroids))
        gathered = graph.node(
            "GatherBlockQuantized",
            [rows, best, graph.node("Cast", [scales], to=1)],
            domain=MICROSOFT,
            bits=form.bits,
            block_size=form.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        padded = graph.reshape(gathered, [self.drafter.num_candidates, -1])
        if size % form.block_size == 0:
            return padded
        start, stop, axis = (graph.constant(np.array([value])) for value in (0, size, 1))
        return graph.node("Slice", [padded, start, stop, axis])


def token_ordering(checkpoint: Checkpoint, drafter: DrafterConfig) -> Indices:
    """Token ids int64 [num_centroids, tokens per centroid]; CheckpointError unless each id occurs once."""
    ordering = checkpoint.indices(TOKEN_ORDERING, drafter.vocab_size)
    if not np.array_equal(np.sort(ordering), np.arange(drafter.vocab_size)):
        raise CheckpointError(f"{checkpoint.place(TOKEN_ORDERING)} is no permutation of {drafter.vocab_size} tokens")
    return ordering.reshape(drafter.num_centroids, -1)
