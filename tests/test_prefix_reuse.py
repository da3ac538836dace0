"""What was generated before never changes what comes next: rows are reused, rewound, parked, and computed anew."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge import InferenceError, Runtime
from tests.lasting import PROFILE, forget, greedy, hooked, open_runtime

MAX_NEW = 12
Open = Callable[..., Runtime]


@pytest.fixture(scope="module")
def native(tiny_artifact: Callable[..., Path]) -> Path:
    """Equal to the bit however a prompt is cut."""
    return tiny_artifact("wide", 4, "int8", "native")


@pytest.fixture
def open_native(native: Path) -> Iterator[Open]:
    opened: list[Runtime] = []

    def open_one(**fields: object) -> Runtime:
        opened.append(open_runtime(native, replace(PROFILE, **{"context_tokens": 400, **fields})))
        return opened[-1]

    yield open_one
    for runtime in opened:
        runtime.close()


def fresh(runtime: Runtime, prompt: list[int], **options: object) -> list[int]:
    forget(runtime)
    return greedy(runtime, prompt, **{"max_tokens": MAX_NEW, **options}).token_ids


def prompts_that_share(rng: np.random.Generator, count: int) -> list[list[int]]:
    """Prompts that begin as an earlier one of them, or its answer's text, and go their own way."""
    prompts: list[list[int]] = [rng.integers(3, 900, size=60).tolist()]
    while len(prompts) < count:
        before = prompts[rng.integers(len(prompts))]
        shared = before[: rng.integers(1, len(before) + 1)]
        prompts.append([*shared, *rng.integers(3, 900, size=rng.integers(1, 90)).tolist()][:300])
    return prompts


@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_prompts_gives_what_fresh_runtimes_do(open_native: Open, seed: int, num_drafts: int) -> None:
    runtime, oracle = open_native(), open_native()
    rng = np.random.default_rng(seed)
    num_reused = 0
    for prompt in prompts_that_share(rng, 14):
        made = greedy(runtime, prompt, max_tokens=MAX_NEW, num_draft_tokens=num_drafts)
        assert made.token_ids == fresh(oracle, prompt, num_draft_tokens=0)
        stats = made.stats
        assert stats.num_prefilled_tokens + stats.num_reused_tokens == len(prompt)
        assert stats.num_prefilled_tokens >= 1
        num_reused += stats.num_reused_tokens
    assert num_reused > 200


def test_samples_do_not_depend_on_what_is_cached(open_native: Open) -> None:
    runtime = open_native()
    prompt, options = list(range(3, 80)), {"temperature": 1.0, "seed": 5, "num_draft_tokens": 2}
    first, second = (greedy(runtime, prompt, **options) for _ in range(2))
    assert first.token_ids == second.token_ids
    assert (first.stats.num_reused_tokens, second.stats.num_reused_tokens) == (0, len(prompt) - 1)


def test_a_second_turn_prefills_what_is_new_alone(open_native: Open) -> None:
    runtime = open_native()
    prompt = list(range(3, 200))
    answer = greedy(runtime, prompt, max_tokens=30).token_ids
    made = greedy(runtime, [*prompt, *answer, 7, 8, 9], max_tokens=MAX_NEW)
    # the last token of an answer has no row yet
    assert made.stats.num_prefilled_tokens == 4
    assert made.token_ids == fresh(runtime, [*prompt, *answer, 7, 8, 9])


def test_a_long_answer_that_is_dropped_costs_no_second_prefill(open_native: Open) -> None:
    """As thoughts are: the answer is far longer than the window, and the next prompt does not hold it."""
    runtime = open_native()
    prompt = list(range(3, 150))
    greedy(runtime, prompt, max_tokens=200)
    stats = greedy(runtime, [*prompt, 5, 6], max_tokens=1).stats
    assert (stats.num_reused_tokens, stats.num_prefilled_tokens, stats.num_recomputed_tokens) == (len(prompt), 2, 0)


def test_what_a_window_has_lost_is_computed_again_and_said(open_native: Open) -> None:
    runtime = open_native()
    head = list(range(3, 100))
    greedy(runtime, [*head, *range(200, 400)], max_tokens=2)
    made = greedy(runtime, [*head, 5, 6], max_tokens=MAX_NEW)
    assert made.stats.num_recomputed_tokens == len(head)
    assert made.stats.num_prefilled_tokens == len(head) + 2
    assert made.token_ids == fresh(runtime, [*head, 5, 6])


def test_where_prompts_part_is_kept_for_the_next(open_native: Open) -> None:
    runtime = open_native()
    head = list(range(3, 100))
    greedy(runtime, [*head, *range(200, 400)], max_tokens=2)
    greedy(runtime, [*head, *range(400, 600)], max_tokens=2)
    made = greedy(runtime, [*head, *range(600, 800)], max_tokens=MAX_NEW)
    assert (made.stats.num_reused_tokens, made.stats.num_recomputed_tokens) == (len(head), 0)
    assert made.token_ids == fresh(runtime, [*head, *range(600, 800)])


def test_another_prompt_is_parked_and_found_again(open_native: Open) -> None:
    runtime = open_native()
    one, other = list(range(3, 150)), list(range(400, 560))
    greedy(runtime, one, max_tokens=3)
    greedy(runtime, other, max_tokens=3)
    made = greedy(runtime, [*one, 9], max_tokens=MAX_NEW)
    assert made.stats.num_reused_tokens == len(one)
    assert made.token_ids == fresh(runtime, [*one, 9])


def test_nothing_is_parked_beyond_the_budget(native: Path) -> None:
    with Runtime.load(native, profile=replace(PROFILE, context_tokens=400)) as probe:
        least = probe.plan.peak_bytes
    profile = replace(PROFILE, context_tokens=400)
    with Runtime.load(native, profile=profile, memory_budget=least) as runtime:
        target = runtime._loaded.target  # type: ignore[union-attr]
        for start in range(3, 500, 100):
            greedy(runtime, list(range(start, start + 150)), max_tokens=2)
            assert target.parked.nbytes <= runtime.plan.parked_bytes <= runtime.plan.budget_bytes - least


def test_parked_rows_stay_within_their_bytes(open_native: Open) -> None:
    runtime = open_native()
    target = runtime._loaded.target  # type: ignore[union-attr]
    for start in range(3, 700, 100):
        greedy(runtime, list(range(start, start + 150)), max_tokens=2)
        assert 0 <= target.parked.nbytes <= runtime.plan.parked_bytes
    assert len(target.parked.entries) > 1


def test_rows_of_a_failed_forward_are_not_reused(open_native: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = open_native()
    target = runtime._loaded.target  # type: ignore[union-attr]
    prompt = list(range(3, 60))

    def fail() -> None:
        raise InferenceError("onnxruntime failed")

    hooked(target, "forward", 6, fail, monkeypatch)
    with pytest.raises(InferenceError):
        greedy(runtime, prompt)
    monkeypatch.undo()
    made = greedy(runtime, prompt, max_tokens=MAX_NEW)
    assert made.stats.num_reused_tokens == 0
    assert made.token_ids == fresh(runtime, prompt)
