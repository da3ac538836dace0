"""The policy in simulation: what drafts stand is drawn, what steps cost is given, so no clock is involved.

A speed is in tokens per plain step, so that plain decoding has 1.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

import pytest

from runtime.draft_policy import PLAIN, PROBE_SHARE, Choice, DraftPolicy, Offer, StepCosts

LIMIT = 7
CHEAP = StepCosts((1.0, 1.02, 1.08, 1.15, 1.22, 1.32, 1.5, 1.8, 1.9), 0.015)
DEAR = StepCosts((1.0, 1.7, 2.0, 2.2, 2.7, 3.0, 3.3, 3.6, 3.8), 0.015)
Acceptance = Callable[[int, int], float]  # of (tokens so far, position)


@dataclass(frozen=True, slots=True)
class Step:
    """A round: tokens and time behind it."""

    num_tokens: int
    seconds: float
    choice: Choice


def simulate(costs: StepCosts, acceptance: Acceptance, num_tokens: int, seed: int) -> list[Step]:
    rng, policy = random.Random(seed), DraftPolicy(costs, LIMIT)
    steps, done, seconds = [], 0, 0.0
    while done < num_tokens:
        choice = policy.choose({"drafter": Offer(LIMIT)})
        num_accepted = 0
        while num_accepted < choice.num_drafts and rng.random() < acceptance(done, num_accepted):
            num_accepted += 1
        policy.observe(choice, num_accepted)
        done += num_accepted + 1
        seconds += costs.round_seconds(choice.source, choice.num_drafts)
        steps.append(Step(done, seconds, choice))
    return steps


def mean_speed(costs: StepCosts, acceptance: Acceptance, num_tokens: int) -> float:
    ends = [simulate(costs, acceptance, num_tokens, seed)[-1] for seed in range(40)]
    return mean(end.num_tokens / end.seconds for end in ends)


def steady(rate: float) -> Acceptance:
    return lambda done, position: rate


def best_fixed_speed(costs: StepCosts, rate: float) -> float:
    tokens = [sum(rate**power for power in range(num + 1)) for num in range(LIMIT + 1)]
    return max(tokens[num] / costs.round_seconds("drafter", num) for num in range(LIMIT + 1))


@pytest.mark.parametrize(("rate", "least"), [(0.0, 0.985), (0.4, 1.35), (0.7, 2.12), (0.9, 3.2)])
def test_speed_from_a_cold_start(rate: float, least: float) -> None:
    speed = mean_speed(CHEAP, steady(rate), 256)
    assert speed >= least
    assert speed >= 0.97 * best_fixed_speed(CHEAP, rate)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.55])
def test_where_drafts_are_dear_and_few_stand_it_is_as_fast_as_plain(rate: float) -> None:
    assert best_fixed_speed(DEAR, rate) == 1
    assert mean_speed(DEAR, steady(rate), 256) >= 0.97
    assert mean_speed(DEAR, steady(rate), 2000) >= 0.98


def test_where_drafts_are_dear_and_most_stand_they_are_made() -> None:
    assert mean_speed(DEAR, steady(0.9), 2000) >= 0.97 * best_fixed_speed(DEAR, 0.9)


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
def test_no_single_text_is_slowed_much(costs: StepCosts) -> None:
    ends = [simulate(costs, steady(rate), 256, seed)[-1] for rate in (0.0, 0.2, 0.5) for seed in range(40)]
    assert min(end.num_tokens / end.seconds for end in ends) >= 0.95


def test_lengths_follow_a_steep_rise_of_costs() -> None:
    steep = StepCosts((1.0, 1.05, 1.1, 4.0, 4.1, 4.2, 4.3, 4.4, 4.5), 0.01)
    lengths = [step.choice.num_drafts for step in simulate(steep, steady(0.8), 500, seed=0)]
    assert sum(length == 2 for length in lengths) > 0.9 * len(lengths)


def test_positions_are_told_apart() -> None:
    """The second draft never stands: one is drafted, a second one now and then tried."""
    speed = mean_speed(CHEAP, lambda done, position: 0.8 if position == 0 else 0.0, 1000)
    assert speed >= 0.95 * 1.8 / CHEAP.round_seconds("drafter", 1)


def test_it_recovers_when_the_text_changes() -> None:
    change, speeds = 300, []
    for seed in range(20):
        steps = simulate(CHEAP, lambda done, position: 0.8 if done >= change else 0.0, 500, seed)
        start = next(step for step in steps if step.num_tokens >= change)
        drafting = next(step for step in steps if step.num_tokens >= change and step.choice.num_drafts >= 3)
        assert drafting.num_tokens - start.num_tokens <= 45
        later = next(step for step in steps if step.num_tokens >= start.num_tokens + 60)
        speeds.append((later.num_tokens - start.num_tokens) / (later.seconds - start.seconds))
    assert mean(speeds) >= 0.8 * best_fixed_speed(CHEAP, 0.8)  # of the first 60 tokens, recovery included


def test_it_gives_up_when_the_text_changes() -> None:
    steps = simulate(CHEAP, lambda done, position: 0.9 if done < 300 else 0.0, 450, seed=1)
    assert mean(step.choice.num_drafts for step in steps if step.num_tokens < 300) > 4
    assert mean(step.choice.num_drafts for step in steps if step.num_tokens > 350) < 0.5


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
def test_probing_takes_its_share(costs: StepCosts) -> None:
    late = [step for step in simulate(costs, steady(0.0), 3000, seed=0) if step.num_tokens > 1000]
    extra = sum(costs.round_seconds("drafter", step.choice.num_drafts) - 1.0 for step in late)
    assert 0.8 * PROBE_SHARE < extra / len(late) <= 1.05 * PROBE_SHARE


def test_equal_outcomes_give_equal_choices() -> None:
    first, second = (simulate(CHEAP, steady(0.6), 400, seed=5) for _ in range(2))
    assert first == second


# sources


def test_the_better_source_is_chosen() -> None:
    policy = DraftPolicy(CHEAP, LIMIT, num_places=7)
    offers = {"drafter": Offer(LIMIT), "lookup": Offer(LIMIT, 6)}
    sources = []
    for _ in range(200):
        choice = policy.choose(offers)  # type: ignore[arg-type]
        sources.append(choice.source)
        policy.observe(choice, choice.num_drafts if choice.source == "lookup" else min(choice.num_drafts, 1))
    assert sources[50:].count("lookup") > 140


def test_lookups_are_believed_by_the_length_of_their_match() -> None:
    policy = DraftPolicy(CHEAP, LIMIT, num_places=7)
    for _ in range(60):
        for first_place, stands in ((0, False), (6, True)):
            choice = policy.choose({"lookup": Offer(LIMIT, first_place)})
            policy.observe(choice, choice.num_drafts if stands else 0)
    assert policy.choose({"lookup": Offer(LIMIT, 6)}).num_drafts >= 5
    short = [policy.choose({"lookup": Offer(LIMIT, 0)}).num_drafts for _ in range(4)]
    assert max(short) <= 1


@pytest.mark.parametrize("num_drafts", [0, 1, 2])
def test_no_more_is_chosen_than_is_offered(num_drafts: int) -> None:
    policy = DraftPolicy(CHEAP, LIMIT)
    for _ in range(50):
        choice = policy.choose({"drafter": Offer(num_drafts)})
        assert choice.num_drafts <= num_drafts
        policy.observe(choice, choice.num_drafts)
    assert choice.num_drafts == num_drafts


def test_nothing_offered_is_plain() -> None:
    policy = DraftPolicy(CHEAP, LIMIT)
    assert policy.choose({}) == policy.choose({"lookup": Offer(0)}) == PLAIN
    policy.observe(PLAIN, 0)


def test_a_draft_that_was_not_given_counts_as_rejected() -> None:
    policy = DraftPolicy(CHEAP, LIMIT)
    for _ in range(40):
        policy.observe(policy.choose({"drafter": Offer(LIMIT)}), 0)
    assert [policy.choose({"drafter": Offer(LIMIT)}) for _ in range(2)] == [PLAIN] * 2


# costs


def test_costs_of_a_round() -> None:
    costs = StepCosts((1.0, 1.5, 2.0), 0.1, overhead_seconds=0.01)
    assert costs.round_seconds("plain", 0) == 1.01
    assert costs.round_seconds("drafter", 2) == pytest.approx(2.21)
    assert costs.round_seconds("lookup", 2) == pytest.approx(2.01)
    assert costs.round_seconds("lookup", 16) == pytest.approx(1.0 + 16 * 0.5 + 0.01)  # goes on as it rose
    assert StepCosts((1.0,), None).round_seconds("lookup", 3) == 1.0
