"""Projected speeds of a device that is not this machine, from the speeds that its profile states.

A forward takes as long as the slowest of reading its bytes from memory, computing its products, and reading from
storage what of the weights does not stay in memory. Nothing here was measured on the device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge.bench.workload import Workload
from edge.report.fits import Fit, residency
from edge.report.subject import Subject

NO_SPEEDS = "no stated speeds, add memory_gb_per_s to the profile"
NO_STORAGE = "weights do not stay in memory; no stated speed of storage, add storage_gb_per_s to the profile"
NO_PRODUCTS = "no stated int8_tops, so prefill is not projected and decode is bound by memory alone"
NO_INT8 = "its products are not int8, so prefill is not projected and decode is bound by memory alone"
AT_MOST = "at most what the whole of the roofline gives"
SCALED = "the roofline x the share of it that was measured on this machine in the same run"


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the roofline that this machine reached, by context and by prompt tokens; empty where none ran."""

    decode: Mapping[int, float] = field(default_factory=dict)
    prefill: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Device:
    """Stated speeds, in bytes and operations a second; infinite where a speed bounds nothing."""

    bytes_per_second: float
    operations_per_second: float
    storage_bytes_per_second: float
    missing_bytes: int

    def seconds(self, num_bytes: float, num_operations: float, share: float) -> tuple[float, str]:
        """The least time of a forward that reaches `share` of the roofline, and what bounds it."""
        bounds = {
            "memory": num_bytes / self.bytes_per_second / share,
            "arithmetic": num_operations / self.operations_per_second / share,
            "storage": self.missing_bytes / self.storage_bytes_per_second,
        }
        name = max(bounds, key=lambda key: bounds[key])
        return bounds[name], name


def project(
    subject: Subject, entry: Fit, efficiency: Efficiency, contexts: tuple[int, ...], prompts: tuple[int, ...]
) -> dict[str, Any]:
    """A profile's projection, sizes that its context does not hold left out; `note` says why where there is none."""
    profile, stays = entry.profile, residency(entry)
    found: dict[str, Any] = {
        "projected": True,
        "profile": profile.name,
        "memory_gb_per_s": profile.memory_gb_per_s,
        "int8_tops": profile.int8_tops,
        "storage_gb_per_s": profile.storage_gb_per_s,
        "basis": SCALED if efficiency.decode else AT_MOST,
        "at_most": not efficiency.decode,
        "residency": stays,
        "decode": [],
        "prefill": [],
    }
    if not entry.fits:
        return found | {"note": "does not fit"}
    if profile.memory_gb_per_s is None:
        return found | {"note": NO_SPEEDS}
    if stays["stays"] is False and profile.storage_gb_per_s is None:
        return found | {"note": NO_STORAGE}
    device = _device(subject, entry, stays.get("missing_bytes", 0))
    has_products = math.isfinite(device.operations_per_second)
    note = "" if has_products else NO_PRODUCTS if subject.is_int8(entry.plan) else NO_INT8
    largest = entry.plan.max_context_tokens
    decode = [_decode(subject, entry, device, efficiency, size) for size in contexts if size <= largest]
    prefill = [_prefill(subject, entry, device, efficiency, size) for size in prompts if size <= largest]
    return found | {"note": note, "decode": decode, "prefill": prefill if has_products else []}


def _device(subject: Subject, entry: Fit, missing_bytes: int) -> Device:
    profile = entry.profile
    tops = profile.int8_tops if subject.is_int8(entry.plan) else None
    return Device(
        bytes_per_second=(profile.memory_gb_per_s or math.inf) * 1e9,
        operations_per_second=math.inf if tops is None else tops * 1e12,
        storage_bytes_per_second=math.inf if profile.storage_gb_per_s is None else profile.storage_gb_per_s * 1e9,
        missing_bytes=missing_bytes,
    )


def _decode(subject: Subject, entry: Fit, device: Device, efficiency: Efficiency, context: int) -> dict[str, Any]:
    workload = subject.workload(entry.plan)
    num_bytes = workload.weight_bytes + workload.kv_bytes(context, np.dtype(entry.plan.kv_dtype).itemsize)
    share = nearest(efficiency.decode, context)
    seconds, bound = device.seconds(num_bytes, workload.operations(1, 1), share)
    return {"context_tokens": context, "tokens_per_s": 1 / seconds, "bound_by": bound, "share": share}


def _prefill(subject: Subject, entry: Fit, device: Device, efficiency: Efficiency, size: int) -> dict[str, Any]:
    """Chunk by chunk: each reads the weights once."""
    workload: Workload = subject.workload(entry.plan)
    share, chunk = nearest(efficiency.prefill, size), entry.plan.prefill_chunk_tokens
    chunks = [min(chunk, size - start) for start in range(0, size, chunk)]
    times = [device.seconds(workload.weight_bytes, workload.operations(num, 1), share) for num in chunks]
    seconds = sum(time for time, _ in times)
    return {
        "prompt_tokens": size,
        "tokens_per_s": size / seconds,
        "first_token_s": seconds,
        "bound_by": times[0][1],
        "share": share,
    }


def nearest(shares: Mapping[int, float], size: int) -> float:
    """The share at the measured size whose ratio to `size` is nearest to 1; the whole where nothing was measured."""
    if not shares:
        return 1.0
    return shares[min(shares, key=lambda known: abs(math.log(known / size)))]
