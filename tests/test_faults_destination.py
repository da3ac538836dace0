"""Where an export may not write, and a disk that fills up. The numbers are those of the list of faults."""

import errno
import math
import os
import pkgutil
import shutil
from typing import Any

import pytest

from edge.export_cli import main
from tests.commands import assert_fails
from tests.faulty import Pair


def test_a_destination_that_is_not_empty(pair: Pair) -> None:  # 36
    pair.out.mkdir()
    (pair.out / "mine.txt").write_text("mine")
    pair.refused("out is not empty; remove it or choose another")


def test_an_earlier_artifact_stays(pair: Pair) -> None:  # 36
    assert pair.export() == 0
    pair.refused("out is not empty; remove it or choose another")


@pytest.mark.parametrize(
    ("out", "relation"),
    [
        ("target", "is"),
        ("assistant", "is"),
        ("link", "is"),
        ("target/inside", "lies inside"),
        ("assistant/inside", "lies inside"),
        (".", "contains"),
    ],
)
def test_a_destination_that_is_the_source(pair: Pair, out: str, relation: str) -> None:  # 45
    folder = pair.out.parent
    (folder / "link").symlink_to(pair.target, target_is_directory=True)
    match = f"destination .* {relation} the source .*; choose a folder apart from it"
    Pair(pair.target, pair.assistant, folder / out, pair.capture).refused(match)


@pytest.mark.parametrize(
    ("out", "match"),
    [
        ("/proc/artifact", "cannot create /proc/.artifact.partial: .*; choose a destination you can write"),  # nor root
        ("/proc/none/artifact", "/proc/none is not a folder; create it or choose another destination"),
        ("/dev/null", "destination /dev/null is a file; choose a folder"),
        ("/dev/null/artifact", "/dev/null is not a folder; create it or choose another destination"),
    ],
)
def test_a_destination_that_cannot_be_written(pair: Pair, out: str, match: str) -> None:  # 35
    assert_fails(main, [pair.target, out, "--drafter", pair.assistant], f"^edge-export: .*{match}", pair.capture)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--bits", "5"], "--bits 5: choose one of 4, 8, 16, 32"),
        (["--bits", "x"], "argument --bits: invalid int value: 'x'; see edge-export --help"),
        (["--block-size", "7"], "--block-size 7: choose one of 16, 32, 64, 128, 256"),
        (["--activations", "int4"], "--activations int4: choose int8 or float32"),
        (["--nonsense"], "unrecognized arguments: --nonsense; see edge-export --help"),
    ],
)
def test_options_that_are_none(pair: Pair, options: list[str], match: str) -> None:
    pair.refused(match, *options)


WRITERS = (
    "export.graph:DataFile.write",
    "export.graph:DataFile.__exit__",
    "export.graph:Graph.save",
    "export.text_files:shutil.copyfile",
    "pathlib:Path.write_text",
    "pathlib:Path.write_bytes",
    "os:fsync",
    "runtime.staging:_publish",
)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fills_up(pair: Pair, writer: str, monkeypatch: pytest.MonkeyPatch) -> None:  # 34
    function = pkgutil.resolve_name(writer)
    calls: list[object] = []

    def fill_up_after(num_calls: float) -> None:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(function)
            if len(calls) > num_calls:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **options)

        calls.clear()
        monkeypatch.setattr(writer.replace(":", "."), call)

    fill_up_after(math.inf)
    assert pair.export("--drafter", pair.assistant) == 0
    num_calls = len(calls) - (writer == "os:fsync")  # the last one comes when the artifact is there
    shutil.rmtree(pair.out)
    assert num_calls > 0
    for num_before in {*range(0, num_calls, num_calls // 5 + 1), num_calls - 1}:
        fill_up_after(num_before)
        pair.refused("/out.*: No space left on device; the export was given up, mend that and export again")
