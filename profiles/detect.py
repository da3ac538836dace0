"""A profile of this machine: what it has, and otherwise the values of the built-in profile nearest in kind."""

import math
import platform
import sys
from dataclasses import replace
from pathlib import Path

import psutil

from profiles.cores import performance_cores
from profiles.device import DeviceProfile
from profiles.limits import ROOT, cgroup_limit_bytes
from profiles.load import load_profile

THIS_MACHINE = "this-machine"
BOARD_CORES, WORKSTATION_CORES = 4, 8  # at most, at least


def detect_profile(root: Path = ROOT) -> DeviceProfile:
    """A profile of this machine, named "this-machine"; its speeds are None, since here they can be measured.

    Args:
        root: where the control group and the processors are looked for.
    """
    total, limit = int(psutil.virtual_memory().total), cgroup_limit_bytes(root)
    memory = total if limit is None else min(total, limit)
    num_cores = performance_cores(root)
    kind = _nearest_kind(memory, num_cores)
    cores = "1 performance core" if num_cores == 1 else f"{num_cores} performance cores"
    budget = kind.memory_budget_bytes
    return replace(
        kind,
        name=THIS_MACHINE,
        description=f"This machine: {platform.machine()}, {cores}, {memory / 2**30:.1f} GiB; otherwise as {kind.name}",
        device_memory_bytes=memory,
        memory_budget_bytes=None if budget is None else min(budget, memory),
        num_threads=0,
        memory_gb_per_s=None,
        int8_tops=None,
        storage_gb_per_s=None,
    )


def _nearest_kind(memory_bytes: int, num_cores: int) -> DeviceProfile:
    """Phones and small Arm boards by what they are, the rest by memory: the nearest as a ratio."""
    if hasattr(sys, "getandroidapilevel") or sys.platform == "ios":
        return load_profile("phone-arm")
    if sys.platform == "linux" and platform.machine() == "aarch64" and num_cores <= BOARD_CORES:
        return load_profile("raspberry-pi")
    names = ["laptop-small", "laptop"] + ["workstation"] * (num_cores >= WORKSTATION_CORES)

    def distance(profile: DeviceProfile) -> float:
        assert profile.device_memory_bytes is not None
        return abs(math.log2(memory_bytes / profile.device_memory_bytes))

    return min(map(load_profile, names), key=distance)
