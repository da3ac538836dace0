"""Which tokens of a prompt need no prefill: those that the KV cache, or a parked copy of one, begins with.

Knows token ids and rows, nothing of conversations: a second turn, a fork, another user's question behind the same
system turn are all prompts that begin alike. Rows of other prompts are parked, copied, where memory was left for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from runtime.kv_cache import KVCache, KVSnapshot

LEAST_PARKED = 64  # tokens whose rows are worth a copy
MAX_PARKED = 4


class Reuse(NamedTuple):
    """How many tokens of a prompt are cached, and how many were before rows that a window needs had gone."""

    num_tokens: int
    num_common: int


@dataclass(frozen=True, slots=True)
class Parked:
    """Rows of tokens that are not in the cache now."""

    token_ids: list[int]
    snapshot: KVSnapshot


@dataclass(slots=True)
class ParkedRows:
    """Copies of rows, `max_bytes` at most and at most `MAX_PARKED`; what was used longest ago goes first.

    `spare_bytes` is all that the memory budget leaves, also for others.
    """

    max_bytes: int = 0
    spare_bytes: int = 0
    entries: list[Parked] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(entry.snapshot.nbytes for entry in self.entries)

    def reserve(self, num_bytes: int) -> bool:
        """Leaves so many of the spare bytes to somebody else for good; False where there are not so many."""
        if num_bytes > self.spare_bytes:
            return False
        self.spare_bytes -= num_bytes
        self.max_bytes = min(self.max_bytes, self.spare_bytes)
        self.make_room(0)
        return True

    def has_room(self, num_bytes: int, beside: Parked | None) -> bool:
        """Whether a copy of so many bytes may be kept, once all others but one have gone."""
        return num_bytes + (0 if beside is None else beside.snapshot.nbytes) <= self.max_bytes

    def use(self, parked: Parked) -> None:
        """Lets a copy stay longest."""
        self.entries = [*(entry for entry in self.entries if entry is not parked), parked]

    def make_room(self, num_bytes: int) -> None:
        """Lets the oldest copies go, so that one of `num_bytes` can be made."""
        while self.entries and (len(self.entries) >= MAX_PARKED or self.nbytes + num_bytes > self.max_bytes):
            self.entries.pop(0)

    def add(self, parked: Parked) -> None:
        """Keeps a copy that there is room for; drops those that it holds the beginning of."""
        self.entries = [
            entry for entry in self.entries if num_common(entry.token_ids, parked.token_ids) < len(entry.token_ids)
        ]
        self.make_room(parked.snapshot.nbytes)
        self.entries.append(parked)


def num_common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    most = min(len(ids), len(others))
    differs = np.asarray(ids[:most]) != np.asarray(others[:most])
    return int(differs.argmax()) if differs.any() else most


def reuse_rows(cache: KVCache, cached_ids: list[int], parked: ParkedRows, token_ids: Sequence[int]) -> Reuse:
    """Makes the cache hold as many of the first of `token_ids` as it can, all but the last at most.

    Args:
        cached_ids: the tokens of the cache
        parked: where its rows go if the prompt has little to do with them
    """
    limit = len(token_ids) - 1  # the last token's logits are wanted
    common = min(limit, num_common(cached_ids, token_ids))
    usable = cache.rewindable_to(common)
    best, most = None, common
    for entry in parked.entries:
        shared = min(limit, num_common(entry.token_ids, token_ids))
        most = max(most, shared)
        if (here := entry.snapshot.usable_at(shared, cache.kept_tokens)) > usable:
            best, usable = entry, here
    if common < len(cached_ids) // 2 and len(cached_ids) - common >= LEAST_PARKED:
        park(cache, cached_ids, parked, beside=best)
    if best is None:
        usable = cache.rewind(usable)
    else:
        usable = cache.restore(best.snapshot, usable)
        parked.use(best)
    if usable < most:  # where prompts begin alike, and part: the next one that does may be rewound to there
        cache.mark(most)
    cache.mark(len(token_ids))
    return Reuse(usable, most)


def park(cache: KVCache, cached_ids: Sequence[int], parked: ParkedRows, beside: Parked | None = None) -> None:
    """Keeps a copy of the cache, if there is room for it, and for one that is about to be used."""
    num_bytes = cache.snapshot_bytes
    if not parked.has_room(num_bytes, beside):
        return
    if beside is not None:  # what was used last stays longest
        parked.use(beside)
    parked.make_room(num_bytes)  # before the copy is made, not behind it
    parked.add(Parked(list(cached_ids), cache.snapshot()))
