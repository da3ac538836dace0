"""Remembers between runs which files of an artifact were verified; only a cache, so every fault of it is ignored."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def user_cache_folder() -> Path | None:
    """Where this program may keep a user's caches, or None where the user has no home."""
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    try:
        # the XDG base directory specification: a relative path is to be ignored
        root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "gemma-edge"


def record_path(cache: Path, folder: Path) -> Path:
    """The record of the artifact in `folder`: one small file per artifact."""
    return cache / f"verified-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"


def recall(record: Path) -> dict[str, Any]:
    """What was remembered; nothing where the record is missing or damaged."""
    try:
        value = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def remember(record: Path, content: Mapping[str, Any]) -> None:
    """Replaces the record atomically, or does nothing where the cache cannot be written."""
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=record.stem, dir=record.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(content, file)
            Path(name).replace(record)
        finally:
            Path(name).unlink(missing_ok=True)
