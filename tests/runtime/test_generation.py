"""The loop on stand-ins without weights: what it counts, asks for, survives and refuses."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from runtime.drafter import Draft
from runtime.errors import InferenceError
from runtime.generation import DraftCounts, Drafter, Request, generate_blocks
from runtime.prefix import Reuse
from runtime.sampling import Distribution, SamplingParams
from runtime.target import Forward
from runtime.turns import Sliding

VOCAB_SIZE = 50
PROMPT = [3, 14, 15, 9, 2]
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.0, top_k=3, top_p=1.0)


def next_token(token_id: int, position: int) -> int:
    """What the stand-in target finds likeliest behind a token at a position."""
    return (7 * token_id + 3 * position + 1) % VOCAB_SIZE


def continuation(num_tokens: int) -> list[int]:
    token_ids = [next_token(PROMPT[-1], len(PROMPT) - 1)]
    while len(token_ids) < num_tokens:
        token_ids.append(next_token(token_ids[-1], len(PROMPT) + len(token_ids) - 1))
    return token_ids


class StubTarget:
    """Gives `next_token` all probability; a token's hidden state holds its position.

    `poison` is what a logit of the last row becomes, by the number of the forward.
    """

    def __init__(self, poison: dict[int, float] | None = None) -> None:
        self.cached: list[int] = []
        self.forwards: list[int] = []  # tokens in each
        self._poison = poison or {}

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        start = len(self.cached)
        self.cached += token_ids
        positions = range(start + len(token_ids) - num_kept, start + len(token_ids))
        logits = np.zeros((num_kept, VOCAB_SIZE), np.float32)
        for row, position in enumerate(positions):
            logits[row, next_token(self.cached[position], position)] = 60.0
        if len(self.forwards) in self._poison:
            logits[-1, 4] = self._poison[len(self.forwards)]
        self.forwards.append(len(token_ids))
        return Forward(logits, np.array(positions, np.float32)[:, None])

    def trim(self, num_tokens: int) -> None:
        del self.cached[len(self.cached) - num_tokens :]

    def reuse(self, token_ids: Sequence[int]) -> Reuse:
        self.cached.clear()
        return Reuse(0, 0)


class StubDrafter:
    """Drafts the target's own tokens, the draft at `wrong_at` excepted, and checks what it is given."""

    def __init__(self, target: StubTarget, wrong_at: int | None = None) -> None:
        self.num_calls = 0
        self._target = target
        self._wrong_at = wrong_at

    def draft(
        self,
        last_token_id: int,
        hidden: npt.NDArray[np.float32],
        num_draft_tokens: int,
        params: SamplingParams,
        rng: np.random.Generator,
    ) -> list[Draft]:
        self.num_calls += 1
        position = len(self._target.cached)
        # the hidden state that predicted `last_token_id`: of the last token in the cache
        assert hidden.tolist() == [position - 1]
        assert last_token_id == next_token(self._target.cached[-1], position - 1)
        return self.drafts(last_token_id, position, num_draft_tokens)

    def drafts(self, token_id: int, position: int, num_draft_tokens: int) -> list[Draft]:
        drafts = []
        for index in range(num_draft_tokens):
            token_id = (next_token(token_id, position + index) + (index == self._wrong_at)) % VOCAB_SIZE
            drafts.append(Draft(token_id, None))
        return drafts


def run(
    target: StubTarget,
    drafter: Drafter | None,
    counts: DraftCounts,
    *,
    max_tokens: int = 20,
    num_draft_tokens: int = 3,
    params: SamplingParams = GREEDY,
    chunk: int = 64,
    cancelled: Callable[[], bool] = lambda: False,
    sliding: Sliding | None = None,
) -> Iterator[list[int]]:
    request = Request(PROMPT, max_tokens, params, num_draft_tokens, chunk, sliding=sliding)
    return generate_blocks(target, drafter, request, np.random.default_rng(0), counts, cancelled)


def joined(blocks: Iterator[list[int]]) -> list[int]:
    return [token for block in blocks for token in block]


# counts


@pytest.mark.parametrize("wrong_at", [None, 0, 1, 4])
@pytest.mark.parametrize("num_draft_tokens", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 20])
def test_exactly_max_tokens_come_and_every_draft_is_counted(
    max_tokens: int, num_draft_tokens: int, wrong_at: int | None
) -> None:
    target, counts = StubTarget(), DraftCounts()
    drafter = StubDrafter(target, wrong_at)
    blocks = list(run(target, drafter, counts, max_tokens=max_tokens, num_draft_tokens=num_draft_tokens))
    assert [token for block in blocks for token in block] == continuation(max_tokens)
    # the last token's row is never computed, so a context of prompt + max_tokens is never exceeded
    assert len(target.cached) == len(PROMPT) + max_tokens - 1
    assert counts.num_verify_steps == len(target.forwards) - 1 == len(blocks) - 1
    assert counts.num_drafted == sum(target.forwards[1:]) - counts.num_verify_steps
    assert counts.num_accepted == max_tokens - 1 - counts.num_verify_steps
    assert [sum(len(block) == n + 1 for block in blocks[1:]) for n in range(len(counts.accepted_histogram))] == (
        counts.accepted_histogram
    )
    assert counts.num_drafter_faults == 0
    assert drafter.num_calls <= counts.num_verify_steps


