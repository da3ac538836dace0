"""The parts of edge-bench: figures, limits, jumps, clocks, simulated acceptance. Nothing holds wall times."""

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edge import EdgeError, Runtime
from edge.bench.child import SampledPeak, evict, measure
from edge.bench.drafting import AssumedTarget, run_rounds
from edge.bench.figures import Report, figure
from edge.bench.onnx_bytes import quantized_product
from edge.bench.opened import OpenedArtifact, TokenIds, session_clock
from edge.bench.roofline import Roofline, stream_read
from edge.bench.workload import Limits, Workload
from edge.whole_file import write_whole
from profiles import DeviceProfile
from runtime import native
from runtime.drafter import Draft
from runtime.generation import DraftCounts, Request, generate_blocks
from runtime.kv_cache import full_bytes_per_token, sliding_bytes
from runtime.kv_rows import KV_DTYPES, KVDtype
from runtime.manifest import read_manifest
from runtime.sampling import SamplingParams
from runtime.step_costs import costs_record
from runtime.target import Forward
from tests.layouts import needs_native
from tests.models import ONE_THREAD

VOCABULARY = 50
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def opened(tiny_artifact: Callable[..., Path]) -> Iterator[OpenedArtifact]:
    with Runtime.load(tiny_artifact("wide", 4), profile="laptop") as runtime:
        yield OpenedArtifact(runtime)


# figures


def test_a_figure_is_a_median_with_its_range() -> None:
    found = figure("a", "A", "ms", [3.0, 1.0, 2.0], limit_share=0.5, simulated=True)
    assert (found.value, found.low, found.high, found.num_samples) == (2.0, 1.0, 3.0, 3)
    assert found.row() == ("A (simulated)", "2.00", "ms", "1.00 - 3.00", "50%", "")
    assert figure("a", "A", "ms", [], note="why").row() == ("A", "-", "ms", "", "", "why")


def test_a_table_is_aligned() -> None:
    figures = (figure("a", "short", "ms", [1.0], note="x"), figure("b", "much longer", "tokens/s", [12345.6]))
    lines = Report({}, figures).table().splitlines()
    assert [line.index("ms") if "ms" in line else line.index("tokens/s") for line in lines[1:]] == [21, 21]
    assert "12,346" in lines[2]


def test_json_replaces_a_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Report({"artifact": "x"}, (figure("a", "A", "ms", [1.0]),)).to_text()
    file = tmp_path / "report.json"
    file.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", _disk_full)
        with pytest.raises(EdgeError, match="--json .*report.json: No space left on device"):
            write_whole(file, text, "--json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    write_whole(file, text, "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads(file.read_text())["figures"]["a"]["value"] == 1.0
    with pytest.raises(EdgeError, match="--json /dev/full: No space left on device"):
        write_whole(Path("/dev/full"), text, "--json")
    assert Path("/dev/full").is_char_device()


def _disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# limits


def test_the_product_is_an_onnx_model() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (40, 24), np.int8)
    session = ort.InferenceSession(quantized_product(8, weights))
    x = rng.uniform(-1, 1, (8, 40)).astype(np.float32)
    (y,) = session.run(None, {"x": x})
    # x is rounded to steps of 2/255: half a step for each of 40 products of at most 1.27
    assert np.abs(y - x @ (weights * np.float32(0.01))).max() < 40 * 1.27 / 255
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_from_string(quantized_product(8, weights)))


def test_the_roofline_measures_both_limits() -> None:
    roofline = Roofline(1, stream_bytes=1)
    assert roofline.stream_bytes == 64 << 20, "a buffer that a cache holds would not measure memory"
    assert roofline.stream() > 0
    assert roofline.multiply() > 0
    assert stream_read(np.ones(100, np.uint64), 3) > 0


def test_a_limit_is_the_slower_of_memory_and_arithmetic() -> None:
    limits = Limits(bytes_per_second=10.0, operations_per_second=100.0)
    assert limits.seconds(20, 50) == 2.0
    assert limits.seconds(20, 500) == 5.0


