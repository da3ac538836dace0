"""What narrower KV rows change: next-token distributions far into a text, drafts that stand, greedy continuations.

Always against float32 rows of the same artifact, so that weights and activations are rounded alike on both sides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge.bench.opened import OpenedArtifact
from profiles import DeviceProfile
from runtime.engine import Runtime
from runtime.errors import RequestError
from runtime.kv_rows import KVDtype

NUM_DRAFTS = 3
KEPT_AT_ONCE = 16  # positions whose logits are in memory together
REFERENCE: KVDtype = "float32"

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class KVEffect:
    """What rows of `kv_dtype` change against float32 ones.

    KL is that of the next token's distribution, KL(float32 || kv_dtype) in nats, at the last `num_positions` of
    `context_tokens` given tokens. `equal_tokens[n]` of `generated_tokens[n]` greedy tokens behind prompt n come before
    the first difference. Acceptance rates are of all prompts together, with three drafts in every round; None where
    nothing was drafted.
    """

    kv_dtype: str
    context_tokens: int
    num_positions: int
    mean_kl_nats: float
    max_kl_nats: float
    same_best_share: float
    acceptance_rate: float | None
    float32_acceptance_rate: float | None
    equal_tokens: tuple[int, ...]
    generated_tokens: tuple[int, ...]

    @property
    def num_equal_prompts(self) -> int:
        """Prompts whose continuations are the same to the end."""
        return sum(equal == made for equal, made in zip(self.equal_tokens, self.generated_tokens, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"num_equal_prompts": self.num_equal_prompts}


def kv_effects(
    artifact: Path,
    profile: DeviceProfile,
    token_ids: Sequence[int],
    prompts: Sequence[Prompt],
    *,
    kv_dtypes: Sequence[KVDtype] = ("float16", "int8"),
    num_positions: int = 256,
    max_tokens: int = 64,
) -> tuple[KVEffect, ...]:
    """Loads an artifact with float32 rows and with each of `kv_dtypes`, and compares.

    Args:
        token_ids: the text, as many tokens as the context is to hold
        prompts: to continue greedily, by at most `max_tokens` each

    Raises:
        ProfileError: the artifact's layout has float32 rows alone.
        RequestError: the context does not hold the text, or the text not the positions.
    """
    with _load(artifact, profile, REFERENCE) as reference:
        effects = []
        for kv_dtype in kv_dtypes:
            with _load(artifact, profile, kv_dtype) as other:
                effects.append(kv_effect(reference, other, token_ids, prompts, num_positions, max_tokens))
        return tuple(effects)


def kv_effect(
    reference: Runtime,
    other: Runtime,
    token_ids: Sequence[int],
    prompts: Sequence[Prompt],
    num_positions: int,
    max_tokens: int,
) -> KVEffect:
    """Compares two loaded runtimes of one artifact, whose caches it uses; arguments as `kv_effects`."""
    if not 0 < num_positions <= len(token_ids):
        raise RequestError(f"{num_positions:,} positions are to be compared in a text of {len(token_ids):,} tokens")
    divergences, agreements = [], []
    for expected, found in zip(*(_logits(one, token_ids, num_positions) for one in (reference, other)), strict=True):
        divergences.append(kl_divergence(expected, found))
        agreements.append(expected.argmax(-1) == found.argmax(-1))
    theirs, mine = (_continuations(one, prompts, max_tokens) for one in (reference, other))
    pairs = list(zip(theirs.token_ids, mine.token_ids, strict=True))
    nats = np.concatenate(divergences)
    return KVEffect(
        kv_dtype=OpenedArtifact(other).target.cache.kv_dtype,
        context_tokens=len(token_ids),
        num_positions=num_positions,
        mean_kl_nats=float(nats.mean()),
        max_kl_nats=float(nats.max()),
        same_best_share=float(np.concatenate(agreements).mean()),
        acceptance_rate=mine.acceptance_rate,
        float32_acceptance_rate=theirs.acceptance_rate,
        equal_tokens=tuple(_num_equal(expected, found) for expected, found in pairs),
        generated_tokens=tuple(max(len(expected), len(found)) for expected, found in pairs),
    )


def kl_divergence(expected: Float32, found: Float32) -> Float64:
    """KL(expected || found) in nats of each row of logits [num_rows, vocab_size], in float64."""
    log_p, log_q = (_log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    divergence: Float64 = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return divergence


def _log_softmax(logits: Float64) -> Float64:
    shifted = logits - logits.max(-1, keepdims=True)
    logs: Float64 = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


def _load(artifact: Path, profile: DeviceProfile, kv_dtype: KVDtype) -> Runtime:
    # a profile without drafts would load no drafter
    return Runtime.load(artifact, profile=replace(profile, kv_dtype=kv_dtype, num_draft_tokens=NUM_DRAFTS))


def _logits(runtime: Runtime, token_ids: Sequence[int], num_positions: int) -> Iterator[Float32]:
    """Logits of the text's last positions, some rows at a time; valid until the next ones are asked for."""
    opened, first = OpenedArtifact(runtime), len(token_ids) - num_positions
    opened.target.cache.clear()
    for start in range(0, first, opened.chunk_tokens):
        opened.target.forward(token_ids[start : min(start + opened.chunk_tokens, first)], num_kept=1)
    step = min(KEPT_AT_ONCE, opened.chunk_tokens)
    for start in range(first, len(token_ids), step):
        piece = token_ids[start : start + step]
        yield opened.target.forward(piece, num_kept=len(piece)).logits


@dataclass(frozen=True, slots=True)
class _Continuations:
    token_ids: list[list[int]]
    acceptance_rate: float | None


def _continuations(runtime: Runtime, prompts: Sequence[Prompt], max_tokens: int) -> _Continuations:
    made = [
        runtime.generate(prompt, max_tokens=max_tokens, temperature=0.0, num_draft_tokens=NUM_DRAFTS)
        for prompt in prompts
    ]
    num_drafted = sum(one.stats.num_drafted for one in made)
    num_accepted = sum(one.stats.num_accepted for one in made)
    return _Continuations([one.token_ids for one in made], num_accepted / num_drafted if num_drafted else None)


def _num_equal(expected: Sequence[int], found: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(expected, found, strict=False)))
