"""What one generation cost and what drafting did for it."""

import time
from dataclasses import dataclass
from typing import Any

from runtime.draft_policy import StepCosts
from runtime.drafting import DraftCounts
from runtime.memory import PeakMemory

SAMPLE_SECONDS = 0.05  # a sample reads /proc, which takes as long as all else that a step does here


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """Figures of one generation; peaks are the process's, sampled between steps.

    Verify steps are counted by where their drafts came from. `drafted_histogram[n]` counts those with n drafts,
    `accepted_histogram[n]` those where n stood; `acceptance_by_position[i]` is the share of drafts i that stood where
    all before did. `step_costs` are those by which the lengths were chosen, None where the length was given.

    `num_slides` counts how often the oldest turns of the prompt were dropped, before the first token or where the
    context was full, and `num_dropped_tokens` what they held. `num_prompt_tokens` is of the whole prompt,
    `num_prefilled_tokens` of what was prefilled, behind a slide anew, and `num_reused_tokens` of what the KV cache held
    from before. `num_recomputed_tokens` of the prefilled ones it held too, without the rows that a window needs.
    """

    num_prompt_tokens: int
    num_generated_tokens: int
    num_prefilled_tokens: int
    num_reused_tokens: int
    num_recomputed_tokens: int
    num_slides: int
    num_dropped_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_ms: float
    num_drafted: int
    num_accepted: int
    num_verify_steps: int
    num_drafter_faults: int
    num_plain_steps: int
    num_drafter_steps: int
    num_lookup_steps: int
    drafted_histogram: tuple[int, ...]
    accepted_histogram: tuple[int, ...]
    acceptance_by_position: tuple[float, ...]
    acceptance_rate: float
    mean_acceptance_length: float
    step_costs: StepCosts | None
    peak_anonymous_bytes: int
    peak_mapped_bytes: int


class StatsRecorder:
    """Takes times and memory while a generation runs."""

    def __init__(self, num_prompt_tokens: int, costs: StepCosts | None = None) -> None:
        self.counts = DraftCounts()
        self._costs = costs
        self._num_prompt_tokens = num_prompt_tokens
        self._num_prefilled = self._num_decoded = 0
        self._prefill_seconds = self._decode_seconds = self._first_seconds = 0.0
        self._peak = PeakMemory()
        self._last = self._next_sample = time.perf_counter()

    def step(self, num_tokens: int) -> None:
        """Notes that a step has yielded tokens; it was a prefill where the counts say so."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self.counts.num_prefilled_tokens > self._num_prefilled:
            self._first_seconds = self._first_seconds or seconds
            self._prefill_seconds += seconds
            self._num_prefilled = self.counts.num_prefilled_tokens
        else:
            self._decode_seconds += seconds
            self._num_decoded += num_tokens
        if now >= self._next_sample:
            self._peak.sample()
            self._next_sample = now + SAMPLE_SECONDS

    def finish(self, num_generated_tokens: int) -> GenerationStats:
        """The figures; `num_generated_tokens` leaves out what followed a stop."""
        self._peak.sample()
        return GenerationStats(
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=num_generated_tokens,
            num_prefilled_tokens=self._num_prefilled,
            num_reused_tokens=self.counts.num_reused_tokens,
            num_recomputed_tokens=self.counts.num_recomputed_tokens,
            num_slides=self.counts.num_slides,
            num_dropped_tokens=self.counts.num_dropped_tokens,
            prefill_tokens_per_second=_rate(self._num_prefilled, self._prefill_seconds),
            decode_tokens_per_second=_rate(self._num_decoded, self._decode_seconds),
            time_to_first_token_ms=self._first_seconds * 1e3,
            peak_anonymous_bytes=self._peak.usage.anonymous_bytes,
            peak_mapped_bytes=self._peak.usage.mapped_bytes,
            step_costs=self._costs,
            **_draft_figures(self.counts),
        )


def _draft_figures(counts: DraftCounts) -> dict[str, Any]:
    return {
        "num_drafted": counts.num_drafted,
        "num_accepted": counts.num_accepted,
        "num_verify_steps": counts.num_verify_steps,
        "num_drafter_faults": counts.num_drafter_faults,
        "num_plain_steps": counts.num_steps["plain"],
        "num_drafter_steps": counts.num_steps["drafter"],
        "num_lookup_steps": counts.num_steps["lookup"],
        "drafted_histogram": tuple(counts.drafted_histogram),
        "accepted_histogram": tuple(counts.accepted_histogram),
        "acceptance_by_position": tuple(counts.acceptance_by_position),
        "acceptance_rate": counts.acceptance_rate,
        "mean_acceptance_length": counts.mean_acceptance_length,
    }


def _rate(num_tokens: int, seconds: float) -> float:
    return num_tokens / seconds if seconds > 0 and num_tokens > 0 else 0.0