def test_bytes_and_operations_are_those_of_every_weight(tiny_artifact: Callable[..., Path]) -> None:
    # 16 bits, so that a file is its weights and little more: norms, and gaps of less than 4,096 bytes a matrix
    folder = tiny_artifact("wide", 16)
    manifest = read_manifest(folder)
    workload = Workload.of(manifest)
    num_weights = workload.operations(1, 1) / 2
    num_arrays = 12 * len(manifest.model.layers) + 10
    assert 0 <= workload.weight_bytes - 2 * num_weights < 4096 * num_arrays + 8 * sum(range(200))
    shared = workload.operations(1, 1) - workload.operations(1, 0)
    assert workload.operations(100, 1) == 100 * workload.operations(1, 0) + shared


# the opened artifact


def test_token_ids_do_not_repeat() -> None:
    token_ids = TokenIds(VOCABULARY, seed=0, excluded=[3, 7])
    taken = token_ids.take(30) + token_ids.take(18)
    assert sorted(taken) == sorted(set(range(VOCABULARY)) - {3, 7})
    assert token_ids.take(1) == taken[:1]


def test_a_jump_leads_to_a_context_like_any_other(opened: OpenedArtifact) -> None:
    for context in (5, 900, 40):
        opened.jump(context)
        assert opened.target.num_tokens == context
        logits = opened.target.forward([4, 5, 6], num_kept=3).logits
        assert np.isfinite(logits).all()
        opened.target.trim(3)
        assert opened.target.num_tokens == context


def test_kv_bytes_are_the_rows_a_token_sees(opened: OpenedArtifact) -> None:
    window = opened.manifest.model.sliding_window
    opened.jump(200)
    rows = [(kind, array[0].nbytes) for kind, _, array in opened.target.cache.arrays()]
    full = sum(size for kind, size in rows if kind == "full")
    sliding = sum(size for kind, size in rows if kind == "sliding")
    assert opened.kv_bytes(200) == 200 * full + window * sliding


@needs_native
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_kv_bytes_and_jumps_follow_the_rows_type(
    kv_dtype: KVDtype, tiny_artifact: Callable[..., Path], one_thread: DeviceProfile
) -> None:
    folder = tiny_artifact("wide", 4, "int8", "native")
    with Runtime.load(folder, profile=replace(one_thread, kv_dtype=kv_dtype, num_draft_tokens=0)) as runtime:
        opened, model = OpenedArtifact(runtime), runtime.manifest.model
        opened.jump(300)
        window = model.sliding_window
        sliding = sliding_bytes(model, kv_dtype, 0, 1 << 20) // (window + 1)
        assert opened.kv_bytes(300) == 300 * full_bytes_per_token(model, kv_dtype) + window * sliding
        assert np.isfinite(opened.target.forward([4, 5, 6], num_kept=3).logits).all()


def test_the_clock_sees_every_session_and_leaves(opened: OpenedArtifact) -> None:
    before = ort.InferenceSession.run_with_iobinding
    opened.jump(10)
    with session_clock() as clock:
        opened.target.forward([4, 5], num_kept=1)
        assert clock.num_runs == 1
        assert clock.seconds > 0
        assert opened.drafter is not None
        hidden = opened.target.forward([6], num_kept=1).hidden[-1]
        opened.drafter.draft(7, hidden, 3, GREEDY, np.random.default_rng(0))
    assert clock.num_runs == 5
    assert ort.InferenceSession.run_with_iobinding == before
    opened.target.forward([4], num_kept=1)
    assert clock.num_runs == 5


# assumed acceptance


class ZeroTarget:
    """A target whose logits are all zero; remembers what it was fed."""

    def __init__(self) -> None:
        self.fed: list[list[int]] = []

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        self.fed.append(list(token_ids))
        return Forward(np.zeros((num_kept, VOCABULARY), np.float32), np.zeros((num_kept, 4), np.float32))

    def trim(self, num_tokens: int) -> None:
        pass


class CountingDrafter:
    """Drafts the numbers behind the last token."""

    def draft(self, last_token_id: int, hidden: object, num_draft_tokens: int, *_: Any) -> list[Draft]:
        return [Draft((last_token_id + 1 + place) % VOCABULARY, None) for place in range(num_draft_tokens)]


