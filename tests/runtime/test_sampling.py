"""Sampling is transformers'; drafting changes no distribution, and the test that says so would notice if it did."""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from runtime.errors import InferenceError, RequestError
from runtime.sampling import (
    Distribution,
    SamplingParams,
    Top,
    Verdict,
    check_logits,
    distribution,
    likeliest_tokens,
    row_distribution,
    verify_greedy,
    verify_sampled,
)

PARAMS = [
    SamplingParams(temperature, top_k, top_p)
    for temperature in (0.3, 1.0, 1.7)
    for top_k in (0, 1, 7, 64)
    for top_p in (0.047, 0.497, 0.947, 1.0)  # not where the sum of tied tokens meets it exactly: rounding would decide
]


def by_transformers(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities over the whole vocabulary, [vocab_size]."""
    scores = TemperatureLogitsWarper(params.temperature)(None, torch.from_numpy(logits)[None].double())
    scores = TopKLogitsWarper(params.top_k)(None, scores) if params.top_k else scores
    scores = TopPLogitsWarper(params.top_p)(None, scores) if params.top_p < 1 else scores
    return scores.softmax(-1)[0].numpy()


def dense(found: Distribution, vocab_size: int) -> np.ndarray:
    probabilities = np.zeros(vocab_size)
    probabilities[found.token_ids] = found.probabilities
    return probabilities


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 5, 1000, 70_000])
def test_distribution_is_that_of_transformers(vocab_size: int, params: SamplingParams) -> None:
    logits = np.random.default_rng(vocab_size).normal(scale=3, size=vocab_size).astype(np.float32)
    found = distribution(logits, params)
    # both work in float64, where 70,000 terms of rounding stay far below 1e-12
    np.testing.assert_allclose(dense(found, vocab_size), by_transformers(logits, params), rtol=0, atol=1e-12)
    assert found.token_ids.dtype == np.int64
    assert (np.diff(found.probabilities) <= 0).all()


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_tied_logits_are_kept_as_in_transformers(params: SamplingParams) -> None:
    """Tokens that tie at the nucleus' edge are interchangeable: probabilities are compared, not ids."""
    logits = np.random.default_rng(3).integers(-2, 3, size=1100).astype(np.float32)
    found, expected = dense(distribution(logits, params), 1100), by_transformers(logits, params)
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=0, atol=1e-12)
    if params.top_p == 1:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_masked_logits_have_no_probability(params: SamplingParams) -> None:
    logits = np.full(2000, -np.inf, np.float32)
    logits[[7, 1500, 1999]] = [0.5, 2.0, 1.0]
    np.testing.assert_allclose(dense(distribution(logits, params), 2000), by_transformers(logits, params), atol=1e-12)


def test_candidates_carry_their_own_ids() -> None:
    logits, ids = np.array([1.0, 3.0, 2.0], np.float32), np.array([900, 50, 7])
    found = distribution(logits, SamplingParams(1.0, 2, 1.0), ids)
    assert found.token_ids.tolist() == [50, 7]
    assert found.probability_of(50) == pytest.approx(1 / (1 + np.exp(-1)))
    assert found.probability_of(900) == 0
    assert distribution(logits, SamplingParams(0.0), ids).token_ids.tolist() == [50]


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e30])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    found = distribution(np.array([1.0, 3.0, 2.9], np.float32), SamplingParams(temperature, 0, 1.0))
    assert found.probability_of(1) == pytest.approx(1 if temperature < 1 else 1 / 3)
    assert found.probabilities.sum() == pytest.approx(1)


