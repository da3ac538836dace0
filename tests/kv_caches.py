"""A small model's KV caches, whose rows hold their token's position, so that every row that is seen can be told."""

import numpy as np
import pytest

from runtime.kv_cache import KVCache
from runtime.kv_rows import KV_DTYPES, encode_rows
from runtime.model_config import LayerConfig, ModelConfig, RopeConfig

WINDOW = 8
HEAD_DIMS = {"sliding": 4, "full": 6}
LAYERS = (
    LayerConfig("sliding", head_dim=4, num_kv_heads=2, intermediate_size=8, kv_source=0),
    LayerConfig("full", head_dim=6, num_kv_heads=1, intermediate_size=8, kv_source=1),
    LayerConfig("sliding", head_dim=4, num_kv_heads=2, intermediate_size=8, kv_source=2),
    LayerConfig("full", head_dim=6, num_kv_heads=1, intermediate_size=8, kv_source=1),
)
NUM_ARRAYS = 2 * (2 + 2 + 1)
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

each_kv_dtype = pytest.mark.parametrize("kv_dtype", KV_DTYPES)


def append_marked(cache: KVCache, num_tokens: int, mark: int = 0) -> None:
    """Appends rows that hold their token's position + `mark`, as a forward writes them."""
    cache.make_room(num_tokens)
    positions = np.arange(cache.num_tokens, cache.num_tokens + num_tokens, dtype=np.float32) + mark
    for kind, _, array in cache.arrays():
        row = cache.new_row(kind)
        values = np.repeat(positions[:, None], HEAD_DIMS[kind], axis=1)
        array[row : row + num_tokens] = encode_rows(values, cache.kv_dtype)
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
