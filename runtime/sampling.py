"""Which token comes next: temperature, top-k, top-p, and the verification of drafted tokens. Pure numpy.

Source: Leviathan et al., arXiv 2211.17192, algorithm 1 (speculative sampling); the warpers of
transformers/generation/logits_process.py in the order temperature, top-k, top-p.
"""

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InferenceError, RequestError

FloatArray = NDArray[np.float32]
IdArray = NDArray[np.int64]

CHUNK_TOKENS = 512  # the vocabulary is scanned in chunks to bound its k-th largest logit


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is drawn: temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95

    @property
    def is_greedy(self) -> bool:
        """True where the likeliest token is taken and nothing is drawn."""
        return self.temperature == 0

    def check(self) -> None:
        """Raises RequestError where a value is out of its range."""
        if not 0 <= _number(self.temperature) < math.inf:
            raise _range_error("temperature", "a finite number >= 0 (0 is greedy)", self.temperature)
        if not isinstance(self.top_k, Integral) or not _number(self.top_k) >= 0:
            raise _range_error("top_k", "a whole number >= 0 (0 is off)", self.top_k)
        if not 0 < _number(self.top_p) <= 1:
            raise _range_error("top_p", "a number above 0 and at most 1 (1 is off)", self.top_p)


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """Candidate tokens and their probabilities, which sum to 1; `distribution` gives the likeliest first."""

    token_ids: IdArray
    probabilities: NDArray[np.float64]

    def probability_of(self, token_id: int) -> float:
        """The probability of a token, 0 where it is no candidate."""
        return float(self.probabilities[self.token_ids == token_id].sum())

    def sample(self, rng: np.random.Generator) -> int:
        """A token drawn by its probability."""
        cumulative = np.cumsum(self.probabilities)
        # side="right" steps over candidates of zero probability
        index = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        return int(self.token_ids[min(index, len(cumulative) - 1)])


class Top(NamedTuple):
    """The best candidates of each row of logits, so that no work here grows with the vocabulary.

    By logit descending, then id ascending. A row of logits that holds a NaN has NaN for all of its own.
    """

    logits: FloatArray  # [num_rows, num_candidates]
    ids: IdArray  # [num_rows, num_candidates]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one verify step: accepted drafts, then one token of the target's own."""

    num_accepted: int
    next_token_id: int


def distribution(logits: FloatArray, params: SamplingParams, token_ids: IdArray | None = None) -> Distribution:
    """The distribution that a token is drawn from: temperature, then top-k, then top-p.

    Args:
        logits: [num_candidates], checked by `check_logits`.
        params: Checked parameters; greedy ones give all probability to the likeliest candidate.
        token_ids: [num_candidates], the candidates where they are not the whole vocabulary.
    """
    if params.is_greedy:
        indices, probabilities = np.array([np.argmax(logits)]), np.ones(1)
    else:
        indices = _likeliest(logits, params.top_k)
        probabilities = _nucleus(_softmax(logits[indices], params.temperature), params.top_p)
        indices = indices[: len(probabilities)]
    return Distribution(indices if token_ids is None else token_ids[indices], probabilities)


def likeliest_tokens(logits: FloatArray) -> Top:
    """The one best candidate of each row; its value is NaN where any logit of the row is.

    Args:
        logits: [num_rows, vocab_size]
    """
    ids = np.argmax(logits, axis=-1, keepdims=True)  # of a NaN where there is one
    return Top(np.take_along_axis(logits, ids, axis=-1), ids)


def verify_greedy(draft_ids: Sequence[int], target_logits: FloatArray, top: Top | None = None) -> Verdict:
    """Accepts drafts while they are the target's likeliest token.

    Args:
        draft_ids: The drafted tokens.
        target_logits: [len(draft_ids) + 1, vocab_size]; row i scores the token at the place of draft i.
        top: The best candidates of these rows, where they are known.
    """
    likeliest: list[int] = (likeliest_tokens(target_logits) if top is None else top).ids[:, 0].tolist()
    for position, draft_id in enumerate(draft_ids):
        if likeliest[position] != draft_id:
            return Verdict(position, likeliest[position])
    return Verdict(len(draft_ids), likeliest[len(draft_ids)])


def verify_sampled(
    draft_ids: Sequence[int],
    draft_distributions: Sequence[Distribution],
    target_logits: FloatArray,
    params: SamplingParams,
    rng: np.random.Generator,
    top: Top | None = None,
) -> Verdict:
    """Accepts drafts so that what comes out is distributed as if the target alone had been sampled.

    Args:
        draft_ids: The drafted tokens, each drawn from its distribution.
        draft_distributions: One per draft.
        target_logits: [len(draft_ids) + 1, vocab_size]; row i scores the token at the place of draft i.
        params: The target's sampling parameters.
        rng: The one source of randomness.
        top: The best candidates of the target's rows, where they are known.
    """
    for position, (draft_id, draft) in enumerate(zip(draft_ids, draft_distributions, strict=True)):
        target = row_distribution(target_logits, position, params, top)
        # With p the target's and q the drafter's probability of the draft: accept with probability min(1, p / q);
        # at the first rejection draw from norm(max(p - q, 0)), after none draw from the target's last row.
        if not rng.random() * draft.probability_of(draft_id) < target.probability_of(draft_id):
            return Verdict(position, _residual(target, draft).sample(rng))
    last = row_distribution(target_logits, len(draft_ids), params, top)
    return Verdict(len(draft_ids), last.sample(rng))