def test_one_forward_yields_up_to_a_draft_length_and_one() -> None:
    target, counts = StubTarget(), DraftCounts()
    blocks = list(run(target, StubDrafter(target), counts, max_tokens=10, num_draft_tokens=3))
    assert [len(block) for block in blocks] == [1, 4, 4, 1]
    assert target.forwards == [len(PROMPT), 4, 4, 1]
    assert counts.accepted_histogram == [1, 0, 0, 2]
    assert counts.acceptance_rate == 1.0
    assert counts.mean_acceptance_length == 1 + 6 / 3


def test_rates_without_drafts_are_zero_and_one() -> None:
    target, counts = StubTarget(), DraftCounts()
    assert (counts.acceptance_rate, counts.mean_acceptance_length) == (0.0, 0.0)
    joined(run(target, None, counts, max_tokens=4))
    assert (counts.acceptance_rate, counts.mean_acceptance_length) == (0.0, 1.0)


@pytest.mark.parametrize(("chunk", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (64, [5])])
def test_the_prompt_goes_in_by_chunks(chunk: int, sizes: list[int]) -> None:
    target = StubTarget()
    assert joined(run(target, None, DraftCounts(), max_tokens=1, chunk=chunk)) == continuation(1)
    assert target.forwards == sizes


# a context that is full: of 10 tokens, 2 behind the first may be dropped, then 1 more

SLIDING = Sliding(10, 1, (2, 3))
MOST_TOKENS = 10 - 2  # what may be generated while two tokens of the prompt are left


def slid_continuation(num_tokens: int) -> list[int]:
    """Token by token: the context is full with 5 tokens behind the prompt, with 7 behind three tokens of it."""
    token_ids: list[int] = []
    while len(token_ids) < num_tokens:
        kept = (
            PROMPT if len(token_ids) < 5 else [PROMPT[0], *PROMPT[3:]] if len(token_ids) < 7 else [PROMPT[0], PROMPT[4]]
        )
        token_ids.append(next_token([*kept, *token_ids][-1], len(kept) + len(token_ids) - 1))
    return token_ids


