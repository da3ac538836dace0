"""Where the native ops cannot be used, a native artifact is read through a portable copy that is made once."""

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edge import Runtime, generate_cli
from profiles import DeviceProfile
from runtime import convert, engine, loading, portable_copy
from runtime.errors import ArtifactError, DestinationError
from runtime.manifest import read_manifest
from tests.commands import Capture, assert_fails, contents, run
from tests.layouts import ExportBoth

PROMPT = ["--prompt-ids", "2,5,7", "--max-tokens", "3", "--temperature", "0"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of the test's own, on a machine that cannot run the native ops."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(engine.native, "unusable_because", lambda: "for a test")
    return tmp_path / "cache" / "gemma-edge"


@pytest.fixture
def artifact(both_layouts: ExportBoth, tmp_path: Path) -> Path:
    shutil.copytree(both_layouts("one_shared")["native"], tmp_path / "artifact")
    return tmp_path / "artifact"


def copied(folder: Path) -> Path:
    return portable_copy.portable_copy(folder, read_manifest(folder), "for a test")


def generate(folder: Path, profile: DeviceProfile) -> list[int]:
    with Runtime.load(folder, profile=profile) as runtime:
        return runtime.generate([2, 5, 7], max_tokens=12, temperature=0).token_ids


def test_a_native_artifact_generates_as_its_portable_twin(
    both_layouts: ExportBoth, artifact: Path, one_thread: DeviceProfile, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(artifact)
    found = generate(artifact, one_thread)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert (
        f"{artifact}: the native ops cannot be used here (for a test); it is read from a portable copy"
        in record.message
    )
    assert record.message.endswith("; to do without, export or convert it with --layout portable")
    assert contents(artifact) == before
    caplog.clear()
    assert found == generate(both_layouts("one_shared")["portable"], one_thread)
    assert not caplog.records


def test_ops_that_can_be_used_need_no_copy(
    artifact: Path, one_thread: DeviceProfile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.native, "unusable_because", lambda: None)
    monkeypatch.setattr(loading, "_open", lambda *opened: opened)
    undrafted = replace(one_thread, num_draft_tokens=0)  # nothing is measured
    assert Runtime.load(artifact, profile=undrafted)._loaded[0] == artifact  # type: ignore[index]  # see `_open` above
    assert not (cache / "portable").exists()


def test_the_copy_is_the_conversion_and_is_kept(both_layouts: ExportBoth, artifact: Path, cache: Path) -> None:
    copy = copied(artifact)
    assert copy.is_relative_to(cache / "portable")
    assert contents(copy) == contents(both_layouts("one_shared")["portable"])
    made = (copy / "decoder.onnx").stat().st_ino
    assert copied(artifact) == copy
    assert (copy / "decoder.onnx").stat().st_ino == made


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "no-manifest"])
def test_a_damaged_copy_is_made_again(artifact: Path, damage: str) -> None:
    copy = copied(artifact)
    whole = contents(copy)
    path = copy / ("manifest.json" if damage == "no-manifest" else "token_table.bin")
    if damage == "flipped":
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    elif damage == "cut":
        os.truncate(path, 100)
    else:
        path.unlink()
    assert copied(artifact) == copy
    assert contents(copy) == whole


def test_another_artifact_in_the_same_place_replaces_the_copy(both_layouts: ExportBoth, artifact: Path) -> None:
    first = copied(artifact)
    shutil.rmtree(artifact)
    shutil.copytree(both_layouts("one_shared", 8)["native"], artifact)
    second = copied(artifact)
    assert second != first
    assert list(second.parent.iterdir()) == [second]
    assert contents(second) == contents(both_layouts("one_shared", 8)["portable"])


def test_two_that_need_it_at_once(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[str] = []

    def count(*arguments: object) -> object:
        made = convert.convert_artifact(*arguments)  # type: ignore[arg-type]  # handed through
        converted.append("made")
        return made

    monkeypatch.setattr(portable_copy, "convert_artifact", count)
    monkeypatch.setattr(portable_copy, "WAIT_SECONDS", 0.01)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(copied(artifact))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == len(converted) == 1


# What cannot be made


def test_a_damaged_artifact(artifact: Path, cache: Path) -> None:
    os.truncate(artifact / "token_table.bin", 100)
    with pytest.raises(ArtifactError, match="token_table.bin is 100 bytes, expected [0-9,]+: truncated"):
        copied(artifact)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def fail_with(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_disk_that_is_full(artifact: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    monkeypatch.setattr(convert, "_write", fail_with(errno.ENOSPC))
    match = (
        r"artifact: the native ops cannot be used here \(for a test\), and a portable copy of [0-9.]+ MB "
        "cannot be made: .*: No space left on device; mend that, or export or convert it with --layout portable"
    )
    with pytest.raises(DestinationError, match=match) as caught:
        copied(artifact)
    assert "\n" not in str(caught.value)
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    logging.disable(logging.WARNING)
    try:
        assert_fails(generate_cli.main, [artifact, *PROMPT], f"^edge-generate: .*{match}", capfd)
    finally:
        logging.disable(logging.NOTSET)


def test_a_cache_that_cannot_be_written(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    with pytest.raises(DestinationError, match="cannot be made: .*/proc.*; mend that, or export or convert it"):
        copied(artifact)


def test_a_user_without_a_home(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable_copy, "user_cache_folder", lambda: None)
    with pytest.raises(DestinationError, match="cannot be made: there is no home folder to keep it in; export or"):
        copied(artifact)


def test_the_command_line_says_it_in_one_line(artifact: Path, capfd: Capture, caplog: pytest.LogCaptureFixture) -> None:
    assert run(generate_cli.main, [artifact, *PROMPT]) == 0
    assert len(caplog.records) == 1
    assert capfd.readouterr().out
