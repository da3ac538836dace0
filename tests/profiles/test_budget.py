"""A budget is what the profile grants of what is there: of this machine now, or of the device it describes."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from profiles import ProfileError, available_profiles, budget, budget_bytes, load_profile, stated_budget_bytes

GIB = 2**30
KERNEL_BYTES = budget.KERNEL_BYTES


@pytest.mark.parametrize(
    ("granted", "group", "available", "expected"),
    [
        ({"memory_budget_bytes": 2 * GIB}, None, 12 * GIB, 2 * GIB),
        ({"memory_budget_bytes": 8 * GIB}, 4 * GIB, 12 * GIB, 4 * GIB),  # 47: what the group leaves
        ({"memory_budget_bytes": 8 * GIB}, 4 * GIB, 3 * GIB, 3 * GIB),
        ({"memory_budget_bytes": 8 * GIB}, 0, 3 * GIB, 0),
        ({"memory_fraction": 0.5}, None, 12 * GIB, 6 * GIB),  # of what is available, not of all
        ({"memory_fraction": 0.5}, 4 * GIB, 12 * GIB, 2 * GIB),
        ({"memory_fraction": 0.5}, 99 * GIB, 12 * GIB, 6 * GIB),
        ({"memory_fraction": 1}, None, 1 * GIB, 1 * GIB),
    ],
)
def test_the_smallest_counts(
    granted: dict[str, Any], group: int | None, available: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, group, available)
    none = {"memory_budget_bytes": None, "memory_fraction": None}
    assert budget_bytes(replace(load_profile("laptop"), **none | granted)) == expected


def test_a_group_keeps_room_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    phone = replace(load_profile("phone-arm"), memory_budget_bytes=GIB)
    for group, expected in ((GIB, GIB - KERNEL_BYTES), (KERNEL_BYTES, 0), (1, 0), (2 * GIB, GIB)):
        machine(monkeypatch, group - KERNEL_BYTES, available=12 * GIB)
        assert budget_bytes(phone) == expected


def test_what_is_held_already_counts_as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    laptop = load_profile("laptop")
    machine(monkeypatch, group=None, available=GIB)
    assert budget_bytes(laptop, "3 GiB", held_bytes=GIB // 4) == GIB + GIB // 4
    assert budget_bytes(laptop, GIB, held_bytes=GIB // 4) == GIB
    half = replace(laptop, memory_fraction=0.5)
    assert budget_bytes(half, held_bytes=GIB) == GIB


@pytest.mark.parametrize("name", ["laptop", "phone-arm"])
@pytest.mark.parametrize(("override", "expected"), [(GIB, GIB), ("3 GiB", 3 * GIB), ("5 GiB", 4 * GIB), (1, 1)])
def test_an_override_replaces_the_profile_only(
    name: str, override: int | str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, group=4 * GIB, available=12 * GIB)
    assert budget_bytes(load_profile(name), override) == expected


@pytest.mark.parametrize("grant", [budget_bytes, stated_budget_bytes])
@pytest.mark.parametrize("override", [0, -1, True, "0", "much", 2**63, 1.5])
def test_an_override_that_is_none(grant: Callable[..., int], override: Any) -> None:
    with pytest.raises(ProfileError, match=r"^memory budget(: 'much' is no amount| is (0|-1|True|'0'|92\d+|1.5), exp)"):
        grant(load_profile("laptop"), override)


# Of the device that is described


@pytest.fixture
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with nothing left, which must not be looked at."""
    machine(monkeypatch, group=0, available=0)


@pytest.mark.usefixtures("no_machine")
def test_the_stated_budget_is_the_device_s() -> None:
    laptop, phone = load_profile("laptop"), load_profile("phone-arm")
    assert stated_budget_bytes(laptop) == 8 * GIB
    assert stated_budget_bytes(replace(laptop, memory_fraction=0.25)) == 4 * GIB
    assert stated_budget_bytes(phone) == stated_budget_bytes(replace(phone, device_memory_bytes=None)) == GIB
    assert stated_budget_bytes(phone, "3 GiB") == 3 * GIB
    assert stated_budget_bytes(phone, "7 GiB") == 6 * GIB  # no device has more than its memory
    assert stated_budget_bytes(replace(phone, device_memory_bytes=None), "7 GiB") == 7 * GIB
    assert budget_bytes(phone) == 0


def test_a_fraction_of_no_stated_memory_is_this_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, group=None, available=6 * GIB)
    assert stated_budget_bytes(replace(load_profile("laptop"), device_memory_bytes=None)) == 3 * GIB


@pytest.mark.usefixtures("no_machine")
def test_every_profile_of_the_package_states_a_budget() -> None:
    for name in available_profiles():
        profile = load_profile(name)
        assert profile.device_memory_bytes is not None
        assert 0 < stated_budget_bytes(profile) < profile.device_memory_bytes


def machine(monkeypatch: pytest.MonkeyPatch, group: int | None, available: int) -> None:
    """A machine of 16 GiB and what it and its control group, without what the kernel needs of it, have left."""
    memory = SimpleNamespace(total=16 * GIB, available=available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    left = None if group is None else group + KERNEL_BYTES
    monkeypatch.setattr(budget, "cgroup_available_bytes", lambda: left)
