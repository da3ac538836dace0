"""The cache's laws: append then trim equals never appended, planned bytes equal `nbytes`, growth keeps rows."""

from collections.abc import Callable

import numpy as np
import pytest

from runtime.errors import RequestError
from runtime.kv_cache import GROWTH_TOKENS, KVCache, full_bytes_per_token, sliding_bytes
from runtime.layout import LAYOUTS, Layout
from runtime.model_config import LayerConfig, ModelConfig, RopeConfig
from runtime.signature import KV_DTYPES
from tests.models import TinyModels

WINDOW = 8
LAYERS = (
    LayerConfig("sliding", head_dim=4, num_kv_heads=2, intermediate_size=8, kv_source=0),
    LayerConfig("full", head_dim=6, num_kv_heads=1, intermediate_size=8, kv_source=1),
    LayerConfig("sliding", head_dim=4, num_kv_heads=2, intermediate_size=8, kv_source=2),
    LayerConfig("full", head_dim=6, num_kv_heads=1, intermediate_size=8, kv_source=1),
)
MODEL = ModelConfig(
    vocab_size=16,
    hidden_size=8,
    num_heads=2,
    sliding_window=WINDOW,
    rms_norm_eps=1e-6,
    rope={"sliding": RopeConfig(1e4, 1.0), "full": RopeConfig(1e6, 0.25)},
    layers=LAYERS,
    ple_size=4,
    context_tokens=4096,
    logit_softcap=None,
    bos_token_id=2,
    eos_token_ids=(1,),
)

each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def append_marked(cache: KVCache, num_tokens: int, mark: int = 0) -> None:
    """Appends rows that hold their token's position + `mark`, as a forward writes them."""
    cache.make_room(num_tokens)
    positions = np.arange(cache.num_tokens, cache.num_tokens + num_tokens, dtype=np.float32) + mark
    for kind, _, array in cache.arrays():
        row = cache.new_row(kind)
        array[row : row + num_tokens] = positions[:, None]
    cache.append(num_tokens)


def visible_rows(cache: KVCache) -> dict[tuple[str, str], np.ndarray]:
    """Rows that the drafter and a forward of one token may see, by view and name."""
    cache.make_room(1)
    rows = {}
    for kind, name, array in cache.arrays():
        draft, append = cache.draft_span(kind), cache.append_span(kind, 1)
        rows["draft", name] = array[draft.start : draft.stop].copy()
        rows["append", name] = array[append.start : append.stop - 1].copy()  # the last one is yet to be written
    return rows


def assert_same_rows(cache: KVCache, other: KVCache) -> None:
    assert cache.num_tokens == other.num_tokens
    rows, others = visible_rows(cache), visible_rows(other)
    for key in rows:
        np.testing.assert_array_equal(rows[key], others[key], err_msg=str(key))


@pytest.mark.parametrize("max_new_tokens", [1, 3, 7, 20])
def test_exactly_the_window_is_visible_at_every_length(max_new_tokens: int) -> None:
    cache, rng = KVCache(MODEL, "portable", max_tokens=200, max_new_tokens=max_new_tokens), np.random.default_rng(0)
    while cache.num_tokens < 150:
        append_marked(cache, int(rng.integers(1, max_new_tokens + 1)))
        for (view, name), rows in visible_rows(cache).items():
            is_full = name.startswith(("keys_1", "values_1"))
            # a token sees window - 1 rows besides its own, the drafter window + 1
            num_seen = cache.num_tokens if is_full else min(cache.num_tokens, WINDOW + (1 if view == "draft" else -1))
            assert rows[:, 0].tolist() == list(range(cache.num_tokens - num_seen, cache.num_tokens))


