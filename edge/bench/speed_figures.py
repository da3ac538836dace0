"""The figures of a finished speed run, each beside what the machine's own limits would allow."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edge.bench.figures import Figure, figure
from edge.bench.opened import OpenedArtifact
from edge.bench.plan import VERIFY_SIZES, Plan
from edge.bench.roofline import Roofline
from edge.bench.speed import Key, SpeedRun
from edge.bench.workload import Limits, Workload

TEXT_DRAFTS = {"adaptive": "as many drafts as pay", "fixed": "a fixed number of drafts"}
OUTSIDE = {"plain": "no drafts", "greedy": "drafts, greedy", "sampled": "drafts, sampled"}


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
            *self.rooflines(),
            *(self.prefill(num_tokens) for num_tokens in plan.prompts),
            *(self.decode(context) for context in plan.decode_contexts),
            *(self.verify(context, size) for context in plan.verify_contexts for size in VERIFY_SIZES[1:]),
            *(entry for context in plan.verify_contexts for entry in self.drafter(context)),
            *(self.first_token(num_tokens) for num_tokens in plan.first_token_prompts),
            *(self.outside(mode) for mode in OUTSIDE),
            *(entry for acceptance in plan.acceptances for entry in self.assumed(acceptance)),
            *(entry for name in TEXT_DRAFTS if plan.prompt_texts for entry in self.texts(name)),
        ]

    def _samples(self, *key: str | float) -> list[float]:
        return self._run.samples.get(key, [])

    def _missing(self, *keys: Key) -> str:
        if self._opened.drafter is None and keys and keys[0] == ("rounds",):
            return "the artifact has no drafter"
        return next((self._run.missing[key] for key in keys if key in self._run.missing), "")

    def rooflines(self) -> list[Figure]:
        """What the machine itself reached."""
        threads, size = self._roofline.num_threads, self._roofline.stream_bytes
        stream = [value / 1e9 for value in self._samples("stream")]
        product = [value / 1e9 for value in self._samples("product")]
        note = f"numpy bitwise_or over {size / 1e9:.1f} GB, {threads} threads"
        return [
            figure("roofline.stream", "stream bandwidth", "GB/s", stream, note=note),
            figure("roofline.product", "int8 product rate", "GOP/s", product, note="onnxruntime DynamicQuantizeMatMul"),
        ]

    def prefill(self, num_tokens: int) -> Figure:
        """Tokens per second of a prompt; where it was not timed by itself, up to its first token."""
        samples = self._samples("prefill", num_tokens)
        samples = samples or [1e3 * num_tokens / ms for ms in self._samples("first_token", num_tokens)]
        note = self._missing(("prefill", num_tokens), ("first_token", num_tokens))
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

    def decode(self, context: int) -> Figure:
        """Tokens per second of single-token forwards."""
        samples = [1 / seconds for seconds in self._samples("forward", context, 1)]
        key, label, note = f"decode.{context}", f"decode, context {context:,}", self._missing(("step", context))
        return figure(key, label, "tokens/s", samples, limit_share=self._forward_share(context, 1), note=note)

    def verify(self, context: int, size: int) -> Figure:
        """The time of a forward over `size` tokens, relative to one."""
        key, label = f"verify.{context}.{size}", f"verify of {size}, context {context:,}"
        samples, note = self._samples("verify", context, size), self._missing(("step", context))
        return figure(key, label, "of M = 1", samples, limit_share=self._forward_share(context, size), note=note)

    def drafter(self, context: int) -> list[Figure]:
        """The time of a drafter's step, absolute and relative to the target's."""
        note = "the artifact has no drafter" if self._opened.drafter is None else self._missing(("step", context))
        where = f"context {context:,}"
        share = [100 * value for value in self._samples("drafter_share", context)]
        return [
            figure(f"drafter.{context}", f"drafter step, {where}", "ms", self._samples("drafter", context), note=note),
            figure(f"drafter_share.{context}", f"drafter step, {where}", "% of M = 1", share, note=note),
        ]

    def first_token(self, size: int) -> Figure:
        """Milliseconds from a prompt of `size` tokens to its first token."""
        samples, note = self._samples("first_token", size), self._missing(("first_token", size))
        return figure(f"first_token.{size}", f"time to first token, prompt of {size:,}", "ms", samples, note=note)

    def outside(self, mode: str) -> Figure:
        """Time of a round outside onnxruntime."""
        samples = self._samples("outside", mode)
        note = self._missing(("rounds",))
        if samples and mode != "plain":
            note = f"{np.median(self._samples('drafts', mode)):.1f} drafts a round"
        return figure(f"outside.{mode}", f"outside sessions a round, {OUTSIDE[mode]}", "ms", samples, note=note)

    def assumed(self, acceptance: float) -> list[Figure]:
        """Drafting with a made-up acceptance relative to none."""
        where, note = f"acceptance {acceptance:g}", self._missing(("rounds",))
        drafted = self._samples("drafted", acceptance)
        if drafted:
            note = f"{np.mean(drafted):.1f} drafts a round, context {self._plan.drafting_context:,}"
        net, tokens = self._samples("net", acceptance), self._samples("round", acceptance)
        return [
            figure(f"net.{acceptance:g}", f"net speed at {where}", "of plain", net, simulated=True, note=note),
            figure(f"tokens_per_round.{acceptance:g}", f"tokens a round at {where}", "tokens", tokens, simulated=True),
        ]

    def drafted(self, context: int, acceptance: float) -> list[Figure]:
        """Drafting with a made-up acceptance at one context: tokens per second, and relative to none beside it."""
        where, note = f"context {context:,}, acceptance {acceptance:.2g}", self._missing(("drafted", context))
        key = f"{context}.{acceptance:g}"
        speed, net = (self._samples(name, context, acceptance) for name in ("drafted_speed", "drafted_net"))
        return [
            figure(f"drafted.{key}", f"decode with drafts, {where}", "tokens/s", speed, simulated=True, note=note),
            figure(f"drafted_net.{key}", f"net speed, {where}", "of plain", net, simulated=True, note=note),
        ]

    def cold_rows(self) -> list[Figure]:
        """A token's time with its PLE row read from storage, and with it cached; and the look-up alone."""
        kinds = {"cold": "PLE row from storage", "warm": "PLE row cached"}
        names = {"token": "one token", "ple_row": "look-up alone"}
        note = self._missing(("cold_rows",))
        return [
            figure(f"{name}.{kind}", f"{label}, {what}", "ms", self._samples(name, kind), note=note)
            for name, label in names.items()
            for kind, what in kinds.items()
        ]

    def texts(self, name: str) -> list[Figure]:
        """What drafting did on real prompts."""
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