@pytest.mark.parametrize("wrong_at", [None, 0, 1])
@pytest.mark.parametrize("num_draft_tokens", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("max_tokens", range(1, MOST_TOKENS + 1))
def test_drafts_do_not_move_a_slide(max_tokens: int, num_draft_tokens: int, wrong_at: int | None) -> None:
    target, counts = StubTarget(), DraftCounts()
    drafter = StubDrafter(target, wrong_at)  # checks that it sees the new tokens and their hidden states
    blocks = run(
        target, drafter, counts, max_tokens=max_tokens, num_draft_tokens=num_draft_tokens, sliding=SLIDING, chunk=3
    )
    num_cached = []
    token_ids = []
    for block in blocks:
        token_ids += block
        num_cached.append(len(target.cached))
    assert token_ids == slid_continuation(max_tokens)
    assert max(num_cached) < 10  # the last token needs no row
    num_slides = (max_tokens > 5) + (max_tokens > 7)
    assert (counts.num_slides, counts.num_dropped_tokens) == (num_slides, (0, 2, 3)[num_slides])
    assert counts.num_prefilled_tokens == sum((5, 3 + 5, 2 + 7)[: num_slides + 1])
    assert counts.num_drafter_faults == 0


@pytest.mark.parametrize(("forward", "step"), [(0, 0), (4, 4), (5, 5), (6, 6), (7, 7)])
def test_nan_names_the_step_behind_slides_too(forward: int, step: int) -> None:
    target = StubTarget({forward: np.nan})
    blocks = run(target, None, DraftCounts(), max_tokens=MOST_TOKENS, sliding=SLIDING)
    with pytest.raises(InferenceError, match=rf"step {step}: the largest of 50 logits in row 0 is nan"):
        joined(blocks)


@pytest.mark.parametrize("num_chunks", [0, 1, 3])
def test_cancelled_between_the_chunks_of_a_slide(num_chunks: int) -> None:
    target, counts, num_forwards = StubTarget(), DraftCounts(), len(PROMPT) + 4 + num_chunks
    options = {"max_tokens": MOST_TOKENS, "sliding": SLIDING, "chunk": 1}
    blocks = run(target, None, counts, **options, cancelled=lambda: len(target.forwards) == num_forwards)
    assert joined(blocks) == slid_continuation(5)
    assert (len(target.forwards), counts.num_slides) == (num_forwards, num_chunks > 0)


# a drafter that fails


class RaisingDrafter(StubDrafter):
    """Fails at its second call."""

    def drafts(self, token_id: int, position: int, num_draft_tokens: int) -> list[Draft]:
        if self.num_calls == 2:
            raise InferenceError("onnxruntime failed")
        return super().drafts(token_id, position, num_draft_tokens)


class SilentDrafter(StubDrafter):
    """Stops at once, as the real one does where its scores are NaN."""

    def drafts(self, token_id: int, position: int, num_draft_tokens: int) -> list[Draft]:
        return []


class NanDrafter(StubDrafter):
    """Draws right and wrong tokens from a distribution of NaN."""

    def drafts(self, token_id: int, position: int, num_draft_tokens: int) -> list[Draft]:
        nowhere = Distribution(np.arange(VOCAB_SIZE), np.full(VOCAB_SIZE, np.nan))
        return [draft._replace(distribution=nowhere) for draft in super().drafts(token_id, position, num_draft_tokens)]


def test_a_drafter_that_raises_is_counted_and_not_asked_again() -> None:
    target, counts = StubTarget(), DraftCounts()
    drafter = RaisingDrafter(target)
    blocks = list(run(target, drafter, counts, max_tokens=12))
    assert [token for block in blocks for token in block] == continuation(12)
    assert [len(block) for block in blocks] == [1, 4, *[1] * 7]
    assert (counts.num_drafter_faults, drafter.num_calls) == (1, 2)


def test_a_drafter_that_stops_early_is_counted_each_time() -> None:
    target, counts = StubTarget(), DraftCounts()
    assert joined(run(target, SilentDrafter(target), counts, max_tokens=6)) == continuation(6)
    assert counts.num_drafter_faults == 4  # the first token comes with the prefill, before the last none is drafted
    assert (counts.num_drafted, counts.acceptance_rate) == (0, 0.0)


def test_drafts_drawn_from_nan_are_rejected() -> None:
    target, counts = StubTarget(), DraftCounts()
    token_ids = joined(run(target, NanDrafter(target, wrong_at=1), counts, max_tokens=12, params=SAMPLED))
    assert len(token_ids) == 12
    assert counts.num_drafted > 0
    assert counts.num_accepted == 0


def test_another_error_of_a_drafter_is_a_bug_and_passes() -> None:
    class Broken(StubDrafter):
        def drafts(self, token_id: int, position: int, num_draft_tokens: int) -> list[Draft]:
            raise KeyError("layer")

    target = StubTarget()
    with pytest.raises(KeyError, match="layer"):
        joined(run(target, Broken(target), DraftCounts()))


# a target that fails


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_nan_of_the_target_ends_with_the_step(step: int, poison: float, params: SamplingParams) -> None:
    target = StubTarget({step: poison})
    blocks = run(target, None, DraftCounts(), params=params)
    for _ in range(step):
        next(blocks)
    with pytest.raises(InferenceError, match=rf"step {step}: the largest of 50 logits in row 0 is {poison}"):
        next(blocks)


def test_nan_in_a_row_behind_drafts_is_named() -> None:
    target = StubTarget({1: np.nan})
    with pytest.raises(InferenceError, match="step 1: the largest of 50 logits in row 3 is nan"):
        joined(run(target, StubDrafter(target), DraftCounts()))


# cancellation


def after(num_checks: int) -> Callable[[], bool]:
    """Says yes from the given check on."""
    checks = iter([False] * num_checks)
    return lambda: next(checks, True)


@pytest.mark.parametrize("num_chunks", [0, 1, 3])
def test_cancelled_between_prefill_chunks(num_chunks: int) -> None:
    target = StubTarget()
    assert list(run(target, None, DraftCounts(), chunk=1, cancelled=after(num_chunks))) == []
    assert target.forwards == [1] * num_chunks


def test_cancelled_between_rounds() -> None:
    is_cancelled = False
    target, counts = StubTarget(), DraftCounts()
    blocks = run(target, StubDrafter(target), counts, cancelled=lambda: is_cancelled)
    token_ids = [*next(blocks), *next(blocks)]
    is_cancelled = True
    assert list(blocks) == []
    assert token_ids == continuation(5)
    assert (counts.num_verify_steps, len(target.forwards)) == (1, 2)


def test_cancelled_while_drafting() -> None:
    target, counts = StubTarget(), DraftCounts()
    drafter = StubDrafter(target)
    # checked before the one prefill chunk, before the round and behind the drafts
    assert joined(run(target, drafter, counts, cancelled=after(2))) == continuation(1)
    assert (drafter.num_calls, len(target.forwards), counts.num_verify_steps) == (1, 1, 0)
