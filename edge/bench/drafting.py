"""Rounds of the draft-verify loop, with the acceptance that the model has or with an assumed one."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge.bench.opened import OpenedArtifact, TokenIds, prefer, session_clock
from runtime.drafting import DraftCounts, Drafter
from runtime.generation import Target
from runtime.prefix import Reuse
from runtime.sampling import SamplingParams
from runtime.target import Forward

GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Rounds:
    """What rounds behind the first token took: seconds of each, and those of them outside onnxruntime."""

    seconds: tuple[float, ...]
    outside_seconds: tuple[float, ...]
    num_tokens: int
    counts: DraftCounts

    @property
    def tokens_per_second(self) -> float:
        """Over all rounds."""
        return self.num_tokens / sum(self.seconds)

    @property
    def tokens_per_round(self) -> float:
        """Drafts that stood, and the target's own token."""
        return self.num_tokens / len(self.seconds)

    @property
    def drafts_per_round(self) -> float:
        """Drafts that were made."""
        return self.counts.num_drafted / len(self.seconds)


class AssumedTarget:
    """The target, but each draft stands with probability `acceptance` if those before it stand.

    Every forward is computed; then its logits are made to prefer the draft, or another token where it is to fall.
    Tokens stay real ids and vary, so that their rows are looked up as those of text are.
    """

    def __init__(self, target: Target, acceptance: float, token_ids: TokenIds, seed: int) -> None:
        self._target = target
        self._acceptance = acceptance
        self._token_ids = token_ids
        self._rng = np.random.default_rng(seed)

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        """Appends tokens; those behind the first kept one are drafts."""
        forward = self._target.forward(token_ids, num_kept)
        draft_ids = token_ids[len(token_ids) - num_kept + 1 :]
        num_accepted = self._draw(len(draft_ids))
        for row, draft_id in enumerate(draft_ids[:num_accepted]):
            prefer(forward, row, draft_id)
        rejected = draft_ids[num_accepted] if num_accepted < len(draft_ids) else -1
        own = next(token for token in self._token_ids.take(2) if token != rejected)
        prefer(forward, num_accepted, own)
        return forward

    def trim(self, num_tokens: int) -> None:
        """Forgets the last tokens."""
        self._target.trim(num_tokens)

    def reuse(self, token_ids: Sequence[int]) -> Reuse:
        """None: what is cached stays, and the rounds go on behind it."""
        return Reuse(0, 0)

    def _draw(self, num_drafts: int) -> int:
        falls = np.flatnonzero(self._rng.random(num_drafts) >= self._acceptance)
        return int(falls[0]) if len(falls) else num_drafts


def run_rounds(
    opened: OpenedArtifact,
    target: Target,
    drafter: Drafter | None,
    context: int,
    num_tokens: int,
    *,
    params: SamplingParams = GREEDY,
    num_draft_tokens: int | None = None,
) -> Rounds:
    """Generates `num_tokens` tokens behind the first one, from a context of random tokens.

    Args:
        num_draft_tokens: so many drafts in every round; None for as many as the runtime would make
    """
    opened.jump(context - 1)
    counts = DraftCounts()
    token_ids = opened.token_ids(seed=context)
    first = token_ids.take(1)[0]
    blocks = opened.rounds(target, drafter, first, num_tokens + 1, params, counts, num_draft_tokens)
    next(blocks)  # the prompt
    seconds, outside, num_generated = [], [], 0
    with session_clock() as clock:
        start, inside = time.perf_counter(), 0.0
        for block in blocks:
            stop = time.perf_counter()
            seconds.append(stop - start)
            outside.append(stop - start - (clock.seconds - inside))
            num_generated += len(block)
            start, inside = time.perf_counter(), clock.seconds
    assert clock.num_runs >= len(seconds), "forwards ran that no session clock saw"
    return Rounds(tuple(seconds), tuple(outside), num_generated, counts)
