"""Measures an artifact for a report: the pieces of edge-bench over more sizes, and memory as a curve."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil

from edge.bench.figures import Figure, figure
from edge.bench.kv_effect import NUM_DRAFTS, REFERENCE, KVEffect, kv_effects
from edge.bench.opened import OpenedArtifact
from edge.bench.plan import ROOM_TOKENS, Plan, quick
from edge.bench.roofline import Roofline
from edge.bench.speed import Progress, SpeedRun
from edge.bench.speed_figures import SpeedFigures
from edge.bench.suite import load_figures, measure_memory, memory_figures, with_room
from edge.report.fits import fit
from edge.report.projection import Efficiency
from edge.report.subject import Subject
from profiles import DeviceProfile, budget_bytes
from runtime import native
from runtime.engine import Runtime

NO_DRAFTER = "the artifact has no drafter"
NO_ACCEPTANCE = "not measured: name prompts with --prompts, or assume an acceptance with --assume-acceptance"
COLD_CONTEXT = 128
KV_CONTEXT_TOKENS, KV_POSITIONS = 8192, 512  # the most at which KV rows are compared


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of the prompts and contexts that are measured and projected, and how often.

    `num_kv_prompts` of the texts compare KV rows; None for all.
    """

    prompts: tuple[int, ...] = (128, 512, 2048, 8192)
    contexts: tuple[int, ...] = (128, 2048, 8192, 32_768)
    num_cold_tokens: int = 24
    num_kv_prompts: int | None = None

    @classmethod
    def of(cls, *, is_quick: bool) -> "Sizes":
        """All sizes, or those that take seconds."""
        few = cls(prompts=(128, 512), contexts=(128, 2048), num_cold_tokens=6, num_kv_prompts=4)
        return few if is_quick else cls()

    def plan(self, *, is_quick: bool, prompt_texts: tuple[str, ...]) -> Plan:
        """What edge-bench's machinery measures for a report."""
        return replace(
            quick() if is_quick else Plan(num_passes=3, num_repeats=2),
            prompts=(),
            first_token_prompts=self.prompts,
            decode_contexts=self.contexts,
            verify_contexts=(),
            outside_tokens=0,
            assumed_tokens=32,
            prompt_texts=prompt_texts,
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found on this machine; `memory` is what the fresh process told, `kv_effect` is of native prompts."""

    figures: tuple[Figure, ...]
    memory: Mapping[str, Any]
    acceptances: tuple[float, ...]
    acceptance_source: str
    setup: Mapping[str, Any]
    kv_effect: tuple[KVEffect, ...] = ()

    def efficiency(self, sizes: Sizes) -> Efficiency:
        """Shares of the roofline by size."""
        share = {entry.key: entry.limit_share for entry in self.figures}
        decode = {size: share.get(f"decode.{size}") for size in sizes.contexts}
        prefill = {size: share.get(f"prefill.{size}") for size in sizes.prompts}
        return Efficiency(
            {size: value for size, value in decode.items() if value},
            {size: value for size, value in prefill.items() if value},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; the figures by key."""
        return {
            "figures": {entry.key: asdict(entry) for entry in self.figures},
            "memory": dict(self.memory),
            "acceptances": list(self.acceptances),
            "acceptance_source": self.acceptance_source,
            "setup": dict(self.setup),
            "kv_effect": [effect.to_json() for effect in self.kv_effect],
        }


def measure_subject(
    subject: Subject, profile: DeviceProfile, sizes: Sizes, plan: Plan, assumed: tuple[float, ...], progress: Progress
) -> Measured:
    """Everything that a report tells of this machine.

    Raises:
        EdgeError: the artifact cannot be loaded.
    """
    assert subject.manifest is not None
    loads = load_figures(subject.artifact, subject.manifest, profile, None, plan, progress)
    memory = measure_memory(subject.artifact, profile, None, plan, progress)
    roomy = with_room(profile, plan, ROOM_TOKENS + plan.assumed_tokens)
    with Runtime.load(subject.artifact, profile=roomy) as runtime:
        opened = OpenedArtifact(runtime)
        roofline = Roofline(profile.num_threads, plan.stream_bytes)
        run = SpeedRun(opened, roofline, plan, progress)
        run.run()
        acceptances, source = _acceptances(run, opened, plan, assumed)
        run.measure_drafted(sizes.contexts if acceptances else (), acceptances)
        progress("tokens whose PLE rows come from storage")
        run.measure_cold_rows(COLD_CONTEXT, sizes.num_cold_tokens)
        found = SpeedFigures(opened, run, plan, roofline)
        figures = (*_speeds(found, sizes, acceptances, source), *loads, *memory_figures(memory))
        setup = _setup(opened, profile, roofline, plan)
        texts = plan.prompt_texts[: sizes.num_kv_prompts] if opened.layout == "native" else ()
        joined, *prompts = (opened.encode(text) for text in ("\n".join(texts), *texts))
    measured = Measured(figures, memory, acceptances, source, setup)
    if not texts:
        return measured
    progress("narrower KV rows against float32 ones")
    return replace(measured, kv_effect=_kv_effects(subject, profile, joined, prompts, plan.text_tokens))


def _kv_effects(
    subject: Subject, profile: DeviceProfile, token_ids: list[int], prompts: Sequence[list[int]], max_tokens: int
) -> tuple[KVEffect, ...]:
    """What narrower rows change in the text and behind the prompts, as far as the context holds them."""
    widest = replace(profile, kv_dtype=REFERENCE, context_tokens=KV_CONTEXT_TOKENS, num_draft_tokens=NUM_DRAFTS)
    half = budget_bytes(profile) // 2  # both types are loaded at once
    planned = fit(subject, widest, memory_budget=half)
    if not planned.fits:
        return ()
    room = planned.plan.context_tokens
    token_ids = token_ids[:room]
    fitting = [prompt for prompt in prompts if len(prompt) + max_tokens <= room]
    num_positions = min(KV_POSITIONS, len(token_ids) // 2)
    return kv_effects(subject.artifact, widest, token_ids, fitting, num_positions=num_positions, max_tokens=max_tokens)


def _acceptances(
    run: SpeedRun, opened: OpenedArtifact, plan: Plan, assumed: tuple[float, ...]
) -> tuple[tuple[float, ...], str]:
    """The probabilities with which drafts are made to stand, and where they come from; none, and why."""
    if opened.drafter is None:
        return (), NO_DRAFTER
    if assumed:
        return assumed, "assumed"
    drafted, accepted = (sum(run.samples[key, "fixed"]) for key in ("text_drafted", "text_accepted"))
    if drafted == 0:
        return (), NO_ACCEPTANCE
    num_drafts = min(plan.fixed_drafts, opened.num_draft_tokens)
    return (round(conditional_acceptance(accepted / drafted, num_drafts), 3),), "measured on the prompts"


def conditional_acceptance(rate: float, num_drafts: int) -> float:
    """The probability p that a draft stands where those before it do, from the share of all drafts that stood.

    Of n drafts p + p^2 + ... + p^n stand: this is solved for p by halving.
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(middle**place for place in range(1, num_drafts + 1)) < rate * num_drafts:
            low = middle
        else:
            high = middle
    return high


def _speeds(found: SpeedFigures, sizes: Sizes, acceptances: tuple[float, ...], source: str) -> list[Figure]:
    drafted = [entry for p in acceptances for size in sizes.contexts for entry in found.drafted(size, p)]
    if not acceptances:
        drafted = [figure("drafted", "decode with drafts", "tokens/s", [], note=source)]
    texts = [entry for name in ("adaptive", "fixed") for entry in found.texts(name)]
    return [
        *found.rooflines(),
        *(found.first_token(size) for size in sizes.prompts),
        *(found.prefill(size) for size in sizes.prompts),
        *(found.decode(size) for size in sizes.contexts),
        *drafted,
        *(entry for entry in texts if entry.value is not None),
        *found.cold_rows(),
    ]


def _setup(opened: OpenedArtifact, profile: DeviceProfile, roofline: Roofline, plan: Plan) -> dict[str, Any]:
    swap = psutil.swap_memory()
    return {
        "profile": profile.name,
        "layout": opened.layout,
        "instruction_set": native.instruction_set() if opened.layout == "native" else None,
        "num_threads": roofline.num_threads,
        "context_tokens": opened.runtime.context_tokens,
        "prefill_chunk_tokens": opened.chunk_tokens,
        "num_passes": plan.num_passes,
        "cold_context_tokens": COLD_CONTEXT,
        "swap_total_bytes": swap.total,
        "swap_used_bytes": swap.used,
    }
