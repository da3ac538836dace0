"""The cache's laws: append then trim equals never appended, cleared equals new, adding tokens moves no other token."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import reserved_memory
from runtime.errors import MemoryBudgetError, RequestError
from runtime.kv_cache import KEPT_TOKENS, KVCache, full_bytes_per_token, sliding_bytes
from runtime.kv_rows import KVDtype, decode_rows, encode_rows, row_bytes
from runtime.reserved_memory import PAGE_BYTES
from tests.kv_caches import (
    MODEL,
    NUM_ARRAYS,
    WINDOW,
    append_marked,
    assert_same_rows,
    each_kv_dtype,
    visible_rows,
)
from tests.models import TinyModels

ROOT = Path(__file__).parents[2]


def addresses(cache: KVCache) -> dict[str, tuple[int, int]]:
    return {name: (array.ctypes.data, array.nbytes) for _, name, array in cache.arrays()}


# tokens


@pytest.mark.parametrize("max_new_tokens", [1, 3, 7, 20])
def test_exactly_the_window_is_visible_at_every_length(max_new_tokens: int) -> None:
    cache, rng = KVCache(MODEL, "float32", max_tokens=200, max_new_tokens=max_new_tokens), np.random.default_rng(0)
    while cache.num_tokens < 150:
        append_marked(cache, int(rng.integers(1, max_new_tokens + 1)))
        for (view, name), rows in visible_rows(cache).items():
            is_full = name.startswith(("keys_1", "values_1"))
            # a token sees window - 1 rows besides its own, the drafter window + 1
            num_seen = cache.num_tokens if is_full else min(cache.num_tokens, WINDOW + (1 if view == "draft" else -1))
            positions = rows.view(np.float32)[:, 0].tolist()
            assert positions == list(range(cache.num_tokens - num_seen, cache.num_tokens))


@each_kv_dtype
@pytest.mark.parametrize("seed", range(5))
def test_append_then_trim_equals_never_appended(kv_dtype: KVDtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache, plain = (KVCache(MODEL, kv_dtype, max_tokens=300, max_new_tokens=5) for _ in range(2))
    while plain.num_tokens < 250:
        num_kept, num_dropped = rng.integers(1, 3), rng.integers(0, 4)
        append_marked(plain, num_kept)
        append_marked(cache, num_kept)
        if num_dropped:
            append_marked(cache, num_dropped, mark=1000)
            cache.trim(num_dropped)
        assert_same_rows(cache, plain)


@each_kv_dtype
@pytest.mark.parametrize("seed", range(3))
def test_cleared_equals_new(kv_dtype: KVDtype, seed: int) -> None:
    rng, sizes = np.random.default_rng(seed), {"max_tokens": 4 * KEPT_TOKENS, "max_new_tokens": 300}
    cache = KVCache(MODEL, kv_dtype, **sizes)
    for num_tokens in (20, 3 * KEPT_TOKENS, 40, 2 * KEPT_TOKENS):
        cache.clear()
        new = KVCache(MODEL, kv_dtype, **sizes)
        while new.num_tokens < num_tokens:
            num_new, num_dropped = rng.integers(1, 300), rng.integers(0, 20)
            for one in (cache, new):
                append_marked(one, num_new, mark=num_tokens)
                append_marked(one, num_dropped, mark=1000)
                one.trim(num_dropped)
            assert_same_rows(cache, new)


@pytest.mark.parametrize("shape", ["wide", "irregular", "one_shared"])
def test_the_same_law_holds_on_a_real_model(shape: str, open_tiny: Callable[..., TinyModels]) -> None:
    max_new = 5  # few rows beyond the window, so that the two caches are compacted often and at different times
    trimmed, plain = (open_tiny(shape, max_new_tokens=max_new).target for _ in range(2))
    rng, vocab_size = np.random.default_rng(1), plain.model.vocab_size
    while plain.num_tokens < 3 * plain.model.sliding_window:
        token_ids, dropped = (rng.integers(vocab_size, size=rng.integers(1, max_new + 1)).tolist() for _ in range(2))
        logits = trimmed.forward(token_ids, num_kept=len(token_ids)).logits
        # the same products over the same numbers, wherever they lie: equal to the bit
        np.testing.assert_array_equal(logits, plain.forward(token_ids, num_kept=len(token_ids)).logits)
        trimmed.forward(dropped, num_kept=1)
        trimmed.trim(len(dropped))
        assert_same_rows(trimmed.cache, plain.cache)


def test_only_the_last_append_can_be_trimmed() -> None:
    cache = KVCache(MODEL, "float32", max_tokens=64, max_new_tokens=4)
    append_marked(cache, 4)
    append_marked(cache, 2)
    cache.trim(1)
    cache.trim(1)
    with pytest.raises(AssertionError):
        cache.trim(1)


def test_context_overflow_is_refused_and_changes_nothing() -> None:
    cache = KVCache(MODEL, "float32", max_tokens=1500, max_new_tokens=1400)
    append_marked(cache, 1400)
    with pytest.raises(RequestError, match="context: 1,501 tokens are needed, 1,500 fit"):
        cache.make_room(101)
    assert cache.num_tokens == 1400
    append_marked(cache, 100)


# what adding tokens costs


@each_kv_dtype
def test_no_row_of_a_full_layer_ever_moves(kv_dtype: KVDtype) -> None:
    cache = KVCache(MODEL, kv_dtype, max_tokens=4000, max_new_tokens=17)
    before = addresses(cache)
    while cache.num_tokens < 3900:
        append_marked(cache, 13)
        assert addresses(cache) == before
    for kind, _, array in cache.arrays():
        if kind == "full":
            values = encode_rows(np.repeat(np.arange(cache.num_tokens, dtype=np.float32)[:, None], 6, 1), kv_dtype)
            np.testing.assert_array_equal(array[: cache.num_tokens], values)
    cache.clear()
    assert addresses(cache) == before


def test_tokens_one_by_one_move_a_window_once_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    max_new, num_moved = 50, []
    compact = KVCache._compact

    def counted(cache: KVCache, kind: Any) -> None:
        compact(cache, kind)
        num_moved.append(cache.new_row("sliding"))

    monkeypatch.setattr(KVCache, "_compact", counted)
    cache = KVCache(MODEL, "float32", max_tokens=2000, max_new_tokens=max_new)
    for _ in range(2000):
        append_marked(cache, 1)
    assert len(num_moved) == (2000 - WINDOW - 1 - 1) // max_new
    assert set(num_moved) == {WINDOW + 1}


# memory


@each_kv_dtype
@pytest.mark.parametrize("max_new_tokens", [1, 17, 512])
@pytest.mark.parametrize("num_tokens", [1, 512, 513, 3000])
def test_planned_bytes_are_those_of_the_rows(kv_dtype: KVDtype, num_tokens: int, max_new_tokens: int) -> None:
    cache = KVCache(MODEL, kv_dtype, max_tokens=4096, max_new_tokens=max_new_tokens)
    assert cache.nbytes == 0
    while cache.num_tokens < num_tokens:
        append_marked(cache, min(max_new_tokens, num_tokens - cache.num_tokens))
    num_sliding = min(num_tokens, WINDOW + 1 + max_new_tokens)
    planned = num_tokens * full_bytes_per_token(MODEL, kv_dtype)
    planned += sliding_bytes(MODEL, kv_dtype, max_new_tokens, 1 << 20) * num_sliding // (WINDOW + 1 + max_new_tokens)
    assert planned <= cache.nbytes < planned + NUM_ARRAYS * PAGE_BYTES


@pytest.mark.parametrize(("kv_dtype", "full", "sliding"), [("float32", 24, 16), ("float16", 12, 8), ("int8", 8, 6)])
def test_planned_bytes_by_hand(kv_dtype: KVDtype, full: int, sliding: int) -> None:
    # keys and values: one full owner of 1 head x 6, two sliding owners of 2 heads x 4
    assert full_bytes_per_token(MODEL, kv_dtype) == 2 * full
    assert sliding_bytes(MODEL, kv_dtype, 17, 1 << 20) == 2 * 2 * 2 * sliding * (WINDOW + 1 + 17)
    assert sliding_bytes(MODEL, kv_dtype, 17, WINDOW) == 2 * 2 * 2 * sliding * WINDOW


@pytest.mark.parametrize(("head_dim", "num_bytes"), [(64, 66), (65, 69), (128, 132), (256, 264), (512, 528)])
def test_an_int8_row_has_a_scale_for_each_64_values(head_dim: int, num_bytes: int) -> None:
    assert row_bytes(head_dim, "int8") == num_bytes
    values = np.random.default_rng(0).standard_normal((9, head_dim)).astype(np.float32)
    rows = encode_rows(values, "int8")
    assert rows.shape == (9, num_bytes)
    num_blocks = (num_bytes - head_dim) // 2
    scales = np.repeat(rows[:, head_dim:].copy().view(np.float16).astype(np.float32), 64, axis=1)[:, :head_dim]
    assert scales.size and num_blocks == -(-head_dim // 64)
    # half a step, and some roundings of float32
    assert (np.abs(decode_rows(rows, head_dim) - values) <= scales * 0.5001).all()


def test_arrays_share_no_page() -> None:
    cache = KVCache(MODEL, "int8", max_tokens=100, max_new_tokens=4)
    assert all(address % PAGE_BYTES == 0 for address, _ in addresses(cache).values())
    assert len({address for address, _ in addresses(cache).values()}) == NUM_ARRAYS


def test_clear_keeps_the_memory_of_a_short_conversation() -> None:
    cache = KVCache(MODEL, "float32", max_tokens=100_000, max_new_tokens=1000)
    for num_tokens in (1000, 50_000):
        while cache.num_tokens < num_tokens:
            append_marked(cache, 1000)
        cache.clear()
        kept = 2 * -(-KEPT_TOKENS * 24 // PAGE_BYTES) * PAGE_BYTES
        assert cache.nbytes == kept + 8 * -(-1009 * 16 // PAGE_BYTES) * PAGE_BYTES


def test_too_few_addresses_are_an_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(reserved_memory.mmap, "mmap", refuse)
    match = r"no 92 MiB of addresses for the KV cache; raise its limit \(ulimit -v\) or lower context_tokens"
    with pytest.raises(MemoryBudgetError, match=match):
        KVCache(MODEL, "float32", max_tokens=2_000_000, max_new_tokens=4)


# What a process has resident beside what the cache says, after each step of a long and a short conversation.
CHILD = """
import numpy as np
from runtime.kv_cache import KVCache
from runtime.memory import memory_usage
from tests.kv_caches import MODEL, append_marked

def resident():
    return memory_usage().anonymous_bytes

cache = KVCache(MODEL, "float16", max_tokens=1 << 24, max_new_tokens=1 << 15)
rows = np.empty(1 << 20, np.uint8)  # what one step writes below is there before the first is measured
for _ in range(2):
    append_marked(cache, 1 << 15)
    cache.clear()
base = resident() - cache.nbytes
for num_tokens in (1 << 15, 1 << 18, 1 << 20, 0, 1 << 16, 1 << 19):
    if num_tokens < cache.num_tokens:
        cache.clear()
    while cache.num_tokens < num_tokens:
        append_marked(cache, 1 << 15)
    print(cache.num_tokens, cache.nbytes, resident() - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count other pages")
def test_resident_memory_follows_the_tokens() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        num_tokens, nbytes, found = map(int, line.split())
        # 24 bytes of a token in the full layers; a heap that grows for temporary arrays is the rest
        assert nbytes >= 24 * num_tokens
        assert abs(found - nbytes) < 1 << 20, line
