"""Runs decoder.onnx over the KV cache, in either layout: what is bound to it, and when it is bound anew.

The portable graph gets masks and views that change with every forward. The native graph gets whole arrays, so that a
binding serves every forward of as many tokens: only what the memory holds changes.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from profiles import MAX_DRAFT_TOKENS
from runtime.kv_cache import KVCache, Span
from runtime.layout import Layout
from runtime.model_config import AttentionKind, ModelConfig
from runtime.session import Binding, float_buffer
from runtime.signature import mask_name, num_top_logits, rows_name

MASKED = np.float32(-1e30)
LARGEST_STEP = MAX_DRAFT_TOKENS + 1  # tokens of a forward that is not a prefill's

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


class Forward(NamedTuple):
    """Results of the last `num_kept` tokens of a forward; views into buffers that the next forward overwrites."""

    logits: Float32  # [num_kept, vocab_size]
    hidden: Float32  # [num_kept, hidden_size], after the final norm
    top_logits: Float32 | None = None  # [num_kept, num_top_logits], the largest first; None in the portable layout
    top_ids: Int64 | None = None  # their token ids; of equal logits the lower id comes first


class Decoder(Protocol):
    """decoder.onnx in one layout."""

    def run(self, inputs_embeds: Float32, per_layer_inputs: Float32, num_kept: int, options: ort.RunOptions) -> Forward:
        """Computes tokens behind the cached ones; the cache has room for their rows, which it is yet to count."""
        ...


def make_decoder(layout: Layout, session: ort.InferenceSession, model: ModelConfig, cache: KVCache) -> Decoder:
    """The decoder of an artifact's layout."""
    kind = NativeDecoder if layout == "native" else PortableDecoder
    return kind(session, model, cache)


class PortableDecoder:
    """decoder.onnx for stock ONNX Runtime: bound anew for every forward."""

    def __init__(self, session: ort.InferenceSession, model: ModelConfig, cache: KVCache) -> None:
        self._session = session
        self._model = model
        self._cache = cache
        self._kinds = _kinds(model)
        self._logits = float_buffer(0, model.vocab_size)
        self._hidden = float_buffer(0, model.hidden_size)

    def run(self, inputs_embeds: Float32, per_layer_inputs: Float32, num_kept: int, options: ort.RunOptions) -> Forward:
        """Computes tokens behind the cached ones."""
        num_new, start = len(inputs_embeds), self._cache.num_tokens
        self._make_output_room(num_kept)
        binding = Binding(self._session)
        binding.input("inputs_embeds", inputs_embeds)
        binding.input("per_layer_inputs", per_layer_inputs)
        binding.input("position_ids", np.arange(start, start + num_new, dtype=np.int64))
        binding.input("num_kept", np.array([num_kept], np.int64))
        self._bind_cache(binding, num_new)
        forward = Forward(self._logits[:num_kept], self._hidden[:num_kept])
        binding.output("logits", forward.logits)
        binding.output("hidden", forward.hidden)
        binding.run(options)
        return forward

    def _make_output_room(self, num_kept: int) -> None:
        if num_kept > len(self._logits):
            self._logits = float_buffer(num_kept, self._model.vocab_size)
            self._hidden = float_buffer(num_kept, self._model.hidden_size)

    def _bind_cache(self, binding: Binding, num_new: int) -> None:
        """Masks, views of all rows a token may see, and the place of the new ones."""
        spans = {kind: self._cache.append_span(kind, num_new) for kind in self._kinds}
        for kind, span in spans.items():
            window = self._model.sliding_window if kind == "sliding" else None
            binding.input(mask_name(kind), attention_mask(span, self._cache.num_tokens, num_new, window))
        for kind, name, array in self._cache.arrays():
            span, row = spans[kind], self._cache.new_row(kind)
            rows = array.view(np.float32)
            new_rows = rows[row : row + num_new]
            binding.input(name, rows[span.start : span.stop])
            binding.output(f"new_{name}", new_rows, (1, *new_rows.shape))


class _Step(NamedTuple):
    """A binding and the memory that it reads and writes."""

    binding: Binding
    inputs_embeds: Float32
    per_layer_inputs: Float32
    position_ids: Int64
    forward: Forward


