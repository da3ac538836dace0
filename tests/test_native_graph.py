"""The native graphs, run by the reference ops, compute what the portable ones do; and the ops what the reference does.

With activations and KV rows in float32 on both sides the two differ by the order of their sums alone; these random
nets amplify its 1e-7 to some 1e-5 of the values' spread (transformers' own float32 is off by as much, see
`tests.reference`).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from runtime.signature import kv_view_names, num_top_logits
from runtime.target import Forward
from tests.checkpoints import SHAPES, TinyCheckpoint
from tests.drafting import GREEDY
from tests.layouts import needs_native
from tests.models import TinyModels, open_models
from tests.native_artifacts import NATIVE, export_both, open_native

TOLERANCE = 1e-4  # of the spread
FLIPPED = 0.05  # of the spread: a step of int8 in a few activations
NUM_STEPS = 3
NODES_PER_LAYER = 10
OTHER_NODES = 30  # inputs, PLE, outputs

Float32 = npt.NDArray[np.float32]
OpenBoth = Callable[..., tuple[TinyModels, TinyModels]]
shapes = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(scope="session")
def artifact_of_both(
    tiny_checkpoint: Callable[[str], TinyCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """artifact_of_both(shape, bits=4, block_size=32): graphs of both layouts; the portable ones compute in float32."""

    @cache
    def make(shape: str, bits: int = 4, block_size: int = 32) -> Path:
        folder = tmp_path_factory.mktemp(f"{shape}-{bits}-{block_size}-both") / "artifact"
        return export_both(tiny_checkpoint(shape), folder, bits, block_size, "float32")

    return make


@pytest.fixture
def opened() -> Iterator[list[TinyModels]]:
    models: list[TinyModels] = []
    yield models
    for one in models:
        one.close()


@pytest.fixture
def open_both(artifact_of_both: Callable[..., Path], opened: list[TinyModels]) -> OpenBoth:
    """open_both(shape, bits=4, block_size=32, **cache sizes): (portable, native all in float32), caches empty."""

    def open_pair(shape: str, bits: int = 4, block_size: int = 32, **sizes: int) -> tuple[TinyModels, TinyModels]:
        folder = artifact_of_both(shape, bits, block_size)
        opened.extend((open_models(folder, **sizes), open_native(folder.with_name(NATIVE), rounds=False, **sizes)))
        return opened[-2], opened[-1]

    return open_pair


def prompt_of(models: TinyModels, num_tokens: int) -> list[int]:
    token_ids: list[int] = np.random.default_rng(num_tokens).integers(models.target.model.vocab_size, size=num_tokens)
    return list(map(int, token_ids))


def check_close(found: Float32, expected: Float32) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.ptp(expected))


def check_same(portable: Forward, native: Forward) -> None:
    check_close(native.logits, portable.logits)
    check_close(native.hidden, portable.hidden)
    assert native.top_logits is not None and native.top_ids is not None
    for logits, values, ids in zip(native.logits, native.top_logits, native.top_ids, strict=True):
        assert len(ids) == num_top_logits(len(logits))
        order = np.lexsort((np.arange(len(logits)), -logits))[: len(ids)]
        np.testing.assert_array_equal(ids, order)
        np.testing.assert_array_equal(values, logits[order])


# the same numbers


@shapes
@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (8, 32), (4, 128)])
def test_prefill_decode_and_verify(shape: str, bits: int, block_size: int, open_both: OpenBoth) -> None:
    models = open_both(shape, bits, block_size, max_new_tokens=20)  # compacted on the way
    window = models[0].target.model.sliding_window
    token_ids = prompt_of(models[0], 100)
    # (new tokens, kept, trimmed): chunks of a prefill, then steps that end before, at and past the window's edge
    steps = [(window - 3, 1, 0), (1, 1, 0), (4, 4, 3), (2, 2, 0), (1, 1, 0), (5, 5, 5), (5, 5, 1)]
    steps += [(20, 1, 0), (20, 20, 7), (7, 3, 0), *[(1, 1, 0)] * 3, (9, 9, 8), (1, 1, 0)]
    place = 0
    for num_new, num_kept, num_trimmed in steps:
        results = [one.target.forward(token_ids[place : place + num_new], num_kept) for one in models]
        check_same(*results)
        place += num_new - num_trimmed
        for one in models:
            one.target.trim(num_trimmed)
    assert place > 3 * window


@shapes
@pytest.mark.parametrize("num_tokens", [(0, 5), (1, 0), (1, 1), (1, 2), (4, 3)], ids=str)
@pytest.mark.parametrize("block_size", [32, 128])
def test_draft_burst(shape: str, num_tokens: tuple[int, int], block_size: int, open_both: OpenBoth) -> None:
    models = open_both(shape, 8, block_size, max_new_tokens=8)
    token_ids = prompt_of(models[0], num_tokens[0] * models[0].target.model.sliding_window + num_tokens[1])
    for one in models:
        for start in range(0, len(token_ids), 8):
            hidden = one.target.forward(token_ids[start : start + 8], 1).hidden[-1].copy()
    # the same rows and state, so that only the drafter's own rounding is left
    for (_, _, theirs), (_, _, mine) in zip(*(one.target.cache.arrays() for one in models), strict=True):
        mine[...] = theirs
    found = []
    for one in models:
        one.drafter.draft(3, hidden, 1, GREEDY, np.random.default_rng())
        ids = one.drafter._ids
        order = np.arange(one.target.model.vocab_size) if ids is None else np.argsort(ids)
        first = None if ids is None else ids[order].copy(), one.drafter._logits[order].copy(), one.drafter._state.copy()
        drafts = one.drafter.draft(3, hidden, NUM_STEPS, GREEDY, np.random.default_rng())
        found.append((first, [draft.token_id for draft in drafts]))
    ((portable_ids, *portable_first), portable), ((native_ids, *native_first), native) = found
    assert native == portable and len(native) == NUM_STEPS
    np.testing.assert_array_equal(native_ids, portable_ids)  # None where the head is dense
    for mine, theirs in zip(native_first, portable_first, strict=True):
        check_close(mine, theirs)


@needs_native
@shapes
def test_the_ops_compute_what_their_reference_does(
    shape: str, tiny_artifact: Callable[..., Path], open_tiny: Callable[..., TinyModels], opened: list[TinyModels]
) -> None:
    native = open_tiny(shape, 4, "int8", "native")
    opened.append(open_native(tiny_artifact(shape, 4, "int8", "native")))
    num_same = 0
    for token_ids in np.array(prompt_of(native, 60)).reshape(20, 3).tolist():
        results = []
        for models in (native, opened[-1]):
            models.target.cache.clear()
            results.append(models.target.forward(token_ids, 1).logits.copy())
        found, due = results
        difference = np.abs(found - due).max() / np.ptp(due)
        # the order of sums differs, which now and then rounds an activation to its other neighbour in int8, or a value
        # of a KV row in float16
        assert difference < FLIPPED
        num_same += difference < TOLERANCE
    assert num_same >= 15


@needs_native
def test_rounded_activations_are_near_float_ones(open_both: OpenBoth, open_tiny: Callable[..., TinyModels]) -> None:
    _, exact = open_both("narrow")
    rounding = open_tiny("narrow", 4, "int8", "native")
    token_ids = prompt_of(exact, 24)
    logits = exact.target.forward(token_ids, 24).logits
    # int8 is off by 1/254 of a block's largest value in every product; twelve random layers add up to some percent
    assert np.abs(rounding.target.forward(token_ids, 24).logits - logits).max() < 0.15 * np.ptp(logits)


# bindings


def test_bindings_last_while_the_cache_grows(
    open_both: OpenBoth, opened: list[TinyModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    portable, native = open_both("one_shared", max_tokens=612, max_new_tokens=256)
    session = native.target._decoder._session  # type: ignore[attr-defined]
    bound = []
    monkeypatch.setattr(session, "io_binding", lambda make=session.io_binding: bound.append(make()) or bound[-1])
    token_ids = prompt_of(native, 552)
    place = 0
    for num_new, num_kept in [*[(250, 1)] * 2, *[(4, 4), (1, 1)] * 6]:
        results = [one.target.forward(token_ids[place : place + num_new], num_kept) for one in (portable, native)]
        check_same(*results)
        place += num_new
    # two chunks of prefill; widths 4 and 1
    assert len(bound) == 2 + 2


# what the graphs are made of


@shapes
def test_ten_nodes_a_layer(shape: str, artifact_of_both: Callable[..., Path]) -> None:
    folder = artifact_of_both(shape)
    model = open_models(folder).manifest.model
    counts = op_counts(folder / "decoder.onnx.native")
    num_layers, num_ple = len(model.layers), 1 + (model.num_owned_layers < len(model.layers))
    assert counts["CachedAttention"] == num_layers
    assert counts["NormAdd"] == 3 * num_layers + num_ple
    assert counts["QuantizedMatMul"] == 6 * num_layers + num_ple + 1
    assert counts.total() <= NODES_PER_LAYER * num_layers + OTHER_NODES
    drafter = op_counts(folder / "drafter.onnx.native")
    assert drafter["CachedAttention"] == 4
    assert drafter["NormAdd"] == 2 * 4
    assert drafter.total() <= 7 * 4 + 16


def op_counts(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@shapes
@pytest.mark.parametrize("name", ["decoder", "drafter"])
def test_both_layouts_read_the_same_matrices(shape: str, name: str, artifact_of_both: Callable[..., Path]) -> None:
    folder = artifact_of_both(shape)
    portable, native = external(folder / f"{name}.onnx"), external(folder / f"{name}.onnx.native")
    matrices = {key.removesuffix(".weight") for key in portable if key.endswith(".weight")}
    assert {key.removesuffix(".panels") for key in native if key.endswith(".panels")} == matrices
    assert native.get("token_ordering") == portable.get("token_ordering")


def external(path: Path) -> dict[str, tuple[str, ...]]:
    """Initializers in data files: name -> (location, offset, length)."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {
        tensor.name: tuple(entry.value for entry in tensor.external_data) for tensor in tensors if tensor.external_data
    }


@shapes
def test_every_array_of_the_cache_is_read_whole(shape: str, artifact_of_both: Callable[..., Path]) -> None:
    folder = artifact_of_both(shape)
    graph = onnx.load(folder / "decoder.onnx.native", load_external_data=False).graph
    model = open_models(folder).manifest.model
    declared = {value.name: value.type.tensor_type for value in graph.input}
    for index in model.owned_layers:
        for name in kv_view_names(index, model.layers[index]):
            capacity, size = (dim.dim_param for dim in declared[name].shape.dim)
            assert (capacity, size) == (f"{model.layers[index].kind}_capacity", f"{model.layers[index].kind}_row_bytes")
            assert declared[name].elem_type == onnx.TensorProto.UINT8