def test_a_gemma_vocabulary_is_fast() -> None:
    logits = np.random.default_rng(0).normal(size=262_144).astype(np.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        distribution(logits, SamplingParams())
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01  # 0.3 ms; a full sort alone takes 29 ms


def test_samples_follow_their_probabilities() -> None:
    found = Distribution(np.array([4, 9, 2, 5]), np.array([0.6, 0.3, 0.1, 0.0]))
    rng = np.random.default_rng(0)
    counts = Counter(found.sample(rng) for _ in range(5000))
    assert counts[5] == 0
    assert chisquare([counts[4], counts[9], counts[2]], [3000, 1500, 500]).pvalue > 0.01


# verification ---------------------------------------------------------------------------------------------------------

VOCAB_SIZE = 6
NUM_DRAWS = 4000
Verify = Callable[..., Verdict]


class Model:
    """Logits that depend on the two tokens before, [VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE]."""

    def __init__(self, seed: int, scale: float) -> None:
        self.table = np.random.default_rng(seed).normal(scale=scale, size=(VOCAB_SIZE,) * 3).astype(np.float32)

    def logits(self, prefix: tuple[int, ...]) -> np.ndarray:
        return self.table[(0, 0, *prefix)[-2], (0, 0, *prefix)[-1]]


TARGET, DRAFTER = Model(seed=1, scale=1.5), Model(seed=2, scale=2.5)
DRAFTER_PARAMS = SamplingParams(1.0, 0, 1.0)


def generate_pair(verify: Verify, params: SamplingParams, rng: np.random.Generator) -> tuple[int, int]:
    """The first two tokens of a generation with two drafts a step."""
    output: tuple[int, ...] = ()
    while len(output) < 2:
        draft: tuple[int, ...] = ()
        draft_distributions = []
        for _ in range(2):
            draft_distributions.append(distribution(DRAFTER.logits(output + draft), DRAFTER_PARAMS))
            draft += (draft_distributions[-1].sample(rng),)
        rows = np.stack([TARGET.logits(output + draft[:num]) for num in range(3)])
        verdict = verify(draft, draft_distributions, rows, params, rng)
        output += (*draft[: verdict.num_accepted], verdict.next_token_id)
    return output[0], output[1]


def p_value(verify: Verify, params: SamplingParams) -> float:
    """Chi-square of the joint distribution of two generated tokens against the target's own."""
    rng = np.random.default_rng(11)
    counts = Counter(generate_pair(verify, params, rng) for _ in range(NUM_DRAWS))
    pairs = list(itertools.product(range(VOCAB_SIZE), repeat=2))
    first = distribution(TARGET.logits(()), params)
    expected = np.array(
        [first.probability_of(a) * distribution(TARGET.logits((a,)), params).probability_of(b) for a, b in pairs]
    )
    found = np.array([counts[pair] for pair in pairs])
    if found[expected == 0].any():
        return 0.0
    rare = expected * NUM_DRAWS < 5  # too few for the chi-square approximation: pooled into one cell
    pool = np.append(expected[~rare], expected[rare].sum()), np.append(found[~rare], found[rare].sum())
    used = pool[0] > 0
    return float(chisquare(pool[1][used], pool[0][used] * NUM_DRAWS).pvalue) if used.sum() > 1 else 1.0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0, 0, 1.0),
        SamplingParams(1.6, 0, 1.0),
        SamplingParams(0.4, 0, 1.0),
        SamplingParams(1.0, 3, 1.0),
        SamplingParams(1.0, 0, 0.7),
        SamplingParams(1.3, 4, 0.8),
        SamplingParams(0.0),
    ],
    ids=str,
)
def test_verification_keeps_the_targets_distribution(params: SamplingParams) -> None:
    assert p_value(verify_sampled, params) > 0.01  # the seed is fixed: no chance involved from run to run


def wrong_verify(*, always_accept: bool = False, use_residual: bool = True, swap: bool = False) -> Verify:
    """`verify_sampled` with one rule broken."""

    def verify(draft_ids: Any, drafts: Any, rows: np.ndarray, params: SamplingParams, rng: Any) -> Verdict:
        for position, (token, q) in enumerate(zip(draft_ids, drafts, strict=True)):
            p = distribution(rows[position], params)
            ratio = p.probability_of(token) / q.probability_of(token)
            if always_accept or rng.random() < (1 / ratio if swap and ratio else ratio):
                continue
            weights = dense(p, VOCAB_SIZE) - (dense(q, VOCAB_SIZE) if use_residual else 0)
            weights = np.maximum(weights, 0) / np.maximum(weights, 0).sum()
            return Verdict(position, int(rng.choice(VOCAB_SIZE, p=weights)))
        return Verdict(len(draft_ids), distribution(rows[-1], params).sample(rng))

    return verify


def test_the_check_has_power() -> None:
    """The same check with the rule written out again passes, and with any part of the rule broken fails."""
    params = SamplingParams(1.0, 0, 1.0)
    assert p_value(wrong_verify(), params) > 0.01
    for broken in ({"always_accept": True}, {"use_residual": False}, {"swap": True}):
        assert p_value(wrong_verify(**broken), params) < 1e-6, broken


def test_at_temperature_zero_sampled_verification_is_the_greedy_one() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        rows = rng.normal(size=(4, VOCAB_SIZE)).astype(np.float32)
        drafts = [distribution(rng.normal(size=VOCAB_SIZE).astype(np.float32), DRAFTER_PARAMS) for _ in range(3)]
        ids = [
            int(row.argmax()) if rng.random() < 0.7 else draft.sample(rng)
            for row, draft in zip(rows[:3], drafts, strict=True)
        ]
        assert verify_sampled(ids, drafts, rows, SamplingParams(0.0), rng) == verify_greedy(ids, rows)


