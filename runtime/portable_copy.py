"""A portable copy of a native artifact, for machines that cannot run the native operators; made once and kept.

It lies in the user's cache, in a folder for each artifact's place, under a name that stands for the artifact's content:
another artifact in the same place makes a new copy and removes the old one.
"""

import hashlib
import logging
import os
import shutil
import time
from pathlib import Path

from runtime.convert import convert_artifact
from runtime.errors import ArtifactError, BusyDestinationError, DestinationError
from runtime.manifest import Manifest, read_manifest, verify_digests
from runtime.verified_cache import user_cache_folder

WAIT_SECONDS = 0.2
WAY_OUT = "export or convert it with --layout portable"

_log = logging.getLogger(__name__)


def portable_copy(folder: Path, manifest: Manifest, reason: str) -> Path:
    """The folder of a portable copy of the native artifact in `folder`; makes it where there is none, with a warning.

    Args:
        reason: why the native ops cannot be used

    Raises:
        ArtifactError: the artifact is damaged.
        DestinationError: the copy cannot be made: there is no cache folder, or no space in it.
    """
    need = f"{folder}: the native ops cannot be used here ({reason})"
    cannot = f"{need}, and a portable copy of {_megabytes(manifest)} cannot be made"
    cache = user_cache_folder()
    if cache is None:
        raise DestinationError(f"{cannot}: there is no home folder to keep it in; {WAY_OUT}")
    copy = cache / "portable" / _short_digest(os.fsencode(folder.resolve())) / _short_digest(manifest.to_bytes())
    _log.warning("%s; it is read from a portable copy in %s, slower; to do without, %s", need, copy, WAY_OUT)
    while True:
        existed = copy.exists()
        if _is_whole(copy, cache):
            return copy
        try:
            _make(folder, copy, is_damaged=existed)
        except BusyDestinationError:  # freed by the system even if the other process dies
            time.sleep(WAIT_SECONDS)
        except (DestinationError, OSError) as error:
            if copy.exists() and not existed:
                continue  # another process was faster
            raise DestinationError(f"{cannot}: {_fault(error)}; mend that, or {WAY_OUT}") from error


def _megabytes(manifest: Manifest) -> str:
    return f"{sum(entry.size_bytes for entry in manifest.files.values()) / 1e6:,.1f} MB"


def _fault(error: DestinationError | OSError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error).partition(";")[0]


def _is_whole(copy: Path, cache: Path) -> bool:
    try:
        verify_digests(copy, read_manifest(copy), cache=cache)
    except ArtifactError:
        return False
    return True


def _make(folder: Path, copy: Path, *, is_damaged: bool) -> None:
    if is_damaged:
        shutil.rmtree(copy)
    copy.parent.mkdir(parents=True, exist_ok=True)
    convert_artifact(folder, copy, "portable")
    for other in copy.parent.iterdir():
        if other != copy and not other.name.startswith("."):
            shutil.rmtree(other, ignore_errors=True)


def _short_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
