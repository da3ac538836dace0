"""The context shrinks to what the budget leaves room for, and no further."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from profiles import load_profile
from runtime import budget
from runtime.budget import context_that_fits, planned_bytes
from runtime.errors import MemoryBudgetError
from runtime.kv_cache import full_bytes_per_token
from runtime.manifest import read_manifest
from tests.layouts import each_layout

ROOT = Path(__file__).parents[2]


# A generation over a whole context, while a thread looks at the memory: prints the plan and the peak.
CHILD = """
import sys, threading, time
from edge import Runtime
from profiles import load_profile
from runtime.budget import planned_bytes
from runtime.memory import PeakMemory

peak, done = PeakMemory(), threading.Event()

def watch():
    while not done.wait(0.002):
        peak.sample()

threading.Thread(target=watch).start()
with Runtime.load(sys.argv[1], profile="laptop", memory_budget="2 GiB") as runtime:
    prompt = [2 + 7 * i % 2000 for i in range(runtime.context_tokens - 40)]
    for options in ({"num_draft_tokens": 16, "temperature": 0}, {"num_draft_tokens": 7, "top_k": 0, "top_p": 0.95}):
        runtime.generate(prompt, max_tokens=40, **options)
    print(planned_bytes(runtime.manifest, runtime.profile, runtime.context_tokens))
done.set()
print(peak.usage.anonymous_bytes)
"""


@pytest.fixture(params=["native", "portable"])
def manifest(request, tiny_artifact):
    return read_manifest(tiny_artifact("wide", 4, "int8", request.param))


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators keep other amounts")
@pytest.mark.parametrize("layout", each_layout)
def test_the_plan_is_no_less_and_not_much_more_than_what_is_used(demo_artifact, layout):
    command = [sys.executable, "-c", CHILD, str(demo_artifact(4, layout))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    planned, used = map(int, done.stdout.split())
    # generous to a model this small, where most of both is the interpreter and its libraries
    assert used <= planned <= 2 * used


def test_native_weights_take_no_memory(tiny_artifact):
    native, portable = (read_manifest(tiny_artifact("wide", 4, "int8", layout)) for layout in ("native", "portable"))
    larger = replace(native, matrices=native.matrices * 1000)
    profile = load_profile("laptop")
    assert planned_bytes(larger, profile, 1000) == planned_bytes(native, profile, 1000)
    packed = sum(matrix.num_bytes for matrix in portable.matrices)
    twice = replace(portable, matrices=portable.matrices * 2)
    assert planned_bytes(twice, profile, 0) - planned_bytes(portable, profile, 0) > packed


def test_native_kv_rows_take_half(tiny_artifact, one_thread):
    manifests = [read_manifest(tiny_artifact("wide", 4, "int8", layout)) for layout in ("native", "portable")]
    native, portable = (planned_bytes(one, one_thread, 1000) - planned_bytes(one, one_thread, 0) for one in manifests)
    model = manifests[0].model
    assert full_bytes_per_token(model, "float32") == 2 * full_bytes_per_token(model, "float16")
    assert 0 < 2 * native <= portable  # which also has scores


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "int8"])
def test_a_token_takes_the_rows_of_the_type_that_the_profile_asks_for(tiny_artifact, one_thread, kv_dtype):
    manifest, profile = (
        read_manifest(tiny_artifact("wide", 4, "int8", "native")),
        replace(one_thread, kv_dtype=kv_dtype),
    )
    added = planned_bytes(manifest, profile, 1000) - planned_bytes(manifest, profile, 0)
    assert added == 1000 * full_bytes_per_token(manifest.model, kv_dtype)


def test_the_largest_context_within_the_budget(manifest, one_thread):
    profile = replace(one_thread, context_tokens=2048)
    for context_tokens in (600, 1000, 1777):
        budget = planned_bytes(manifest, profile, context_tokens)
        assert context_that_fits(manifest, profile, budget) == context_tokens
        assert context_that_fits(manifest, profile, budget - 1) == context_tokens - 1


def test_the_profile_and_the_model_cap_it(manifest, one_thread):
    plenty = 1 << 40
    assert context_that_fits(manifest, one_thread, plenty) == one_thread.context_tokens
    wide = replace(one_thread, context_tokens=1 << 20)
    assert context_that_fits(manifest, wide, plenty) == manifest.model.context_tokens


def test_too_little_names_need_have_and_the_way_out(manifest, one_thread):
    needed = planned_bytes(manifest, one_thread, 512)
    match = rf"test: the model needs {needed / 2**20:,.0f} MiB for 512 tokens of context, the budget is 10 MiB; raise"
    with pytest.raises(MemoryBudgetError, match=match):
        context_that_fits(manifest, one_thread, 10 << 20)


def test_a_larger_chunk_needs_more(manifest, one_thread):
    small, large = (replace(one_thread, prefill_chunk_tokens=size) for size in (64, 512))
    assert planned_bytes(manifest, large, 1000) > planned_bytes(manifest, small, 1000)


@pytest.mark.parametrize(
    ("file", "name", "planned"),
    [
        ("attention_op.cpp", "kWaveStates", budget.WAVE_STATES),
        ("attention_op.cpp", "kSharingTiles", budget.SHARING_TILES),
        ("attention_op.cpp", "kTilesAtOnce", budget.TILES_AT_ONCE),
        ("kernels.hpp", "kMaxSegmentKeys", budget.SEGMENT_KEYS),
        ("kernels.hpp", "kTileQueries", budget.TILE_QUERIES),
        ("kernels.hpp", "kSmallTileQueries", budget.SMALL_TILE_QUERIES),
    ],
)
def test_the_plan_has_the_sizes_of_the_native_ops(file: str, name: str, planned: int) -> None:
    source = (Path(budget.__file__).parent / "native/src" / file).read_text(encoding="utf-8")
    assert f"constexpr int {name} = {planned};" in source
