import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime import loading, native
from runtime.draft_policy import StepCosts
from runtime.drafter import Draft
from runtime.engine import Runtime
from runtime.errors import InferenceError
from runtime.step_costs import (
    MAX_SECONDS,
    NUM_VERIFY_COSTS,
    OVERHEAD_SECONDS,
    WIDTHS,
    costs_record,
    measure_step_costs,
    recall_costs,
    remember_costs,
)
from runtime.target import Forward
from tests.layouts import needs_native
from tests.models import ONE_THREAD

COSTS = StepCosts((1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8), 0.01, OVERHEAD_SECONDS)


class Device:
    """A clock that only models move, and models that take what they are said to."""

    def __init__(self, seconds: Callable[[int], float], draft_seconds: float = 0.001) -> None:
        self.now = 100.0
        self.widths: list[int] = []
        self.cached = 0
        self.longest = 0
        self._seconds = seconds
        self._draft_seconds = draft_seconds

    def clock(self) -> float:
        return self.now

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        self.now += self._seconds(len(token_ids)) * (10 if not self.widths else 1)  # the first one reads from disk
        self.widths.append(len(token_ids))
        self.cached += len(token_ids)
        self.longest = max(self.longest, self.cached)
        return Forward(np.zeros((num_kept, 4), np.float32), np.zeros((num_kept, 4), np.float32))

    def trim(self, num_tokens: int) -> None:
        self.cached -= num_tokens

    def draft(self, last_token_id: int, hidden: object, num_draft_tokens: int, *_: object) -> list[Draft]:
        assert self.cached > 0  # a drafter reads the target's rows
        self.now += num_draft_tokens * self._draft_seconds
        return [Draft(0, None)] * num_draft_tokens


def measured(device: Device, context_tokens: int = 100) -> StepCosts:
    return measure_step_costs(device, device, 2, context_tokens, device.clock)  # type: ignore[arg-type]


def test_costs_are_what_the_models_take() -> None:
    device = Device(lambda width: 0.010 + 0.001 * width)
    costs = measured(device)
    assert costs.verify_seconds == pytest.approx([0.010 + 0.001 * width for width in range(1, 10)], rel=0.01)
    assert costs.draft_seconds == pytest.approx(0.001)
    assert costs.overhead_seconds == OVERHEAD_SECONDS
    assert device.cached == 0


def test_the_least_of_several_counts_and_costs_never_fall() -> None:
    noise = iter([9.0, 3.0, 4.0, 2.0, 1.0, 1.5, 1.0, 1.0, 1.0] + [1.0] * 100)
    costs = measured(Device(lambda width: next(noise) * 1e-3 * (2 if width == 2 else 1)))
    assert costs.verify_seconds[:2] == pytest.approx([1e-3, 2e-3])
    assert all(later >= sooner for sooner, later in zip(costs.verify_seconds, costs.verify_seconds[1:], strict=False))


@pytest.mark.parametrize(("seconds", "num_forwards"), [(0.1, 8), (0.4, 3), (5.0, 2)])
def test_a_slow_device_is_stopped_early(seconds: float, num_forwards: int) -> None:
    device = Device(lambda width: seconds, draft_seconds=0.0)
    costs = measured(device)
    assert len(device.widths) <= num_forwards
    assert device.now - 100.0 <= 10 * seconds + MAX_SECONDS + seconds + 1e-9
    assert costs.verify_seconds[0] == pytest.approx(seconds)
    assert len(costs.verify_seconds) == NUM_VERIFY_COSTS
    if num_forwards == 2:  # one token is all that was seen: the rest rises by the usual share
        assert costs.verify_seconds[4] == pytest.approx(seconds * 1.48)


@pytest.mark.parametrize("context_tokens", [1, 3, 8])
def test_no_more_than_the_context_is_taken(context_tokens: int) -> None:
    device = Device(lambda width: 0.01)
    measured(device, context_tokens)
    assert device.longest == max(width for width in WIDTHS if width <= context_tokens)


def test_a_drafter_that_fails_has_no_costs() -> None:
    device = Device(lambda width: 0.01)
    broken = Device(lambda width: 0.01)
    broken.draft = lambda *_: (_ for _ in ()).throw(InferenceError("onnxruntime failed"))  # type: ignore[method-assign]
    assert measure_step_costs(device, broken, 2, 100, device.clock).draft_seconds is None  # type: ignore[arg-type]
    assert measure_step_costs(device, None, 2, 100, device.clock).draft_seconds is None


# the record


@pytest.fixture
def record(tmp_path: Path) -> Path:
    (tmp_path / "manifest.json").write_text("{}")
    return costs_record(tmp_path / "cache", tmp_path / "manifest.json", 2)


