"""One benchmark run: fresh processes for load and memory, then interleaved passes, then the report."""

import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edge.bench.child import evict, let_settle, measure
from edge.bench.figures import Figure, Report, figure
from edge.bench.memory_curve import MemoryCurve
from edge.bench.opened import OpenedArtifact
from edge.bench.plan import ROOM_TOKENS, Plan
from edge.bench.roofline import Roofline
from edge.bench.speed import NO_EVICTION, Progress, SpeedRun
from edge.bench.speed_figures import SpeedFigures
from profiles import DeviceProfile
from runtime import native
from runtime.engine import Runtime
from runtime.manifest import Manifest, read_manifest

MB = 1e6


def run_bench(artifact: Path, profile: DeviceProfile, budget: str | None, plan: Plan, progress: Progress) -> Report:
    """Measures all that the plan names.

    Raises:
        EdgeError: the artifact cannot be loaded.
    """
    manifest = read_manifest(artifact)
    fresh = [
        *load_figures(artifact, manifest, profile, budget, plan, progress),
        *memory_figures(measure_memory(artifact, profile, budget, plan, progress)),
    ]
    with Runtime.load(artifact, profile=with_room(profile, plan), memory_budget=budget) as runtime:
        opened = OpenedArtifact(runtime)
        roofline = Roofline(profile.num_threads, plan.stream_bytes)
        run = SpeedRun(opened, roofline, plan, progress)
        run.run()
        figures = SpeedFigures(opened, run, plan, roofline)
        return Report(about(artifact, opened, plan, roofline), (*figures.all(), *fresh))


def with_room(profile: DeviceProfile, plan: Plan, room_tokens: int = ROOM_TOKENS) -> DeviceProfile:
    """The profile with a context for the longest measurement; the cache grows only as far as it is used."""
    return replace(profile, context_tokens=max(profile.context_tokens, plan.longest + room_tokens))


def load_figures(
    artifact: Path, manifest: Manifest, profile: DeviceProfile, budget: str | None, plan: Plan, progress: Progress
) -> list[Figure]:
    """Load times in fresh processes. Comes before this process maps the artifact: pages in use cannot be evicted."""
    progress("load")
    let_settle(artifact, manifest)
    measure("load", artifact, profile, budget)  # dropped: it may have to verify digests
    found: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for _ in range(plan.num_loads):
        if evict(artifact, manifest):
            found["cold"].append(measure("load", artifact, profile, budget))
        found["warm"].append(measure("load", artifact, profile, budget))
    figures = []
    for kind, note in (("cold", "files not in the page cache"), ("warm", "files in the page cache")):
        loads = found[kind]
        note = note if loads else NO_EVICTION
        samples = [load["load_s"] for load in loads]
        figures.append(figure(f"load.{kind}", f"load, {kind}", "s", samples, note=note))
        samples = [load["first_token_s"] for load in loads]
        figures.append(figure(f"load_and_token.{kind}", f"load and a first token, {kind}", "s", samples))
    samples = [load["tokenizer_s"] for load in found["warm"]]
    return [*figures, figure("load.tokenizer", "load of the tokenizer alone, warm", "s", samples)]


def measure_memory(
    artifact: Path, profile: DeviceProfile, budget: str | None, plan: Plan, progress: Progress
) -> dict[str, Any]:
    """Peaks and the curve of a fresh process that loads, prefills and decodes, as `edge.bench.child` gives them."""
    progress("memory")
    sizes = {"memory_context": plan.memory_context, "memory_tokens": plan.memory_tokens}
    curve = MemoryCurve()
    found = measure("memory", artifact, profile, budget, curve=curve, **sizes)
    begins = [phase["clock_s"] for phase in found["phases"]]
    # a thread of the process itself sees nothing while the tokenizer loads
    found["loading_anonymous"] = max(found["loading_anonymous"], curve.peak_anonymous(*begins[:2]))
    return found | {"curve": curve.to_json(found["phases"])}


def memory_figures(found: Mapping[str, Any]) -> list[Figure]:
    """The peaks that `measure_memory` found."""
    where = f"context {found['context']:,}"
    labels = {
        "decode_anonymous": f"peak anonymous memory, decode at {where}",
        "decode_mapped": f"peak mapped memory, decode at {where}",
        "prefill_anonymous": f"peak anonymous memory, prefill of {found['context']:,}",
        "loading_anonymous": "peak anonymous memory, load",
        "loaded_anonymous": "anonymous memory, loaded and idle",
        "imported_anonymous": "anonymous memory, before load",
    }
    return [figure(f"memory.{key}", label, "MB", [found[key] / MB]) for key, label in labels.items()]


def about(artifact: Path, opened: OpenedArtifact, plan: Plan, roofline: Roofline) -> Mapping[str, Any]:
    """What a run measured, on what and with what."""
    profile = opened.runtime.profile
    return {
        "artifact": str(artifact),
        "recipe": opened.manifest.recipe,
        "layout": opened.layout,
        "instruction_set": native.instruction_set() if opened.layout == "native" else None,
        "profile": profile.name,
        "num_threads": roofline.num_threads,
        "context_tokens": opened.runtime.context_tokens,
        "num_draft_tokens": profile.num_draft_tokens,
        "prefill_chunk_tokens": profile.prefill_chunk_tokens,
        "num_passes": plan.num_passes,
        **machine(),
    }


def machine() -> dict[str, Any]:
    """The system, and the versions of what computes."""
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            "gemma-edge": _own_version(),
            "onnxruntime": ort.__version__,
            "numpy": np.__version__,
        },
    }


def _own_version() -> str:
    try:
        return version("gemma-edge")
    except PackageNotFoundError:  # run from a folder that is not installed
        return "unknown"