def row_distribution(logits: FloatArray, row: int, params: SamplingParams, top: Top | None) -> Distribution:
    """`distribution` of one row, from its best candidates where they hold all that can be drawn.

    They do for a top-k among them where none but they can tie with the k-th: it is above the last of them.
    """
    if top is not None and not params.is_greedy and 0 < params.top_k < top.ids.shape[1]:
        values = top.logits[row]
        kth = values[params.top_k - 1]
        if kth > values[-1]:
            num_likeliest = int(np.count_nonzero(values >= kth))
            probabilities = _nucleus(_softmax(values[:num_likeliest], params.temperature), params.top_p)
            return Distribution(top.ids[row, : len(probabilities)], probabilities)
    return distribution(logits[row], params)


def check_logits(logits: FloatArray, step: int, top: Top | None = None) -> None:
    """Raises InferenceError where the largest logit of a row is NaN or infinite.

    Args:
        logits: [vocab_size] or [num_rows, vocab_size].
        step: The generation step that the message names.
        top: The best candidates of these rows, where they are known.
    """
    # The maximum is NaN where any logit is; a lone -inf is a masked token and passes.
    peaks = np.atleast_1d(logits.max(axis=-1)) if top is None else top.logits[:, 0]
    for row, peak in enumerate(peaks.tolist()):
        if not math.isfinite(peak):
            raise InferenceError(
                f"step {step}: the largest of {logits.shape[-1]:,} logits in row {row} is {peak}; "
                "the model overflowed or every token is masked: export it again or choose another precision"
            )


def _likeliest(logits: FloatArray, top_k: int) -> IdArray:
    """Indices of the `top_k` largest logits, descending, with all that tie with the last; all indices for 0."""
    indices = np.arange(logits.size) if top_k in (0, logits.size) else _at_least_kth(logits, top_k)
    return indices[np.argsort(-logits[indices], kind="stable")].astype(np.int64, copy=False)


def _softmax(descending: FloatArray, temperature: float) -> NDArray[np.float64]:
    # The peak goes first: a tiny temperature then overflows to -inf, a probability of zero, and never to NaN.
    with np.errstate(over="ignore"):
        weights = np.exp((descending.astype(np.float64) - float(descending[0])) / float(temperature))
    return weights / weights.sum()  # type: ignore[no-any-return]


def _nucleus(descending: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """The fewest probabilities that sum to `top_p` or more, made to sum to 1."""
    if top_p == 1:
        return descending
    kept = descending[: int(np.searchsorted(np.cumsum(descending), top_p)) + 1]
    return kept / kept.sum()  # type: ignore[no-any-return]


def _at_least_kth(logits: FloatArray, top_k: int) -> IdArray:
    # k chunks each hold a logit >= the k-th largest chunk maximum, so the k-th largest logit is no smaller: one pass
    # leaves a few hundred candidates of 262,144.
    num_chunks = logits.size // CHUNK_TOKENS
    indices = np.arange(logits.size)
    if num_chunks > top_k:
        peaks = logits[: num_chunks * CHUNK_TOKENS].reshape(num_chunks, CHUNK_TOKENS).max(axis=1)
        indices = np.flatnonzero(logits >= _kth_largest(peaks, top_k))
    candidates = logits[indices]
    return indices[candidates >= _kth_largest(candidates, top_k)]


def _kth_largest(values: FloatArray, k: int) -> np.float32:
    place = max(values.size - k, 0)
    return np.partition(values, place)[place]  # type: ignore[no-any-return]


def _residual(target: Distribution, draft: Distribution) -> Distribution:
    """norm(max(p - q, 0)); p itself where rounding leaves no mass or q is not a number."""
    residual = target.probabilities.copy()
    _, in_target, in_draft = np.intersect1d(target.token_ids, draft.token_ids, assume_unique=True, return_indices=True)
    residual[in_target] = np.maximum(residual[in_target] - draft.probabilities[in_draft], 0)
    mass = residual.sum()
    return Distribution(target.token_ids, residual / mass) if mass > 0 else target


def _number(value: Any) -> float:
    """The value as a float; NaN, which no range holds, where it is no number."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


def _range_error(name: str, expected: str, value: Any) -> RequestError:
    return RequestError(f"{name} must be {expected}, got {reprlib.repr(value)}")
