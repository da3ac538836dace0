from pathlib import Path

import pytest

from runtime.verified_cache import recall, record_path, remember, user_cache_folder


@pytest.fixture(autouse=True)
def _linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")


def test_the_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache_folder() == Path("/somewhere/gemma-edge")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert user_cache_folder() == tmp_path / ".cache/gemma-edge"


def test_the_cache_folder_follows_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert user_cache_folder() == Path("/local/gemma-edge")


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert user_cache_folder() is None


def test_a_record_is_replaced_whole(tmp_path: Path) -> None:
    record = record_path(tmp_path / "cache", tmp_path)
    assert recall(record) == {}
    remember(record, {"a": [1, "x"]})
    remember(record, {"b": [2, "y"]})
    assert recall(record) == {"b": [2, "y"]}
    assert list(record.parent.iterdir()) == [record]


def test_each_artifact_has_its_record(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert record_path(tmp_path, tmp_path / "a") != record_path(tmp_path, tmp_path / "b")
    assert record_path(tmp_path, tmp_path / "link/a") == record_path(tmp_path, tmp_path / "a")
