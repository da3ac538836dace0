"""Keys and values of the layers that own them, in plain memory that sessions write and read in place.

Each KV head of a layer has one array [capacity, head_dim] for keys and one for values. Full layers' arrays grow in
steps; sliding layers' hold a window and are compacted when they run full. The layout decides the arrays' type. Knows
nothing of sessions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.errors import RequestError
from runtime.layout import Layout
from runtime.model_config import AttentionKind, ModelConfig
from runtime.signature import KV_DTYPES, kv_view_names

GROWTH_TOKENS = 512

Rows = npt.NDArray[np.floating[Any]]


class Span(NamedTuple):
    """Rows [start, stop) of the arrays of one kind, and the position of row `start`."""

    start: int
    stop: int
    position: int


@dataclass(slots=True)
class _Kind:
    """Arrays of one attention kind; row 0 holds the token at `first_position`."""

    arrays: dict[str, Rows]
    capacity: int
    first_position: int = 0


class KVCache:
    """KV rows of the tokens at positions [0, num_tokens).

    Laws: append then trim equals never appended; `nbytes` is the sum of the arrays.
    """

    def __init__(self, model: ModelConfig, layout: Layout, *, max_tokens: int, max_new_tokens: int) -> None:
        """An empty cache.

        Args:
            layout: of the graphs that read and write it
            max_tokens: positions it may ever hold
            max_new_tokens: the most tokens one forward appends
        """
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.arrays_version = 0  # another one whenever `arrays` yields other memory
        self._num_trimmable = 0  # rows of earlier appends may be gone from the sliding arrays
        # the drafter sees one row more than the window
        self._kept_tokens = model.sliding_window + 1
        sliding_capacity = self._kept_tokens + max_new_tokens
        self._kinds: dict[AttentionKind, _Kind] = {
            "full": _Kind(_arrays(model, layout, "full", 0), 0),
            "sliding": _Kind(_arrays(model, layout, "sliding", sliding_capacity), sliding_capacity),
        }
        self._window = model.sliding_window

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for kind in self._kinds.values() for array in kind.arrays.values())

    def arrays(self) -> Iterator[tuple[AttentionKind, str, Rows]]:
        """(kind, graph input name, array) of each KV head's keys and values."""
        for name, kind in self._kinds.items():
            for view_name, array in kind.arrays.items():
                yield name, view_name, array

    def make_room(self, num_new: int) -> None:
        """Prepares rows for `num_new` tokens; RequestError where the context would be exceeded."""
        needed = self.num_tokens + num_new
        if needed > self.max_tokens:
            raise RequestError(f"context: {needed:,} tokens are needed, {self.max_tokens:,} fit; shorten the prompt")
        self._grow_full(needed)
        sliding = self._kinds["sliding"]
        if needed - sliding.first_position > sliding.capacity:
            self._compact(sliding)

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
        """Forgets every token and keeps the memory."""
        self.num_tokens = self._num_trimmable = 0
        for kind in self._kinds.values():
            kind.first_position = 0

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

    def _grow_full(self, needed: int) -> None:
        full = self._kinds["full"]
        if needed <= full.capacity:
            return
        self.arrays_version += 1
        full.capacity = min(self.max_tokens, -(-needed // GROWTH_TOKENS) * GROWTH_TOKENS)
        for name, old in full.arrays.items():
            grown = np.empty((full.capacity, old.shape[1]), old.dtype)
            grown[: self.num_tokens] = old[: self.num_tokens]
            full.arrays[name] = grown

    def _compact(self, kind: _Kind) -> None:
        """Moves the rows that may still be seen to the front."""
        first = max(0, self.num_tokens - self._kept_tokens)
        shift, num_rows = first - kind.first_position, self.num_tokens - first
        for array in kind.arrays.values():
            array[:num_rows] = array[shift : shift + num_rows]
        kind.first_position = first


def _arrays(model: ModelConfig, layout: Layout, kind: AttentionKind, capacity: int) -> dict[str, Rows]:
    return {
        name: np.empty((capacity, model.layers[layer].head_dim), KV_DTYPES[layout])
        for layer in model.owned_layers
        if model.layers[layer].kind == kind
        for name in kv_view_names(layer, model.layers[layer])
    }


def full_bytes_per_token(model: ModelConfig, layout: Layout) -> int:
    """Bytes that each token adds to the full layers' arrays."""
    return _row_bytes(model, layout, "full")


def sliding_bytes(model: ModelConfig, layout: Layout, max_new_tokens: int) -> int:
    """Bytes of the sliding layers' arrays, whatever the context."""
    return _row_bytes(model, layout, "sliding") * (model.sliding_window + 1 + max_new_tokens)


def _row_bytes(model: ModelConfig, layout: Layout, kind: AttentionKind) -> int:
    owners = (model.layers[layer] for layer in model.owned_layers)
    num_values = sum(2 * layer.num_kv_heads * layer.head_dim for layer in owners if layer.kind == kind)
    return num_values * KV_DTYPES[layout].itemsize
