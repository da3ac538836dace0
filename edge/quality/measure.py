"""Compares an artifact, as the runtime runs it, with its checkpoint in transformers' own layers, on a text."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge.bench.kv_effect import kl_divergence
from edge.bench.opened import OpenedArtifact
from export.calibration import token_windows
from export.layerwise import LayerwiseTarget
from export.pipeline import Source, open_source
from export.reference import record_of, reference_hidden
from profiles import DeviceProfile, detect_profile
from runtime.engine import Runtime
from runtime.errors import EdgeError
from runtime.manifest import MANIFEST, Manifest, read_manifest
from runtime.verified_cache import user_cache_folder

DRAFT_LENGTHS = (1, 2, 3, 4)
PROMPT_TOKENS, GENERATED_TOKENS, NUM_PROMPTS = 64, 64, 8
KEPT_AT_ONCE = 64  # positions whose logits are in memory together
DEFAULT_TOKENS = 4096

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Quality:
    """What an artifact costs on a text.

    KL is KL(reference || artifact) of the next token in nats, top-1 agreement the share of positions with the same best
    token. `acceptance` has accepted / drafted by the number of drafts in every round, greedy; empty without a drafter.
    `tensors` is what the manifest says of each quantized matrix. `is_own_source` tells whether the reference is the
    very checkpoint that the artifact was exported from.
    """

    artifact: str
    reference: str
    text: str
    is_own_source: bool
    num_tokens: int
    num_weight_bytes: int
    mean_kl_nats: float
    p99_kl_nats: float
    top1_agreement: float
    reference_perplexity: float
    artifact_perplexity: float
    acceptance: dict[int, float]
    tensors: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure_quality(
    artifact: Path,
    target: Path,
    text: Path,
    *,
    max_tokens: int = DEFAULT_TOKENS,
    progress: Progress = lambda what, done, total: None,
) -> Quality:
    """Measures an artifact against the checkpoint folder `target`.

    Args:
        max_tokens: of the text, in windows spread over all of it
        progress: hears of each stage how much is done, from 0 on, and of how much

    Raises:
        EdgeError: the artifact, the checkpoint or the text cannot be used, or the two do not belong together.
    """
    manifest = read_manifest(artifact)
    source = open_source(target, None)
    check_belongs(artifact, manifest, source)
    token_ids = token_windows(source.target, source.model, text, max_tokens)
    reference, hidden = _reference(source, token_ids, progress)
    compared = _Comparison()
    # drafts are asked for in numbers of their own; a profile without any would load no drafter
    profile = replace(detect_profile(), num_draft_tokens=max(DRAFT_LENGTHS))
    with Runtime.load(artifact, profile=_profile(profile, token_ids)) as runtime:
        progress("artifact", 0, len(token_ids))
        for index, window in enumerate(token_ids.tolist()):
            for rows, logits in _artifact_logits(runtime, window):
                expected = reference.logits(hidden[index, rows]).numpy()
                compared.add(expected, logits, window[rows.start + 1 : rows.stop + 1])
            progress("artifact", index + 1, len(token_ids))
        acceptance = _acceptance(runtime, token_ids.tolist(), progress)
    digests = {f"target/{name}": digest for name, digest in source.target.digests().items()}
    return Quality(
        artifact=str(artifact),
        reference=str(target),
        text=str(text),
        is_own_source=digests.items() <= manifest.sources.items(),
        num_tokens=token_ids.numel(),
        num_weight_bytes=sum(e.size_bytes for name, e in manifest.files.items() if name.endswith((".data", ".bin"))),
        acceptance=acceptance,
        tensors=manifest.recipe.get("tensors", {}),
        **compared.figures(),
    )


def check_belongs(artifact: Path, manifest: Manifest, source: Source) -> None:
    """Raises EdgeError unless a checkpoint has the artifact's architecture and vocabulary."""
    mine, theirs = asdict(manifest.model), asdict(source.model)
    for field, value in mine.items():
        if value != theirs[field]:
            raise EdgeError(
                f"{source.target.folder} does not belong to {artifact}: {field} is {theirs[field]!r:.60}, in its "
                f"{MANIFEST} {value!r:.60}; pass the checkpoint that it was exported from as --reference"
            )


