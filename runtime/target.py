"""The target model: embeds tokens, runs decoder.onnx over the KV cache, returns logits and hidden states."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from runtime.kv_cache import KVCache, Span
from runtime.model_config import AttentionKind, ModelConfig
from runtime.session import Binding, float_buffer
from runtime.tables import RowTable

MASKED = np.float32(-1e30)

Float32 = npt.NDArray[np.float32]


class Forward(NamedTuple):
    """Results of the last `num_kept` tokens of a forward; views into buffers that the next forward overwrites."""

    logits: Float32  # [num_kept, vocab_size]
    hidden: Float32  # [num_kept, hidden_size], after the final norm
    # the best candidates, [num_kept, num_candidates] by value descending, then id ascending, NaN in a row with a NaN;
    # None where the graph does not give them
    top_logits: Float32 | None = None
    top_ids: npt.NDArray[np.int64] | None = None


class TargetModel:
    """A session over decoder.onnx with its KV cache and mapped tables."""

    def __init__(
        self,
        session: ort.InferenceSession,
        model: ModelConfig,
        cache: KVCache,
        token_table: RowTable,
        ple_table: RowTable,
    ) -> None:
        self.model = model
        self.cache = cache
        self.token_table = token_table
        self.ple_table = ple_table
        self.run_options = ort.RunOptions()
        self._session = session
        self._kinds: list[AttentionKind] = sorted({layer.kind for layer in model.layers})
        self._logits = float_buffer(0, model.vocab_size)
        self._hidden = float_buffer(0, model.hidden_size)

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV rows are cached."""
        return self.cache.num_tokens

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        """Appends tokens to the cache and computes the last `num_kept` of them to the end.

        Raises:
            InferenceError: the session failed; the cache is as before.
        """
        num_new, start = len(token_ids), self.cache.num_tokens
        self.cache.make_room(num_new)
        self._make_output_room(num_kept)
        binding = Binding(self._session)
        binding.input("inputs_embeds", self.token_table.rows(token_ids))
        binding.input("per_layer_inputs", self.ple_table.rows(token_ids))
        binding.input("position_ids", np.arange(start, start + num_new, dtype=np.int64))
        binding.input("num_kept", np.array([num_kept], np.int64))
        self._bind_cache(binding, num_new)
        logits, hidden = self._logits[:num_kept], self._hidden[:num_kept]
        binding.output("logits", logits)
        binding.output("hidden", hidden)
        binding.run(self.run_options)
        self.cache.append(num_new)
        return Forward(logits, hidden)

    def trim(self, num_tokens: int) -> None:
        """Forgets the last tokens, as after rejected drafts."""
        self.cache.trim(num_tokens)

    def _make_output_room(self, num_kept: int) -> None:
        if num_kept > len(self._logits):
            self._logits = float_buffer(num_kept, self.model.vocab_size)
            self._hidden = float_buffer(num_kept, self.model.hidden_size)

    def _bind_cache(self, binding: Binding, num_new: int) -> None:
        """Masks, views of all rows a token may see, and the place of the new ones."""
        spans = {kind: self.cache.append_span(kind, num_new) for kind in self._kinds}
        for kind, span in spans.items():
            window = self.model.sliding_window if kind == "sliding" else None
            binding.input(f"{kind}_mask", attention_mask(span, self.cache.num_tokens, num_new, window))
        for kind, name, array in self.cache.arrays():
            span, row = spans[kind], self.cache.new_row(kind)
            new_rows = array[row : row + num_new]
            binding.input(name, array[span.start : span.stop])
            binding.output(f"new_{name}", new_rows, (1, *new_rows.shape))


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
