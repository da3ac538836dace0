from pathlib import Path

import pytest

from profiles.limits import cgroup_available_bytes, cgroup_cpus, cgroup_limit_bytes

GIB = 2**30


def fake(root: Path, membership: str, files: dict[str, str]) -> Path:
    """A root folder with /proc/self/cgroup and files below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for name, content in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        # v2
        ("0::/\n", {"memory.max": "1073741824\n"}, GIB),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "2147483648\n"}, 2 * GIB),
        ("0::/a/b\n", {"a/b/memory.max": "2147483648\n", "a/memory.max": "1073741824\n"}, GIB),
        ("0::/a/b\n", {"a/b/memory.max": "1073741824\n", "a/memory.max": "2147483648\n"}, GIB),
        ("0::/a\n", {"a/memory.max": "2147483648\n", "a/memory.high": "1073741824\n"}, GIB),
        ("0::/a:b c\n", {"a:b c/memory.max": "1073741824\n"}, GIB),
        ("0::/a\n", {"other/memory.max": "1073741824\n"}, None),
        # a container that sees its own group as the mount, with the host's path or one that leads out
        ("0::/docker/0123\n", {"memory.max": "1073741824\n"}, GIB),
        ("0::/../..\n", {"memory.max": "1073741824\n"}, GIB),
        # v1, alone and beside an empty v2
        ("4:memory:/a\n1:cpu:/b\n", {"memory/a/memory.limit_in_bytes": "1073741824\n"}, GIB),
        ("4:cpu,memory:/a\n0::/\n", {"memory/memory.limit_in_bytes": "1073741824\n"}, GIB),
        ("4:memory:/a\n0::/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        (
            "4:memory:/a/b\n",
            {"memory/a/b/memory.limit_in_bytes": "2147483648\n", "memory/a/memory.limit_in_bytes": "1073741824\n"},
            GIB,
        ),
        # nothing that can be read
        ("0::/\n", {"memory.max": "many\n"}, None),
        ("0::/\n", {"memory.max": "-1\n"}, None),
        ("0::/\n", {"memory.max": ""}, None),
        ("\n:\nmemory\n", {"memory.max": "1073741824\n"}, None),
        ("", {"memory.max": "1073741824\n"}, None),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, membership: str, files: dict[str, str], limit: int | None) -> None:
    assert cgroup_limit_bytes(fake(tmp_path, membership, files)) == limit


# What is left


def v2(folder: str, limit: str, usage: str, stat: str = "") -> dict[str, str]:
    return {f"{folder}memory.max": limit, f"{folder}memory.current": usage, f"{folder}memory.stat": stat}


def v1(folder: str, limit: str, usage: str, stat: str = "") -> dict[str, str]:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"memory/{folder}{name}": text for name, text in zip(names, (limit, usage, stat), strict=True)}


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        # v2: pages of files count as left, those of tmpfs (counted in `file`) and locked ones do not
        ("0::/\n", v2("", "1000\n", "300\n"), 700),
        ("0::/\n", v2("", "1000", "900", "anon 500\nfile 400\nactive_file 100\ninactive_file 50\nshmem 250\n"), 250),
        ("0::/\n", v2("", "1000", "1200", "active_file 100\n"), 0),
        ("0::/\n", v2("", "1000", "100", "active_file 200\n"), 1000),  # the two were read at different moments
        ("0::/\n", v2("", "1000", "900", "active_file many\ninactive_file\n"), 100),
        ("0::/\n", v2("", "1000", "900") | {"memory.high": "950\n"}, 50),
        ("0::/\n", v2("", "max\n", "300\n"), None),
        # an ancestor that is tighter, for its limit or for what others use of it
        ("0::/a/b\n", v2("a/b/", "1000", "100") | v2("a/", "800", "100"), 700),
        ("0::/a/b\n", v2("a/b/", "1000", "100") | v2("a/", "2000", "1900"), 100),
        ("0::/a/b\n", v2("a/b/", "max", "100") | v2("a/", "2000", "1900", "active_file 500\n"), 600),
        ("0::/a/b\n", v2("a/b/", "1000", "100") | v2("a/", "2000", "300"), 900),
        # v1: `total_` counts descendants too
        ("4:memory:/a\n", v1("a/", "1000", "300"), 700),
        ("4:memory:/a\n", v1("a/", "1000", "900", "active_file 9\ntotal_active_file 100\ntotal_inactive_file 50"), 250),
        ("4:memory:/a\n", v1("a/", "9223372036854771712", "900"), None),
        ("4:memory:/a/b\n0::/\n", v1("a/b/", "1000", "100") | v1("a/", "1200", "1100"), 100),
        # files that are missing or cannot be read
        ("0::/\n", {"memory.max": "1000\n"}, 1000),
        ("0::/\n", {"memory.max": "1000\n", "memory.current": "many"}, 1000),
        ("0::/\n", {"memory.max": "1000\n", "memory.current": "400"}, 600),
        ("0::/\n", {"memory.current": "400"}, None),
        ("", v2("", "1000", "300"), None),
    ],
)
def test_what_the_group_leaves(tmp_path: Path, membership: str, files: dict[str, str], left: int | None) -> None:
    assert cgroup_available_bytes(fake(tmp_path, membership, files)) == left


# Processor time


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "150000 100000\n"}, 0.5),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "25000\n"}, 2),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "25000\n"}, None),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000\n"}, None),
        ("4:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "25000\n"}, None),
        ("0::/\n", {"cpu.max": "200000\n"}, None),
        ("0::/\n", {"cpu.max": "200000 0\n"}, None),
        ("0::/\n", {"cpu.max": "many few\n"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_the_smallest_quota_counts(tmp_path: Path, membership: str, files: dict[str, str], cpus: float | None) -> None:
    assert cgroup_cpus(fake(tmp_path, membership, files)) == cpus


# No control groups, and this one


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert cgroup_limit_bytes(tmp_path) is None
    assert cgroup_available_bytes(tmp_path) is None
    assert cgroup_cpus(tmp_path) is None


def test_this_machine() -> None:
    limit, left, cpus = cgroup_limit_bytes(), cgroup_available_bytes(), cgroup_cpus()
    assert (limit is None) == (left is None)
    assert limit is None or (left is not None and 0 <= left <= limit)
    assert cpus is None or cpus > 0
