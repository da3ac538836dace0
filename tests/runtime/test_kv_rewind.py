"""A rewound or restored cache holds what one that never went further does, or fewer tokens where it says so."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kv_cache import MARK_SLACK, MAX_WINDOWS, KVCache, window_copy_bytes
from runtime.kv_rows import KVDtype
from tests.kv_caches import MODEL, WINDOW, append_marked, assert_same_rows, each_kv_dtype, visible_rows

MAX_NEW = 5
MAX_TOKENS = 300


def make_cache(kv_dtype: KVDtype = "float32", max_new_tokens: int = MAX_NEW) -> KVCache:
    return KVCache(MODEL, kv_dtype, max_tokens=MAX_TOKENS, max_new_tokens=max_new_tokens)


def fill(cache: KVCache, num_tokens: int, mark: int = 0, step: int = MAX_NEW) -> KVCache:
    """Appends up to `num_tokens`, so many at once."""
    while cache.num_tokens < num_tokens:
        append_marked(cache, min(step, num_tokens - cache.num_tokens), mark)
    return cache


def assert_goes_on_alike(cache: KVCache, num_tokens: int, kv_dtype: KVDtype = "float32") -> None:
    """The cache, which has `num_tokens`, equals one that never had more, now and over two windows."""
    plain = fill(make_cache(kv_dtype), num_tokens)
    for _ in range(2 * WINDOW):
        assert_same_rows(cache, plain)
        append_marked(cache, 1, 50)
        append_marked(plain, 1, 50)


@each_kv_dtype
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_rewound_equals_never_appended(kv_dtype: KVDtype, data: st.DataObject) -> None:
    cache = make_cache(kv_dtype)
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            cache.mark(data.draw(st.integers(1, 120)))
        num_tokens = data.draw(st.integers(cache.num_tokens, 150))
        fill(cache, num_tokens, step=data.draw(st.integers(1, MAX_NEW)))
        wanted = data.draw(st.integers(0, cache.num_tokens))
        possible = cache.rewindable_to(wanted)
        assert cache.rewind(wanted) == possible == cache.num_tokens <= wanted
    assert_goes_on_alike(cache, cache.num_tokens, kv_dtype)


@pytest.mark.parametrize("back", range(MARK_SLACK + 1))
def test_a_marked_token_and_a_few_before_it_stay_within_reach(back: int) -> None:
    cache = fill(make_cache(max_new_tokens=40), 60, step=20)
    cache.mark(60)
    fill(cache, 250, mark=9)
    assert cache.rewind(60 - back) == 60 - back
    assert_goes_on_alike(cache, 60 - back)


def test_a_mark_may_be_ahead() -> None:
    cache = make_cache()
    cache.mark(73)
    fill(cache, 250)
    assert cache.rewind(73) == 73
    assert_goes_on_alike(cache, 73)


def test_without_a_mark_the_window_goes_and_all_with_it() -> None:
    cache = fill(make_cache(), 250)
    assert cache.rewindable_to(100) == 0
    assert cache.rewind(100) == 0
    assert_goes_on_alike(cache, 0)


def test_the_last_marks_are_kept() -> None:
    cache = make_cache()
    marks = [30, 60, 90, 120, 150]
    for mark in marks:
        fill(cache, mark)
        cache.mark(mark)
    fill(cache, 250)
    assert [cache.rewindable_to(mark) for mark in marks] == [0, 0, *marks[-MAX_WINDOWS:]]


def test_copies_take_no_more_than_is_planned() -> None:
    cache = make_cache()
    for mark in range(10, 250, 10):
        cache.mark(mark)
        fill(cache, mark)
    planned = window_copy_bytes(MODEL, "float32", MAX_TOKENS)
    assert 0 < sum(window.nbytes for window in cache._windows) <= planned


@each_kv_dtype
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_restored_equals_the_cache_of_the_snapshot(kv_dtype: KVDtype, data: st.DataObject) -> None:
    cache = make_cache(kv_dtype)
    cache.mark(data.draw(st.integers(1, 150)))
    fill(cache, data.draw(st.integers(1, 150)), step=data.draw(st.integers(1, MAX_NEW)))
    snapshot, num_tokens = cache.snapshot(), cache.num_tokens
    assert snapshot.nbytes <= cache.snapshot_bytes
    other = fill(make_cache(kv_dtype), data.draw(st.integers(0, 200)), mark=77)  # of other tokens
    wanted = data.draw(st.integers(0, num_tokens))
    left = other.restore(snapshot, wanted)
    assert cache.rewindable_to(wanted) <= left <= wanted
    fill(cache, 200, mark=5)  # which changes nothing of the snapshot
    assert_goes_on_alike(other, left, kv_dtype)


def test_a_cut_snapshot_holds_nothing_of_what_was_cut_off() -> None:
    cache = fill(make_cache(max_new_tokens=80), 50)
    fill(cache, 70, mark=1000)
    cut = cache.snapshot(50)
    assert cut.num_tokens == 50
    for rows in (*cut.full.values(), *(rows for window in cut.windows for rows in window.rows.values())):
        assert (rows.view(np.float32)[:, 0] < 1000).all()
    other = make_cache(max_new_tokens=80)
    assert other.restore(cut, 50) == 50
    assert_goes_on_alike(other, 50)


def test_memory_follows_a_rewind() -> None:
    cache = KVCache(MODEL, "float32", max_tokens=8000, max_new_tokens=600)
    for _ in range(10):
        append_marked(cache, 600)
    peak = cache.nbytes
    cache.rewind(0)
    assert cache.nbytes < peak / 3
    assert visible_rows(cache)


def test_a_snapshot_can_be_cut_as_far_as_its_window_reaches() -> None:
    snapshot = fill(make_cache(max_new_tokens=80), 70).snapshot()
    kept = make_cache().kept_tokens
    assert [snapshot.cut(num, kept).num_tokens for num in (70, 70 - MARK_SLACK, 70 - MARK_SLACK - 1)] == [70, 62, 0]
    other = make_cache(max_new_tokens=80)
    assert other.restore(snapshot.cut(64, kept), 100) == 64
    assert_goes_on_alike(other, 64)


def test_snapshots_of_restored_caches_do_not_grow() -> None:
    cache = make_cache(max_new_tokens=20)
    for mark in (40, 80, 120):
        fill(cache, mark)
        cache.mark(mark)
    snapshot = fill(cache, 200).snapshot()
    for _ in range(3):
        other = make_cache(max_new_tokens=20)
        other.restore(snapshot, 200)
        again = other.snapshot()
        assert [(window.first, window.stop) for window in again.windows] == [
            (window.first, window.stop) for window in snapshot.windows
        ]
        assert [other.rewindable_to(mark) for mark in (40, 80, 120)] == [40, 80, 120]
        snapshot = again
