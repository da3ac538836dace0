"""How many threads compute: one for each performance core that this process may use.

Work is split evenly, so a step ends with its slowest core: a slow one delays all others.

Source: https://docs.kernel.org/admin-guide/abi-testing.html (cpu_capacity, thread_siblings_list, cpu_core, cpu_atom)
"""

import math
import os
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

import psutil

from profiles.device import DeviceProfile
from profiles.limits import ROOT, cgroup_cpus

# Of the largest capacity. Split evenly over as many slow cores as fast ones, a step is faster than on the fast ones
# alone if the slow ones have at least half their capacity. Beside a prime core of 1024, a phone's big cores have 600 to
# 900, its little ones (in order, with narrow vector units) 250 to 450.
LEAST_CAPACITY = 0.5
SYSCTL = ("sysctl", "-n", "hw.perflevel0.physicalcpu")  # perflevel0: the fastest kind of core that a Mac has


def threads_of(profile: DeviceProfile) -> int:
    """Threads that compute under a profile: as many as it says, or one for each performance core.

    More threads than this machine has processors are taken as they are: a profile may be of another device, threads
    change no token in the native layout, and whoever asks for a number gets it.
    """
    return profile.num_threads or performance_cores()


def performance_cores(root: Path = ROOT) -> int:
    """Physical cores of the fast kind among the processors that this process may run on, at least 1.

    Affinity and the control group's CPU quota bound them. A quota of 1.5 counts as 2: two threads do use it up, one
    would not.

    Args:
        root: where `sys/devices`, `sys/fs/cgroup` and `proc/self/cgroup` are looked for.
    """
    cores, quota = _cores(root / "sys/devices"), cgroup_cpus(root)
    return cores if quota is None else min(cores, math.ceil(quota))


def _cores(devices: Path) -> int:
    if sys.platform == "darwin" and (fast := _perflevel0()) is not None:
        return fast
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return physical
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(devices, cpu) for cpu in _fast(devices, cpus)}
    return len(cores) if all(cores) else min(len(cpus), physical)


def _fast(devices: Path, cpus: Set[int]) -> Set[int]:
    """Those of the fast kind, measured by the best of these; all, where the system does not tell kinds apart."""
    p_cores = cpus & _cpu_list(devices / "cpu_core/cpus")  # x86 alone; `cpu_atom` has the E-cores
    if p_cores:
        return p_cores
    capacities = {cpu: _capacity(devices / f"system/cpu/cpu{cpu}/cpu_capacity") for cpu in cpus}
    least = LEAST_CAPACITY * max(capacities.values())
    return {cpu for cpu in cpus if capacities[cpu] >= least}


def _siblings(devices: Path, cpu: int) -> frozenset[int]:
    """All processors of a core, which share its arithmetic; empty where the system does not tell."""
    return _cpu_list(devices / f"system/cpu/cpu{cpu}/topology/thread_siblings_list")


def _cpu_list(file: Path) -> frozenset[int]:
    """Processors of a list such as "0-3,8"; none where there is no such list."""
    try:
        spans = [part.partition("-") for part in file.read_text(encoding="ascii").split(",")]
        return frozenset(cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return frozenset()


def _capacity(file: Path) -> int:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _perflevel0() -> int | None:
    try:
        done = subprocess.run(SYSCTL, capture_output=True, text=True, timeout=5)
        return int(done.stdout) or None
    except (OSError, ValueError, subprocess.TimeoutExpired):  # an Intel Mac knows no levels
        return None
