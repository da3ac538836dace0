"""Reads a Hugging Face checkpoint folder: JSON files and safetensors, a chunk of rows at a time.

Refuses pickles. Never holds more than one chunk of one tensor.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from export.errors import CheckpointError

CHUNK_WEIGHTS = 1 << 23  # 32 MiB as float32
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}

Float32 = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


class Checkpoint:
    """The tensors and JSON files of one checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        """Opens every safetensors shard.

        Raises:
            CheckpointError: the folder, its config or its weights are missing or damaged, or only pickles are there.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder")
        self.folder = folder
        self.config = self.read_json("config.json")
        self.weight_files = self._find_weight_files()
        self._shard_of: dict[str, Any] = {}
        for file in self.weight_files:
            shard = _open_shard(file)
            self._shard_of.update(dict.fromkeys(shard.keys(), shard))
        self._check_index()

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; CheckpointError where it is missing or is none."""
        file = self.folder / name
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{file}: missing; SOURCE must be a Hugging Face checkpoint folder") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{file}: holds a {type(value).__name__}, expected an object")
        return value

    def optional_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder, empty where the file is missing."""
        return self.read_json(name) if (self.folder / name).exists() else {}

    def digests(self) -> dict[str, str]:
        """SHA-256 of config and weight files by name, as the manifest's record of the source."""
        files = [self.folder / "config.json", *self.weight_files]
        return {file.name: _sha256(file) for file in files}

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._shard_of)

    def num_elements(self, name: str) -> int:
        """Elements of a tensor of any type."""
        return math.prod(self._slice(name).get_shape())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError where the checkpoint lacks it or stores it as no plain float."""
        tensor = self._slice(name)
        if (dtype := tensor.get_dtype()) not in FLOAT_TYPES:
            raise CheckpointError(
                f"{self.folder}: {name} is stored as {dtype}, expected one of {', '.join(sorted(FLOAT_TYPES))}; "
                "quantized checkpoints cannot be exported, use the unquantized one"
            )
        return tuple(tensor.get_shape())

    def rows(self, name: str, start: int, stop: int) -> Iterator[Float32]:
        """Rows [start, stop) of a matrix as float32 chunks [num_rows, width]; CheckpointError on NaN or infinity."""
        tensor = self._slice(name)
        width = self.shape(name)[-1]
        step = max(1, CHUNK_WEIGHTS // width)
        for first in range(start, stop, step):
            chunk: Float32 = tensor[first : min(first + step, stop)].to(torch.float32).numpy()
            self._check_finite(name, chunk)
            yield chunk

    def rows_in_order(self, name: str, order: Indices) -> Iterator[Float32]:
        """Rows of a matrix in an order of their own, as `rows`; holds the tensor once, in the checkpoint's type."""
        tensor = self._slice(name)[:]
        step = max(1, CHUNK_WEIGHTS // self.shape(name)[-1])
        for first in range(0, len(order), step):
            chunk: Float32 = tensor[torch.from_numpy(order[first : first + step])].to(torch.float32).numpy()
            self._check_finite(name, chunk)
            yield chunk

    def vector(self, name: str, size: int) -> Float32:
        """A one-dimensional tensor [size] as float32."""
        if (shape := self.shape(name)) != (size,):
            raise CheckpointError(f"{self.folder}: {name} has shape {list(shape)}, expected [{size}] from config.json")
        vector: Float32 = self._slice(name)[:].to(torch.float32).numpy()
        self._check_finite(name, vector)
        return vector

    def indices(self, name: str, size: int) -> Indices:
        """An integer tensor [size]."""
        tensor = self._slice(name)
        if tuple(tensor.get_shape()) != (size,):
            raise CheckpointError(f"{self.folder}: {name} has shape {list(tensor.get_shape())}, expected [{size}]")
        values: Indices = tensor[:].to(torch.int64).numpy()
        return values

    def _slice(self, name: str) -> Any:
        if name not in self._shard_of:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing from the safetensors files")
        return self._shard_of[name].get_slice(name)

    def _check_finite(self, name: str, values: Float32) -> None:
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.folder}: tensor {name} holds NaN or infinity; the checkpoint is damaged")

    def _find_weight_files(self) -> list[Path]:
        files = sorted(self.folder.glob("*.safetensors"))
        if files:
            return files
        pickles = sorted(file for pattern in PICKLES for file in self.folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.folder}: only pickled weights ({pickles[0].name}), which can run code when they are read; "
                "convert them to safetensors"
            )
        raise CheckpointError(f"{self.folder}: no *.safetensors files")

    def _check_index(self) -> None:
        """Every tensor and shard that the index names must be there."""
        index = self.optional_json("model.safetensors.index.json").get("weight_map", {})
        present = {file.name for file in self.weight_files}
        if missing := sorted(set(index.values()) - present):
            raise CheckpointError(f"{self.folder}: shard {missing[0]} is missing; download the checkpoint again")
        if absent := sorted(set(index) - set(self._shard_of)):
            raise CheckpointError(f"{self.folder}: model.safetensors.index.json names {absent[0]}, but no shard has it")


def _open_shard(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
