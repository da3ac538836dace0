"""Measures a target and its drafter with transformers' own assisted generation.

Counts what happened in each verify round that had drafts; the rule that accepts them is transformers'.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM

MODES = {  # do_sample, is_lossless
    "greedy": (False, False),
    "sampled": (True, False),
    "sampled, lossless rule": (True, True),
}


@dataclass(frozen=True, slots=True)
class Round:
    """One verify step: drafts offered and accepted. `is_first` in the round straight after the prompt."""

    num_drafted: int
    num_accepted: int
    is_first: bool


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The rounds of some generations."""

    rounds: tuple[Round, ...]

    @property
    def drafted(self) -> int:
        """Tokens the drafter offered."""
        return sum(r.num_drafted for r in self.rounds)

    @property
    def accepted(self) -> int:
        """Drafted tokens that the output contains."""
        return sum(r.num_accepted for r in self.rounds)

    @property
    def rate(self) -> float:
        """Accepted / drafted; 0 where nothing was drafted."""
        return self.accepted / max(1, self.drafted)

    @property
    def rate_by_position(self) -> tuple[float, ...]:
        """For each place in a burst, the share of the drafts offered there that were accepted."""
        longest = max((r.num_drafted for r in self.rounds), default=0)
        offered = [sum(r.num_drafted > place for r in self.rounds) for place in range(longest)]
        accepted = [sum(r.num_accepted > place for r in self.rounds) for place in range(longest)]
        return tuple(a / o for a, o in zip(accepted, offered, strict=True))

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a verify step yields: 1 + accepted / verify steps."""
        return 1 + self.accepted / max(1, len(self.rounds))

    def __str__(self) -> str:
        places = " / ".join(f"{rate:.2f}" for rate in self.rate_by_position)
        return (
            f"{self.accepted:,} of {self.drafted:,} = {self.rate:.1%}, by position {places}, "
            f"{self.mean_acceptance_length:.2f} tokens a verify step"
        )

    def first_rounds(self) -> "Acceptance":
        """Only the round after each prompt, where the text before the burst is not the target's own."""
        return Acceptance(tuple(r for r in self.rounds if r.is_first))


class CountingGenerator:
    """transformers' candidate generator, with a record of every round."""

    requires_model_outputs = True

    def __init__(self, generator: Any, is_lossless: bool) -> None:
        """Wraps `generator`, which drafts.

        Args:
            is_lossless: hide the drafter's logits. transformers then samples from the target and keeps the drafts that
                agree, which is the exact rule for drafts taken by argmax; with the logits it accepts by p / q, as if
                the drafts had been sampled from q.
        """
        self.rounds: list[Round] = []
        self.model_kwargs_overrides = generator.model_kwargs_overrides
        self._generator = generator
        self._is_lossless = is_lossless
        self._drafts: list[int] = []
        self._num_tokens_before = 0

    def get_candidates(self, input_ids: Tensor, **state: Any) -> tuple[Tensor, Tensor | None]:
        """Drafts as transformers does, and remembers them."""
        candidates, logits = self._generator.get_candidates(input_ids, **state)
        self._num_tokens_before = input_ids.shape[1]
        self._drafts = candidates[0, self._num_tokens_before :].tolist()
        return candidates, None if self._is_lossless else logits

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Counts the drafts at the head of the tokens just added."""
        self._generator.update_candidate_strategy(input_ids, scores, num_matches)
        if not self._drafts:
            return
        added = input_ids[0, self._num_tokens_before :].tolist()
        agreeing = [a == d for a, d in zip(added, self._drafts, strict=False)]
        num_accepted = [*agreeing, False].index(False)
        self.rounds.append(Round(len(self._drafts), num_accepted, is_first=not self.rounds))


@contextmanager
def counted(target: Gemma4ForCausalLM, is_lossless: bool) -> Iterator[list[CountingGenerator]]:
    """Inside, every assisted generation of `target` adds its generator to the list."""
    generators: list[CountingGenerator] = []
    build = target._get_candidate_generator

    def build_counting(**options: Any) -> CountingGenerator:
        generators.append(CountingGenerator(build(**options), is_lossless))
        return generators[-1]

    target._get_candidate_generator = build_counting
    try:
        yield generators
    finally:
        del target._get_candidate_generator


def measure_acceptance(
    target: Gemma4ForCausalLM,
    drafter: Gemma4AssistantForCausalLM,
    prompts: Sequence[Sequence[int]],
    num_draft_tokens: int,
    max_new_tokens: int,
    do_sample: bool,
    *,
    is_lossless: bool = False,
    seed: int = 0,
) -> Acceptance:
    """Acceptance over the generations from `prompts`, token ids with their `<bos>`.

    Args:
        do_sample: sample at temperature 1, top_k 64, top_p 0.95 instead of greedily.
        is_lossless: accept sampled drafts by the rule that keeps the target's distribution (see CountingGenerator).
    """
    torch.manual_seed(seed)
    drafter.generation_config.num_assistant_tokens = num_draft_tokens
    drafter.generation_config.num_assistant_tokens_schedule = "constant"
    sampling: dict[str, Any] = {"temperature": 1.0, "top_k": 64, "top_p": 0.95} if do_sample else {}
    with counted(target, is_lossless) as generators, torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            options = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "pad_token_id": 0, **sampling}
            target.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=drafter, **options)
    return Acceptance(tuple(r for g in generators for r in g.rounds))


def measure_modes(
    target: Gemma4ForCausalLM,
    drafter: Gemma4AssistantForCausalLM,
    prompts: Sequence[Sequence[int]],
    num_draft_tokens: int,
    max_new_tokens: int,
) -> dict[str, Acceptance]:
    """Acceptance by the name of the mode in MODES."""
    return {
        name: measure_acceptance(
            target, drafter, prompts, num_draft_tokens, max_new_tokens, do_sample, is_lossless=is_lossless
        )
        for name, (do_sample, is_lossless) in MODES.items()
    }
