import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.errors import DestinationError
from runtime.staging import MARKER, staged_folder, terminate_as_interrupt

ROOT = Path(__file__).parents[2]
CHILD = """
import sys, time
from pathlib import Path
from runtime.staging import staged_folder, terminate_as_interrupt
with terminate_as_interrupt(), staged_folder(Path(sys.argv[1]), sources=[]) as folder:
    (folder / "manifest.json").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def export(destination: Path, content: str = "whole", sources: tuple[Path, ...] = ()) -> None:
    with staged_folder(destination, sources=sources) as folder:
        (folder / "manifest.json").write_text(content)
        (folder / "decoder.onnx").write_bytes(b"0" * 100)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


WHOLE = {"out", "out/manifest.json", "out/decoder.onnx"}


@contextmanager
def child_export(destination: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CHILD, str(destination)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


# All of it


def test_the_folder_appears_whole(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", sources=[]) as folder:
        (folder / "manifest.json").write_text("whole")
        assert folder.parent == tmp_path / ".out.partial"
        assert not (tmp_path / "out").exists()
        (folder / "decoder.onnx").touch()
    assert tree(tmp_path) == WHOLE


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(tmp_path / "out")
    assert tree(tmp_path) == WHOLE


def test_a_relative_destination_and_one_behind_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    export(Path("link/out"))
    assert tree(tmp_path / "disk") == WHOLE


def test_the_permissions_are_those_of_any_folder(tmp_path: Path) -> None:
    (tmp_path / "any").mkdir()
    export(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_everything_is_on_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def note(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(f"{path.relative_to(tmp_path)} {(tmp_path / 'out').exists()}")

    monkeypatch.setattr(os, "fsync", note)
    export(tmp_path / "out")
    inner = ".out.partial/artifact"
    assert set(synced[:2]) == {f"{inner}/manifest.json False", f"{inner}/decoder.onnx False"}
    assert synced[2:] == [f"{inner} False", ". True"]


# Or nothing


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit(143), ValueError("bug")]
)
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_nothing_and_passes(tmp_path: Path, error: BaseException, existing: bool) -> None:
    if existing:
        (tmp_path / "out").mkdir()
    with pytest.raises(type(error)) as caught, staged_folder(tmp_path / "out", sources=[]) as folder:
        (folder / "deep").mkdir()
        (folder / "deep/decoder.onnx").touch()
        raise error
    assert caught.value is error
    assert tree(tmp_path) == ({"out"} if existing else set())


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_error_at_the_end_leaves_nothing(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", fail) if call == "fsync" else (Path, "replace", fail)))
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "out")
    assert tree(tmp_path) == set()


def test_a_killed_export_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    with child_export(tmp_path / "out") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert tree(tmp_path) == {
        f".out.partial{rest}" for rest in ("", f"/{MARKER}", "/artifact", "/artifact/manifest.json")
    }
    export(tmp_path / "out")
    assert tree(tmp_path) == WHOLE
    assert (tmp_path / "out/manifest.json").read_text() == "whole"


@pytest.mark.parametrize("left", [(), (MARKER,)])
def test_an_export_killed_at_its_very_start_or_end(tmp_path: Path, left: tuple[str, ...]) -> None:
    (tmp_path / ".out.partial").mkdir()
    for name in left:
        (tmp_path / ".out.partial" / name).touch()
    export(tmp_path / "out")
    assert tree(tmp_path) == WHOLE


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with child_export(tmp_path / "out") as process:
        process.send_signal(number)
        assert process.wait(10) == code
    assert tree(tmp_path) == set()


# Two of them


def test_two_exporters(tmp_path: Path) -> None:
    with child_export(tmp_path / "out") as process:
        before = tree(tmp_path)
        with pytest.raises(DestinationError, match=r"another export holds .*\.out\.partial; wait until it ends"):
            export(tmp_path / "out")
        assert tree(tmp_path) == before
        export(tmp_path / "other")
        process.terminate()
        process.wait()
    export(tmp_path / "out")


def test_two_exports_of_one_process(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", sources=[]) as folder:
        with pytest.raises(DestinationError, match="another export holds"):
            export(tmp_path / "out")
        (folder / "manifest.json").touch()
        (folder / "decoder.onnx").touch()
    assert tree(tmp_path) == WHOLE


def test_of_many_exporters_one_wins(tmp_path: Path) -> None:
    outcomes: list[str] = []

    def run(number: int) -> None:
        try:
            export(tmp_path / "out", content=str(number))
            outcomes.append(str(number))
        except DestinationError:
            pass

    threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [(tmp_path / "out/manifest.json").read_text()]
    assert tree(tmp_path) == WHOLE


def test_a_destination_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(DestinationError, match="out is not empty"),
        staged_folder(tmp_path / "out", sources=[]),
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine").touch()
    assert tree(tmp_path) == {"out", "out/mine"}


# Refusals


def test_a_destination_in_use(tmp_path: Path) -> None:
    export(tmp_path / "out")
    with pytest.raises(DestinationError, match="out is not empty; remove it or choose another"):
        export(tmp_path / "out", content="second")
    with pytest.raises(DestinationError, match=r"manifest\.json is a file; choose a folder"):
        export(tmp_path / "out/manifest.json")
    with pytest.raises(DestinationError, match=r"manifest\.json is not a folder; create it or choose another"):
        export(tmp_path / "out/manifest.json/out")
    with pytest.raises(DestinationError, match="absent is not a folder; create it"):
        export(tmp_path / "absent/out")
    assert tree(tmp_path) == WHOLE
    assert (tmp_path / "out/manifest.json").read_text() == "whole"


def test_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(DestinationError, match="out is a mount point; choose a folder inside it"):
        export(tmp_path / "out")


def test_a_destination_that_overlaps_a_source(tmp_path: Path) -> None:
    source = tmp_path / "models/gemma"
    source.mkdir(parents=True)
    (source / "config.json").touch()
    (tmp_path / "link").symlink_to(source)
    for destination, relation in [
        (source, "is"),
        (tmp_path / "link", "is"),
        (source / "out", "lies inside"),
        (source / "new/out", "lies inside"),
        (tmp_path / "models", "contains"),
    ]:
        with pytest.raises(DestinationError, match=rf"destination \S+ {relation} the source \S+gemma; choose"):
            export(destination, sources=(tmp_path / "absent", source))
    with pytest.raises(DestinationError, match=r"contains the source \S+config.json"):
        export(source, sources=(source / "config.json",))
    export(tmp_path / "models/out", sources=(source, source / "config.json"))
    assert tree(source) == {"config.json"}


def test_a_parent_that_cannot_be_written() -> None:
    with pytest.raises(
        DestinationError, match=r"cannot create /proc/\.out\.partial: .*; choose a destination you can write"
    ):
        export(Path("/proc/out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_parent_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(
        DestinationError, match=r"cannot create .*Permission denied; choose a destination you can write"
    ):
        export(tmp_path / "out")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_the_user_has_at_the_partial_name_is_kept(tmp_path: Path, kind: str) -> None:
    partial = tmp_path / ".out.partial"
    if kind == "folder":
        (partial / "artifact").mkdir(parents=True)
    elif kind == "file":
        partial.touch()
    else:
        partial.symlink_to(".")
    before = tree(tmp_path)
    with pytest.raises(DestinationError, match=r"\.out\.partial exists and is not an export's; move it away"):
        export(tmp_path / "out")
    assert tree(tmp_path) == before


def test_what_the_user_put_into_the_partial_folder_is_kept(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", sources=[]) as folder:
        (folder.parent / "notes.txt").touch()
    assert tree(tmp_path) >= {"out", ".out.partial/notes.txt"}
    (tmp_path / "out").rmdir()
    export(tmp_path / "out")
    assert (tmp_path / ".out.partial/notes.txt").exists()


# SIGTERM


def test_termination_raises_within_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, terminate_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_termination_in_another_thread_is_not_touched() -> None:
    entered = []

    def run() -> None:
        with terminate_as_interrupt():
            entered.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert entered
