"""The plan of a forward's activations against the emitted graph: ONNX Runtime reports each result's size."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from runtime import activations
from runtime.activations import forward_bytes
from runtime.manifest import read_manifest
from tests.models import open_models

ITEM_BYTES = {"float": 4, "int64": 8}


@pytest.fixture
def profiled_models(tmp_path, monkeypatch):
    """Opens an artifact whose sessions write profiles."""

    class ProfiledOptions(ort.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling = True
            self.profile_file_prefix = str(tmp_path / "profile")

    monkeypatch.setattr(ort, "SessionOptions", ProfiledOptions)
    return open_models


def alive_bytes(events, graph):
    """The most that is alive at once: results from the node that makes them to the last one that reads them."""
    nodes = {node.name: node for node in graph.node}
    runs = [(nodes[event["name"].removesuffix("_kernel_time")], event["args"]["output_type_shape"]) for event in events]
    last_use = {name: place for place, (node, _) in enumerate(runs) for name in node.input}
    outputs, alive, most = {value.name for value in graph.output}, {}, 0
    for place, (node, results) in enumerate(runs):
        for name, result in zip(filter(None, node.output), results, strict=True):
            if name not in outputs:
                ((kind, shape),) = result.items()
                alive[name] = int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[kind]
        most = max(most, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last_use.get(name, -1) > place}
    return most


@pytest.mark.parametrize(("num_tokens", "num_kept"), [(60, 1), (17, 17), (60, 17), (1, 1)])
@pytest.mark.parametrize("shape", ["wide", "one_shared"])
def test_what_is_planned_is_what_is_alive(tiny_artifact, profiled_models, shape, num_tokens, num_kept):
    folder = tiny_artifact(shape, 4, "int8", "native")
    models = profiled_models(folder)
    models.target.forward([2 + i for i in range(num_tokens)], num_kept)
    events = json.loads(Path(models.target._decoder._session.end_profiling()).read_text(encoding="utf-8"))
    events = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    model = read_manifest(folder).model
    inputs = 4 * num_tokens * (model.hidden_size + len(model.layers) * model.ple_size)
    measured = inputs + alive_bytes(events, graph)
    planned = forward_bytes(model, num_tokens, num_kept)
    # never less but for int64 positions; of few tokens that are all kept, the parts of both kinds of layer add up
    assert measured - 8 * 3 * num_tokens - 64 <= planned <= (1.25 if num_kept < num_tokens else 1.6) * measured


@pytest.mark.parametrize(
    ("file", "name", "planned"),
    [
        ("attention_op.cpp", "kWaveStates", activations.WAVE_STATES),
        ("attention_op.cpp", "kSharingTiles", activations.SHARING_TILES),
        ("attention_op.cpp", "kTilesAtOnce", activations.TILES_AT_ONCE),
        ("kernels.hpp", "kMaxSegmentKeys", activations.SEGMENT_KEYS),
        ("kernels.hpp", "kTileQueries", activations.TILE_QUERIES),
        ("kernels.hpp", "kSmallTileQueries", activations.SMALL_TILE_QUERIES),
    ],
)
def test_the_plan_has_the_sizes_of_the_native_ops(file: str, name: str, planned: int) -> None:
    source = (Path(activations.__file__).parent / "native/src" / file).read_text(encoding="utf-8")
    assert f"constexpr int {name} = {planned};" in source
