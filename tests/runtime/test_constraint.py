"""Thinking before an answer: every border is a mask's, and asking ahead over borders changes nothing."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from runtime.constraint import BoolArray, Constraint, ThinkingConstraint, masked_logits
from runtime.errors import RequestError

VOCAB_SIZE, EOS, START, END, A, B = 6, 0, 1, 2, 3, 4
EOS_IDS = (EOS,)


class Spelling:
    """A grammar of one text, `ids`, and an end."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = [*ids, EOS]

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        pairs = itertools.zip_longest(token_ids, self._ids[: len(token_ids)], fillvalue=EOS)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def masks(self, token_ids: Sequence[int]) -> list[BoolArray | None]:
        following = [*self._ids, *[EOS] * len(token_ids)][: len(token_ids) + 1]
        return [np.arange(VOCAB_SIZE) == id_ for id_ in following]

    def consume(self, token_ids: Sequence[int]) -> None:
        assert self.num_allowed(token_ids) == len(token_ids)
        self._ids = [*self._ids[len(token_ids) :]] or [EOS]

    @property
    def is_complete(self) -> bool:
        return self._ids == [EOS]


def thinking(budget: int | None, *, spelling: Sequence[int] | None = (A, B)) -> ThinkingConstraint:
    inner: Constraint | None = None if spelling is None else Spelling(spelling)
    return ThinkingConstraint(START, END, budget, inner, vocab_size=VOCAB_SIZE, eos_ids=EOS_IDS)


def allowed(constraint: Constraint, ahead: Sequence[int] = ()) -> list[int] | None:
    mask = constraint.masks(ahead)[-1]
    return None if mask is None else np.flatnonzero(mask).tolist()


def test_the_first_token_may_open_a_thought() -> None:
    constraint = thinking(None)
    assert allowed(constraint) == [START, A]
    constraint.consume([A])
    assert allowed(constraint) == [B]
    constraint.consume([B])
    assert constraint.is_complete
    assert allowed(constraint) == [EOS]


def test_a_thought_ends_and_then_the_answer_is_ruled() -> None:
    constraint = thinking(None)
    constraint.consume([START, B, B])
    assert allowed(constraint) == [START, END, A, B, 5]  # no end of the sequence
    assert not constraint.is_complete
    constraint.consume([B] * 1000)
    assert allowed(constraint) == [START, END, A, B, 5]
    constraint.consume([END])
    assert allowed(constraint) == [A]  # and no second thought
    assert constraint.num_allowed([START]) == 0
    constraint.consume([A, B])
    assert constraint.is_complete


def test_a_budget_closes_the_thought() -> None:
    constraint = thinking(2)
    assert [allowed(constraint, ids) for ids in ([START, B], [START, B, A])] == [[1, 2, 3, 4, 5], [END]]
    assert constraint.num_allowed([START, B, A, B]) == 3
    assert constraint.num_allowed([START, B, A, END, A, B, EOS, EOS]) == 8
    assert constraint.num_allowed([START, END, A, A]) == 3
    assert constraint.num_allowed([START, EOS]) == 1
    assert allowed(thinking(0), [START]) == [END]


def test_without_a_grammar_only_the_budget_is_kept() -> None:
    constraint = thinking(2, spelling=None)
    assert allowed(constraint) is None
    assert allowed(constraint, [START, A]) is None
    assert allowed(constraint, [START, A, A]) == [END]
    constraint.consume([A, START, A, END, B])
    assert allowed(constraint, [START]) is None
    assert allowed(constraint, [START, A]) == [END]  # both thoughts together have it
    assert constraint.num_allowed([A, EOS, START, A, A]) == 4
    assert not constraint.is_complete


SEQUENCES = [(START, B, B, END, A, B, EOS), (START, END, A, B, EOS), (A, B, EOS, EOS), (START, A, A, END, A)]


@pytest.mark.parametrize("budget", [2, 5, None])
@pytest.mark.parametrize("ids", SEQUENCES, ids=str)
@pytest.mark.parametrize("spelling", [(A, B), None], ids=str)
def test_asking_ahead_is_going_there(ids: Sequence[int], budget: int | None, spelling: Sequence[int] | None) -> None:
    for begin, end in itertools.combinations(range(len(ids) + 1), 2):
        constraint = thinking(budget, spelling=spelling)
        constraint.consume(ids[:begin])
        before = allowed(constraint)
        for place, mask in enumerate(constraint.masks(ids[begin:end]), begin):
            fresh = thinking(budget, spelling=spelling)
            fresh.consume(ids[:place])
            assert np.array_equal(mask, fresh.masks([])[0])
        assert constraint.num_allowed(ids[begin:end]) == end - begin
        assert allowed(constraint) == before


@pytest.mark.parametrize("spelling", [(A, B), None], ids=str)
def test_num_allowed_is_the_longest_prefix_in_the_masks(spelling: Sequence[int] | None) -> None:
    for ids in itertools.product(range(VOCAB_SIZE), repeat=4):
        constraint = thinking(1, spelling=spelling)
        position = 0
        while position < 4 and ((mask := constraint.masks(ids[:position])[-1]) is None or mask[ids[position]]):
            position += 1
        assert constraint.num_allowed(ids) == position


def test_a_budget_below_zero_is_refused() -> None:
    with pytest.raises(RequestError, match="the thinking budget must be at least 0 tokens, got -1"):
        thinking(-1)


def test_masked_logits_are_a_copy_only_where_there_is_a_mask() -> None:
    logits = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert masked_logits(logits, [None, None]) is logits
    masked = masked_logits(logits, [None, np.array([True, False, True])])
    assert masked.tolist() == [[0, 1, 2], [3, -np.inf, 5]]
    assert masked.dtype == np.float32
    assert logits[1, 1] == 4
