"""Times prefill, decode, verify and draft: every figure once a pass, so that all of them see the same machine."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np

from edge.bench.drafting import GREEDY, AssumedTarget, Rounds, run_rounds
from edge.bench.opened import OpenedArtifact
from edge.bench.plan import ROOM_TOKENS, VERIFY_SIZES, Plan
from edge.bench.roofline import Roofline
from runtime.sampling import SamplingParams

SAMPLED = SamplingParams()
STEPS_A_REPEAT = 3
NO_EVICTION = "this system has no posix_fadvise"
Key = tuple[str | int | float, ...]
Progress = Callable[[str], None]


class SpeedRun:
    """Samples by key; a key is a figure's name and its sizes."""

    def __init__(self, opened: OpenedArtifact, roofline: Roofline, plan: Plan, progress: Progress) -> None:
        self.samples: dict[Key, list[float]] = defaultdict(list)
        self.missing: dict[Key, str] = {}
        self._opened = opened
        self._roofline = roofline
        self._plan = plan
        self._progress = progress
        self._token_ids = opened.token_ids(seed=1)

    def run(self) -> None:
        """All passes, behind one that only warms up."""
        self._warm_up()
        for index in range(self._plan.num_passes):
            where = f"pass {index + 1} of {self._plan.num_passes}"
            self._measure_roofline()
            self._progress(f"{where}: prefill")
            for num_tokens in self._plan.prompts:
                self._measure_prefill(num_tokens)
            for num_tokens in self._plan.first_token_prompts:
                self._measure_first_token(num_tokens)
            for context in self._plan.contexts:
                self._progress(f"{where}: decode and verify at context {context:,}")
                self._measure_forwards(context)
            self._progress(f"{where}: draft-verify rounds")
            self._measure_outside()
            self._measure_assumed(index)
            for text in self._plan.prompt_texts[index :: self._plan.num_passes]:  # each once in a run
                self._measure_text(text)
            self._measure_roofline()

    def _warm_up(self) -> None:
        self._progress("warming up")
        opened, plan = self._opened, self._plan
        opened.prefill(self._take(min(opened.chunk_tokens, plan.longest, self._room)))
        for num_tokens in VERIFY_SIZES:
            self._timed_forward(num_tokens)

    @property
    def _room(self) -> int:
        return self._opened.runtime.context_tokens - ROOM_TOKENS

    def _fits(self, key: Key, num_tokens: int) -> bool:
        if num_tokens > self._room:
            context = self._opened.runtime.context_tokens
            self.missing[key] = f"the context holds {context:,} tokens"
        return num_tokens <= self._room

    def _take(self, num_tokens: int) -> list[int]:
        return self._token_ids.take(num_tokens)

    def _measure_roofline(self) -> None:
        self.samples["stream",].append(self._roofline.stream())
        self.samples["product",].append(self._roofline.multiply())

    def _measure_prefill(self, num_tokens: int) -> None:
        key = ("prefill", num_tokens)
        if self._fits(key, num_tokens):
            token_ids = self._take(num_tokens)
            start = time.perf_counter()
            self._opened.prefill(token_ids)
            self.samples[key].append(num_tokens / (time.perf_counter() - start))

    def _measure_first_token(self, num_tokens: int) -> None:
        if self._fits(("first_token", num_tokens), num_tokens):
            generation = self._opened.runtime.generate(self._take(num_tokens), max_tokens=1, temperature=0.0)
            self.samples["first_token", num_tokens].append(generation.stats.time_to_first_token_ms)

    def _measure_forwards(self, context: int) -> None:
        """Decode steps, then forwards of several sizes in turn, each followed by a trim: all see the same context."""
        sizes = VERIFY_SIZES if context in self._plan.verify_contexts else ()
        if not self._fits(("step", context), context):
            return
        self._measure_roofline()
        self._opened.jump(context)
        for size in (1, *sizes):
            self._timed_forward(size)  # dropped: the first ones read the rows that were just written
        for repeat in range(self._plan.num_repeats):
            stream = self._roofline.stream()  # right beside: what memory gives may change from one second to the next
            for _ in range(STEPS_A_REPEAT):
                self._sample_forward(context, 1, stream)
            seconds = {
                size: self._sample_forward(context, size, stream) for size in np.roll(sizes, repeat * 3).tolist()
            }
            for size in sizes[1:]:
                self.samples["verify", context, size].append(seconds[size] / seconds[1])
            if sizes:
                self._measure_drafter(context, seconds[1])

    def _sample_forward(self, context: int, size: int, stream: float) -> float:
        seconds = self._timed_forward(size)
        self.samples["forward", context, size].append(seconds)
        self.samples["stream_beside", context, size].append(stream)
        return seconds

    def _timed_forward(self, num_tokens: int) -> float:
        return self._time_forward(self._take(num_tokens))

    def _time_forward(self, token_ids: list[int]) -> float:
        target, num_tokens = self._opened.target, len(token_ids)
        start = time.perf_counter()
        target.forward(token_ids, num_kept=num_tokens)
        seconds = time.perf_counter() - start
        target.trim(num_tokens)
        return seconds

    def _measure_drafter(self, context: int, step_seconds: float) -> None:
        opened, num_steps = self._opened, self._plan.drafter_steps
        if opened.drafter is None:
            return
        hidden = opened.target.forward(self._take(1), num_kept=1).hidden[-1]
        last, rng = self._take(1)[0], np.random.default_rng(0)
        start = time.perf_counter()
        num_drafts = len(opened.drafter.draft(last, hidden, num_steps, GREEDY, rng))
        seconds = (time.perf_counter() - start) / max(num_drafts, 1)
        opened.target.trim(1)
        self.samples["drafter", context].append(seconds * 1e3)
        self.samples["drafter_share", context].append(seconds / step_seconds)

    def _measure_outside(self) -> None:
        """Python's time a round: no drafts, drafts of the best candidates, drawn drafts."""
        opened, plan = self._opened, self._plan
        fits = self._fits(("rounds",), plan.drafting_context + plan.outside_tokens)
        if plan.outside_tokens == 0 or not fits:
            return
        modes = {"plain": (None, GREEDY), "greedy": (opened.drafter, GREEDY), "sampled": (opened.drafter, SAMPLED)}
        for mode, (drafter, params) in modes.items():
            if mode != "plain" and drafter is None:
                continue
            rounds = run_rounds(
                opened,
                opened.target,
                drafter,
                plan.drafting_context,
                plan.outside_tokens,
                params=params,
                num_draft_tokens=min(plan.fixed_drafts, opened.num_draft_tokens),
            )
            self.samples["outside", mode] += [seconds * 1e3 for seconds in rounds.outside_seconds]
            self.samples["drafts", mode].append(rounds.drafts_per_round)

    def _measure_assumed(self, index: int) -> None:
        """Drafting at assumed acceptances against none, in turn."""
        opened, plan = self._opened, self._plan
        fits = self._fits(("rounds",), plan.drafting_context + plan.assumed_tokens)
        if not plan.acceptances or opened.drafter is None or not fits:
            return
        context = plan.drafting_context
        plain = self._assumed_rounds(context, 0.0, index, is_drafting=False)
        for acceptance in plan.acceptances:
            rounds = self._assumed_rounds(context, acceptance, index, is_drafting=True)
            self.samples["net", acceptance].append(rounds.tokens_per_second / plain.tokens_per_second)
            self.samples["round", acceptance].append(rounds.tokens_per_round)
            self.samples["drafted", acceptance].append(rounds.drafts_per_round)

    def measure_drafted(self, contexts: Sequence[int], acceptances: Sequence[float]) -> None:
        """What `run` leaves out: drafting at assumed acceptances over contexts, each pass beside none."""
        for index, context in product(range(self._plan.num_passes), contexts):
            if not self._fits(("drafted", context), context + self._plan.assumed_tokens):
                continue
            where = f"pass {index + 1} of {self._plan.num_passes}"
            self._progress(f"{where}: draft-verify rounds at context {context:,}")
            plain = self._assumed_rounds(context, 0.0, index, is_drafting=False)
            for acceptance in acceptances:
                rounds = self._assumed_rounds(context, acceptance, index, is_drafting=True)
                self.samples["drafted_speed", context, acceptance].append(rounds.tokens_per_second)
                self.samples["drafted_net", context, acceptance].append(
                    rounds.tokens_per_second / plain.tokens_per_second
                )

    def measure_cold_rows(self, context: int, num_tokens: int) -> None:
        """A token whose PLE row is read from storage, then again, now cached; and the same look-up by itself."""
        if not self._fits(("cold_rows",), context):
            return
        self._opened.jump(context)
        for token_id in self._take(num_tokens):
            if not self._opened.drop_ple_pages():
                self.missing["cold_rows",] = NO_EVICTION
                return
            for kind in ("cold", "warm"):
                self.samples["token", kind].append(1e3 * self._time_forward([token_id]))
            self._opened.drop_ple_pages()
            for kind in ("cold", "warm"):
                start = time.perf_counter()
                self._opened.read_ple_row(token_id)
                self.samples["ple_row", kind].append(1e3 * (time.perf_counter() - start))

    def _measure_text(self, text: str) -> None:
        """Decoding behind a real prompt: without drafts, with as many as pay, with a fixed number; in turn."""
        opened, plan = self._opened, self._plan
        num_tokens = opened.runtime.count_tokens(text) + plan.text_tokens
        if not self._fits(("texts",), num_tokens) or opened.num_draft_tokens == 0:
            return
        fixed = min(plan.fixed_drafts, opened.num_draft_tokens)
        speeds = {}
        for name, num_drafts in {"plain": 0, "adaptive": None, "fixed": fixed}.items():
            generation = opened.runtime.generate(
                text, max_tokens=plan.text_tokens, temperature=0.0, num_draft_tokens=num_drafts
            )
            stats = generation.stats
            if stats.num_generated_tokens < 2:
                return  # it ends at once
            speeds[name] = stats.decode_tokens_per_second
            if name != "plain":
                self.samples["text_net", name].append(speeds[name] / speeds["plain"])
                self.samples["text_drafted", name].append(stats.num_drafted)
                self.samples["text_accepted", name].append(stats.num_accepted)
                self.samples["text_round", name].append(stats.mean_acceptance_length)

    def _assumed_rounds(self, context: int, acceptance: float, seed: int, *, is_drafting: bool) -> Rounds:
        opened, plan = self._opened, self._plan
        target = AssumedTarget(opened.target, acceptance, opened.token_ids(seed=seed + 2), seed)
        drafter = opened.drafter if is_drafting else None
        return run_rounds(opened, target, drafter, context, plan.assumed_tokens)
