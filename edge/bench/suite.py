"""One benchmark run: fresh processes for load and memory, then interleaved passes, then the report."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edge.bench.child import evict, let_settle, measure
from edge.bench.figures import Figure, Report, figure
from edge.bench.opened import OpenedArtifact
from edge.bench.plan import ROOM_TOKENS, VERIFY_SIZES, Plan
from edge.bench.roofline import Roofline
from edge.bench.speed import Key, Progress, SpeedRun
from edge.bench.workload import Limits, Workload
from profiles import DeviceProfile
from runtime import native
from runtime.engine import Runtime
from runtime.manifest import Manifest, read_manifest

MB = 1e6
TEXT_DRAFTS = {"adaptive": "as many drafts as pay", "fixed": "a fixed number of drafts"}
OUTSIDE = {"plain": "no drafts", "greedy": "drafts, greedy", "sampled": "drafts, sampled"}


def run_bench(artifact: Path, profile: DeviceProfile, budget: str | None, plan: Plan, progress: Progress) -> Report:
    """Measures all that the plan names.

    Raises:
        EdgeError: the artifact cannot be loaded.
    """
    manifest = read_manifest(artifact)
    fresh = [
        *_load_figures(artifact, manifest, profile, budget, plan, progress),
        *_memory_figures(artifact, profile, budget, plan, progress),
    ]
    with Runtime.load(artifact, profile=_with_room(profile, plan), memory_budget=budget) as runtime:
        opened = OpenedArtifact(runtime)
        roofline = Roofline(profile.num_threads, plan.stream_bytes)
        run = SpeedRun(opened, roofline, plan, progress)
        run.run()
        figures = SpeedFigures(opened, run, plan, roofline)
        return Report(_about(artifact, opened, plan, roofline), (*figures.all(), *fresh))


def _with_room(profile: DeviceProfile, plan: Plan) -> DeviceProfile:
    """The profile with a context for the longest measurement; the cache grows only as far as it is used."""
    longest = max(*plan.contexts, *plan.prompts) + ROOM_TOKENS
    return replace(profile, context_tokens=max(profile.context_tokens, longest))


def _load_figures(
    artifact: Path, manifest: Manifest, profile: DeviceProfile, budget: str | None, plan: Plan, progress: Progress
) -> list[Figure]:
    """Before this process maps the artifact: pages in use cannot be evicted."""
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
        note = note if loads else "this system has no posix_fadvise"
        samples = [load["load_s"] for load in loads]
        figures.append(figure(f"load.{kind}", f"load, {kind}", "s", samples, note=note))
        samples = [load["first_token_s"] for load in loads]
        figures.append(figure(f"load_and_token.{kind}", f"load and a first token, {kind}", "s", samples))
    samples = [load["tokenizer_s"] for load in found["warm"]]
    return [*figures, figure("load.tokenizer", "load of the tokenizer alone, warm", "s", samples)]


def _memory_figures(
    artifact: Path, profile: DeviceProfile, budget: str | None, plan: Plan, progress: Progress
) -> list[Figure]:
    progress("memory")
    sizes = {"memory_context": plan.memory_context, "memory_tokens": plan.memory_tokens}
    found = measure("memory", artifact, profile, budget, **sizes)
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


class SpeedFigures:
    """Figures of a finished run, each beside its limit."""

    def __init__(self, opened: OpenedArtifact, run: SpeedRun, plan: Plan, roofline: Roofline) -> None:
        self._opened = opened
        self._run = run
        self._plan = plan
        self._roofline = roofline
        self._workload = Workload.of(opened.manifest)
        median = {name: float(np.median(run.samples[name,])) for name in ("stream", "product")}
        self._limits = Limits(median["stream"], median["product"])

    def all(self) -> list[Figure]:
        """In the order of the table."""
        plan = self._plan
        return [
            *self._rooflines(),
            *(self._prefill(num_tokens) for num_tokens in plan.prompts),
            *(self._decode(context) for context in plan.decode_contexts),
            *(self._verify(context, size) for context in plan.verify_contexts for size in VERIFY_SIZES[1:]),
            *(entry for context in plan.verify_contexts for entry in self._drafter(context)),
            self._first_token(),
            *(self._outside(mode) for mode in OUTSIDE),
            *(entry for acceptance in plan.acceptances for entry in self._assumed(acceptance)),
            *(entry for name in TEXT_DRAFTS if plan.prompt_texts for entry in self._texts(name)),
        ]

    def _samples(self, *key: str | float) -> list[float]:
        return self._run.samples.get(key, [])

    def _missing(self, *keys: Key) -> str:
        if self._opened.drafter is None and keys and keys[0] == ("rounds",):
            return "the artifact has no drafter"
        return next((self._run.missing[key] for key in keys if key in self._run.missing), "")

    def _rooflines(self) -> list[Figure]:
        threads, size = self._roofline.num_threads, self._roofline.stream_bytes
        stream = [value / 1e9 for value in self._samples("stream")]
        product = [value / 1e9 for value in self._samples("product")]
        note = f"numpy bitwise_or over {size / 1e9:.1f} GB, {threads} threads"
        return [
            figure("roofline.stream", "stream bandwidth", "GB/s", stream, note=note),
            figure("roofline.product", "int8 product rate", "GOP/s", product, note="onnxruntime DynamicQuantizeMatMul"),
        ]

    def _prefill(self, num_tokens: int) -> Figure:
        samples, note = self._samples("prefill", num_tokens), self._missing(("prefill", num_tokens))
        num_chunks = -(-num_tokens // self._opened.chunk_tokens)
        num_operations = self._workload.operations(num_tokens, num_kept=num_chunks)
        least = self._limits.seconds(self._workload.weight_bytes, num_operations)
        share = _share(least, [num_tokens / rate for rate in samples])
        key, label = f"prefill.{num_tokens}", f"prefill, {num_tokens:,} tokens"
        return figure(key, label, "tokens/s", samples, limit_share=share, note=note)

    def _forward_share(self, context: int, num_tokens: int) -> float | None:
        """The median over the samples, each beside the bandwidth that was measured just before it."""
        num_bytes = self._workload.weight_bytes + self._opened.kv_bytes(context)
        num_operations = self._workload.operations(num_tokens, num_tokens)
        timed, streams = (self._samples(name, context, num_tokens) for name in ("forward", "stream_beside"))
        shares = [
            replace(self._limits, bytes_per_second=stream).seconds(num_bytes, num_operations) / seconds
            for stream, seconds in zip(streams, timed, strict=True)
        ]
        return float(np.median(shares)) if shares else None

    def _decode(self, context: int) -> Figure:
        samples = [1 / seconds for seconds in self._samples("forward", context, 1)]
        key, label, note = f"decode.{context}", f"decode, context {context:,}", self._missing(("step", context))
        return figure(key, label, "tokens/s", samples, limit_share=self._forward_share(context, 1), note=note)

    def _verify(self, context: int, size: int) -> Figure:
        key, label = f"verify.{context}.{size}", f"verify of {size}, context {context:,}"
        samples, note = self._samples("verify", context, size), self._missing(("step", context))
        return figure(key, label, "of M = 1", samples, limit_share=self._forward_share(context, size), note=note)

    def _drafter(self, context: int) -> list[Figure]:
        note = "the artifact has no drafter" if self._opened.drafter is None else self._missing(("step", context))
        where = f"context {context:,}"
        share = [100 * value for value in self._samples("drafter_share", context)]
        return [
            figure(f"drafter.{context}", f"drafter step, {where}", "ms", self._samples("drafter", context), note=note),
            figure(f"drafter_share.{context}", f"drafter step, {where}", "% of M = 1", share, note=note),
        ]

    def _first_token(self) -> Figure:
        size = self._plan.first_token_prompt
        samples, note = self._samples("first_token", size), self._missing(("first_token", size))
        return figure(f"first_token.{size}", f"time to first token, prompt of {size:,}", "ms", samples, note=note)

    def _outside(self, mode: str) -> Figure:
        samples = self._samples("outside", mode)
        note = self._missing(("rounds",))
        if samples and mode != "plain":
            note = f"{np.median(self._samples('drafts', mode)):.1f} drafts a round"
        return figure(f"outside.{mode}", f"outside sessions a round, {OUTSIDE[mode]}", "ms", samples, note=note)

    def _assumed(self, acceptance: float) -> list[Figure]:
        where, note = f"acceptance {acceptance:g}", self._missing(("rounds",))
        drafted = self._samples("drafted", acceptance)
        if drafted:
            note = f"{np.mean(drafted):.1f} drafts a round, context {self._plan.drafting_context:,}"
        net, tokens = self._samples("net", acceptance), self._samples("round", acceptance)
        return [
            figure(f"net.{acceptance:g}", f"net speed at {where}", "of plain", net, simulated=True, note=note),
            figure(f"tokens_per_round.{acceptance:g}", f"tokens a round at {where}", "tokens", tokens, simulated=True),
        ]

    def _texts(self, name: str) -> list[Figure]:
        drafted, accepted = (self._samples(key, name) for key in ("text_drafted", "text_accepted"))
        what, note = f"prompts, {TEXT_DRAFTS[name]}", self._missing(("texts",))
        shares = [100 * part / whole for part, whole in zip(accepted, drafted, strict=True) if whole]
        if drafted:
            note = f"{len(drafted)} prompts"
        counted = f"{sum(accepted):.0f} of {sum(drafted):.0f} drafts" if sum(drafted) else note
        net, tokens = self._samples("text_net", name), self._samples("text_round", name)
        return [
            figure(f"text_acceptance.{name}", f"acceptance, {what}", "%", shares, note=counted),
            figure(f"text_net.{name}", f"net speed, {what}", "of plain", net, note=note),
            figure(f"text_round.{name}", f"tokens a round, {what}", "tokens", tokens, note=note),
        ]


def _share(least_seconds: float, seconds: Sequence[float]) -> float | None:
    """The part of the time that could not have been saved."""
    return least_seconds / float(np.median(seconds)) if len(seconds) else None


def _about(artifact: Path, opened: OpenedArtifact, plan: Plan, roofline: Roofline) -> Mapping[str, Any]:
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
