"""Keys and values of the layers that own them, in plain memory that sessions write and read in place.

Each KV head of a layer has one array of rows for keys and one for values. Every array is reserved for its last row at
once and never moves: full layers' for the whole context, sliding layers' for a window, compacted when they run full.
The system provides a page when its first row is written, so memory follows the tokens. Knows nothing of sessions and
of what a row holds.

A cache can be rewound to any earlier token whose window it still holds, or of which it kept a copy: before rows are
dropped that end at a marked token, they are copied.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.errors import RequestError
from runtime.kv_rows import KVDtype, Rows, row_bytes
from runtime.model_config import AttentionKind, ModelConfig
from runtime.reserved_memory import ReservedMemory, whole_pages
from runtime.signature import kv_view_names

MAX_WINDOWS = 3  # copies of windows; the oldest goes
MARK_SLACK = 8  # tokens in front of a mark that its copy can be rewound to, too
KEPT_TOKENS = 512  # whose rows `clear` keeps, so that short conversations do not fetch the same pages again and again


class Span(NamedTuple):
    """Rows [start, stop) of the arrays of one kind, and the position of row `start`."""

    start: int
    stop: int
    position: int


@dataclass(frozen=True, slots=True)
class Window:
    """Rows of the sliding layers at positions [first, stop) by name of their array; copies that nothing changes."""

    first: int
    stop: int
    rows: dict[str, Rows]

    def usable_at(self, num_tokens: int, kept_tokens: int) -> int:
        """The most tokens, up to `num_tokens`, the last `kept_tokens` of which have their rows here; 0 for none."""
        most = min(num_tokens, self.stop)
        return most if self.first <= max(0, most - kept_tokens) else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(rows.nbytes for rows in self.rows.values())


@dataclass(frozen=True, slots=True)
class KVSnapshot:
    """Rows of the tokens at positions [0, num_tokens), copied; the last of `windows` ends there."""

    num_tokens: int
    full: dict[str, Rows]
    windows: tuple[Window, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(rows.nbytes for rows in self.full.values()) + sum(window.nbytes for window in self.windows)

    def usable_at(self, num_tokens: int, kept_tokens: int) -> int:
        """The most tokens, up to `num_tokens`, that a cache which keeps so many can be restored to."""
        return max((window.usable_at(num_tokens, kept_tokens) for window in self.windows), default=0)

    def cut(self, num_tokens: int, kept_tokens: int) -> "KVSnapshot":
        """The snapshot of a cache that was rewound to `num_tokens`; shares its rows."""
        left = self.usable_at(num_tokens, kept_tokens)
        full = {name: rows[:left] for name, rows in self.full.items()}
        return KVSnapshot(left, full, tuple(_cut(self.windows, left, kept_tokens)))


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

    Laws: append then trim, or rewind, equals never appended; cleared equals new; restored equals the cache that the
    snapshot is of; `nbytes` follows the tokens, not `max_tokens`.
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
        self.kept_tokens = model.sliding_window + 1
        self._window = model.sliding_window
        self._slack = min(MARK_SLACK, max_new_tokens)  # a copy must fit into the arrays
        self._marks: list[int] = []
        self._windows: list[Window] = []
        self._kinds: dict[AttentionKind, _Kind] = {
            "full": _Kind(max_tokens),
            "sliding": _Kind(min(self.kept_tokens + max_new_tokens, max_tokens)),
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
        self._marks.clear()
        self._windows.clear()
        self._release_behind(KEPT_TOKENS)

    def mark(self, num_tokens: int) -> None:
        """Says that the cache may be rewound to so many tokens, or a few less, some time; they may be yet to come."""
        self._marks = [*(mark for mark in self._marks if mark != num_tokens), num_tokens][-MAX_WINDOWS:]

    def rewindable_to(self, num_tokens: int) -> int:
        """The most tokens, up to `num_tokens`, that the cache can be rewound to."""
        if num_tokens >= self.num_tokens or self._holds_window_at(num_tokens):
            return min(num_tokens, self.num_tokens)
        return max((window.usable_at(num_tokens, self.kept_tokens) for window in self._windows), default=0)

    def rewind(self, num_tokens: int) -> int:
        """Forgets all tokens behind the first `num_tokens`; returns how many are left, as `rewindable_to` does."""
        left = self.rewindable_to(num_tokens)
        if left == 0:
            self.clear()
            return 0
        if not self._holds_window_at(left):
            self._install(next(window for window in self._windows if window.usable_at(left, self.kept_tokens) == left))
        self.num_tokens, self._num_trimmable = left, 0
        self._marks = [mark for mark in self._marks if mark <= left]
        self._keep_windows(self._windows)
        self._release_behind(max(left, KEPT_TOKENS))
        return left

    def empty_snapshot(self) -> KVSnapshot:
        """The snapshot of no tokens, which tells what rows are like."""
        arrays = {kind: {name: array[:0] for name, array in self._kinds[kind].arrays.items()} for kind in self._kinds}
        return KVSnapshot(0, arrays["full"], (Window(0, 0, arrays["sliding"]),))

    @property
    def snapshot_bytes(self) -> int:
        """Bytes that a snapshot would take, at most."""
        num_rows = {"full": self.num_tokens, "sliding": min(self.num_tokens, self.kept_tokens + self._slack)}
        own = sum(num_rows[kind] * int(array.shape[1]) for kind, _, array in self.arrays())
        return own + sum(window.nbytes for window in self._windows)

    def snapshot(self, num_tokens: int | None = None, *, is_copy: bool = True) -> KVSnapshot:
        """Every row that is needed to go on, or to rewind as now.

        Args:
            num_tokens: of the cache as it would be rewound to so many; None for all
            is_copy: False for the rows themselves, which the next forward may change
        """
        left = self.rewindable_to(self.num_tokens if num_tokens is None else num_tokens)
        full = {name: array[:left] for name, array in self._kinds["full"].arrays.items()}
        windows = _cut(self._windows, left, self.kept_tokens)
        if self._holds_window_at(left):
            windows.append(self._window_rows(max(0, left - self.kept_tokens - self._slack), left, is_copy=is_copy))
        if is_copy:
            full = {name: rows.copy() for name, rows in full.items()}
        return KVSnapshot(left, full, tuple(windows))

    def restore(self, snapshot: KVSnapshot, num_tokens: int) -> int:
        """Becomes the cache that the snapshot is of, rewound to `num_tokens`; returns how many tokens it holds."""
        self.clear()
        left = snapshot.usable_at(num_tokens, self.kept_tokens)
        if left == 0:
            return 0
        full = self._kinds["full"]
        for name, rows in snapshot.full.items():
            full.arrays[name][:left] = rows[:left]
        full.num_written = max(full.num_written, left)
        self._install(next(window for window in snapshot.windows if window.usable_at(left, self.kept_tokens) == left))
        self.num_tokens = left
        self._keep_windows(snapshot.windows)
        return left

    def _holds_window_at(self, num_tokens: int) -> bool:
        return self._kinds["sliding"].first_position <= max(0, num_tokens - self.kept_tokens)

    def _install(self, window: Window) -> None:
        """Makes a copied window the sliding layers' rows."""
        sliding, num_rows = self._kinds["sliding"], window.stop - window.first
        for name, rows in window.rows.items():
            sliding.arrays[name][:num_rows] = rows[:num_rows]
        sliding.first_position = window.first
        sliding.num_written = max(sliding.num_written, num_rows)

    def _keep_windows(self, windows: Iterable[Window]) -> None:
        """Keeps what the sliding layers' own rows do not hold; where these do, a mark."""
        windows = _cut(windows, self.num_tokens, self.kept_tokens)
        first_position = self._kinds["sliding"].first_position
        self._windows = [window for window in windows if window.first < first_position][-MAX_WINDOWS:]
        for window in windows:
            if window.first >= first_position:
                self.mark(window.stop)

    def _window_rows(self, first: int, stop: int, *, is_copy: bool = True) -> Window:
        """Rows of the sliding layers, as many of [first, stop) as there are."""
        sliding = self._kinds["sliding"]
        first = max(first, sliding.first_position)
        start = first - sliding.first_position
        rows = {name: array[start : start + stop - first] for name, array in sliding.arrays.items()}
        return Window(first, stop, {name: row.copy() for name, row in rows.items()} if is_copy else rows)

    def _keep_marked(self, first_position: int) -> None:
        """Copies the windows of marks that end before rows [.., first_position) go, and would not be whole then."""
        for mark in [mark for mark in self._marks if mark <= self.num_tokens]:
            first = max(0, mark - self.kept_tokens - self._slack)
            if first < first_position:
                self._marks.remove(mark)
                self._windows = [*self._windows, self._window_rows(first, mark)][-MAX_WINDOWS:]

    def _release_behind(self, num_tokens: int) -> None:
        """Gives back the memory of full layers' rows behind the first `num_tokens`."""
        full = self._kinds["full"]
        num_kept = min(full.num_written, num_tokens)
        for name, array in full.arrays.items():
            kept, written = (whole_pages(num_rows * array.shape[1]) for num_rows in (num_kept, full.num_written))
            self._memory.release(full.places[name] + kept, full.places[name] + written)
        full.num_written = num_kept

    def append_span(self, kind: AttentionKind, num_new: int) -> Span:
        """Rows that a forward of `num_new` tokens may see, its own included."""
        return self._span(kind, self.num_tokens + num_new, self.num_tokens - self._window + 1)

    def draft_span(self, kind: AttentionKind) -> Span:
        """Rows that the drafter sees: all of a full layer, window + 1 of a sliding one."""
        return self._span(kind, self.num_tokens, self.num_tokens - self.kept_tokens)

    def new_row(self, kind: AttentionKind) -> int:
        """Row of the next token."""
        return self.num_tokens - self._kinds[kind].first_position

    def _span(self, kind: AttentionKind, stop: int, earliest: int) -> Span:
        first = self._kinds[kind].first_position
        position = 0 if kind == "full" else max(earliest, first)
        return Span(position - first, stop - first, position)

    def _compact(self, kind: _Kind) -> None:
        """Moves the rows that may still be seen to the front."""
        first = max(0, self.num_tokens - self.kept_tokens)
        self._keep_marked(first)
        shift, num_rows = first - kind.first_position, self.num_tokens - first
        for array in kind.arrays.values():
            array[:num_rows] = array[shift : shift + num_rows]
        kind.first_position = first