def _reference(source: Source, token_ids: torch.Tensor, progress: Progress) -> tuple[LayerwiseTarget, torch.Tensor]:
    """The unquantized target and its hidden states behind the final norm."""
    target, cache = LayerwiseTarget(source.target, source.prefix, source.model), user_cache_folder()
    record = None if cache is None else record_of(cache, source.target, token_ids)
    done, total = 0, len(source.model.layers)

    def behind(num_layers: int) -> None:
        nonlocal done
        done += num_layers
        progress("reference", done, total)

    behind(0)
    return target, reference_hidden(target, token_ids, record, behind)


def _profile(profile: DeviceProfile, token_ids: torch.Tensor) -> DeviceProfile:
    """The same with a context that holds a window, and a prompt with what is generated behind it."""
    least = max(token_ids.shape[1], PROMPT_TOKENS + GENERATED_TOKENS)
    return replace(profile, context_tokens=max(least, profile.prefill_chunk_tokens))


def _artifact_logits(runtime: Runtime, window: list[int]) -> Iterator[tuple[slice, Float32]]:
    """Logits of a window's positions, some rows at a time; valid until the next ones are asked for."""
    target = OpenedArtifact(runtime).target
    target.cache.clear()
    for start in range(0, len(window), KEPT_AT_ONCE):
        piece = window[start : start + KEPT_AT_ONCE]
        yield slice(start, start + len(piece)), target.forward(piece, num_kept=len(piece)).logits


class _Comparison:
    """Figures over positions, as they come."""

    def __init__(self) -> None:
        self._divergences: list[Float64] = []
        self._agreements: list[npt.NDArray[np.bool_]] = []
        self._losses: tuple[list[Float64], list[Float64]] = ([], [])

    def add(self, expected: Float32, found: Float32, next_ids: list[int]) -> None:
        """Rows of logits, and the tokens that follow them; the last row may have none."""
        self._divergences.append(kl_divergence(expected, found))
        self._agreements.append(expected.argmax(-1) == found.argmax(-1))
        rows = np.arange(len(next_ids))
        for losses, logits in zip(self._losses, (expected, found), strict=True):
            exact = logits[: len(next_ids)].astype(np.float64)
            peak = exact.max(-1)
            sums = peak + np.log(np.exp(exact - peak[:, None]).sum(-1))
            losses.append(sums - exact[rows, next_ids])

    def figures(self) -> dict[str, float]:
        """By the names of `Quality`."""
        nats = np.concatenate(self._divergences)
        theirs, mine = (float(np.exp(np.concatenate(losses).mean())) for losses in self._losses)
        return {
            "mean_kl_nats": float(nats.mean()),
            "p99_kl_nats": float(np.quantile(nats, 0.99)),
            "top1_agreement": float(np.concatenate(self._agreements).mean()),
            "reference_perplexity": theirs,
            "artifact_perplexity": mine,
        }


def _acceptance(runtime: Runtime, windows: list[list[int]], progress: Progress) -> dict[int, float]:
    """Accepted / drafted of greedy generations behind the windows' beginnings, by drafts in a round."""
    if runtime.manifest.drafter is None:
        return {}
    rates = {}
    progress("acceptance", 0, len(DRAFT_LENGTHS))
    for num_drafts in DRAFT_LENGTHS:
        made = [
            runtime.generate(
                window[:PROMPT_TOKENS], max_tokens=GENERATED_TOKENS, temperature=0.0, num_draft_tokens=num_drafts
            ).stats
            for window in windows[:NUM_PROMPTS]
        ]
        num_drafted = sum(stats.num_drafted for stats in made)
        rates[num_drafts] = sum(stats.num_accepted for stats in made) / num_drafted if num_drafted else 0.0
        progress("acceptance", num_drafts, len(DRAFT_LENGTHS))
    return rates