def test_costs_are_remembered(record: Path) -> None:
    assert recall_costs(record, has_drafter=True) is None
    remember_costs(record, COSTS)
    assert recall_costs(record, has_drafter=True) == COSTS
    assert recall_costs(record, has_drafter=False) is None
    assert list(record.parent.iterdir()) == [record]


@pytest.mark.parametrize("days", [-0.1, 1.1, 400.0])
def test_costs_are_measured_anew_after_a_day(record: Path, days: float) -> None:
    remember_costs(record, COSTS, now=lambda: 1e9)
    assert recall_costs(record, has_drafter=True, now=lambda: 1e9 + 0.9 * 86_400) == COSTS
    assert recall_costs(record, has_drafter=True, now=lambda: 1e9 + days * 86_400) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"verify_seconds": [1.0], "draft_seconds": 0.1}',
        json.dumps({"verify_seconds": [1.0] * 8 + [0.0], "draft_seconds": 0.1}),
        json.dumps({"verify_seconds": [1.0] * 8 + ["1"], "draft_seconds": 0.1}),
        json.dumps({"verify_seconds": [float("nan")] * 9, "draft_seconds": 0.1}),
        json.dumps({"verify_seconds": [1.0] * 9, "draft_seconds": float("inf")}),
        json.dumps({"verify_seconds": [1.0] * 9}),
        json.dumps({"verify_seconds": [1.0] * 9, "draft_seconds": True}),
    ],
)
def test_a_damaged_record_is_none(record: Path, content: str) -> None:
    record.parent.mkdir()
    content = content.replace("}", f', "measured_at": {time.time()}}}') if len(content) > 2 else content
    record.write_text(content)
    assert recall_costs(record, has_drafter=True) is None


def test_a_record_is_of_one_artifact_machine_and_version(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other() -> Path:
        return costs_record(tmp_path / "cache", tmp_path / "manifest.json", 2)

    assert other() == record
    assert costs_record(tmp_path / "cache", tmp_path / "manifest.json", 4) != record
    for name in ("instruction_set", "library_digest"):
        with monkeypatch.context() as patch:
            patch.setattr(f"runtime.native.{name}", lambda: "another")
            assert other() != record
    with monkeypatch.context() as patch:
        patch.setattr("platform.node", lambda: "another")
        assert other() != record
    with monkeypatch.context() as patch:
        patch.setattr("onnxruntime.__version__", "0.1")
        assert other() != record
    (tmp_path / "manifest.json").write_text("{ }")
    assert other() != record


@needs_native
def test_a_forced_instruction_set_has_costs_of_its_own(record: Path, tmp_path: Path, best_instruction_set: str) -> None:
    names, records = native.runnable_instruction_sets(), set()
    for name in names:
        native.force_instruction_set(name)
        records.add(costs_record(tmp_path / "cache", tmp_path / "manifest.json", 2))
    assert len(records) == len(names)
    assert record in records


# the engine


def test_the_second_load_measures_nothing(
    tiny_artifact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Runtime.load(tiny_artifact("wide"), profile=ONE_THREAD) as runtime:
        stats = runtime.generate([2, 5, 7], max_tokens=4).stats
        costs = stats.step_costs
        assert costs is not None
        assert costs.draft_seconds is not None
        assert runtime.generate([2, 5, 7], max_tokens=4, num_draft_tokens=2).stats.step_costs is None
    monkeypatch.setattr(loading, "measure_step_costs", None)
    with Runtime.load(tiny_artifact("wide"), profile=ONE_THREAD) as runtime:
        assert runtime.generate([2, 5, 7], max_tokens=4).stats.step_costs == costs


def test_a_load_without_a_cache_folder_measures_again(
    tiny_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "user_cache_folder", lambda: None)
    with Runtime.load(tiny_artifact("wide"), profile=ONE_THREAD) as runtime:
        assert runtime.generate([2, 5, 7], max_tokens=4).stats.step_costs is not None


def test_costs_are_those_of_the_threads_that_compute(
    tiny_artifact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache, manifest = tmp_path / "gemma-edge", tiny_artifact("wide") / "manifest.json"
    for num_cores in (1, 2):  # after a change of affinity or quota, the same profile has other costs
        monkeypatch.setattr("profiles.cores.performance_cores", lambda num_cores=num_cores: num_cores)
        with Runtime.load(manifest.parent, profile=replace(ONE_THREAD, num_threads=0)):
            assert costs_record(cache, manifest, num_cores).exists()
    assert len(list(cache.glob("costs-*"))) == 2
