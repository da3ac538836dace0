"""The context shrinks to what the budget leaves room for, and no further."""

from dataclasses import replace

import pytest

from runtime.budget import context_that_fits, planned_bytes
from runtime.errors import MemoryBudgetError
from runtime.manifest import read_manifest


@pytest.fixture
def manifest(tiny_artifact):
    return read_manifest(tiny_artifact("wide", 4))


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
