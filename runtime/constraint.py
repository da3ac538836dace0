"""Which tokens may come next, as the generation loop asks it, and thinking before what a grammar allows. Pure numpy."""

import itertools
from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.sampling import FloatArray

BoolArray = NDArray[np.bool_]


class Constraint(Protocol):
    """What the generation loop asks about tokens; only `consume` changes the state."""

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens are allowed, one behind the other, from the current state."""
        ...

    def masks(self, token_ids: Sequence[int]) -> list[BoolArray | None]:
        """Allowed tokens [vocab_size] now and behind each of `token_ids`, all of which are; None where everything is.

        Behind an end-of-sequence token nothing but another is allowed.
        """
        ...

    def consume(self, token_ids: Sequence[int]) -> None:
        """Goes on behind what was generated."""
        ...

    @property
    def is_complete(self) -> bool:
        """True where nothing but an end-of-sequence token can follow."""
        ...


class _Phase(Enum):
    OPENING = auto()  # nothing was generated: a thought may open
    THINKING = auto()
    ANSWER = auto()


class _State(NamedTuple):
    phase: _Phase
    num_thought: int  # tokens within thoughts, without those that start and end them


class ThinkingConstraint:
    """Thoughts of `budget` tokens at most, all together, then what `inner` allows; a thought is start ... end.

    With `inner` there is at most one thought, before anything else, and the sequence cannot end within it.
    """

    def __init__(
        self,
        start_id: int,
        end_id: int,
        budget: int | None,
        inner: Constraint | None,
        *,
        vocab_size: int,
        eos_ids: Sequence[int],
    ) -> None:
        """With a `budget` of None thoughts are as long as they like; with 0 one that opens closes at once."""
        if budget is not None and budget < 0:
            raise RequestError(f"the thinking budget must be at least 0 tokens, got {budget:,}")
        self._start_id, self._end_id = start_id, end_id
        self._budget = budget
        self._inner = inner
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._state = _State(_Phase.OPENING, 0)

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens are allowed, one behind the other, from the current state."""
        states, begin = self._walk(token_ids)
        for position in range(begin):
            if states[position].phase is _Phase.THINKING and not self._may_think(states[position], token_ids[position]):
                return position
        return begin + (0 if self._inner is None else self._inner.num_allowed(token_ids[begin:]))

    def masks(self, token_ids: Sequence[int]) -> list[BoolArray | None]:
        """Allowed tokens [vocab_size] now and behind each of `token_ids`, all of which are; None where all are."""
        states, begin = self._walk(token_ids)
        masks = [self._mask(state) for state in states[:begin]]
        if self._inner is None or states[begin].phase is _Phase.THINKING:
            return [*masks, self._mask(states[begin])]
        first, *others = self._inner.masks(token_ids[begin:])
        return [*masks, self._opened(first) if states[begin].phase is _Phase.OPENING else first, *others]

    def consume(self, token_ids: Sequence[int]) -> None:
        """Goes on behind what was generated."""
        states, begin = self._walk(token_ids)
        if self._inner is not None and begin < len(token_ids):
            self._inner.consume(token_ids[begin:])
        self._state = states[-1]

    @property
    def is_complete(self) -> bool:
        """True where nothing but an end-of-sequence token can follow."""
        return self._state.phase is _Phase.ANSWER and self._inner is not None and self._inner.is_complete

    def _walk(self, token_ids: Sequence[int]) -> tuple[list[_State], int]:
        """The state before each token and behind the last, and from which token on `inner` rules: all where none."""
        states = [self._state]
        for token_id in token_ids:
            states.append(self._behind(states[-1], token_id))
        phases = [state.phase for state in states]
        rules = (
            before is not _Phase.THINKING and behind is _Phase.ANSWER and self._inner is not None
            for before, behind in itertools.pairwise(phases)
        )
        begin = next((position for position, ruled in enumerate(rules) if ruled), len(token_ids))
        return states, begin

    def _behind(self, state: _State, token_id: int) -> _State:
        if state.phase is _Phase.THINKING:
            ends = token_id == self._end_id
            return (
                _State(_Phase.ANSWER, state.num_thought) if ends else state._replace(num_thought=state.num_thought + 1)
            )
        opens = token_id == self._start_id and (self._inner is None or state.phase is _Phase.OPENING)
        return state._replace(phase=_Phase.THINKING if opens else _Phase.ANSWER)

    def _may_think(self, state: _State, token_id: int) -> bool:
        if state.num_thought == self._budget:
            return token_id == self._end_id
        return self._inner is None or token_id not in self._eos_ids

    def _mask(self, state: _State) -> BoolArray | None:
        if state.phase is not _Phase.THINKING:
            return None if self._inner is None else self._opened(self._inner.masks([])[0])
        if state.num_thought == self._budget:
            return _mask_of([self._end_id], self._vocab_size)
        return None if self._inner is None else ~_mask_of(list(self._eos_ids), self._vocab_size)

    def _opened(self, mask: BoolArray | None) -> BoolArray | None:
        return None if mask is None else mask | _mask_of([self._start_id], self._vocab_size)


def masked_logits(logits: FloatArray, masks: Sequence[BoolArray | None]) -> FloatArray:
    """`logits` with -inf where a mask forbids the token; themselves where there is no mask, else a copy.

    Args:
        logits: [num_rows, vocab_size]
        masks: One for each row.
    """
    if all(mask is None for mask in masks):
        return logits
    masked = logits.copy()
    for row, mask in zip(masked, masks, strict=True):
        if mask is not None:
            np.copyto(row, -np.inf, where=~mask)
    return masked


def _mask_of(token_ids: Sequence[int], vocab_size: int) -> BoolArray:
    mask = np.zeros(vocab_size, np.bool_)
    mask[list(token_ids)] = True
    return mask