class NativeDecoder:
    """decoder.onnx over the native ops: bound once for each number of tokens, new and kept, of a decode step."""

    def __init__(self, session: ort.InferenceSession, model: ModelConfig, cache: KVCache) -> None:
        self._session = session
        self._model = model
        self._cache = cache
        self._inputs_embeds = float_buffer(LARGEST_STEP, model.hidden_size)
        self._per_layer_inputs = float_buffer(LARGEST_STEP, len(model.layers) * model.ple_size)
        self._rows = RowInputs(_kinds(model))
        self._outputs = self._make_outputs(0)
        self._steps: dict[tuple[int, int], _Step] = {}

    def run(self, inputs_embeds: Float32, per_layer_inputs: Float32, num_kept: int, options: ort.RunOptions) -> Forward:
        """Computes tokens behind the cached ones."""
        num_new, start = len(inputs_embeds), self._cache.num_tokens
        self._make_output_room(num_kept)
        if num_new > LARGEST_STEP:
            step = self._bind(inputs_embeds, per_layer_inputs, num_kept)
        else:
            step = self._kept_step(num_new, num_kept)
            step.inputs_embeds[:] = inputs_embeds
            step.per_layer_inputs[:] = per_layer_inputs
        step.position_ids[:] = np.arange(start, start + num_new)
        self._rows.fill(lambda kind: self._cache.append_span(kind, num_new))
        step.binding.run(options)
        return step.forward

    def _make_output_room(self, num_kept: int) -> None:
        """Makes room for the outputs; bindings over other memory are dropped."""
        if num_kept > len(self._outputs.logits):
            self._steps.clear()
            self._outputs = self._make_outputs(num_kept)

    def _make_outputs(self, num_kept: int) -> Forward:
        model, num_top = self._model, num_top_logits(self._model.vocab_size)
        logits, hidden = float_buffer(num_kept, model.vocab_size), float_buffer(num_kept, model.hidden_size)
        return Forward(logits, hidden, float_buffer(num_kept, num_top), np.empty((num_kept, num_top), np.int64))

    def _kept_step(self, num_new: int, num_kept: int) -> _Step:
        step = self._steps.get((num_new, num_kept))
        if step is None:
            step = self._bind(self._inputs_embeds[:num_new], self._per_layer_inputs[:num_new], num_kept)
            self._steps[num_new, num_kept] = step
        return step

    def _bind(self, inputs_embeds: Float32, per_layer_inputs: Float32, num_kept: int) -> _Step:
        binding, position_ids = Binding(self._session), np.empty(len(inputs_embeds), np.int64)
        binding.input("inputs_embeds", inputs_embeds)
        binding.input("per_layer_inputs", per_layer_inputs)
        binding.input("position_ids", position_ids)
        binding.input("num_kept", np.array([num_kept], np.int64))
        self._rows.bind(binding)
        for _, name, array in self._cache.arrays():
            binding.input(name, array)
        outputs = self._outputs
        assert outputs.top_logits is not None and outputs.top_ids is not None
        top_logits, top_ids = outputs.top_logits[:num_kept], outputs.top_ids[:num_kept]
        forward = Forward(outputs.logits[:num_kept], outputs.hidden[:num_kept], top_logits, top_ids)
        binding.output("logits", forward.logits)
        binding.output("hidden", forward.hidden)
        binding.output("top_logits", top_logits)
        binding.output("top_ids", top_ids)
        return _Step(binding, inputs_embeds, per_layer_inputs, position_ids, forward)


class RowInputs:
    """Which rows of the KV arrays the last token sees, as inputs of a native graph; memory of its own."""

    def __init__(self, kinds: list[AttentionKind]) -> None:
        self._rows: dict[AttentionKind, Int64] = {kind: np.zeros(3, np.int64) for kind in kinds}

    def bind(self, binding: Binding) -> None:
        """Binds each kind's rows."""
        for kind, rows in self._rows.items():
            binding.input(rows_name(kind), rows)

    def fill(self, span_of: Callable[[AttentionKind], Span]) -> None:
        """Sets each kind's rows for the next run."""
        for kind, rows in self._rows.items():
            rows[:] = span_of(kind)


def _kinds(model: ModelConfig) -> list[AttentionKind]:
    return sorted({layer.kind for layer in model.layers})


def attention_mask(span: Span, start: int, num_new: int, window: int | None) -> Float32:
    """Additive mask [num_new, rows of the span]: 0 where a token at `start` + i may see a row, else a large negative.

    A token sees itself and earlier ones, in a sliding layer only the last `window` of them.
    """
    mask = np.zeros((num_new, span.stop - span.start), np.float32)
    if num_new == 1:
        return mask  # the span holds exactly the visible rows
    tokens = np.arange(start, start + num_new)[:, None]
    keys = np.arange(span.position, start + num_new)[None, :]
    mask[keys > tokens] = MASKED
    if window is not None:
        mask[keys <= tokens - window] = MASKED
    return mask