def simulate(acceptance: float, *, num_tokens: int, num_drafts: int = 3) -> tuple[DraftCounts, list[list[int]]]:
    target = AssumedTarget(ZeroTarget(), acceptance, TokenIds(VOCABULARY, seed=1), seed=2)
    request = Request([1], num_tokens + 1, GREEDY, num_drafts, prefill_chunk_tokens=8)
    counts = DraftCounts()
    blocks = generate_blocks(target, CountingDrafter(), request, np.random.default_rng(0), counts, lambda: False)
    return counts, list(blocks)[1:]


@pytest.mark.parametrize("num_drafts", [1, 3, 7])
def test_all_drafts_stand_or_none(num_drafts: int) -> None:
    _, blocks = simulate(1.0, num_tokens=10 * (num_drafts + 1), num_drafts=num_drafts)
    assert [len(block) for block in blocks] == [num_drafts + 1] * 10
    _, blocks = simulate(0.0, num_tokens=20, num_drafts=num_drafts)
    assert [len(block) for block in blocks] == [1] * 20


def test_each_draft_stands_with_its_probability() -> None:
    counts, _ = simulate(0.6, num_tokens=6000)
    steps = counts.num_verify_steps
    expected = [0.4, 0.6 * 0.4, 0.36 * 0.4, 0.216]
    # a share p of n steps is within 5 standard errors sqrt(p (1 - p) / n)
    for share, due in zip(np.array(counts.accepted_histogram) / steps, expected, strict=True):
        assert abs(share - due) < 5 * (due * (1 - due) / steps) ** 0.5


def test_simulated_tokens_are_repeatable_and_vary() -> None:
    first, second = (simulate(0.5, num_tokens=200)[1] for _ in range(2))
    assert first == second
    assert len({token for block in first for token in block}) > VOCABULARY // 2


@pytest.mark.parametrize("acceptance", [0.0, 1.0])
def test_rounds_of_a_real_target(opened: OpenedArtifact, acceptance: float) -> None:
    target = AssumedTarget(opened.target, acceptance, opened.token_ids(seed=1), seed=0)
    rounds = run_rounds(opened, target, opened.drafter, 40, 8, num_draft_tokens=3)
    assert rounds.num_tokens == 8
    assert rounds.tokens_per_round == (4 if acceptance else 1)
    assert all(0 < outside < whole for outside, whole in zip(rounds.outside_seconds, rounds.seconds, strict=True))


def test_rounds_without_drafts(opened: OpenedArtifact) -> None:
    rounds = run_rounds(opened, opened.target, None, 40, 5)
    assert (rounds.tokens_per_round, rounds.drafts_per_round, len(rounds.seconds)) == (1, 0, 5)


# processes of their own


def test_a_peak_between_two_looks_is_seen() -> None:
    with SampledPeak() as peak:
        before = peak.take().anonymous_bytes
        buffer = np.ones(64 << 20, np.uint8)
        with_buffer = peak.take().anonymous_bytes
        del buffer
        after = peak.take().anonymous_bytes
    assert with_buffer - before > 60 << 20
    assert after <= with_buffer


@needs_native
@pytest.mark.parametrize("name", native.INSTRUCTION_SETS)
def test_a_fresh_process_uses_the_same_instruction_set(
    name: str,
    tiny_artifact: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    best_instruction_set: str,
) -> None:
    if not native.force_instruction_set(name):
        pytest.skip(f"this processor does not run {name}")
    folder = tiny_artifact("wide", 4, "int8", "native")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measure("load", folder, ONE_THREAD, None)
    cache = tmp_path / "gemma-edge"
    assert list(cache.glob("costs-*")) == [costs_record(cache, folder / "manifest.json", ONE_THREAD.num_threads)]


def test_an_evicted_artifact_is_as_before(tiny_artifact: Callable[..., Path]) -> None:
    folder = tiny_artifact("wide", 4)
    before = (folder / "manifest.json").read_bytes()
    evict(folder, read_manifest(folder))
    assert (folder / "manifest.json").read_bytes() == before
