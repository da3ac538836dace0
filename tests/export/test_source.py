"""SOURCE is a folder, the demo or a hub id; the hub is asked only for the last."""

import huggingface_hub
import pytest

from export.errors import ExportError
from export.source import DEMO_FOLDER, HUB_FILES, resolve_source


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Records what would be downloaded."""
    asked = []

    def snapshot_download(repository, *, allow_patterns):
        asked.append((repository, tuple(allow_patterns)))
        folder = tmp_path / repository
        folder.mkdir(parents=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_demo_needs_no_network(hub):
    target, drafter = resolve_source("demo", None)
    assert (target, drafter) == (DEMO_FOLDER / "target", DEMO_FOLDER / "assistant")
    assert hub == []


def test_a_folder_named_demo_comes_first(hub, monkeypatch, tmp_path):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_source("demo", None)[0].resolve() == tmp_path / "demo"


def test_folders_are_taken_as_they_are(hub, tmp_path):
    assert resolve_source(str(tmp_path), None) == (tmp_path, None)
    assert hub == []


def test_hub_ids_are_downloaded_without_pickles(hub, tmp_path):
    target, drafter = resolve_source("google/gemma-4-E2B-it", "google/gemma-4-E2B-it-assistant")
    assert target == tmp_path / "google/gemma-4-E2B-it"
    assert drafter == tmp_path / "google/gemma-4-E2B-it-assistant"
    assert hub[0] == ("google/gemma-4-E2B-it", tuple(HUB_FILES))
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in HUB_FILES)


def test_a_failed_download_is_one_line(monkeypatch):
    def fail(repository, *, allow_patterns):
        raise OSError("no route to the hub\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ExportError, match="owner/name: no such folder here, and the hub download failed: no") as e:
        resolve_source("owner/name", None)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["nothing-here", "./no/such", "a/b/c", "/absent"])
def test_other_names_are_refused(hub, name):
    with pytest.raises(ExportError, match="no such folder"):
        resolve_source(name, None)
    assert hub == []


def test_a_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ExportError, match="is a file"):
        resolve_source(str(file), None)
