from pathlib import Path

import pytest

from profiles.limits import cgroup_limit_bytes

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


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert cgroup_limit_bytes(tmp_path) is None


def test_this_machine() -> None:
    limit = cgroup_limit_bytes()
    assert limit is None or limit > 0
