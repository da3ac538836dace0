"""The memory limit of the control group this process runs in.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# v1 says "no limit" with the largest multiple of a page below 2^63
_UNLIMITED = 1 << 62


def cgroup_limit_bytes(root: Path = Path("/")) -> int | None:
    """The smallest memory limit of this process's control group and its ancestors, or None where there is none.

    `memory.high` counts like `memory.max`: beyond it the kernel slows a process to a crawl instead of ending it.

    Args:
        root: where `proc/self/cgroup` and `sys/fs/cgroup` are looked for.
    """
    limits = [limit for file in _limit_files(root) if (limit := _read_limit(file)) is not None]
    return min(limits, default=None)


def _limit_files(root: Path) -> Iterator[Path]:
    mounted = root / "sys/fs/cgroup"
    for controllers, path in _memberships(root / "proc/self/cgroup"):
        if not controllers:
            yield from (folder / name for folder in _ancestry(mounted, path) for name in ("memory.max", "memory.high"))
        elif "memory" in controllers:
            yield from (folder / "memory.limit_in_bytes" for folder in _ancestry(mounted / "memory", path))


def _memberships(file: Path) -> Iterator[tuple[list[str], str]]:
    """Controllers and path of each hierarchy; the one of v2 names no controllers."""
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        if line.count(":") >= 2:
            _, controllers, path = line.split(":", 2)
            yield controllers.split(",") if controllers else [], path


def _ancestry(mounted: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it. A container sees its own group as the mount, whatever the path says."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for length in range(len(parts), -1, -1):
        yield mounted.joinpath(*parts[:length])


def _read_limit(file: Path) -> int | None:
    try:
        limit = int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # absent, or "max"
        return None
    return limit if 0 <= limit < _UNLIMITED else None
