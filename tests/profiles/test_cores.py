"""Threads are as many as performance cores that the process may use, on trees as the kernel makes them."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from profiles import cores, load_profile, performance_cores, threads_of

Cores = Callable[..., int]
# capacities of one processor each
PHONE = [250] * 4 + [800] * 3 + [1024]  # little, big, prime
TENSOR = [250] * 4 + [620] * 2 + [1024] * 2
BUDGET_PHONE = [380] * 6 + [1024] * 2
JUNO = [446] * 4 + [1024] * 2


@pytest.fixture
def count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cores:
    """count(siblings, capacities, files, cpus): performance cores of such a machine; `cpus` are those granted."""

    def count_on(
        siblings: Sequence[str],
        capacities: Sequence[int] = (),
        files: dict[str, str] | None = None,
        cpus: set[int] | None = None,
    ) -> int:
        texts = {f"sys/devices/{name}": text for name, text in (files or {}).items() if not name.startswith("/")}
        texts |= {name[1:]: text for name, text in (files or {}).items() if name.startswith("/")}
        for kind, values in (("topology/thread_siblings_list", siblings), ("cpu_capacity", capacities)):
            texts |= {f"sys/devices/system/cpu/cpu{cpu}/{kind}": f"{value}\n" for cpu, value in enumerate(values)}
        for name, text in texts.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        granted = set(range(len(siblings))) if cpus is None else cpus
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: granted, raising=False)
        monkeypatch.setattr(psutil, "cpu_count", lambda logical: 6)
        return performance_cores(tmp_path)

    return count_on


def single(number: int) -> list[str]:
    """Siblings on a machine without SMT."""
    return [str(cpu) for cpu in range(number)]


def smt(number: int) -> list[str]:
    """Siblings of `number` cores as x86 servers number them: 0 and n, 1 and n + 1, ..."""
    return [f"{cpu},{cpu + number}" for cpu in range(number)] * 2


@pytest.mark.parametrize(
    ("siblings", "cpus", "expected"),
    [
        (single(4), None, 4),
        (smt(8), None, 8),
        (["0-1", "0-1", "2-3", "2-3"], None, 2),
        (smt(8), {0, 8, 1, 9}, 2),  # two cores, both threads
        (smt(8), {0, 1, 2}, 3),
        (smt(8), {9}, 1),
    ],
)
def test_siblings_count_once_and_only_what_is_granted(
    count: Cores, siblings: list[str], cpus: set[int] | None, expected: int
) -> None:
    assert count(siblings, cpus=cpus) == expected


@pytest.mark.parametrize(
    ("capacities", "cpus", "expected"),
    [
        (PHONE, None, 4),
        (TENSOR, None, 4),
        (BUDGET_PHONE, None, 2),
        (JUNO, None, 2),
        ([511, 1024], None, 1),
        ([512, 1024], None, 2),
        ([1024] * 4, None, 4),
        (PHONE, {0, 1, 2, 3}, 4),  # an app in the background, on little cores alone: the best there are
        (PHONE, {0, 1, 4, 5}, 2),
        (PHONE, {3, 7}, 1),
    ],
)
def test_little_cores_do_not_count(count: Cores, capacities: list[int], cpus: set[int] | None, expected: int) -> None:
    assert count(single(len(capacities)), capacities, cpus=cpus) == expected


@pytest.mark.parametrize(("cpus", "expected"), [(None, 6), ({0, 1, 2, 12, 13}, 2), ({12, 13, 14}, 3), ({1, 3, 12}, 2)])
def test_efficiency_cores_do_not_count(count: Cores, cpus: set[int] | None, expected: int) -> None:
    siblings = [f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}" for cpu in range(12)] + [str(cpu) for cpu in range(12, 20)]
    files = {"cpu_core/cpus": "0-11\n", "cpu_atom/cpus": "12-19\n"}
    assert count(siblings, [1024] * 12 + [700] * 8, files=files, cpus=cpus) == expected


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 64), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("9900000 100000", 64)],
)
def test_a_quota_bounds_them(count: Cores, quota: str, expected: int) -> None:
    files = {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": quota}
    assert count(smt(64), files=files) == expected


def test_a_quota_of_version_1_bounds_them(count: Cores) -> None:
    folder = "/sys/fs/cgroup/cpu/a"
    files = {f"{folder}/cpu.cfs_quota_us": "300000", f"{folder}/cpu.cfs_period_us": "100000"}
    assert count(single(8), files=files | {"/proc/self/cgroup": "3:cpu,cpuacct:/a\n"}) == 3


@pytest.mark.parametrize("siblings", ["", "many", "1-", "-1"])
def test_a_system_that_does_not_tell(count: Cores, siblings: str) -> None:
    assert count([siblings] * 16) == 6  # psutil's
    assert count([siblings] * 16, cpus={0, 1}) == 2


def test_a_system_without_affinity(count: Cores, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    count(single(4))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert performance_cores(tmp_path) == 6
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert performance_cores(tmp_path) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for sysctl")
@pytest.mark.parametrize(("script", "expected"), [("echo 8", 8), ("echo 0", 6), ("exit 1", 6), (None, 6)])
def test_a_mac(
    count: Cores, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, expected: int
) -> None:
    count(single(4))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        text = f'#!/bin/sh\n[ "$*" = "-n hw.perflevel0.physicalcpu" ] || exit 1\n{script}\n'
        (tmp_path / "sysctl").write_text(text)
        (tmp_path / "sysctl").chmod(0o755)
    assert performance_cores(tmp_path) == expected


def test_this_machine() -> None:
    assert 1 <= performance_cores() <= (os.cpu_count() or 1)


def test_a_profile_s_threads(monkeypatch: pytest.MonkeyPatch) -> None:  # 48
    monkeypatch.setattr(cores, "performance_cores", lambda: 3)
    laptop = load_profile("laptop")
    assert [threads_of(replace(laptop, num_threads=number)) for number in (0, 1, 4, 1024)] == [3, 1, 4, 1024]
