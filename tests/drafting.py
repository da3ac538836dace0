"""Stand-ins for the loop's target and drafter: they record, propose what a test wants, or are broken on purpose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.draft_policy import StepCosts
from runtime.drafter import Draft
from runtime.generation import DraftCounts, Drafter, Request, Target, generate_blocks
from runtime.prefix import Reuse
from runtime.sampling import SamplingParams, distribution
from runtime.target import Forward

Float32 = npt.NDArray[np.float32]
GREEDY = SamplingParams(temperature=0.0)
ONE_GO = 1 << 20  # a prefill chunk that holds any prompt
# drafting pays at almost any rate, and what pays best changes with it
CHEAP_DRAFTS = StepCosts((1.0, 1.02, 1.08, 1.15, 1.22, 1.32, 1.5, 1.8, 1.9), 0.015)


class RecordingTarget:
    """A target that keeps the tokens in its cache, and the logits row that decided each generated token."""

    def __init__(self, target: Target) -> None:
        self.token_ids: list[int] = []
        self.rows: list[Float32] = []
        self._target = target

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        forward = self._target.forward(token_ids, num_kept)
        self.token_ids += token_ids
        self.rows += list(forward.logits.copy())
        return forward

    def reuse(self, token_ids: Sequence[int]) -> Reuse:
        return self._target.reuse(token_ids)

    def trim(self, num_tokens: int) -> None:
        self._target.trim(num_tokens)
        del self.token_ids[len(self.token_ids) - num_tokens :], self.rows[len(self.rows) - num_tokens :]


class KeepsARejectedRow(RecordingTarget):
    """Broken: one KV row of the rejected drafts stays."""

    def trim(self, num_tokens: int) -> None:
        super().trim(max(num_tokens - 1, 0))


class ScriptedDrafter:
    """Proposes the true continuation, but a wrong token at `wrong_at` of each burst."""

    def __init__(self, target: RecordingTarget, num_prompt_tokens: int, continuation: Sequence[int]) -> None:
        self.wrong_at: int | None = None
        self._target = target
        self._num_prompt_tokens = num_prompt_tokens
        self._continuation = continuation

    def draft(
        self,
        last_token_id: int,
        hidden: Float32,
        num_draft_tokens: int,
        params: SamplingParams,
        rng: np.random.Generator,
    ) -> list[Draft]:
        start = len(self._target.token_ids) - self._num_prompt_tokens + 1
        token_ids = list(self._continuation[start : start + num_draft_tokens])
        if self.wrong_at is not None and self.wrong_at < len(token_ids):
            token_ids[self.wrong_at] = 1 if token_ids[self.wrong_at] == 0 else 0
        return [Draft(token_id, None) for token_id in token_ids]


class NoisyDrafter:
    """Draws from the target's own logits with noise on them, so that some drafts stand and some do not."""

    def __init__(
        self, target: RecordingTarget, next_logits: Callable[[tuple[int, ...]], Float32], noise: float
    ) -> None:
        self._target = target
        self._next_logits = next_logits
        self._noise = noise

    def draft(
        self,
        last_token_id: int,
        hidden: Float32,
        num_draft_tokens: int,
        params: SamplingParams,
        rng: np.random.Generator,
    ) -> list[Draft]:
        context, drafts = (*self._target.token_ids, last_token_id), []
        for _ in range(num_draft_tokens):
            logits = self._next_logits(context)
            noise = np.random.default_rng(context).normal(scale=self._noise, size=logits.size)
            drawn_from = distribution((logits + noise).astype(np.float32), params)
            drafts.append(Draft(drawn_from.sample(rng), drawn_from))
            context = (*context, drafts[-1].token_id)
        return drafts


@dataclass(frozen=True, slots=True)
class Decoding:
    """Generated tokens and the logits row [vocab_size] that decided each."""

    token_ids: list[int]
    rows: Float32
    counts: DraftCounts


def decode(
    target: RecordingTarget,
    drafter: Drafter | None,
    prompt_ids: Sequence[int],
    max_tokens: int,
    num_draft_tokens: int,
    *,
    params: SamplingParams = GREEDY,
    seed: int = 0,
    costs: StepCosts | None = None,
) -> Decoding:
    """Runs the loop to its end; the target's cache must be empty."""
    request = Request(prompt_ids, max_tokens, params, num_draft_tokens, ONE_GO, costs)
    counts = DraftCounts()
    blocks = list(generate_blocks(target, drafter, request, np.random.default_rng(seed), counts, lambda: False))
    return Decoding([token for block in blocks for token in block], np.array(target.rows), counts)
