"""The draft-verify loop: which tokens come next. Knows nothing of sessions, files or text.

Source: Leviathan et al., arXiv 2211.17192 (verification); transformers 5.22 `_assisted_decoding` (the round).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from runtime.constraint import Constraint, masked_logits
from runtime.draft_policy import StepCosts
from runtime.drafter import Draft
from runtime.drafting import AdaptiveDrafting, DraftCounts, Drafter, Drafting, FixedDrafting, LastingDrafter
from runtime.prefix import Reuse
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
from runtime.turns import Sliding


class Target(Protocol):
    """What the loop needs of the target model."""

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        """Appends tokens and returns the results of the last `num_kept`."""
        ...

    def trim(self, num_tokens: int) -> None:
        """Forgets the last tokens."""
        ...

    def reuse(self, token_ids: Sequence[int]) -> Reuse:
        """Keeps as many of the first of these tokens as are cached, not the last, and forgets all others."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be generated; `max_tokens` already fits the context, with `sliding` once all is dropped that may be.

    With `costs` as many tokens are drafted as pay, `num_draft_tokens` at most; without, so many in every round.
    `fills_context` says that more would have been generated, had the context held it. Of `constraint` each generation
    takes one of its own.
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    params: SamplingParams
    num_draft_tokens: int
    prefill_chunk_tokens: int
    costs: StepCosts | None = None
    sliding: Sliding | None = None
    fills_context: bool = False
    constraint: Constraint | None = None


def generate_blocks(
    target: Target,
    drafter: Drafter | None,
    request: Request,
    rng: np.random.Generator,
    counts: DraftCounts,
    cancelled: Callable[[], bool],
) -> Iterator[list[int]]:
    """Yields the token ids of each step, `max_tokens` in all; ends early where `cancelled` says so.

    Where the context is full and turns may be dropped, the rest goes on as a generation whose prompt is the kept turns
    and all that was generated. How many tokens that is in does not depend on drafts.

    Raises:
        InferenceError: the target produced NaN or infinite logits, or its session failed.
    """
    drafting = _drafting(LastingDrafter(drafter, request.params, rng, counts, cancelled), request)
    constraint = request.constraint
    generated: list[int] = []
    step = 0
    while len(generated) < request.max_tokens:
        # prefill
        token_ids, end = _fitted(request, generated, counts)
        reuse = target.reuse(token_ids)
        forward = _prefill(target, token_ids[reuse.num_tokens :], request.prefill_chunk_tokens, cancelled)
        if forward is None:
            return
        counts.count_prefill(len(token_ids), reuse)
        block = [_verify([], forward, request.params, rng, step, constraint).next_token_id]
        hidden = forward.hidden[-1]
        generated += block
        if constraint is not None:
            constraint.consume(block)
        yield block

        # decode
        drafting.begin([*token_ids, *block])
        while len(generated) < end and not cancelled():
            drafts = drafting.propose(block[-1], hidden, end - len(generated) - 1)
            if cancelled():
                return
            # drafts that the constraint forbids fall, the first of them by the verdict: so the text is the target's
            draft_ids = _ids(drafts)
            num_allowed = len(drafts) if constraint is None else constraint.num_allowed(draft_ids)
            forward = target.forward([block[-1], *draft_ids[:num_allowed]], num_kept=num_allowed + 1)
            judged = drafts[: num_allowed + 1]
            verdict = _verify(judged, forward, request.params, rng, step := step + 1, constraint)
            num_accepted = verdict.num_accepted
            target.trim(num_allowed - num_accepted)
            block = [*draft_ids[:num_accepted], verdict.next_token_id]
            counts.count(len(drafts), num_accepted, drafting.observe(block, num_accepted))
            hidden = forward.hidden[num_accepted]
            generated += block
            if constraint is not None:
                constraint.consume(block)
            yield block
        if cancelled():
            return
        step += 1


def _ids(drafts: Sequence[Draft]) -> list[int]:
    return [draft.token_id for draft in drafts]


def _fitted(request: Request, generated: Sequence[int], counts: DraftCounts) -> tuple[list[int], int]:
    """What is prefilled now, without turns that there is no room for, and how many tokens are then generated in all.

    Those are `max_tokens`, or as many as fill the context again.
    """
    if (sliding := request.sliding) is None:
        return list(request.prompt_ids), request.max_tokens
    num_tokens, num_left = len(request.prompt_ids) + len(generated), request.max_tokens - len(generated)
    num_dropped = sliding.num_dropped(num_tokens, num_left)
    counts.num_slides += num_dropped > counts.num_dropped_tokens
    counts.num_dropped_tokens = num_dropped
    token_ids = [*sliding.kept(request.prompt_ids, num_dropped), *generated]
    return token_ids, len(generated) + min(num_left, sliding.context_tokens - len(token_ids))


def _drafting(drafter: LastingDrafter, request: Request) -> Drafting:
    if request.costs is None:
        return FixedDrafting(drafter, request.num_draft_tokens)
    return AdaptiveDrafting(drafter, request.num_draft_tokens, request.costs, request.params)


def _prefill(
    target: Target, token_ids: Sequence[int], chunk_tokens: int, cancelled: Callable[[], bool]
) -> Forward | None:
    """Feeds the tokens in chunks; the results of the last one, or None where it was cancelled."""
    forward = None
    for start in range(0, len(token_ids), chunk_tokens):
        if cancelled():
            return None
        forward = target.forward(token_ids[start : start + chunk_tokens], num_kept=1)
    return forward


def _verify(
    drafts: Sequence[Draft],
    forward: Forward,
    params: SamplingParams,
    rng: np.random.Generator,
    step: int,
    constraint: Constraint | None,
) -> Verdict:
    """How many drafts stand, and the target's own next token.

    A last draft that the constraint forbids has no row behind it: at its own place it has no probability, and falls.
    """
    logits, top = forward.logits, None
    if forward.top_logits is not None and forward.top_ids is not None:
        top = Top(forward.top_logits, forward.top_ids)
    elif params.is_greedy:
        top = likeliest_tokens(logits)
    check_logits(logits, step, top)
    draft_ids = _ids(drafts)
    if constraint is not None:
        masks = constraint.masks(draft_ids[: len(logits) - 1])
        if any(mask is not None for mask in masks):
            logits, top = masked_logits(logits, masks), None
            check_logits(logits, step)
    if params.is_greedy:
        return verify_greedy(draft_ids, logits, top)
    drawn_from = [draft.distribution for draft in drafts if draft.distribution is not None]
    return verify_sampled(draft_ids, drawn_from, logits, params, rng, top)
