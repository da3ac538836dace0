"""decoder.onnx: the target as one graph over embedded tokens and KV rows, in whichever layout the emitter has.

Layers that share KV, the final norm and the logits are computed only for the last `num_kept` tokens.

Source: transformers 5.22 `Gemma4TextModel.forward`, `_maybe_slice_kv_shared_inputs`.
"""

from dataclasses import dataclass

import numpy as np

from export.linear import StoredMatrix, TensorRows
from export.stack import Emitter, Tokens, Weight, attention_and_mlp, columns, finish_layer, last_rows
from runtime.model_config import ModelConfig


@dataclass(slots=True)
class DecoderGraph:
    """Emits the target."""

    emitter: Emitter
    model: ModelConfig

    def emit(self, lm_head: StoredMatrix) -> None:
        """Appends everything between the graph's inputs and its outputs."""
        graph, emitter, model = self.emitter.graph, self.emitter, self.model
        residual = self._declare_inputs()
        kept_from = graph.node("Neg", ["num_kept"])
        tokens = emitter.tokens("position_ids", model.sliding_window)
        ple = self._per_layer_inputs(residual, kept_from)
        normed = emitter.rms_norm(residual, emitter.weights.norm("layers.0.input_layernorm"))
        for index in range(len(model.layers)):
            if index == model.num_owned_layers:
                normed, residual = last_rows(graph, normed, kept_from), last_rows(graph, residual, kept_from)
                tokens = emitter.kept(tokens, kept_from)
            normed, residual = self._layer(index, normed, residual, ple[index], tokens)
        if model.num_owned_layers == len(model.layers):
            normed = last_rows(graph, normed, kept_from)
        graph.output("hidden", np.float32, ["num_kept", model.hidden_size])
        graph.node("Identity", [normed], outputs=["hidden"])
        emitter.logits(normed, lm_head, model.logit_softcap)

    def _declare_inputs(self) -> str:
        graph, model = self.emitter.graph, self.model
        embeds = graph.input("inputs_embeds", np.float32, ["num_tokens", model.hidden_size])
        graph.input("per_layer_inputs", np.float32, ["num_tokens", len(model.layers) * model.ple_size])
        graph.input("position_ids", np.int64, ["num_tokens"])
        graph.input("num_kept", np.int64, [1])
        owners = {index: model.layers[index] for index in model.owned_layers}
        self.emitter.declare_cache(owners, model.sliding_window)
        return embeds

    def _per_layer_inputs(self, embeds: str, kept_from: str) -> list[str]:
        """PLE of each layer [num_tokens, ple_size]: (token part + projected context) / sqrt(2)."""
        graph, model = self.emitter.graph, self.model
        num_owned, num_layers, size = model.num_owned_layers, len(model.layers), model.ple_size
        if num_owned == num_layers:
            return self._project_ple(embeds, "per_layer_inputs", 0, num_layers)
        kept_embeds, kept = (last_rows(graph, value, kept_from) for value in (embeds, "per_layer_inputs"))
        lower, upper = columns(graph, "per_layer_inputs", 0, num_owned * size), columns(graph, kept, num_owned * size)
        return [
            *self._project_ple(embeds, lower, 0, num_owned),
            *self._project_ple(kept_embeds, upper, num_owned, num_layers),
        ]

    def _project_ple(self, embeds: str, token_part: str, start: int, stop: int) -> list[str]:
        graph, model, size = self.emitter.graph, self.model, self.model.ple_size
        weights, name = self.emitter.weights, "per_layer_model_projection"
        rows = (TensorRows(f"{weights.prefix}{name}.weight", start * size, stop * size),)
        projection = weights.matrix(f"{name}.{start}", rows, model.hidden_size)
        context = graph.reshape(self.emitter.multiply(embeds, projection), [-1, size])
        # the projection's factor hidden_size^-0.5 goes into the norm's epsilon
        total = self.emitter.norm_add(
            context,
            weights.vector("per_layer_projection_norm", size),
            graph.reshape(token_part, [-1, size]),
            scale=2.0**-0.5,
            epsilon=model.rms_norm_eps * model.hidden_size,
        )
        return graph.split(graph.reshape(total, [-1, (stop - start) * size]), [size] * (stop - start))

    def _layer(self, index: int, normed: str, residual: str, ple: str, tokens: Tokens) -> tuple[str, str]:
        emitter, owns_kv = self.emitter, self.model.layers[index].kv_source == index
        output, residual = attention_and_mlp(emitter, index, normed, residual, tokens, owns_kv=owns_kv)
        post_mlp = emitter.weights.norm(f"layers.{index}.post_feedforward_layernorm")
        hidden = emitter.norm_add(output, post_mlp, residual)
        return finish_layer(emitter, index, self._ple_update(index, hidden, ple), "post_per_layer_input_norm", hidden)

    def _ple_update(self, index: int, hidden: str, ple: str) -> str:
        """projection(gelu(gate(hidden)) * ple), yet to be normed."""
        size, ple_size = self.model.hidden_size, self.model.ple_size
        gate = self._ple_matrix(index, "per_layer_input_gate", ple_size, size)
        projection = self._ple_matrix(index, "per_layer_projection", size, ple_size)
        return self.emitter.multiply(self.emitter.gelu_mul(hidden, gate, ple), projection)

    def _ple_matrix(self, index: int, part: str, num_rows: int, width: int) -> Weight:
        weights, name = self.emitter.weights, f"layers.{index}.{part}"
        rows = (TensorRows(f"{weights.prefix}{name}.weight", 0, num_rows),)
        return weights.matrix(name, rows, width)