def test_greedy_verification_accepts_what_greedy_decoding_would_write() -> None:
    rows = np.eye(4, VOCAB_SIZE, k=1, dtype=np.float32)  # the target writes 1 2 3 4
    assert verify_greedy([1, 2, 3], rows) == Verdict(3, 4)
    assert verify_greedy([1, 5, 3], rows) == Verdict(1, 2)
    assert verify_greedy([0, 2, 3], rows) == Verdict(0, 1)
    assert verify_greedy([], rows[:1]) == Verdict(0, 1)


def test_without_drafts_the_target_is_sampled() -> None:
    rows = np.array([[0, 9, 0]], np.float32)
    assert verify_sampled([], [], rows, SamplingParams(0.1), np.random.default_rng(0)) == Verdict(0, 1)


def test_equal_distributions_accept_every_draft() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, VOCAB_SIZE)).astype(np.float32)
    drafts = [distribution(row, SamplingParams()) for row in rows[:2]]
    for _ in range(200):
        ids = [draft.sample(rng) for draft in drafts]
        assert verify_sampled(ids, drafts, rows, SamplingParams(), rng).num_accepted == 2


@pytest.mark.parametrize("q", [[0.5, 0.5], [np.nan, np.nan]], ids=["no residual mass", "NaN from the drafter"])
def test_a_rejection_without_a_usable_residual_samples_the_target(q: list[float]) -> None:
    class NeverAccepts:
        """Probability 0.5 + rounding: the draft is rejected although p equals q."""

        def random(self) -> float:
            return 1.0 - 2**-53

    rows = np.array([[1, 1], [0, 0]], np.float32)
    draft = Distribution(np.array([0, 1]), np.array(q) * (1 + 1e-15))
    verdict = verify_sampled([0], [draft], rows, SamplingParams(1.0, 0, 1.0), NeverAccepts())  # type: ignore[arg-type]
    assert verdict == Verdict(0, 1)


def test_only_needed_rows_are_looked_at() -> None:
    rows = np.full((4, VOCAB_SIZE), np.nan, np.float32)
    rows[0] = [9, 0, 0, 0, 0, 0]
    draft = Distribution(np.array([3]), np.array([1.0]))
    verdict = verify_sampled([3] * 3, [draft] * 3, rows, SamplingParams(0.1), np.random.default_rng(0))
    assert verdict == Verdict(0, 0)


# checks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, 2])
def test_unusable_logits_are_named_by_step_and_row(bad: float, row: int) -> None:
    logits = np.zeros((3, 1000), np.float32)
    logits[row, 500] = bad
    with pytest.raises(InferenceError, match=rf"^step 17: the largest of 1,000 logits in row {row} is {bad}; "):
        check_logits(logits, 17)


def test_one_row_and_masked_tokens_pass_and_a_fully_masked_row_does_not() -> None:
    check_logits(np.array([-np.inf, 1.0], np.float32), 0)
    with pytest.raises(InferenceError, match=r"^step 3: .* is -inf; .*every token is masked"):
        check_logits(np.full(4, -np.inf, np.float32), 3)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(0, 0, 1),
        SamplingParams(np.float32(0.5), np.int64(3), np.float64(0.5)),  # type: ignore[arg-type]
        SamplingParams(1e308, 10**30, 1e-300),
    ],
)
def test_usable_parameters_pass(params: SamplingParams) -> None:
    params.check()
    assert params.is_greedy == (params.temperature == 0)
    assert len(distribution(np.arange(3, dtype=np.float32), params).token_ids) >= 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.5}, r"temperature must be a finite number >= 0 \(0 is greedy\), got -0.5"),
        ({"temperature": float("nan")}, r"temperature .*, got nan"),
        ({"temperature": float("inf")}, r"temperature .*, got inf"),
        ({"temperature": 10**400}, r"temperature .*, got 10000"),
        ({"temperature": True}, r"temperature .*, got True"),
        ({"temperature": "1"}, r"temperature .*, got '1'"),
        ({"temperature": None}, r"temperature .*, got None"),
        ({"top_k": -1}, r"top_k must be a whole number >= 0 \(0 is off\), got -1"),
        ({"top_k": 1.0}, r"top_k .*, got 1.0"),
        ({"top_k": False}, r"top_k .*, got False"),
        ({"top_p": 0}, r"top_p must be a number above 0 and at most 1 \(1 is off\), got 0"),
        ({"top_p": 1.01}, r"top_p .*, got 1.01"),
        ({"top_p": float("nan")}, r"top_p .*, got nan"),
        ({"top_p": True}, r"top_p .*, got True"),
        ({"top_p": [0.5]}, r"top_p .*, got \[0.5\]"),
    ],
)
def test_unusable_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match="^" + message):
        SamplingParams(**params).check()


