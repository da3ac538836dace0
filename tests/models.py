"""An artifact's graphs opened by themselves: a target with its cache and a drafter, without engine or text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiles import DeviceProfile
from runtime.drafter import DrafterModel
from runtime.kv_cache import KVCache
from runtime.manifest import Manifest, read_manifest
from runtime.session import open_session
from runtime.tables import RowTable
from runtime.target import TargetModel

Float32 = npt.NDArray[np.float32]

ONE_THREAD = DeviceProfile(
    name="test",
    description="one thread, whatever the machine",
    memory_budget_bytes=2 << 30,
    memory_fraction=None,
    providers=("CPUExecutionProvider",),
    num_threads=1,
    context_tokens=1024,
    prefill_chunk_tokens=64,
    num_draft_tokens=3,
)


@dataclass(frozen=True, slots=True)
class TinyModels:
    """An artifact's opened graphs; the cache is empty."""

    manifest: Manifest
    target: TargetModel
    drafter: DrafterModel

    def close(self) -> None:
        """Unmaps the tables."""
        self.target.token_table.close()
        self.target.ple_table.close()


def open_models(folder: Path, *, max_tokens: int = 512, max_new_tokens: int = 128) -> TinyModels:
    """Opens an artifact that has a drafter; nothing is verified."""
    manifest = read_manifest(folder)
    assert manifest.drafter is not None
    target = TargetModel(
        open_session(folder / "decoder.onnx", ONE_THREAD),
        manifest.model,
        KVCache(manifest.model, max_tokens=max_tokens, max_new_tokens=max_new_tokens),
        RowTable(folder, manifest.token_table),
        RowTable(folder, manifest.ple_table),
    )
    drafter = DrafterModel(open_session(folder / "drafter.onnx", ONE_THREAD), manifest.drafter, target)
    return TinyModels(manifest, target, drafter)


def draft_graph(models: TinyModels, artifact: Path) -> Callable[[int, Float32], dict[str, Any]]:
    """drafter.onnx by its contract in `runtime.signature`: (token, state) -> outputs by name."""
    session = open_session(artifact / "drafter.onnx", ONE_THREAD)
    inputs, outputs = ({value.name for value in values} for values in (session.get_inputs(), session.get_outputs()))
    cache = models.target.cache
    rows = {name: array[slice(*cache.draft_span(kind)[:2])] for kind, name, array in cache.arrays() if name in inputs}

    def run(token_id: int, state: Float32) -> dict[str, Any]:
        embeds = np.concatenate([models.target.token_table.rows([token_id])[0], state])[None]
        feeds = {"inputs_embeds": embeds, "position_ids": np.array([cache.num_tokens]), **rows}
        return dict(zip(outputs, session.run(list(outputs), feeds), strict=True))

    return run
