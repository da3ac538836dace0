"""decoder.onnx: the target as one graph over embedded tokens and KV views.

Layers that share KV, the final norm and the logits are computed only for the last `num_kept` tokens.

Source: transformers 5.22 `Gemma4TextModel.forward`, `_maybe_slice_kv_shared_inputs`.
"""

from dataclasses import dataclass

import numpy as np

from export.layers import LAST, LayerEmitter, Rotation
from export.linear import StoredMatrix, TensorRows
from quant.recipe import WeightFormat
from runtime.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the layers need of the tokens they run on: all of them, or the kept ones."""

    rotations: dict[str, Rotation]
    masks: dict[str, dict[int, str]]  # by kind and by query heads for each KV head


@dataclass(slots=True)
class DecoderGraph:
    """Emits the target; `ple_form` stores the PLE projections."""

    emitter: LayerEmitter
    model: ModelConfig
    ple_form: WeightFormat

    def emit(self, lm_head: StoredMatrix) -> None:
        """Appends everything between the graph's inputs and its outputs."""
        graph = self.emitter.graph
        embeds = self._declare_inputs()
        kept_from = graph.node("Neg", ["num_kept"])
        every = _Rows(self.emitter.rotations("position_ids"), self._masks(None))
        kept = self._kept_rows(every, kept_from)
        first_shared = self.model.num_owned_layers
        ple = self._per_layer_inputs(embeds, kept_from)
        residual: str | None = embeds
        normed = self.emitter.rms_norm(embeds, self.emitter.vector("layers.0.input_layernorm", self.model.hidden_size))
        for index in range(len(self.model.layers)):
            assert residual is not None
            if index == first_shared:
                normed, residual = self._last_rows(normed, kept_from), self._last_rows(residual, kept_from)
            rows = every if index < first_shared else kept
            normed, residual = self._layer(index, normed, residual, ple[index], rows)
        if first_shared == len(self.model.layers):
            normed = self._last_rows(normed, kept_from)
        self._outputs(normed, lm_head)

    def _declare_inputs(self) -> str:
        graph, model = self.emitter.graph, self.model
        embeds = graph.input("inputs_embeds", np.float32, ["num_tokens", model.hidden_size])
        graph.input("per_layer_inputs", np.float32, ["num_tokens", len(model.layers) * model.ple_size])
        graph.input("position_ids", np.int64, ["num_tokens"])
        graph.input("num_kept", np.int64, [1])
        for kind in sorted({layer.kind for layer in model.layers}):
            graph.input(f"{kind}_mask", np.float32, ["num_tokens", f"num_{kind}_keys"])
        for index in model.owned_layers:
            self.emitter.kv_views(index, model.layers[index])
        return embeds

    def _last_rows(self, value: str, kept_from: str) -> str:
        graph = self.emitter.graph
        end, axis = graph.constant(np.array([LAST])), graph.constant(np.array([0]))
        return graph.node("Slice", [value, kept_from, end, axis])

    def _masks(self, kept_from: str | None) -> dict[str, dict[int, str]]:
        """Each kind's mask with its rows repeated for the query heads that share a KV head."""
        masks: dict[str, dict[int, str]] = {}
        for layer in self.model.layers:
            repeats = self.model.num_heads // layer.num_kv_heads
            by_repeats = masks.setdefault(layer.kind, {})
            if repeats not in by_repeats:
                mask = f"{layer.kind}_mask"
                mask = mask if kept_from is None else self._last_rows(mask, kept_from)
                by_repeats[repeats] = self._repeat_rows(mask, repeats)
        return masks

    def _repeat_rows(self, mask: str, repeats: int) -> str:
        graph = self.emitter.graph
        if repeats == 1:
            return mask
        apart = graph.node("Unsqueeze", [mask, graph.constant(np.array([1]))])
        zeros = graph.constant(np.zeros((1, repeats, 1), np.float32))
        return graph.node("Flatten", [graph.node("Add", [apart, zeros])], axis=2)

    def _kept_rows(self, every: _Rows, kept_from: str) -> _Rows:
        if self.model.num_owned_layers == len(self.model.layers):
            return every
        rotations = {
            kind: Rotation(self._last_rows(rotation.cos, kept_from), self._last_rows(rotation.sin, kept_from))
            for kind, rotation in every.rotations.items()
        }
        return _Rows(rotations, self._masks(kept_from))

    def _per_layer_inputs(self, embeds: str, kept_from: str) -> list[str]:
        """PLE of each layer [num_tokens, ple_size]: (token part + projected context) / sqrt(2)."""
        graph, model = self.emitter.graph, self.model
        num_owned, num_layers, size = model.num_owned_layers, len(model.layers), model.ple_size
        if num_owned == num_layers:
            return self._project_ple(embeds, "per_layer_inputs", 0, num_layers)
        lower, upper = graph.split("per_layer_inputs", [num_owned * size, (num_layers - num_owned) * size])
        kept_embeds, kept_upper = self._last_rows(embeds, kept_from), self._last_rows(upper, kept_from)
        return [
            *self._project_ple(embeds, lower, 0, num_owned),
            *self._project_ple(kept_embeds, kept_upper, num_owned, num_layers),
        ]

    def _project_ple(self, embeds: str, token_part: str, start: int, stop: int) -> list[str]:
        graph, model, size = self.emitter.graph, self.model, self.model.ple_size
        name, num = "per_layer_model_projection", stop - start
        rows = (TensorRows(f"{self.emitter.prefix}{name}.weight", start * size, stop * size),)
        context = self.emitter.multiply(embeds, f"{name}.{start}", rows, model.hidden_size, self.ple_form)
        # the projection's factor hidden_size^-0.5 goes into the norm's epsilon
        weight = self.emitter.vector("per_layer_projection_norm", size)
        eps = model.rms_norm_eps * model.hidden_size
        context = self.emitter.rms_norm(graph.reshape(context, [-1, num, size]), weight, eps)
        total = graph.node("Add", [graph.reshape(context, [-1, num * size]), token_part])
        total = graph.node("Mul", [total, graph.constant(np.float32(2.0**-0.5))])
        return graph.split(total, [size] * num)

    def _layer(self, index: int, normed: str, residual: str, ple: str, rows: _Rows) -> tuple[str, str | None]:
        layer, emitter = self.model.layers[index], self.emitter
        project = emitter.query_and_new_rows if layer.kv_source == index else emitter.query
        queries = project(index, normed, rows.rotations[layer.kind])
        mask = rows.masks[layer.kind][self.model.num_heads // layer.num_kv_heads]
        output, residual = emitter.after_attention(index, emitter.attend(index, queries, mask), residual)
        hidden = emitter.graph.node("Add", [output, residual])
        return emitter.finish_layer(index, self._ple_update(index, hidden, ple), hidden)

    def _ple_update(self, index: int, hidden: str, ple: str) -> str:
        """post_norm(projection(gelu(gate(hidden)) * ple))."""
        emitter, size, ple_size = self.emitter, self.model.hidden_size, self.model.ple_size
        gate = self._ple_linear(index, "per_layer_input_gate", hidden, ple_size, size)
        gated = emitter.graph.node("Mul", [emitter.gelu(gate), ple])
        update = self._ple_linear(index, "per_layer_projection", gated, size, ple_size)
        return emitter.rms_norm(update, emitter.vector(f"layers.{index}.post_per_layer_input_norm", size))

    def _ple_linear(self, index: int, part: str, x: str, num_rows: int, width: int) -> str:
        name = f"layers.{index}.{part}"
        rows = (TensorRows(f"{self.emitter.prefix}{name}.weight", 0, num_rows),)
        return self.emitter.multiply(x, name, rows, width, self.ple_form)

    def _outputs(self, normed: str, lm_head: StoredMatrix) -> None:
        graph, model = self.emitter.graph, self.model
        graph.output("hidden", np.float32, ["num_kept", model.hidden_size])
        graph.node("Identity", [normed], outputs=["hidden"])
        graph.output("logits", np.float32, ["num_kept", model.vocab_size])
        if model.logit_softcap is None:
            logits = self.emitter.product.emit(graph, normed, lm_head, "lm_head")
            graph.node("Identity", [logits], outputs=["logits"])
            return
        # softcap * tanh(logits / softcap), the division on the smaller side of the product
        cap = graph.constant(np.float32(model.logit_softcap))
        logits = self.emitter.product.emit(graph, graph.node("Div", [normed, cap]), lm_head, "lm_head")
        graph.node("Mul", [graph.node("Tanh", [logits]), cap], outputs=["logits"])
