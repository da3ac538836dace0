"""Drafting by policy in the loop, on a target whose text is known; and what it makes of sampled distributions."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import chisquare

from runtime.draft_policy import StepCosts
from runtime.drafter import Draft
from runtime.drafting import AdaptiveDrafting, DraftCounts, LastingDrafter
from runtime.errors import InferenceError
from runtime.generation import Drafter, Request, generate_blocks
from runtime.prefix import Reuse
from runtime.sampling import Distribution, SamplingParams, distribution
from runtime.target import Forward
from tests.drafting import CHEAP_DRAFTS

VOCAB_SIZE = 40
GREEDY = SamplingParams(temperature=0.0)
LIMIT = 7


class TextTarget:
    """Goes on with a text that is known, all probability on it."""

    def __init__(self, text: Sequence[int]) -> None:
        self.num_cached = 0
        self.widths: list[int] = []
        self._text = text

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        self.num_cached += len(token_ids)
        self.widths.append(len(token_ids))
        logits = np.zeros((num_kept, VOCAB_SIZE), np.float32)
        for row in range(num_kept):
            logits[row, self.token(self.num_cached - num_kept + row + 1)] = 60.0
        return Forward(logits, np.zeros((num_kept, 2), np.float32))

    def trim(self, num_tokens: int) -> None:
        self.num_cached -= num_tokens

    def reuse(self, token_ids: Sequence[int]) -> Reuse:
        self.num_cached = 0
        return Reuse(0, 0)

    def token(self, place: int) -> int:
        return self._text[place % len(self._text)]


class TextDrafter:
    """Knows the text too, but errs at every `wrong_every`-th place."""

    def __init__(self, target: TextTarget, wrong_every: int = 1 << 30) -> None:
        self.num_calls = 0
        self._target = target
        self._wrong_every = wrong_every

    def draft(
        self,
        last_token_id: int,
        hidden: npt.NDArray[np.float32],
        num_draft_tokens: int,
        params: SamplingParams,
        rng: np.random.Generator,
    ) -> list[Draft]:
        self.num_calls += 1
        first = self._target.num_cached + 1
        return [Draft(self._token(first + index), None) for index in range(num_draft_tokens)]

    def _token(self, place: int) -> int:
        return (self._target.token(place) + (place % self._wrong_every == 0)) % VOCAB_SIZE


def run(
    target: TextTarget,
    drafter: Drafter | None,
    num_prompt_tokens: int,
    max_tokens: int,
    *,
    costs: StepCosts = CHEAP_DRAFTS,
    limit: int = LIMIT,
    params: SamplingParams = GREEDY,
) -> tuple[list[int], DraftCounts]:
    prompt = [target.token(place) for place in range(num_prompt_tokens)]
    request, counts = Request(prompt, max_tokens, params, limit, 512, costs), DraftCounts()
    blocks = generate_blocks(target, drafter, request, np.random.default_rng(0), counts, lambda: False)
    return [token for block in blocks for token in block], counts


def varied_text() -> list[int]:
    """No pair of tokens is there twice."""
    pairs = [token for step in range(1, VOCAB_SIZE // 2) for token in (step, VOCAB_SIZE - step)]
    assert len(set(pairwise(pairs))) == len(pairs) - 1
    return pairs


def repeating_text() -> list[int]:
    return np.random.default_rng(4).integers(VOCAB_SIZE, size=60).tolist() * 4


# the loop


@pytest.mark.parametrize("wrong_every", [1, 2, 5, 1 << 30])
@pytest.mark.parametrize("max_tokens", [1, 2, 9, 100])
@pytest.mark.parametrize("text", [varied_text(), repeating_text()], ids=["varied", "repeating"])
def test_the_text_stays_and_every_step_is_counted(text: list[int], max_tokens: int, wrong_every: int) -> None:
    target = TextTarget(text)
    token_ids, counts = run(target, TextDrafter(target, wrong_every), 12, max_tokens)
    assert token_ids == [target.token(12 + place) for place in range(max_tokens)]
    assert target.num_cached == 12 + max_tokens - 1
    assert counts.num_verify_steps == len(target.widths) - 1 == sum(counts.num_steps.values())
    assert sum(counts.drafted_histogram) == sum(counts.accepted_histogram) == counts.num_verify_steps
    assert sum(num * steps for num, steps in enumerate(counts.drafted_histogram)) == counts.num_drafted
    assert counts.drafted_histogram[:1] == [counts.num_steps["plain"]] * (max_tokens > 1)
    assert max(target.widths[1:], default=0) <= LIMIT + 1


def test_a_right_drafter_is_asked_for_long_drafts() -> None:
    target = TextTarget(varied_text())
    _, counts = run(target, TextDrafter(target), 2, 36)
    assert counts.num_steps["lookup"] == 0
    assert counts.mean_acceptance_length > 4
    assert counts.acceptance_by_position[:3] == [1.0, 1.0, 1.0]


def test_a_wrong_drafter_is_left_alone() -> None:
    target = TextTarget(varied_text() * 10)
    drafter = TextDrafter(target, wrong_every=1)
    _, counts = run(target, drafter, 2, 34, costs=StepCosts((1.0, 2.0, 3.0), 0.1))
    assert (counts.num_accepted, counts.acceptance_by_position) == (0, [0.0])
    assert drafter.num_calls == 1


@pytest.mark.parametrize("has_drafter", [False, True])
def test_repeated_text_is_looked_up(has_drafter: bool) -> None:
    target = TextTarget(repeating_text())
    drafter = TextDrafter(target, wrong_every=2) if has_drafter else None
    _, counts = run(target, drafter, 70, 120)
    assert counts.num_steps["lookup"] > counts.num_steps["drafter"]
    assert counts.num_verify_steps < 40
    assert counts.num_drafter_faults == 0


def test_a_text_that_repeats_nothing_is_plain_without_a_drafter() -> None:
    target = TextTarget(varied_text())
    _, counts = run(target, None, 2, 36)
    assert counts.num_steps == {"plain": 35, "drafter": 0, "lookup": 0}


def test_a_drafter_without_costs_is_not_asked() -> None:
    target = TextTarget(varied_text())
    drafter = TextDrafter(target)
    run(target, drafter, 2, 30, costs=StepCosts((1.0, 1.1), None))
    assert drafter.num_calls == 0


class Faulty(TextDrafter):
    def __init__(self, target: TextTarget, fault: Callable[[], list[Draft]]) -> None:
        super().__init__(target)
        self._fault = fault

    def draft(self, *arguments: object) -> list[Draft]:  # type: ignore[override]
        self.num_calls += 1
        return self._fault()


def raising() -> list[Draft]:
    raise InferenceError("onnxruntime failed")


def test_a_drafter_that_raises_is_counted_and_not_asked_again() -> None:
    target = TextTarget(varied_text())
    drafter = Faulty(target, raising)
    token_ids, counts = run(target, drafter, 2, 30)
    assert token_ids == [target.token(2 + place) for place in range(30)]
    assert (counts.num_drafter_faults, drafter.num_calls) == (1, 1)


def test_a_drafter_that_gives_nothing_is_asked_less_and_less() -> None:
    target = TextTarget(varied_text() * 10)
    drafter = Faulty(target, list)
    _, counts = run(target, drafter, 2, 37)
    assert counts.num_drafter_faults == drafter.num_calls < 25
    assert counts.num_steps["drafter"] == 0  # what was verified had no drafts


# sampled


class ChainTarget:
    """Logits that depend on the last token; the text repeats often, so that much is looked up."""

    def __init__(self) -> None:
        self.cached: list[int] = []
        self.table = np.random.default_rng(2).normal(scale=1.5, size=(4, 4)).astype(np.float32)

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        self.cached += token_ids
        return Forward(self.table[self.cached[-num_kept:]], np.zeros((num_kept, 1), np.float32))

    def reuse(self, token_ids: Sequence[int]) -> Reuse:
        return Reuse(0, 0)

    def trim(self, num_tokens: int) -> None:
        del self.cached[len(self.cached) - num_tokens :]


def one_of_two(token_id: int) -> Distribution:
    return Distribution(np.array([token_id, -1]), np.full(2, 0.5))


@pytest.mark.parametrize("is_wrong", [False, True], ids=["lossless", "broken"])
def test_looked_up_drafts_keep_the_distribution(is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_wrong:  # a draft that was certain passes as one of two
        monkeypatch.setattr(AdaptiveDrafting, "_certain", lambda _, token_id: Draft(token_id, one_of_two(token_id)))
    params = SamplingParams(1.0, 3, 0.95)
    table, found, num_lookups = ChainTarget().table, Counter[tuple[int, int]](), 0
    for seed in range(40):
        counts = DraftCounts()
        request = Request([0, 1, 2, 3, 0, 1], 400, params, 4, 512, CHEAP_DRAFTS)
        blocks = generate_blocks(ChainTarget(), None, request, np.random.default_rng(seed), counts, lambda: False)
        token_ids = [1, *(token for block in blocks for token in block)]
        found.update(pairwise(token_ids))
        num_lookups += counts.num_steps["lookup"]
    assert num_lookups > 1000
    p_values = []
    for last in range(4):
        due = distribution(table[last], params)
        cells = [found[last, int(token)] for token in due.token_ids]
        assert sum(cells) == sum(num for (first, _), num in found.items() if first == last)
        p_values.append(float(chisquare(cells, due.probabilities * sum(cells)).pvalue))
    assert (min(p_values) > 1e-3) != is_wrong


def test_equal_seeds_and_costs_give_equal_tokens() -> None:
    def sampled(seed: int) -> list[int]:
        request = Request([0, 1, 2], 200, SamplingParams(), 7, 512, CHEAP_DRAFTS)
        rng = np.random.default_rng(seed)
        blocks = generate_blocks(ChainTarget(), None, request, rng, DraftCounts(), lambda: False)
        return [token for block in blocks for token in block]

    assert sampled(3) == sampled(3) != sampled(4)


# counts


def test_acceptance_by_position_is_of_what_was_reached() -> None:
    counts = DraftCounts()
    for num_drafted, num_accepted in [(3, 3), (3, 1), (3, 0), (1, 1), (0, 0)]:
        counts.count(num_drafted, num_accepted)
    assert counts.acceptance_by_position == [3 / 4, 1 / 2, 1.0]
    assert counts.drafted_histogram == [1, 1, 0, 3]
    assert counts.accepted_histogram == [2, 2, 0, 1]
    assert counts.num_steps == {"plain": 1, "drafter": 4, "lookup": 0}


def test_a_lasting_drafter_asks_for_nothing_in_vain() -> None:
    drafter = LastingDrafter(None, GREEDY, np.random.default_rng(0), DraftCounts(), lambda: False)
    assert not drafter.is_there
    assert drafter.draft(1, np.zeros(2, np.float32), 3) == []
