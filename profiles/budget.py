"""Bytes the runtime may take: on this machine now, or on the device that a profile describes."""

import psutil

from profiles.amounts import amount_bytes
from profiles.device import DeviceProfile
from profiles.limits import cgroup_available_bytes

OVERRIDE = "memory budget"
# What the kernel counts against a control group beside the process's own memory: page tables of mapped weights, stacks.
# A group with the plan's very size was killed, with 2 MiB more it was not; E4B's page tables alone are 5 MiB.
KERNEL_BYTES = 8 << 20


def budget_bytes(profile: DeviceProfile, override: int | str | None = None, *, held_bytes: int = 0) -> int:
    """Bytes the runtime may take now, never more than the machine and the control group still have.

    Args:
        profile: its budget, or its fraction of the memory that is available now
        override: budget instead of the profile's, in bytes or as `parse_bytes` reads it
        held_bytes: what the runtime takes and this process holds already, which is no longer available

    Raises:
        ProfileError: the override is no amount above 0.
    """
    available = _available_bytes() + held_bytes
    if override is not None:
        return min(amount_bytes(override, OVERRIDE), available)
    if profile.memory_budget_bytes is not None:
        return min(profile.memory_budget_bytes, available)
    assert profile.memory_fraction is not None
    return int(available * profile.memory_fraction)


def stated_budget_bytes(profile: DeviceProfile, override: int | str | None = None) -> int:
    """Bytes the runtime may take on the device that the profile describes, without a look at this machine.

    The budget, or the fraction of `device_memory_bytes`. A profile that has a fraction and states no memory describes
    this machine alone: then, and only then, this machine is asked (`budget_bytes`).

    Args:
        profile: what the device is like
        override: budget instead of the profile's, in bytes or as `parse_bytes` reads it; the device's memory bounds it

    Raises:
        ProfileError: the override is no amount above 0.
    """
    memory = profile.device_memory_bytes
    if override is not None:
        granted = amount_bytes(override, OVERRIDE)
        return granted if memory is None else min(granted, memory)
    if profile.memory_budget_bytes is not None:
        return profile.memory_budget_bytes
    assert profile.memory_fraction is not None
    return budget_bytes(profile) if memory is None else int(memory * profile.memory_fraction)


def _available_bytes() -> int:
    """What this process may still take; below the total memory and the group's limit by what is in use."""
    machine, group = int(psutil.virtual_memory().available), cgroup_available_bytes()
    return machine if group is None else max(0, min(machine, group - KERNEL_BYTES))
