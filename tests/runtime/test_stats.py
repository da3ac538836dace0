import json
from dataclasses import asdict

import pytest

from runtime import memory
from runtime.draft_policy import StepCosts
from runtime.memory import MemoryUsage
from runtime.stats import SAMPLE_SECONDS, StatsRecorder


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("runtime.stats.time", clock)
    return clock


def test_memory_is_sampled_now_and_then_and_at_the_end(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    samples: list[float] = []

    def usage() -> MemoryUsage:
        samples.append(clock.now)
        return MemoryUsage(len(samples), 0)

    monkeypatch.setattr(memory, "memory_usage", usage)
    recorder = StatsRecorder(4)
    for _ in range(200):
        clock.now += SAMPLE_SECONDS / 50
        recorder.step(1)
    assert 4 <= len(samples) <= 5
    assert recorder.finish(200).peak_anonymous_bytes == len(samples)
    assert samples[-1] == clock.now


def test_figures_of_drafting(clock: Clock) -> None:
    costs = StepCosts((1.0, 1.1), 0.01)
    recorder = StatsRecorder(10, costs)
    clock.now = 2.0
    recorder.counts.num_prefilled_tokens = 10
    recorder.step(1)
    for source, num_drafted, num_accepted in (("drafter", 3, 2), ("lookup", 2, 0), ("plain", 0, 0)):
        recorder.counts.count(num_drafted, num_accepted, source)  # type: ignore[arg-type]
        clock.now += 1.0
        recorder.step(num_accepted + 1)
    stats = recorder.finish(6)
    assert (stats.num_plain_steps, stats.num_drafter_steps, stats.num_lookup_steps) == (1, 1, 1)
    assert stats.drafted_histogram == (1, 0, 1, 1)
    assert stats.accepted_histogram == (2, 0, 1)
    assert stats.acceptance_by_position == (0.5, 1.0, 0.0)
    assert stats.step_costs == costs
    assert (stats.prefill_tokens_per_second, stats.decode_tokens_per_second) == (5.0, 5 / 3)
    assert json.loads(json.dumps(asdict(stats)))["step_costs"]["verify_seconds"] == [1.0, 1.1]


def test_a_prefill_behind_a_slide_is_no_decoding(clock: Clock) -> None:
    recorder = StatsRecorder(30)
    for seconds, num_prefilled, num_tokens in ((2.0, 20, 1), (1.0, 0, 3), (4.0, 40, 1), (1.0, 0, 2)):
        clock.now += seconds
        recorder.counts.num_prefilled_tokens += num_prefilled
        recorder.step(num_tokens)
    recorder.counts.num_slides, recorder.counts.num_dropped_tokens = 2, 25
    stats = recorder.finish(7)
    assert (stats.num_prompt_tokens, stats.num_prefilled_tokens) == (30, 60)
    assert (stats.num_slides, stats.num_dropped_tokens) == (2, 25)
    assert stats.time_to_first_token_ms == 2000
    assert (stats.prefill_tokens_per_second, stats.decode_tokens_per_second) == (60 / 6, 5 / 2)
