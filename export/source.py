"""Finds what SOURCE names: a folder, the bundled demo, or a repository on the Hugging Face hub."""

import re
from pathlib import Path

from export.errors import ExportError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo" / "checkpoint"
HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_source(source: str, drafter: str | None) -> tuple[Path, Path | None]:
    """Folders of the target and the drafter; downloads only where a hub id was given.

    Raises:
        ExportError: nothing of that name is there, or the download failed.
    """
    if source == DEMO and not Path(DEMO).exists():
        return DEMO_FOLDER / "target", _resolve(drafter) if drafter else DEMO_FOLDER / "assistant"
    return _resolve(source), _resolve(drafter) if drafter else None


def bundled_calibration(target: Path) -> Path | None:
    """The demo's own calibration text; None for other checkpoints."""
    return DEMO_FOLDER / "calibration.txt" if target == DEMO_FOLDER / "target" else None


def _resolve(name: str) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ExportError(f"{name}: is a file; SOURCE is the folder of a checkpoint, 'demo' or a hub id")
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return download(name)
    raise ExportError(f"{name}: no such folder; SOURCE is the folder of a checkpoint, 'demo' or a hub id (owner/name)")


def download(repository: str) -> Path:
    """A snapshot of a hub repository in Hugging Face's own cache, without pickles."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's errors have no common base below OSError and ValueError
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(f"{repository}: no such folder here, and the hub download failed: {reason}") from error
