"""A loaded artifact taken apart for measuring: the one place that knows how the runtime's pieces hang together."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from runtime.drafting import DraftCounts, Drafter
from runtime.engine import Runtime
from runtime.generation import Request, Target, generate_blocks
from runtime.kv_rows import encode_rows
from runtime.prefix import Reuse
from runtime.sampling import SamplingParams
from runtime.target import Forward

SESSION_RUNS = ("run_with_iobinding", "run")
PREFERRED_LOGIT = 1e4  # above every real one, and finite

Float32 = npt.NDArray[np.float32]


class TokenIds:
    """Random token ids, none twice before all were there: look-ups spread over the tables as those of text do."""

    def __init__(self, vocab_size: int, *, seed: int, excluded: Sequence[int] = ()) -> None:
        ids = np.random.default_rng(seed).permutation(vocab_size).astype(np.int32)
        self._ids = ids[~np.isin(ids, excluded)]
        self._next = 0

    def take(self, num_tokens: int) -> list[int]:
        """The next ids."""
        places = np.arange(self._next, self._next + num_tokens) % len(self._ids)
        self._next += num_tokens
        return [int(token_id) for token_id in self._ids[places]]


class BehindCached:
    """The target, but a prompt goes on behind whatever is cached."""

    def __init__(self, target: Target) -> None:
        self.forward, self.trim = target.forward, target.trim

    def reuse(self, token_ids: Sequence[int]) -> Reuse:
        """None of a prompt's tokens are cached, and what is cached stays."""
        return Reuse(0, 0)


class OpenedArtifact:
    """The target, the drafter and the KV cache of a loaded runtime; a generation of the runtime itself clears them."""

    def __init__(self, runtime: Runtime) -> None:
        loaded = runtime._loaded
        assert loaded is not None
        self.runtime = runtime
        self.target = loaded.target
        self.drafter = loaded.drafter
        self.manifest = runtime.manifest
        self.chunk_tokens = runtime.profile.prefill_chunk_tokens
        self.num_draft_tokens = runtime.profile.num_draft_tokens
        # what the loop chooses draft lengths by, where this version of the runtime does
        costs = getattr(loaded, "costs", None)
        self._policy = {} if costs is None else {"costs": costs}
        self._rng = np.random.default_rng(0)

    @property
    def layout(self) -> str:
        """What the target's graph works on."""
        return str(getattr(self.target, "layout", getattr(self.manifest, "layout", "portable")))

    def token_ids(self, seed: int) -> TokenIds:
        """Random ids of this model's vocabulary without those that end a generation."""
        return TokenIds(self.manifest.model.vocab_size, seed=seed, excluded=self.manifest.generation["eos_token_ids"])

    def encode(self, text: str) -> list[int]:
        """Tokens that `text` takes as a prompt, BOS first."""
        loaded = self.runtime._loaded
        assert loaded is not None
        return loaded.tokenizer.encode(text, add_bos=True)

    def prefill(self, token_ids: Sequence[int]) -> Forward:
        """Computes a prompt on an empty cache, in the profile's chunks."""
        self.target.cache.clear()
        for start in range(0, len(token_ids), self.chunk_tokens):
            forward = self.target.forward(token_ids[start : start + self.chunk_tokens], num_kept=1)
        return forward

    def jump(self, num_tokens: int) -> None:
        """Makes the cache hold `num_tokens` tokens without computing them: random rows, of norms as real ones have."""
        cache = self.target.cache
        cache.clear()
        while cache.num_tokens < num_tokens:
            step = min(self.chunk_tokens, num_tokens - cache.num_tokens)
            cache.make_room(step)
            cache.append(step)
        head_dims = {layer.kind: layer.head_dim for layer in self.manifest.model.layers}
        for kind, _, array in cache.arrays():
            pattern = self._rng.standard_normal(head_dims[kind], np.float32)
            rows = encode_rows(np.stack([np.roll(pattern, row) for row in range(64)]), cache.kv_dtype)
            stop = cache.new_row(kind)
            array[:stop] = rows[np.arange(stop) % 64]

    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes of the rows that one more token sees, each counted once however many layers read it."""
        window = self.manifest.model.sliding_window
        rows = {"full": num_tokens, "sliding": min(num_tokens, window)}
        return sum(rows[kind] * array[0].nbytes for kind, _, array in self.target.cache.arrays())

    def drop_ple_pages(self) -> bool:
        """Drops the PLE table's pages from the system's cache; False where the system cannot be asked to."""
        return drop_pages(self.target.ple_table._file.fileno())

    def read_ple_row(self, token_id: int) -> None:
        """Looks one token's row of the PLE table up."""
        self.target.ple_table.rows([token_id])

    def rounds(
        self,
        target: Target,
        drafter: Drafter | None,
        first_token_id: int,
        max_tokens: int,
        params: SamplingParams,
        counts: DraftCounts,
        num_draft_tokens: int | None = None,
    ) -> Iterator[list[int]]:
        """The runtime's own loop behind the tokens that are cached: each round's tokens, the first one alone.

        Args:
            num_draft_tokens: so many drafts in every round; None for as many as the runtime would make
        """
        policy: dict[str, Any] = self._policy if num_draft_tokens is None and drafter is not None else {}
        most = self.num_draft_tokens if num_draft_tokens is None else num_draft_tokens
        request = Request(
            prompt_ids=[first_token_id],
            max_tokens=max_tokens,
            params=params,
            num_draft_tokens=most if drafter is not None else 0,
            prefill_chunk_tokens=self.chunk_tokens,
            **policy,
        )
        return generate_blocks(BehindCached(target), drafter, request, self._rng, counts, lambda: False)


def drop_pages(descriptor: int) -> bool:
    """Drops an open file's clean pages from the system's cache; False where the system cannot be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def prefer(forward: Forward, row: int, token_id: int) -> None:
    """Makes a token the likeliest one of a kept row, in the buffers that the next forward overwrites."""
    forward.logits[row, token_id] = PREFERRED_LOGIT
    top_logits, top_ids = getattr(forward, "top_logits", None), getattr(forward, "top_ids", None)
    if top_logits is not None and top_ids is not None:  # graphs that give the best candidates, the largest first
        top_logits[row, 0], top_ids[row, 0] = PREFERRED_LOGIT, token_id


@dataclass(slots=True)
class SessionClock:
    """Time spent inside onnxruntime."""

    seconds: float = 0.0
    num_runs: int = 0


@contextmanager
def session_clock() -> Iterator[SessionClock]:
    """Times every run of every session while it is open."""
    clock = SessionClock()
    kind: Any = ort.InferenceSession
    own = {name: vars(kind).get(name) for name in SESSION_RUNS}
    for name in SESSION_RUNS:
        setattr(kind, name, _timed(getattr(kind, name), clock))
    try:
        yield clock
    finally:
        for name, method in own.items():
            if method is None:
                delattr(kind, name)
            else:
                setattr(kind, name, method)


def _timed(method: Callable[..., Any], clock: SessionClock) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            clock.seconds += time.perf_counter() - start
            clock.num_runs += 1

    return run