def _cut(windows: Iterable[Window], num_tokens: int, kept_tokens: int) -> list[Window]:
    """Windows without what is behind the first `num_tokens`, and without those that are of no use then."""
    return [
        Window(window.first, stop, {name: rows[: stop - window.first] for name, rows in window.rows.items()})
        for window in windows
        if (stop := min(window.stop, num_tokens)) > window.first and window.usable_at(stop, kept_tokens) == stop
    ]


def window_copy_bytes(model: ModelConfig, kv_dtype: KVDtype, context_tokens: int) -> int:
    """Bytes of the copied windows that a cache keeps, at most."""
    return (
        MAX_WINDOWS
        * _row_bytes(model, kv_dtype, "sliding")
        * min(model.sliding_window + 1 + MARK_SLACK, context_tokens)
    )


def full_bytes_per_token(model: ModelConfig, kv_dtype: KVDtype) -> int:
    """Bytes that each token adds to the full layers' arrays."""
    return _row_bytes(model, kv_dtype, "full")


def sliding_bytes(model: ModelConfig, kv_dtype: KVDtype, max_new_tokens: int, context_tokens: int) -> int:
    """Bytes of the sliding layers' arrays once the context, or else the window with its new rows, has filled them."""
    return _row_bytes(model, kv_dtype, "sliding") * min(model.sliding_window + 1 + max_new_tokens, context_tokens)


def _row_bytes(model: ModelConfig, kv_dtype: KVDtype, kind: AttentionKind) -> int:
    owners = (model.layers[layer] for layer in model.owned_layers)
    return sum(2 * layer.num_kv_heads * row_bytes(layer.head_dim, kv_dtype) for layer in owners if layer.kind == kind)