@each_layout
@pytest.mark.parametrize("seed", range(5))
def test_append_then_trim_equals_never_appended(layout: Layout, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache, plain = (KVCache(MODEL, layout, max_tokens=300, max_new_tokens=5) for _ in range(2))
    while plain.num_tokens < 250:
        num_kept, num_dropped = rng.integers(1, 3), rng.integers(0, 4)
        append_marked(plain, num_kept)
        append_marked(cache, num_kept)
        if num_dropped:
            append_marked(cache, num_dropped, mark=1000)
            cache.trim(num_dropped)
        assert_same_rows(cache, plain)


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
    cache = KVCache(MODEL, "portable", max_tokens=64, max_new_tokens=4)
    append_marked(cache, 4)
    append_marked(cache, 2)
    cache.trim(1)
    cache.trim(1)
    with pytest.raises(AssertionError):
        cache.trim(1)


@each_layout
@pytest.mark.parametrize("max_new_tokens", [1, 17, 512])
@pytest.mark.parametrize("num_tokens", [1, GROWTH_TOKENS, GROWTH_TOKENS + 1, 3 * GROWTH_TOKENS - 1])
def test_planned_bytes_are_the_arrays_bytes(layout: Layout, num_tokens: int, max_new_tokens: int) -> None:
    cache = KVCache(MODEL, layout, max_tokens=4 * GROWTH_TOKENS, max_new_tokens=max_new_tokens)
    assert cache.nbytes == sliding_bytes(MODEL, layout, max_new_tokens)
    while cache.num_tokens < num_tokens:
        append_marked(cache, min(max_new_tokens, num_tokens - cache.num_tokens))
    num_rows = -(-num_tokens // GROWTH_TOKENS) * GROWTH_TOKENS
    planned = num_rows * full_bytes_per_token(MODEL, layout) + sliding_bytes(MODEL, layout, max_new_tokens)
    assert cache.nbytes == planned
    # keys and values of 4 bytes, or 2: one full owner of 1 head x 6, two sliding owners of 2 heads x 4
    size = 2 if layout == "native" else 4
    assert full_bytes_per_token(MODEL, layout) == 2 * size * 1 * 6
    assert sliding_bytes(MODEL, layout, 17) == 2 * 2 * size * 2 * 4 * (WINDOW + 1 + 17)


def test_growth_stops_at_the_context() -> None:
    cache = KVCache(MODEL, "portable", max_tokens=GROWTH_TOKENS + 10, max_new_tokens=GROWTH_TOKENS)
    append_marked(cache, GROWTH_TOKENS)
    append_marked(cache, 10)
    context_bytes = (GROWTH_TOKENS + 10) * full_bytes_per_token(MODEL, "portable")
    assert cache.nbytes == context_bytes + sliding_bytes(MODEL, "portable", GROWTH_TOKENS)


@each_layout
def test_growth_keeps_rows_and_their_type(layout: Layout) -> None:
    cache = KVCache(MODEL, layout, max_tokens=4096, max_new_tokens=GROWTH_TOKENS)
    for _ in range(4):
        append_marked(cache, GROWTH_TOKENS - 1)
    for kind, _, array in cache.arrays():
        assert array.dtype == KV_DTYPES[layout]
        if kind == "full":
            np.testing.assert_array_equal(array[: cache.num_tokens, 0], np.arange(cache.num_tokens))


def test_clear_forgets_tokens_and_keeps_memory() -> None:
    cache = KVCache(MODEL, "portable", max_tokens=64, max_new_tokens=4)
    for _ in range(8):
        append_marked(cache, 4)
    before = cache.nbytes
    cache.clear()
    append_marked(cache, 2)
    fresh = KVCache(MODEL, "portable", max_tokens=64, max_new_tokens=4)
    append_marked(fresh, 2)
    assert_same_rows(cache, fresh)
    assert cache.nbytes == before


def test_context_overflow_is_refused_and_changes_nothing() -> None:
    cache = KVCache(MODEL, "portable", max_tokens=1500, max_new_tokens=1400)
    append_marked(cache, 1400)
    with pytest.raises(RequestError, match="context: 1,501 tokens are needed, 1,500 fit"):
        cache.make_room(101)
    assert cache.num_tokens == 1400
    append_marked(cache, 100)
