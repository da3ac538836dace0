"""This machine as a profile: what it has, and the values of the nearest kind."""

import platform
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import edge
from profiles import DeviceProfile, detect, detect_profile, load_profile

GIB = 2**30
OWN = {"name", "description", "device_memory_bytes", "memory_budget_bytes", "num_threads"}
SPEEDS = {"memory_gb_per_s", "int8_tops", "storage_gb_per_s"}


@pytest.mark.parametrize(
    ("system", "machine", "gib", "num_cores", "kind"),
    [
        ("linux", "x86_64", 15.4, 8, "laptop"),
        ("linux", "x86_64", 7.6, 2, "laptop-small"),
        ("linux", "x86_64", 1, 1, "laptop-small"),
        ("linux", "x86_64", 31, 12, "laptop"),
        ("linux", "x86_64", 62, 12, "workstation"),
        ("linux", "x86_64", 251, 32, "workstation"),
        ("linux", "x86_64", 62, 4, "laptop"),  # a virtual machine with memory and little else
        ("win32", "AMD64", 15.8, 6, "laptop"),
        ("win32", "ARM64", 15.6, 8, "laptop"),
        ("darwin", "arm64", 8, 4, "laptop-small"),
        ("darwin", "arm64", 64, 12, "workstation"),
        ("linux", "aarch64", 7.9, 4, "raspberry-pi"),
        ("linux", "aarch64", 15.9, 4, "raspberry-pi"),
        ("linux", "aarch64", 124, 32, "workstation"),
        ("android", "aarch64", 5.5, 4, "phone-arm"),
        ("android", "aarch64", 11.1, 8, "phone-arm"),
        ("ios", "iPhone16,1", 7.5, 2, "phone-arm"),
    ],
)
def test_the_nearest_kind(
    system: str, machine: str, gib: float, num_cores: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = detected(monkeypatch, tmp_path, system, machine, int(gib * GIB), num_cores)
    near = load_profile(kind)
    for name in {field.name for field in fields(DeviceProfile)} - OWN - SPEEDS:
        assert getattr(profile, name) == getattr(near, name)
    assert (profile.name, profile.device_memory_bytes, profile.num_threads) == ("this-machine", int(gib * GIB), 0)
    assert profile.memory_budget_bytes == near.memory_budget_bytes
    assert all(getattr(profile, name) is None for name in SPEEDS)
    assert profile.description.endswith(f"{gib:.1f} GiB; otherwise as {kind}")


def test_the_group_s_limit_is_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{8 * GIB}\n")
    profile = detected(monkeypatch, tmp_path, "linux", "x86_64", 64 * GIB, 16)
    assert profile.device_memory_bytes == 8 * GIB
    assert profile.description == "This machine: x86_64, 16 performance cores, 8.0 GiB; otherwise as laptop-small"


def test_a_phone_of_little_memory_has_a_budget_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = detected(monkeypatch, tmp_path, "android", "aarch64", GIB // 2, 1)
    assert profile.memory_budget_bytes == profile.device_memory_bytes == GIB // 2
    assert profile.description == "This machine: aarch64, 1 performance core, 0.5 GiB; otherwise as phone-arm"


def test_this_machine() -> None:
    profile = edge.detect_profile()
    assert profile.device_memory_bytes is not None
    assert 0 < profile.device_memory_bytes <= psutil.virtual_memory().total
    assert platform.machine() in profile.description


def detected(
    monkeypatch: pytest.MonkeyPatch, root: Path, system: str, machine: str, memory_bytes: int, num_cores: int
) -> DeviceProfile:
    """What is detected on such a machine; CPython for Android has a function of its own."""
    with monkeypatch.context() as patch:
        if system == "android":
            patch.setattr(sys, "getandroidapilevel", lambda: 34, raising=False)
        patch.setattr(sys, "platform", "linux" if system == "android" else system)
        patch.setattr(platform, "machine", lambda: machine)
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory_bytes))
        patch.setattr(detect, "performance_cores", lambda root: num_cores)
        return detect_profile(root)
