"""The target model: embeds tokens, runs decoder.onnx over the KV cache, returns logits and hidden states."""

from collections.abc import Sequence

import onnxruntime as ort

from runtime.decoder import Forward as Forward
from runtime.decoder import make_decoder
from runtime.kv_cache import KVCache
from runtime.layout import Layout
from runtime.memory import release_free_memory
from runtime.model_config import ModelConfig
from runtime.prefix import Parked, ParkedRows, Reuse, num_common, park, reuse_rows
from runtime.session import new_run_options
from runtime.tables import RowTable

RELEASING_TOKENS = 64  # of a forward whose activations are worth giving back: 13 MiB in E2B, in 1 ms


class TargetModel:
    """A session over decoder.onnx with its KV cache and mapped tables; `layout` is the graph's."""

    def __init__(
        self,
        session: ort.InferenceSession,
        model: ModelConfig,
        cache: KVCache,
        token_table: RowTable,
        ple_table: RowTable,
        layout: Layout = "portable",
    ) -> None:
        self.model = model
        self.cache = cache
        self.token_table = token_table
        self.ple_table = ple_table
        self.layout = layout
        self.run_options = new_run_options()
        self.parked = ParkedRows()
        self._token_ids: list[int] = []  # whose rows are cached, where all went through `forward`
        self._decoder = make_decoder(layout, session, model, cache)

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV rows are cached."""
        return self.cache.num_tokens

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        """Appends tokens to the cache and computes the last `num_kept` of them to the end.

        Raises:
            InferenceError: the session failed; the cache is as before.
        """
        self.cache.make_room(len(token_ids))
        inputs_embeds, per_layer_inputs = self.token_table.rows(token_ids), self.ple_table.rows(token_ids)
        forward = self._decoder.run(inputs_embeds, per_layer_inputs, num_kept, self.run_options)
        self.cache.append(len(token_ids))
        self._token_ids += token_ids
        if len(token_ids) >= RELEASING_TOKENS:
            del inputs_embeds, per_layer_inputs
            release_free_memory()
        return forward

    def trim(self, num_tokens: int) -> None:
        """Forgets the last tokens, as after rejected drafts."""
        del self._token_ids[max(len(self._token_ids) - num_tokens, 0) :]
        self.cache.trim(num_tokens)

    def clear(self) -> None:
        """Forgets every token."""
        self._token_ids.clear()
        self.cache.clear()

    def reuse(self, token_ids: Sequence[int]) -> Reuse:
        """Makes the cache hold as many of the first of `token_ids` as is known of them, all but the last at most."""
        reuse = reuse_rows(self.cache, self._known_ids(), self.parked, token_ids)
        self._token_ids = list(token_ids[: reuse.num_tokens])
        return reuse

    def rows_of(self, token_ids: Sequence[int]) -> Parked:
        """Rows of as many of the first of `token_ids` as are known, cached or parked; the next forward changes them."""
        kept = self.cache.kept_tokens
        live = self.cache.snapshot(num_common(self._known_ids(), token_ids), is_copy=False)
        parked = [entry.snapshot.cut(num_common(entry.token_ids, token_ids), kept) for entry in self.parked.entries]
        best = max([live, *parked], key=lambda snapshot: snapshot.num_tokens)
        return Parked(list(token_ids[: best.num_tokens]), best)

    def give_way(self) -> None:
        """Empties the cache; its rows are parked, if there is room."""
        if self._known_ids():
            park(self.cache, self._token_ids, self.parked)
        self.clear()

    def adopt(self, rows: Parked) -> None:
        """Makes the cache hold rows that were there before."""
        self._token_ids = rows.token_ids[: self.cache.restore(rows.snapshot, len(rows.token_ids))]

    def _known_ids(self) -> list[int]:
        """Tokens whose rows are cached; none where others than `forward` put rows there."""
        if len(self._token_ids) != self.cache.num_tokens:
            self.clear()
        return self._token_ids
