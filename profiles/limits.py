"""What the control group of this process and its ancestors grant: memory, and processor time.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html,
https://docs.kernel.org/scheduler/sched-bwc.html
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
# v1 says "no limit" with the largest multiple of a page below 2^63
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class _MemoryFiles:
    """Names of a version's files, and the lines of memory.stat that count pages of files, of descendants too.

    Pages of tmpfs and locked ones are on other lists: they cannot be reclaimed, though they count as cache.
    """

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]


# `memory.high` counts like `memory.max`: beyond it the kernel slows a process to a crawl instead of ending it
_V2 = _MemoryFiles(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"))
_V1 = _MemoryFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))


def cgroup_limit_bytes(root: Path = ROOT) -> int | None:
    """The smallest memory limit of this process's control group and its ancestors, or None where there is none.

    Args:
        root: where `proc/self/cgroup` and `sys/fs/cgroup` are looked for.
    """
    return min((limit for _, _, limit in _limited_groups(root)), default=None)


def cgroup_available_bytes(root: Path = ROOT) -> int | None:
    """What the control group and its ancestors still leave, or None where none has a limit; never below 0.

    Of each group with a limit, the limit less the memory in use that cannot be reclaimed. Where a group does not tell
    its use, all of its limit counts as left.
    """
    left = [limit - _kept_bytes(folder, files) for folder, files, limit in _limited_groups(root)]
    return max(0, min(left)) if left else None


def cgroup_cpus(root: Path = ROOT) -> float | None:
    """Processors' worth of time that the control group and its ancestors grant, or None where there is no quota."""
    quotas = [_quota_v2(folder) if is_v2 else _quota_v1(folder) for folder, is_v2 in _groups(root, "cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def _limited_groups(root: Path) -> Iterator[tuple[Path, _MemoryFiles, int]]:
    for folder, is_v2 in _groups(root, "memory"):
        files = _V2 if is_v2 else _V1
        limits = [limit for name in files.limits if (limit := _read_amount(folder / name)) is not None]
        if limits:
            yield folder, files, min(limits)


def _kept_bytes(folder: Path, files: _MemoryFiles) -> int:
    """Memory in use less what the kernel drops when others need it."""
    usage = _read_amount(folder / files.usage) or 0
    counts = dict(line.partition(" ")[::2] for line in _read(folder / "memory.stat").splitlines())
    reclaimable = sum(int(counts.get(name, "")) for name in files.reclaimable if counts.get(name, "").isdecimal())
    return max(0, usage - reclaimable)  # the two are not read at one moment


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    """None for "max", -1 and whatever else is no quota."""
    try:
        granted, length = int(quota), int(period)
    except ValueError:
        return None
    return granted / length if granted > 0 and length > 0 else None


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of the group and its ancestors in each hierarchy that may have the controller, and whether it is v2."""
    mounted = root / "sys/fs/cgroup"
    for controllers, path in _memberships(root / "proc/self/cgroup"):
        if not controllers:
            yield from ((folder, True) for folder in _ancestry(mounted, path))
        elif controller in controllers:
            yield from ((folder, False) for folder in _ancestry(mounted / controller, path))


def _memberships(file: Path) -> Iterator[tuple[list[str], str]]:
    """Controllers and path of each hierarchy; the one of v2 names no controllers."""
    for line in _read(file).splitlines():
        if line.count(":") >= 2:
            _, controllers, path = line.split(":", 2)
            yield controllers.split(",") if controllers else [], path


def _ancestry(mounted: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it. A container sees its own group as the mount, whatever the path says."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for length in range(len(parts), -1, -1):
        yield mounted.joinpath(*parts[:length])


def _read_amount(file: Path) -> int | None:
    try:
        amount = int(_read(file))
    except ValueError:  # absent, or "max"
        return None
    return amount if 0 <= amount < _UNLIMITED else None


def _read(file: Path) -> str:
    """A file's text, empty where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError):  # a path with a NUL byte is a ValueError
        return ""
