"""The draft-verify loop: which tokens come next. Knows nothing of sessions, files or text.

Source: Leviathan et al., arXiv 2211.17192 (verification); transformers 5.22 `_assisted_decoding` (the round).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from runtime.draft_policy import StepCosts
from runtime.drafter import Draft
from runtime.drafting import AdaptiveDrafting, DraftCounts, Drafter, Drafting, FixedDrafting, LastingDrafter
from runtime.sampling import (
    SamplingParams,
    Top,
    Verdict,
    check_logits,
    likeliest_tokens,
    verify_greedy,
    verify_sampled,
)
from runtime.target import Forward


class Target(Protocol):
    """What the loop needs of the target model."""

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        """Appends tokens and returns the results of the last `num_kept`."""
        ...

    def trim(self, num_tokens: int) -> None:
        """Forgets the last tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be generated; `max_tokens` already fits the context.

    With `costs` as many tokens are drafted as pay, `num_draft_tokens` at most; without, so many in every round.
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    params: SamplingParams
    num_draft_tokens: int
    prefill_chunk_tokens: int
    costs: StepCosts | None = None


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
    verdict = _verify([], forward, request.params, rng, step=0)
    block = [verdict.next_token_id]
    hidden = forward.hidden[-1]
    num_left = request.max_tokens - 1
    yield block

    # decode
    drafting = _drafting(LastingDrafter(drafter, request.params, rng, counts, cancelled), request, block)
    while num_left > 0 and not cancelled():
        drafts = drafting.propose(block[-1], hidden, num_left - 1)
        if cancelled():
            return
        draft_ids = [draft.token_id for draft in drafts]
        forward = target.forward([block[-1], *draft_ids], num_kept=len(draft_ids) + 1)
        verdict = _verify(drafts, forward, request.params, rng, step=counts.num_verify_steps + 1)
        num_accepted = verdict.num_accepted
        target.trim(len(draft_ids) - num_accepted)
        block = [*draft_ids[:num_accepted], verdict.next_token_id]
        counts.count(len(draft_ids), num_accepted, drafting.observe(block, num_accepted))
        hidden = forward.hidden[num_accepted]
        num_left -= len(block)
        yield block


def _drafting(drafter: LastingDrafter, request: Request, first_block: Sequence[int]) -> Drafting:
    if request.costs is None:
        return FixedDrafting(drafter, request.num_draft_tokens)
    token_ids = [*request.prompt_ids, *first_block]
    return AdaptiveDrafting(drafter, token_ids, request.num_draft_tokens, request.costs, request.params)


def _prefill(target: Target, request: Request, cancelled: Callable[[], bool]) -> Forward | None:
    """Feeds the prompt in chunks; the results of its last token, or None where it was cancelled."""
    forward = None
    for start in range(0, len(request.prompt_ids), request.prefill_chunk_tokens):
        if cancelled():
            return None
        forward = target.forward(request.prompt_ids[start : start + request.prefill_chunk_tokens], num_kept=1)
    return forward


def _verify(
    drafts: Sequence[Draft], forward: Forward, params: SamplingParams, rng: np.random.Generator, step: int
) -> Verdict:
    """How many drafts stand, and the target's own next token."""
    logits, top = forward.logits, None
    if forward.top_logits is not None and forward.top_ids is not None:
        top = Top(forward.top_logits, forward.top_ids)
    elif params.is_greedy:
        top = likeliest_tokens(logits)
    check_logits(logits, step, top)
    draft_ids = [draft.token_id for draft in drafts]
    if params.is_greedy:
        return verify_greedy(draft_ids, logits, top)
    drawn_from = [draft.distribution for draft in drafts if draft.distribution is not None]
    return verify_sampled(draft_ids, drawn_from, logits, params, rng, top)
