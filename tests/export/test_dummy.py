"""Artifacts of random weights: sizes of the real models, what an export makes, kept until they are out of use."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge import EdgeError, Runtime
from export import dummy as dummies
from export.dummy import RandomCheckpoint, drafter_shapes, dummy_artifact, target_shapes
from export.hf_config import drafter_config, model_config
from export.released import RELEASED, ReleasedModel
from quant.blockwise import BlockFormat
from quant.recipe import make_recipe
from runtime.manifest import read_manifest
from runtime.tables import dequantize_rows

SMALL = {
    "vocab_size": 4096,
    "intermediate_size": 128,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 16,
}
E2B = RELEASED["E2B"]
TINY = ReleasedModel(
    "tiny",
    E2B.target
    | SMALL
    | {
        "vocab_size_per_layer_input": 4096,
        "hidden_size": 64,
        "hidden_size_per_layer_input": 32,
        "num_hidden_layers": 10,
        "num_kv_shared_layers": 5,
        "layer_types": E2B.target["layer_types"][:10],
    },
    E2B.assistant
    | {
        "backbone_hidden_size": 64,
        "num_centroids": 64,
        "centroid_intermediate_top_k": 8,
        "text_config": E2B.assistant["text_config"] | SMALL | {"hidden_size": 32},
    },
)
RECIPE = make_recipe(4, 32)


def count(shapes: dict[str, tuple[int, ...]], part: str = "") -> int:
    return sum(int(np.prod(shape)) for name, shape in shapes.items() if part in name)


@pytest.mark.parametrize(
    ("name", "layers", "embedding", "ple"),
    [("E2B", 1.863e9, 403e6, 2.35e9), ("E4B", 3.946e9, 671e6, 2.82e9)],
)
def test_sizes_are_those_of_the_model(name: str, layers: float, embedding: float, ple: float) -> None:
    shapes = target_shapes(model_config(RELEASED[name].target, name))
    # published to three or four digits
    assert count(shapes, ".embed_tokens.weight") == pytest.approx(embedding, rel=2e-3)
    assert count(shapes, ".embed_tokens_per_layer.weight") == pytest.approx(ple, rel=2e-3)
    assert count(shapes, ".layers.") == pytest.approx(layers, rel=1e-2)


@pytest.mark.parametrize(("name", "total"), [("E2B", 77.7e6), ("E4B", 78.5e6)])
def test_sizes_are_those_of_the_drafter(name: str, total: float) -> None:
    model = model_config(RELEASED[name].target, name)
    shapes = drafter_shapes(drafter_config(RELEASED[name].assistant, model, name))
    weights = count(shapes) - count(shapes, "token_ordering")
    assert weights == pytest.approx(total, rel=1e-2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dummy") / "tiny"
    dummies.write_dummy(TINY, folder, RECIPE, show_progress=False)
    return folder


def test_it_generates_and_drafts(tiny: Path) -> None:
    with Runtime.load(tiny, profile="phone-arm") as runtime:
        generation = runtime.generate([2, 5, 7], max_tokens=12, temperature=0, num_draft_tokens=3)
    assert generation.stats.num_drafted > 0
    assert len(set(generation.token_ids)) > 1


def test_logits_are_finite_and_apart(tiny: Path) -> None:
    with Runtime.load(tiny, profile="phone-arm") as runtime:
        assert runtime._loaded
        logits = runtime._loaded.target.forward([5, 900, 77, 4000], num_kept=4).logits
        assert np.isfinite(logits).all()
        assert (logits.std(axis=1) > 0.1).all()
        assert len(np.unique(logits[0])) > logits.shape[1] // 2


def test_the_tokenizer_is_as_large_as_the_vocabulary(tiny: Path) -> None:
    with Runtime.load(tiny, profile="phone-arm") as runtime:
        assert runtime._loaded
        assert runtime._loaded.tokenizer.vocab_size == 4096


def random_checkpoint(tmp_path: Path) -> RandomCheckpoint:
    (tmp_path / "config.json").write_text("{}")
    return RandomCheckpoint(tmp_path, {"a": (96, 128), "b": (96, 128), "token_ordering": (50,)})


def test_no_two_matrices_are_equal(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path)
    form = BlockFormat(128, 4, 32)
    (first,), (second,) = checkpoint.rows("a", 0, 96), checkpoint.rows("b", 0, 96)
    assert not np.array_equal(first, second)
    codes = [checkpoint.codes(96, form).codes for _ in range(3)]
    assert not np.array_equal(codes[0], codes[1])
    assert not np.array_equal(codes[1], codes[2])
    assert sorted(checkpoint.indices("token_ordering", 50)) == list(range(50))


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_have_norm_one(tmp_path: Path, bits: int) -> None:
    checkpoint = random_checkpoint(tmp_path)
    (rows,) = checkpoint.rows("a", 0, 96)
    codes, scales, _ = checkpoint.codes(96, BlockFormat(128, bits, 32))
    for weights in (rows, dequantize_rows(codes, scales, 128, bits)):
        # 12,288 values: their mean square is within 4 standard errors of 4 % at most; the signed scales add 8 %
        assert (weights**2).sum(axis=1).mean() == pytest.approx(1, abs=0.2)
        assert abs(weights.mean()) < 0.01


# the cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def make(**options: Any) -> Path:
    return dummy_artifact(TINY, make_recipe(**{"bits": 4, **options}), show_progress=False)


def test_it_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    assert folder.is_relative_to(cache)
    with monkeypatch.context() as patch:
        patch.setattr(dummies, "write_dummy", None)
        assert make() == folder
    other = make(block_size=64)
    assert other != folder
    assert read_manifest(other).recipe["rules"][0]["block_size"] == 64


def test_a_damaged_one_is_made_again(cache: Path) -> None:
    folder = make()
    (folder / "decoder.onnx").write_bytes(b"")
    assert make() == folder
    assert (folder / "decoder.onnx").stat().st_size > 0


def test_those_out_of_use_are_removed(cache: Path) -> None:
    folder = make()
    (folder.parent / "other").mkdir()  # of someone else: not an artifact
    (folder.parent / ".tiny.partial").mkdir()
    for path in folder.parent.iterdir():
        os.utime(path, (0, 0))
    newer = make(block_size=64)
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted(["other", newer.name])


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    (cache / "gemma-edge").write_text("a file")
    with pytest.raises(EdgeError, match="gemma-edge/dummy: Not a directory; set XDG_CACHE_HOME to a folder"):
        make()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dummies, "user_cache_folder", lambda: None)
    with pytest.raises(EdgeError, match="no cache folder: this user has no home; set XDG_CACHE_HOME"):
        make()
