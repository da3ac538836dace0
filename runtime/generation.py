"""The draft-verify loop: which tokens come next. Knows nothing of sessions, files or text.

Source: Leviathan et al., arXiv 2211.17192 (verification); transformers 5.22 `_assisted_decoding` (the round).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.drafter import Draft
from runtime.errors import InferenceError
from runtime.sampling import SamplingParams, Verdict, check_logits, verify_greedy, verify_sampled
from runtime.target import Forward

Float32 = npt.NDArray[np.float32]


class Target(Protocol):
    """What the loop needs of the target model."""

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        """Appends tokens and returns the results of the last `num_kept`."""
        ...

    def trim(self, num_tokens: int) -> None:
        """Forgets the last tokens."""
        ...


class Drafter(Protocol):
    """What the loop needs of a drafter."""

    def draft(
        self,
        last_token_id: int,
        hidden: Float32,
        num_draft_tokens: int,
        params: SamplingParams,
        rng: np.random.Generator,
    ) -> list[Draft]:
        """At most `num_draft_tokens` tokens behind `last_token_id`."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be generated; `max_tokens` already fits the context."""

    prompt_ids: Sequence[int]
    max_tokens: int
    params: SamplingParams
    num_draft_tokens: int
    prefill_chunk_tokens: int


@dataclass(slots=True)
class DraftCounts:
    """What drafting did; `accepted_histogram[n]` counts the verify steps that accepted n drafts."""

    num_drafted: int = 0
    num_accepted: int = 0
    num_verify_steps: int = 0
    num_drafter_faults: int = 0
    accepted_histogram: list[int] = field(default_factory=list)

    def count(self, num_drafted: int, num_accepted: int) -> None:
        """Counts one forward of the target behind the prefill."""
        self.num_verify_steps += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.accepted_histogram += [0] * (num_accepted + 1 - len(self.accepted_histogram))
        self.accepted_histogram[num_accepted] += 1

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0 where nothing was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens each verify step yields: 1 + accepted / verify steps."""
        return 1 + self.num_accepted / self.num_verify_steps if self.num_verify_steps else 0.0


def generate_blocks(
    target: Target,
    drafter: Drafter | None,
    request: Request,
    rng: np.random.Generator,
    counts: DraftCounts,
    cancelled: Callable[[], bool],
) -> Iterator[list[int]]:
    """Yields the token ids of each step, `max_tokens` in all; ends early where `cancelled` says so.

    Raises:
        InferenceError: the target produced NaN or infinite logits, or its session failed.
    """
    # prefill
    forward = _prefill(target, request, cancelled)
    if forward is None:
        return
    verdict = _verify([], forward.logits, request.params, rng, step=0)
    block = [verdict.next_token_id]
    hidden = forward.hidden[-1]
    num_left = request.max_tokens - 1
    yield block

    # decode
    while num_left > 0 and not cancelled():
        num_drafts = min(request.num_draft_tokens, num_left - 1)
        drafts: list[Draft] = []
        if drafter is not None and num_drafts > 0:
            try:
                drafts = drafter.draft(block[-1], hidden, num_drafts, request.params, rng)
                counts.num_drafter_faults += len(drafts) < num_drafts
            except InferenceError:
                if cancelled():  # a terminated run fails
                    return
                counts.num_drafter_faults += 1
                drafter = None  # a drafter that failed is not asked again
        if cancelled():
            return
        draft_ids = [draft.token_id for draft in drafts]
        forward = target.forward([block[-1], *draft_ids], num_kept=len(draft_ids) + 1)
        verdict = _verify(drafts, forward.logits, request.params, rng, step=counts.num_verify_steps + 1)
        counts.count(len(draft_ids), verdict.num_accepted)
        target.trim(len(draft_ids) - verdict.num_accepted)
        block = [*draft_ids[: verdict.num_accepted], verdict.next_token_id]
        hidden = forward.hidden[verdict.num_accepted]
        num_left -= len(block)
        yield block


def _prefill(target: Target, request: Request, cancelled: Callable[[], bool]) -> Forward | None:
    """Feeds the prompt in chunks; the results of its last token, or None where it was cancelled."""
    forward = None
    for start in range(0, len(request.prompt_ids), request.prefill_chunk_tokens):
        if cancelled():
            return None
        forward = target.forward(request.prompt_ids[start : start + request.prefill_chunk_tokens], num_kept=1)
    return forward


def _verify(
    drafts: Sequence[Draft], logits: Float32, params: SamplingParams, rng: np.random.Generator, step: int
) -> Verdict:
    """How many drafts stand, and the target's own next token."""
    check_logits(logits, step)
    draft_ids = [draft.token_id for draft in drafts]
    if params.is_greedy:
        return verify_greedy(draft_ids, logits)
    drawn_from = [draft.distribution for draft in drafts if draft.distribution is not None]
    return verify_sampled(draft_ids, drawn_from, logits, params, rng)
