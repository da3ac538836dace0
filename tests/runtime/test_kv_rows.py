"""Which type KV rows get, what the runtime says where the graphs cannot read it, and that a generation uses it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge import Runtime
from profiles import DeviceProfile, ProfileError
from runtime import engine
from runtime.kv_rows import KV_DTYPES, KVDtype, choose_kv_dtype, decode_rows, encode_rows
from runtime.verified_cache import user_cache_folder
from tests.layouts import ExportBoth, needs_native

PROMPT = [2, 5, 7, 30, 12]
REFUSED = (
    "profile test: kv_dtype '{}' needs the native layout, {}, and stock ONNX Runtime would make a dense float32 copy "
    "of each layer's rows in every forward; export or convert with --layout native where the ops run, or set kv_dtype "
    "to 'float32' or 'auto'"
)


@pytest.mark.parametrize(("asked", "due"), [("auto", "float16"), *((dtype, dtype) for dtype in KV_DTYPES)])
def test_the_native_layout_reads_any_type(asked: str, due: KVDtype, one_thread: DeviceProfile) -> None:
    assert choose_kv_dtype(replace(one_thread, kv_dtype=asked), "native") == due


@pytest.mark.parametrize("asked", ["auto", "float32"])
def test_the_portable_layout_reads_floats(asked: str, one_thread: DeviceProfile) -> None:
    assert choose_kv_dtype(replace(one_thread, kv_dtype=asked), "portable") == "float32"


@pytest.mark.parametrize("asked", ["float16", "int8"])
def test_the_portable_layout_refuses_others(
    asked: str, one_thread: DeviceProfile, tiny_artifact: Callable[..., Path]
) -> None:
    with pytest.raises(ProfileError) as caught:
        Runtime.load(tiny_artifact("wide", 4), profile=replace(one_thread, kv_dtype=asked))
    assert str(caught.value) == REFUSED.format(asked, "the artifact is portable")


@pytest.mark.parametrize("asked", ["float16", "int8"])
def test_a_portable_copy_refuses_them_before_it_is_made(
    asked: str,
    one_thread: DeviceProfile,
    both_layouts: ExportBoth,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(engine.native, "unusable_because", lambda: "for a test")
    with pytest.raises(ProfileError) as caught:
        Runtime.load(both_layouts("one_shared")["native"], profile=replace(one_thread, kv_dtype=asked))
    assert str(caught.value) == REFUSED.format(asked, "its ops cannot be used here (for a test)")
    cache = user_cache_folder()
    assert cache is not None and not (cache / "portable").exists()


@needs_native
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_loaded_runtime_keeps_rows_of_that_type(
    kv_dtype: KVDtype, one_thread: DeviceProfile, both_layouts: ExportBoth
) -> None:
    profile = replace(one_thread, kv_dtype=kv_dtype)
    with Runtime.load(both_layouts("irregular")["native"], profile=profile) as runtime:
        found = [
            runtime.generate(PROMPT, max_tokens=24, temperature=0.0, num_draft_tokens=num).token_ids for num in (0, 3)
        ]
        assert runtime._loaded is not None
        cache, model = runtime._loaded.target.cache, runtime.manifest.model
        assert cache.kv_dtype == kv_dtype
        for _, name, array in cache.arrays():
            head_dim = model.layers[int(name.split("_")[1])].head_dim
            size = {"float32": 4 * head_dim, "float16": 2 * head_dim}.get(kv_dtype, head_dim + 2 * -(-head_dim // 64))
            assert array.shape[1] == size
    assert found[0] == found[1]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_rows_come_back(kv_dtype: KVDtype) -> None:
    values = np.random.default_rng(0).integers(-127, 128, (7, 150)).astype(np.float32)
    values[:, ::64] = 127  # so that the scale of every block is 1
    np.testing.assert_array_equal(decode_rows(encode_rows(values, kv_dtype), 150), values)


def test_what_is_no_number_spoils_its_block() -> None:
    values = np.ones((2, 150), np.float32)
    values[0, 70], values[1, 149] = np.nan, -np.inf
    found = decode_rows(encode_rows(values, "int8"), 150)
    np.testing.assert_array_equal(np.isnan(found[0]), [64 <= place < 128 for place in range(150)])
    np.testing.assert_array_equal(np.isnan(found[1]), [place >= 128 for place in range(150)])
