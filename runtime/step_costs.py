"""What a round costs on this device: measured when an artifact is first loaded, then remembered for this machine."""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from runtime import native
from runtime.draft_policy import StepCosts
from runtime.drafting import Drafter
from runtime.errors import InferenceError
from runtime.generation import Target
from runtime.sampling import SamplingParams
from runtime.verified_cache import recall, remember

# In this order, so that a slow device, which is stopped early, has seen one token and what a burst of drafts is like.
WIDTHS = (1, 4, 2, 8)
NUM_VERIFY_COSTS = 9
MAX_PASSES = 8
MAX_SECONDS = 0.6
BURST_TOKENS = 2
# Of a round's Python outside the models on 2 Zen 4 cores: 0.02 ms for drafting and verification, the rest for text. It
# matters only where the models are as small as in the demo.
OVERHEAD_SECONDS = 1e-4
# Each token behind the first is taken to cost this share of it where widths were not measured.
TYPICAL_SHARE = 0.12
VERSION = 2  # of the record
# A measure can be wrong, taken while the machine was busy or throttled, and nothing tells. The next load after a day
# measures anew, for half a second: often enough that a wrong one does not stay, too rarely to be noticed.
LASTING_SECONDS = 24 * 3600.0


def measure_step_costs(
    target: Target,
    drafter: Drafter | None,
    token_id: int,
    context_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCosts:
    """Times forwards of a few widths and drafts over an empty cache, which is empty again afterwards.

    The first forward reads the weights from disk and does not count. The others end with the one that runs over
    `MAX_SECONDS`, on a slow device the first.

    Args:
        token_id: any token
        context_tokens: the most that the cache holds

    Raises:
        InferenceError: the target's session failed.
    """
    hidden = target.forward([token_id], 1).hidden[-1].copy()
    target.trim(1)
    verify: dict[int, float] = {}
    drafts: list[float] = []
    deadline = clock() + MAX_SECONDS
    for width in [width for width in WIDTHS if width <= context_tokens] * MAX_PASSES:
        start = clock()
        target.forward([token_id] * width, width)
        verify[width] = min(clock() - start, verify.get(width, math.inf))
        if drafter is not None and width == 1:
            try:
                drafts.append(_draft_seconds(drafter, token_id, hidden, clock))
            except InferenceError:  # a generation does without it, too
                drafter = None
        target.trim(width)
        if clock() > deadline:
            break
    return StepCosts(_filled(verify), min(drafts) if drafter is not None else None, OVERHEAD_SECONDS)


def costs_record(cache: Path, manifest_file: Path, num_threads: int) -> Path:
    """Where the costs of an artifact, whose layout its manifest tells, on this machine are remembered."""
    machine = (platform.node(), platform.machine(), os.cpu_count())
    manifest = hashlib.sha256(manifest_file.read_bytes()).hexdigest()
    software = (ort.__version__, native.instruction_set(), native.library_digest())
    key = json.dumps([VERSION, manifest, num_threads, *software, *machine])
    return cache / f"costs-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def recall_costs(record: Path, has_drafter: bool, now: Callable[[], float] = time.time) -> StepCosts | None:
    """What was remembered; None where the record is missing, too old or not usable."""
    content = recall(record)
    verify, draft, measured = (content.get(name) for name in ("verify_seconds", "draft_seconds", "measured_at"))
    if not _is_time(measured) or not 0 <= now() - measured <= LASTING_SECONDS:  # a clock may have been set back
        return None
    if not isinstance(verify, list) or len(verify) != NUM_VERIFY_COSTS or not all(map(_is_time, verify)):
        return None
    if not _is_time(draft) if has_drafter else draft is not None:
        return None
    return StepCosts(tuple(verify), draft, OVERHEAD_SECONDS)


def remember_costs(record: Path, costs: StepCosts, now: Callable[[], float] = time.time) -> None:
    """Writes a record, or does nothing where the cache cannot be written."""
    content = {"verify_seconds": list(costs.verify_seconds), "draft_seconds": costs.draft_seconds}
    remember(record, content | {"measured_at": float(now())})


def _draft_seconds(
    drafter: Drafter, token_id: int, hidden: npt.NDArray[np.float32], clock: Callable[[], float]
) -> float:
    start = clock()
    drafts = drafter.draft(token_id, hidden, BURST_TOKENS, SamplingParams(temperature=0.0), np.random.default_rng(0))
    return (clock() - start) / max(len(drafts), 1)


def _filled(verify: dict[int, float]) -> tuple[float, ...]:
    """Costs of 1, 2, ... tokens: the measured ones, and between and behind them a straight line; never falling."""
    widths: Sequence[int] = sorted(verify)
    wanted = np.arange(1, NUM_VERIFY_COSTS + 1)
    # as multiples of a straight line, so that behind the last width, and where there is but one, the costs still rise
    line = 1 + TYPICAL_SHARE * (wanted - 1)
    known = np.array([verify[width] for width in widths]) / line[np.array(widths) - 1]
    filled: list[float] = np.maximum.accumulate(line * np.interp(wanted, widths, known)).tolist()
    return tuple(filled)


def _is_time(value: Any) -> TypeGuard[float]:
    return type(value) is float and 0 < value < math.inf
