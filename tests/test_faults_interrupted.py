"""Exports whose process is killed, interrupted or limited. The numbers are those of the list of faults."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge.export_cli import main
from tests.commands import Capture, assert_fails, contents, run

ROOT = Path(__file__).parents[1]
SHAPE = "one_shared"
EXPORTERS = """
import json, os, pkgutil, resource, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
import export.pipeline
from edge.export_cli import main

def pause(place, num_calls, ready):
    module, _, path = place.partition(":")
    parents, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(f"{module}:{parents}" if parents else module)
    function, calls = getattr(owner, name), []
    def call(*args, **options):
        calls.append(place)
        if len(calls) > num_calls:
            Path(ready).touch()
            time.sleep(60)
        return function(*args, **options)
    setattr(owner, name, call)

def work(arguments, output, place=None, num_calls=0, ready=None, max_file_bytes=None):
    for descriptor in (1, 2):
        os.dup2(os.open(f"{output}{descriptor}", os.O_WRONLY | os.O_CREAT), descriptor)
    if place:
        pause(place, num_calls, ready)
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code
    except BaseException:
        traceback.print_exc()
        return 99

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os._exit(work(**json.loads(line)))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Exporters:
    """Processes that run `edge-export` one after another, forked from one that has imported what takes seconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parent = subprocess.Popen(
            [sys.executable, "-c", EXPORTERS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, arguments: Sequence[object], place: str = "", num_calls: int = 0, **job: object) -> int:
        """Begins an export; with a `place`, returns once the function of that name was called so many times."""
        for path in self._folder.iterdir():
            path.unlink()
        ready = self._folder / "ready"
        job |= {"arguments": [str(argument) for argument in arguments], "output": str(self._folder / "output")}
        job |= {"place": place, "num_calls": num_calls, "ready": str(ready)}
        assert self._parent.stdin
        self._parent.stdin.write(json.dumps(job) + "\n")
        self._parent.stdin.flush()
        pid = self._number()
        deadline = time.monotonic() + 60
        while place and not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return pid

    def finish(self) -> tuple[int, str, str]:
        """Exit code (negative: the signal that ended it), standard output and standard error."""
        code = self._number()
        return code, (self._folder / "output1").read_text(), (self._folder / "output2").read_text()

    def close(self) -> None:
        assert self._parent.stdin
        self._parent.stdin.close()
        self._parent.wait(60)
        assert self._parent.stdout
        self._parent.stdout.close()

    def _number(self) -> int:
        assert self._parent.stdout
        return int(self._parent.stdout.readline())


@pytest.fixture(scope="module")
def exporters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporters]:
    made = Exporters(tmp_path_factory.mktemp("exporters"))
    yield made
    made.close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def exporting(tiny_checkpoint: Callable[[str], Any], out: Path) -> list[object]:
    """Arguments of an export to `out`."""
    pair = tiny_checkpoint(SHAPE)
    return [pair.target, out, "--drafter", pair.assistant, "--bits", 4, "--layout", "portable"]


@pytest.fixture
def whole(tiny_artifact: Callable[..., Path]) -> dict[str, str]:
    """What the artifact of `exporting` holds."""
    return contents(tiny_artifact(SHAPE, 4))


MOMENTS = [
    ("runtime.staging:_check_vacant", 1),  # the marker is there, the folder not yet
    ("export.graph:DataFile.write", 0),
    ("export.graph:DataFile.write", 30),
    ("export.graph:Graph.save", 1),
    ("export.graph:Graph.save", 2),
    ("export.text_files:shutil.copyfile", 0),
    ("runtime.manifest:Manifest.to_bytes", 0),
    ("runtime.staging:_publish", 0),
    ("runtime.staging:_sync", 4),
    ("pathlib:Path.replace", 0),
]


@pytest.mark.parametrize(("place", "num_calls"), MOMENTS)
def test_killed_then_exported_again(  # 32, 43
    exporters: Exporters, exporting: list[object], out: Path, whole: dict[str, str], place: str, num_calls: int
) -> None:
    os.kill(exporters.start(exporting, place, num_calls), signal.SIGKILL)
    assert exporters.finish() == (-signal.SIGKILL, "", "")
    assert not out.exists()
    assert run(main, exporting) == 0
    assert contents(out) == whole
    assert list(out.parent.iterdir()) == [out]


def test_killed_after_it_was_published(  # 32
    exporters: Exporters, exporting: list[object], out: Path, whole: dict[str, str], capfd: Capture
) -> None:
    os.kill(exporters.start(exporting, "runtime.staging:_drop"), signal.SIGKILL)
    assert exporters.finish()[0] == -signal.SIGKILL
    assert contents(out) == whole
    assert_fails(main, exporting, "out is not empty; remove it or choose another", capfd)
    assert contents(out) == whole


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "edge-export: interrupted\n"), (signal.SIGTERM, 143, "edge-export: terminated\n")],
)
@pytest.mark.parametrize(("place", "num_calls"), MOMENTS[2:8:2])
def test_a_signal_leaves_nothing(  # 33
    exporters: Exporters,
    exporting: list[object],
    out: Path,
    number: signal.Signals,
    code: int,
    said: str,
    place: str,
    num_calls: int,
) -> None:
    os.kill(exporters.start(exporting, place, num_calls), number)
    assert exporters.finish() == (code, "", said)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("max_file_bytes", [4096, 10_000, 100_000])
def test_a_file_size_limit_of_the_system(  # 34
    exporters: Exporters, exporting: list[object], out: Path, max_file_bytes: int
) -> None:
    exporters.start(exporting, max_file_bytes=max_file_bytes)
    code, printed, error = exporters.finish()
    assert (code, printed) == (1, "")
    assert error == f"edge-export: {out}: File too large; the export was given up, mend that and export again\n"
    assert list(out.parent.iterdir()) == []


def test_two_exporters_into_one_folder(
    exporters: Exporters, exporting: list[object], out: Path, capfd: Capture
) -> None:
    pid = exporters.start(exporting, "export.graph:Graph.save", 1)  # 37
    assert_fails(main, exporting, r"another export holds .*\.out\.partial; wait until it ends or choose", capfd)
    os.kill(pid, signal.SIGKILL)
    assert exporters.finish()[0] == -signal.SIGKILL
    assert not out.exists()


def test_an_export_is_the_same_each_time(exporting: list[object], out: Path, whole: dict[str, str]) -> None:  # 32
    for _ in range(2):
        assert run(main, exporting) == 0
        assert contents(out) == whole
        shutil.rmtree(out)
