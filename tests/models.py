"""An artifact's graphs opened by themselves: a target with its cache and a drafter, without engine or text."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiles import DeviceProfile
from runtime.drafter import DrafterModel
from runtime.kv_cache import KVCache
from runtime.kv_rows import choose_kv_dtype
from runtime.manifest import Manifest, read_manifest
from runtime.session import open_session
from runtime.signature import rows_name
from runtime.tables import RowTable
from runtime.target import TargetModel

Float32 = npt.NDArray[np.float32]

ONE_THREAD = DeviceProfile(
    name="test",
    description="one thread, whatever the machine",
    device_memory_bytes=None,
    memory_budget_bytes=2 << 30,
    memory_fraction=None,
    providers=("CPUExecutionProvider",),
    num_threads=1,
    kv_dtype="auto",
    context_tokens=1024,
    prefill_chunk_tokens=64,
    num_draft_tokens=3,
    model="E2B",
    weight_bits=4,
    memory_gb_per_s=None,
    int8_tops=None,
    storage_gb_per_s=None,
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


def open_models(
    folder: Path,
    *,
    max_tokens: int = 512,
    max_new_tokens: int = 128,
    num_threads: int = 1,
    kv_dtype: str = "auto",
) -> TinyModels:
    """Opens an artifact that has a drafter; nothing is verified."""
    manifest, profile = read_manifest(folder), replace(ONE_THREAD, num_threads=num_threads, kv_dtype=kv_dtype)
    assert manifest.drafter is not None
    target = TargetModel(
        open_session(folder / "decoder.onnx", profile, manifest.layout),
        manifest.model,
        KVCache(
            manifest.model,
            choose_kv_dtype(profile, manifest.layout),
            max_tokens=max_tokens,
            max_new_tokens=max_new_tokens,
        ),
        RowTable(folder, manifest.token_table),
        RowTable(folder, manifest.ple_table),
        manifest.layout,
    )
    session = open_session(folder / "drafter.onnx", profile, manifest.layout)
    return TinyModels(manifest, target, DrafterModel(session, manifest.drafter, target))


def draft_graph(models: TinyModels, artifact: Path) -> Callable[[int, Float32], dict[str, Any]]:
    """drafter.onnx by its contract in `runtime.signature`: (token, state) -> outputs by name."""
    layout, cache = models.manifest.layout, models.target.cache
    session = open_session(artifact / "drafter.onnx", ONE_THREAD, layout)
    inputs, outputs = ({value.name for value in values} for values in (session.get_inputs(), session.get_outputs()))
    rows: dict[str, Any] = {}
    for kind, name, array in cache.arrays():
        span = cache.draft_span(kind)
        if name in inputs:
            rows[name] = array if layout == "native" else array[span.start : span.stop].view(np.float32)
        if rows_name(kind) in inputs:
            rows[rows_name(kind)] = np.array(span)

    def run(token_id: int, state: Float32) -> dict[str, Any]:
        embeds = np.concatenate([models.target.token_table.rows([token_id])[0], state])[None]
        feeds = {"inputs_embeds": embeds, "position_ids": np.array([cache.num_tokens]), **rows}
        return dict(zip(outputs, session.run(list(outputs), feeds), strict=True))

    return run
