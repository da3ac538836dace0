"""Hidden states of the unquantized target on a text, a layer at a time; goes on where it was interrupted."""

import contextlib
import hashlib
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.checkpoint import Checkpoint
from export.layerwise import LayerwiseTarget, Stream

DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError)


def reference_hidden(
    target: LayerwiseTarget, token_ids: Tensor, record: Path | None, progress: Callable[[int], None]
) -> Tensor:
    """Hidden states behind the final norm [num_windows, num_tokens, hidden_size].

    Args:
        record: file that keeps the state behind the last layer, as `record_of` names it; None keeps nothing
        progress: hears of each layer that is behind
    """
    stream, done = target.start(token_ids), 0
    if record is not None and (kept := _recall(record, stream)) is not None:
        stream, done = kept
        progress(done)
    for index in range(done, len(target.model.layers)):
        stream = target.run(target.layer(index), index, stream)
        if record is not None:
            _remember(record, stream, index + 1)
        progress(1)
    return target.final_norm(stream.hidden)


def record_of(cache: Path, checkpoint: Checkpoint, token_ids: Tensor) -> Path:
    """A file's name for a checkpoint, by its files' stamps, and a text."""
    files = [checkpoint.folder / "config.json", *checkpoint.weight_files]
    stamps = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    digest = hashlib.sha256(json.dumps(stamps).encode() + token_ids.numpy().tobytes())
    return cache / f"reference-{digest.hexdigest()[:32]}.npz"


def _recall(record: Path, started: Stream) -> tuple[Stream, int] | None:
    try:
        with np.load(record, allow_pickle=False) as kept:
            done, hidden = int(kept["done"]), torch.from_numpy(kept["hidden"])
            kinds = {name.partition(".")[2] for name in kept.files if name.startswith("keys.")}
            shared = {k: (torch.from_numpy(kept[f"keys.{k}"]), torch.from_numpy(kept[f"values.{k}"])) for k in kinds}
    except DAMAGED:
        return None
    if hidden.shape != started.hidden.shape:
        return None
    return Stream(started.token_ids, started.embeds, hidden, shared), done


def _remember(record: Path, stream: Stream, done: int) -> None:
    """Replaces the record whole, or does nothing where it cannot be written."""
    arrays = {"done": np.array(done), "hidden": stream.hidden.numpy()}
    arrays |= {f"keys.{kind}": keys.numpy() for kind, (keys, _) in stream.shared_kv.items()}
    arrays |= {f"values.{kind}": values.numpy() for kind, (_, values) in stream.shared_kv.items()}
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=record.stem, dir=record.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays, allow_pickle=False)
            Path(name).replace(record)
        finally:
            Path(name).unlink(missing_ok=True)
