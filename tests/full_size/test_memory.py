"""E2B and E4B at their real sizes: a process takes what was planned. `pytest -m full_size`, some minutes.

Set EDGE_FULL_SIZE to a folder to keep the artifacts between runs.
"""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from export.dummy import write_dummy
from export.released import RELEASED
from quant.recipe import make_recipe
from runtime.manifest import read_manifest
from runtime.tables import CACHED_TABLE_BYTES, RowTable
from tests.page_residency import num_cached_pages
from tests.peak_memory import run_watched

pytestmark = pytest.mark.full_size

MIB = 1 << 20
CONTEXTS = [
    (512, "float16", "prefill"),
    (8192, "float16", "prefill"),
    (32_768, "float16", "jump"),
    (32_768, "int8", "jump"),
]
LIMITS = {("E2B", 8192, "float16"): 400 * MIB, ("E2B", 32_768, "int8"): 600 * MIB, ("E4B", 32_768, "int8"): 1024 * MIB}

# A whole context, drafts and sampling from the whole vocabulary behind it: prints the plan. With "jump" all but the
# last chunk of the prompt is not computed: its KV rows are filled at random, and its ids and their lookup are held.
CHILD = """
import dataclasses, sys
from edge import Runtime, load_profile
from edge.bench.opened import OpenedArtifact
from runtime.drafting import DraftCounts
from runtime.prompt_lookup import PromptLookup
from runtime.sampling import SamplingParams

artifact, num_tokens, kv_dtype, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
profile = dataclasses.replace(load_profile("laptop"), kv_dtype=kv_dtype)
with Runtime.load(artifact, profile=profile, memory_budget="4 GiB", context_tokens=num_tokens) as runtime:
    runtime.generate([2, 300], max_tokens=8, top_k=0, num_draft_tokens=16)
    prompt = [2 + 97 * i % 260_000 for i in range(num_tokens - 9)]
    if mode == "prefill":
        assert runtime.generate(prompt, max_tokens=8, num_draft_tokens=7).stats.num_drafted
    else:
        opened, held = OpenedArtifact(runtime), PromptLookup(prompt)
        opened.jump(len(prompt) - 548)
        opened.target.forward(prompt[-548:-36], num_kept=1)
        params = SamplingParams(temperature=1.0, top_k=0, top_p=0.95)
        for _ in opened.rounds(opened.target, opened.drafter, 300, 36, params, DraftCounts(), num_draft_tokens=7):
            pass
    print(runtime.plan.peak_bytes)
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    kept = os.environ.get("EDGE_FULL_SIZE")
    root = Path(kept) if kept else tmp_path_factory.mktemp("dummies")

    def make(name: str) -> Path:
        folder = root / f"{name}-native"
        if not folder.exists():
            write_dummy(RELEASED[name], folder, make_recipe(4), layout="native", show_progress=False)
        return folder

    return make


@pytest.mark.parametrize(("context_tokens", "kv_dtype", "mode"), CONTEXTS)
@pytest.mark.parametrize("name", RELEASED)
def test_the_plan_is_within_a_tenth(artifact, name, context_tokens, kv_dtype, mode):
    printed, measured = run_watched(CHILD, artifact(name), context_tokens, kv_dtype, mode)
    planned = int(printed)
    print(f"{name} {context_tokens:,} {kv_dtype}: planned {planned / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB")
    assert measured <= planned <= 1.1 * measured
    assert planned < LIMITS.get((name, context_tokens, kv_dtype), 1 << 40)


def test_ten_thousand_tokens_leave_the_tables_on_disk(artifact):
    folder = artifact("E2B")
    manifest = read_manifest(folder)
    file = folder / manifest.ple_table.file
    table, most = RowTable(folder, manifest.ple_table, cached_bytes=CACHED_TABLE_BYTES), 0
    assert num_cached_pages(file) == 0, "an export's pages are dropped when the table is opened"
    ids = np.random.default_rng(0).integers(manifest.model.vocab_size, size=10_000)
    for first in range(0, len(ids), 100):
        table.rows(ids[first : first + 100].tolist())
        most = max(most, num_cached_pages(file))
    table.close()
    assert 16 * MIB < most * mmap.PAGESIZE <= CACHED_TABLE_BYTES
