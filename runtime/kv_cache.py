"""Keys and values of the layers that own them, in plain memory that sessions write and read in place.

Each KV head of a layer has one array of rows for keys and one for values. Every array is reserved for its last row at
once and never moves: full layers' for the whole context, sliding layers' for a window, compacted when they run full.
The system provides a page when its first row is written, so memory follows the tokens. Knows nothing of sessions and
of what a row holds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.errors import RequestError
from runtime.kv_rows import KVDtype, Rows, row_bytes
from runtime.model_config import AttentionKind, ModelConfig
from runtime.reserved_memory import ReservedMemory, whole_pages
from runtime.signature import kv_view_names

KEPT_TOKENS = 512  # whose rows `clear` keeps, so that short conversations do not fetch the same pages again and again


class Span(NamedTuple):
    """Rows [start, stop) of the arrays of one kind, and the position of row `start`."""

    start: int
    stop: int
    position: int


@dataclass(slots=True)
class _Kind:
    """Arrays of one attention kind; row 0 holds the token at `first_position`, rows [0, num_written) have memory."""

    capacity: int
    arrays: dict[str, Rows] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)  # of the arrays in the reserved memory
    first_position: int = 0
    num_written: int = 0


class KVCache:
    """KV rows of the tokens at positions [0, num_tokens).

    Laws: append then trim equals never appended; cleared equals new; `nbytes` follows the tokens, not `max_tokens`.
    """

    def __init__(self, model: ModelConfig, kv_dtype: KVDtype, *, max_tokens: int, max_new_tokens: int) -> None:
        """An empty cache.

        Args:
            max_tokens: positions it may ever hold, for which addresses are reserved
            max_new_tokens: the most tokens one forward appends

        Raises:
            MemoryBudgetError: the system does not grant the addresses.
        """
        self.kv_dtype = kv_dtype
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._num_trimmable = 0  # rows of earlier appends may be gone from the sliding arrays
        # the drafter sees one row more than the window
        self._kept_tokens = model.sliding_window + 1
        self._window = model.sliding_window
        self._kinds: dict[AttentionKind, _Kind] = {
            "full": _Kind(max_tokens),
            "sliding": _Kind(min(self._kept_tokens + max_new_tokens, max_tokens)),
        }
        self._memory = self._reserve(model)

    def _reserve(self, model: ModelConfig) -> ReservedMemory:
        """Lays the arrays out one behind the other, each from a page's begin on."""
        shapes, end = {}, 0
        for index in model.owned_layers:
            layer = model.layers[index]
            kind = self._kinds[layer.kind]
            for name in kv_view_names(index, layer):
                kind.places[name] = end
                shapes[name] = kind.capacity, row_bytes(layer.head_dim, self.kv_dtype)
                end += whole_pages(math.prod(shapes[name]))
        memory = ReservedMemory(end)
        for kind in self._kinds.values():
            for name, place in kind.places.items():
                kind.arrays[name] = memory.array[place : place + math.prod(shapes[name])].reshape(shapes[name])
        return memory

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that rows written so far occupy."""
        return sum(
            whole_pages(kind.num_written * array.shape[1])
            for kind in self._kinds.values()
            for array in kind.arrays.values()
        )

    def arrays(self) -> Iterator[tuple[AttentionKind, str, Rows]]:
        """(kind, graph input name, rows as bytes) of each KV head's keys and values; the same memory at any time."""
        for name, kind in self._kinds.items():
            for view_name, array in kind.arrays.items():
                yield name, view_name, array

    def make_room(self, num_new: int) -> None:
        """Prepares rows for `num_new` tokens; RequestError where the context would be exceeded."""
        needed = self.num_tokens + num_new
        if needed > self.max_tokens:
            raise RequestError(f"context: {needed:,} tokens are needed, {self.max_tokens:,} fit; shorten the prompt")
        sliding = self._kinds["sliding"]
        if needed - sliding.first_position > sliding.capacity:
            self._compact(sliding)
        for kind in self._kinds.values():
            kind.num_written = max(kind.num_written, needed - kind.first_position)

    def append(self, num_new: int) -> None:
        """Declares the rows behind the last token as valid."""
        self.num_tokens += num_new
        self._num_trimmable = num_new

    def trim(self, num_tokens: int) -> None:
        """Forgets the last `num_tokens` tokens; at most those of the last append."""
        assert 0 <= num_tokens <= self._num_trimmable
        self.num_tokens -= num_tokens
        self._num_trimmable -= num_tokens

    def clear(self) -> None:
        """Forgets every token, and gives back the memory of full layers' rows but for the first `KEPT_TOKENS`."""
        self.num_tokens = self._num_trimmable = 0
        self._kinds["sliding"].first_position = 0
        full = self._kinds["full"]
        num_kept = min(full.num_written, KEPT_TOKENS)
        for name, array in full.arrays.items():
            kept, written = (whole_pages(num_rows * array.shape[1]) for num_rows in (num_kept, full.num_written))
            self._memory.release(full.places[name] + kept, full.places[name] + written)
        full.num_written = num_kept

    def append_span(self, kind: AttentionKind, num_new: int) -> Span:
        """Rows that a forward of `num_new` tokens may see, its own included."""
        return self._span(kind, self.num_tokens + num_new, self.num_tokens - self._window + 1)

    def draft_span(self, kind: AttentionKind) -> Span:
        """Rows that the drafter sees: all of a full layer, window + 1 of a sliding one."""
        return self._span(kind, self.num_tokens, self.num_tokens - self._kept_tokens)

    def new_row(self, kind: AttentionKind) -> int:
        """Row of the next token."""
        return self.num_tokens - self._kinds[kind].first_position

    def _span(self, kind: AttentionKind, stop: int, earliest: int) -> Span:
        first = self._kinds[kind].first_position
        position = 0 if kind == "full" else max(earliest, first)
        return Span(position - first, stop - first, position)

    def _compact(self, kind: _Kind) -> None:
        """Moves the rows that may still be seen to the front."""
        first = max(0, self.num_tokens - self._kept_tokens)
        shift, num_rows = first - kind.first_position, self.num_tokens - first
        for array in kind.arrays.values():
            array[:num_rows] = array[shift : shift + num_rows]
        kind.first_position = first


def full_bytes_per_token(model: ModelConfig, kv_dtype: KVDtype) -> int:
    """Bytes that each token adds to the full layers' arrays."""
    return _row_bytes(model, kv_dtype, "full")


def sliding_bytes(model: ModelConfig, kv_dtype: KVDtype, max_new_tokens: int, context_tokens: int) -> int:
    """Bytes of the sliding layers' arrays once the context, or else the window with its new rows, has filled them."""
    return _row_bytes(model, kv_dtype, "sliding") * min(model.sliding_window + 1 + max_new_tokens, context_tokens)


def _row_bytes(model: ModelConfig, kv_dtype: KVDtype, kind: AttentionKind) -> int:
    owners = (model.layers[layer] for layer in model.owned_layers)
    return sum(2 * layer.num_kv_heads * row_bytes(layer.head_dim, kv_dtype) for layer in owners if layer.kind == kind)