# from the best candidates ---------------------------------------------------------------------------------------------

NUM_CANDIDATES = 16


def top_of(logits: np.ndarray, num_candidates: int = NUM_CANDIDATES) -> Top:
    """What the graph gives: by value descending, then id ascending; NaN values in a row with a NaN."""
    ids = np.stack([np.lexsort((np.arange(row.size), -row))[:num_candidates] for row in logits])
    values = np.take_along_axis(logits, ids, axis=1)
    values[np.isnan(logits).any(axis=1)] = np.nan
    return Top(values, ids)


def tied_rows(seed: int, num_rows: int) -> np.ndarray:
    """Rows with few and many ties, masked tokens and both zeros."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(scale=2, size=(num_rows, 60)).astype(np.float32)
    coarse = rng.choice([1, 2, 8, 1000], size=(num_rows, 1)).astype(np.float32)
    rows = np.round(rows * coarse) / coarse
    rows[rng.random(rows.shape) < rng.choice([0, 0.1, 0.9], size=(num_rows, 1))] = -np.inf
    rows[:, 0] = np.where(np.isinf(rows).all(axis=1), 0, rows[:, 0])
    return rows


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_candidates_give_the_same_distribution(params: SamplingParams) -> None:
    logits = tied_rows(0, 60)
    top = top_of(logits)
    for row in range(len(logits)):
        found, expected = row_distribution(logits, row, params, top), distribution(logits[row], params)
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        assert found.probabilities.tolist() == expected.probabilities.tolist()


def test_where_candidates_suffice_the_logits_are_not_looked_at() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 60)).astype(np.float32)
    top = top_of(logits)
    others = np.zeros_like(logits)
    others[:, 59] = 50.0
    for top_k in range(1, NUM_CANDIDATES):
        params = SamplingParams(0.7, top_k, 0.9)
        found = row_distribution(others, 1, params, top)
        assert found.token_ids.tolist() == distribution(logits[1], params).token_ids.tolist()
    for top_k in (0, NUM_CANDIDATES, NUM_CANDIDATES + 1):
        assert row_distribution(others, 1, SamplingParams(0.7, top_k, 0.5), top).token_ids.tolist() == [59]


@pytest.mark.parametrize("params", [SamplingParams(0.0), *PARAMS[16:24]], ids=str)
def test_candidates_give_the_same_verdicts(params: SamplingParams) -> None:
    rng = np.random.default_rng(1)
    for seed in range(60):
        rows = tied_rows(seed, 4)
        drafts = [distribution(rng.normal(size=60).astype(np.float32), DRAFTER_PARAMS) for _ in range(3)]
        ids = [
            int(row.argmax()) if rng.random() < 0.7 else draft.sample(rng)
            for row, draft in zip(rows[:3], drafts, strict=True)
        ]
        first, second = np.random.default_rng(seed), np.random.default_rng(seed)
        assert verify_sampled(ids, drafts, rows, params, first, top_of(rows)) == (
            verify_sampled(ids, drafts, rows, params, second)
        )
        assert first.random() == second.random()
        assert verify_greedy(ids, rows, top_of(rows)) == verify_greedy(ids, rows, likeliest_tokens(rows))
        assert verify_greedy(ids, rows, top_of(rows)) == verify_greedy(ids, rows)


def test_candidates_of_a_small_vocabulary_are_all_of_it() -> None:
    logits = np.array([[1.0, 3.0, 2.0]], np.float32)
    for top_k in range(5):
        params = SamplingParams(1.0, top_k, 1.0)
        found, expected = row_distribution(logits, 0, params, top_of(logits, 3)), distribution(logits[0], params)
        assert dense(found, 3).tolist() == dense(expected, 3).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_candidates_are_checked_as_the_logits_are(bad: float) -> None:
    logits = np.zeros((3, 1000), np.float32)
    check_logits(logits, 0, top_of(logits))
    logits[2, slice(None) if bad < 0 else 500] = bad
    messages = []
    for top in (None, top_of(logits), likeliest_tokens(logits)):
        with pytest.raises(
            InferenceError, match=rf"^step 17: the largest of 1,000 logits in row 2 is {bad}; "
        ) as caught:
            check_logits(logits, 17, top)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1
