"""Reads a Hugging Face checkpoint folder: JSON files and safetensors, a chunk of rows at a time.

Refuses pickles. Never holds more than one chunk of one tensor: files are mapped anew for each chunk, so that pages
which were read do not add up in this process's resident memory.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from export.errors import CheckpointError
from export.quantization_config import WAY_OUT, Storage, find_storages
from export.quantized_tensors import FLOAT_TYPES, QuantizedTensor, check_finite

CHUNK_WEIGHTS = 1 << 23  # 32 MiB as float32
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
INDEX = "model.safetensors.index.json"
INDEX_TYPES = {"I64", "I32"}

Float32 = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


class Checkpoint:
    """The tensors and JSON files of one checkpoint folder.

    A matrix that is stored quantized has the name and the shape that it would have unquantized; the tensors that it is
    stored as have no names of their own here.
    """

    _storages: Mapping[str, Storage] = MappingProxyType({})
    _matrix_of: Mapping[str, str] = MappingProxyType({})  # the quantized matrix that a stored tensor belongs to

    def __init__(self, folder: Path) -> None:
        """Opens every safetensors shard.

        Raises:
            CheckpointError: the folder, its config or its weights are missing or damaged, only pickles are there, or
                the weights are quantized in a way that cannot be read.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder")
        self.folder = folder
        self.config = self.read_json("config.json")
        self.weight_files = self._find_weight_files()
        self._tensors = {name: entry for file in self.weight_files for name, entry in _read_header(file)}
        self._check_index()
        types = {name: entry.dtype for name, entry in self._tensors.items()}
        self._storages = find_storages(self.config, types, str(folder / "config.json"))
        self._matrix_of = {part: name for name, storage in self._storages.items() for part in storage.tensors}
        self._opened: dict[str, QuantizedTensor] = {}

    def read_text(self, name: str) -> str:
        """A text file of the folder; CheckpointError where it is missing, no file or not UTF-8."""
        file = self.folder / name
        if not file.exists():
            raise CheckpointError(f"{file}: missing; SOURCE must be a Hugging Face checkpoint folder")
        if not file.is_file():  # a FIFO would never end
            raise CheckpointError(f"{file}: not a regular file; put the file itself there")
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: not UTF-8 at byte {error.start:,}; download it again") from error
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; CheckpointError where it is missing or is none."""
        text = self.read_text(name)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.folder / name}: not readable as JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.folder / name}: holds a {type(value).__name__}, expected an object")
        return value

    def optional_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder, empty where the file is missing."""
        return self.read_json(name) if (self.folder / name).exists() else {}

    def digests(self) -> dict[str, str]:
        """SHA-256 of config and weight files by name, as the manifest's record of the source."""
        files = [self.folder / "config.json", *self.weight_files]
        return {file.name: _sha256(file) for file in files}

    def __contains__(self, name: str) -> bool:
        return name in self._storages or (name in self._tensors and name not in self._matrix_of)

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(dict.fromkeys(self._matrix_of.get(name, name) for name in self._tensors))

    def place(self, name: str) -> str:
        """A tensor's file and name, for messages; also of a quantized matrix, or a tensor that one is stored as."""
        parts = self._storages[name].tensors if name in self._storages else ()
        return f"{self._entry(next((part for part in parts if part in self._tensors), name)).file}: tensor {name}"

    def num_elements(self, name: str) -> int:
        """Elements of a tensor of any type."""
        stored = self.quantized(name)
        return math.prod(self._entry(name).shape if stored is None else stored.shape)

    def quantized(self, name: str) -> QuantizedTensor | None:
        """A matrix that is stored quantized; None for other tensors, CheckpointError where it is damaged."""
        if name in self._storages and name not in self._opened:
            self._opened[name] = self._storages[name].open(self, name)
        return self._opened.get(name) if name in self._storages else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError where the checkpoint lacks it or stores it as nothing that can be read."""
        if (stored := self.quantized(name)) is not None:
            return stored.shape
        entry = self._entry(name)
        if entry.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{self.place(name)} is stored as {entry.dtype}, expected one of {', '.join(sorted(FLOAT_TYPES))}, "
                f"as config.json names no quantization of it; {WAY_OUT}"
            )
        return entry.shape

    def row_chunks(self, name: str, start: int, stop: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Rows [start, stop) of a matrix as [first, last) of each chunk: a multiple of some rows, but for the last."""
        step = max(1, CHUNK_WEIGHTS // self.shape(name)[-1] // multiple) * multiple
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def rows(self, name: str, start: int, stop: int) -> Iterator[Float32]:
        """Rows [start, stop) of a matrix as float32 chunks [num_rows, width]; CheckpointError on NaN or infinity."""
        stored = self.quantized(name)
        for first, last in self.row_chunks(name, start, stop):
            if stored is None:
                yield self._floats(name, self.read(name, first, last))
            else:
                yield self._checked(name, stored.rows(first, last))

    def rows_in_order(self, name: str, order: Indices) -> Iterator[Float32]:
        """Rows of a matrix in an order of their own, as `rows`; holds the tensor once, in the checkpoint's type.

        A quantized one is dequantized once for each chunk instead.
        """
        step = max(1, CHUNK_WEIGHTS // self.shape(name)[-1])
        tensor = self.read(name, 0, len(order)) if self.quantized(name) is None else None
        for first in range(0, len(order), step):
            wanted = order[first : first + step]
            if tensor is None:
                yield self._gathered(name, wanted, len(order))
            else:
                yield self._floats(name, tensor[torch.from_numpy(wanted)])

    def _gathered(self, name: str, wanted: Indices, num_rows: int) -> Float32:
        found = np.empty((len(wanted), self.shape(name)[-1]), np.float32)
        start = 0
        for chunk in self.rows(name, 0, num_rows):
            here = (start <= wanted) & (wanted < start + len(chunk))
            found[here] = chunk[wanted[here] - start]
            start += len(chunk)
        return found

    def single_rows(self, name: str, rows: Sequence[int], start: int, stop: int) -> Float32:
        """Columns [start, stop) of single rows of a matrix [len(rows), stop - start]."""
        found = np.empty((len(rows), stop - start), np.float32)
        if (stored := self.quantized(name)) is not None:
            for place, row in enumerate(rows):
                found[place] = stored.rows(row, row + 1)[0, start:stop]
            return self._checked(name, found)
        entry = self._entry(name)
        with _open_shard(entry.file) as shard:
            matrix = shard.get_slice(name)
            for place, row in enumerate(rows):
                found[place] = matrix[row : row + 1, start:stop].to(torch.float32).numpy()[0]
        return self._checked(name, found)

    def vector(self, name: str, size: int) -> Float32:
        """A one-dimensional tensor [size] as float32."""
        if (shape := self.shape(name)) != (size,):
            raise CheckpointError(f"{self.place(name)} has shape {list(shape)}, expected [{size}] from config.json")
        return self._floats(name, self.read(name, 0, size))

    def indices(self, name: str, size: int) -> Indices:
        """An integer tensor [size]."""
        entry = self._entry(name)
        if entry.shape != (size,) or entry.dtype not in INDEX_TYPES:
            raise CheckpointError(
                f"{self.place(name)} is {entry.dtype} {list(entry.shape)}, expected integers [{size}]"
            )
        values: Indices = self.read(name, 0, size).to(torch.int64).numpy()
        return values

    def stored(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Type and shape of a tensor of the files; None where they have none of this name."""
        entry = self._tensors.get(name)
        return None if entry is None else (entry.dtype, entry.shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor of the files, or all of it, in its own type."""
        entry = self._entry(name)
        with _open_shard(entry.file) as shard:
            tensor: torch.Tensor = shard.get_slice(name)[start:stop] if entry.shape else shard.get_tensor(name)
            return tensor.clone()

    def _entry(self, name: str) -> "TensorEntry":
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing from the safetensors files")
        return self._tensors[name]

    def _floats(self, name: str, tensor: torch.Tensor) -> Float32:
        return self._checked(name, tensor.to(torch.float32).numpy())

    def _checked(self, name: str, values: Float32) -> Float32:
        check_finite(self, name, values)
        return values

    def _find_weight_files(self) -> list[Path]:
        """The shards an index names, or model.safetensors, or whatever safetensors there are."""
        whole = self.folder / "model.safetensors"
        if (self.folder / INDEX).exists():
            return self._shards(self.read_json(INDEX))
        if whole.is_file():
            return [whole]
        if files := [file for file in sorted(self.folder.glob("*.safetensors")) if file.is_file()]:
            return files
        pickles = sorted(file for pattern in PICKLES for file in self.folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.folder}: only pickled weights ({pickles[0].name}), which can run code when they are read; "
                "convert them to safetensors"
            )
        raise CheckpointError(f"{self.folder}: no *.safetensors files")

    def _shards(self, index: dict[str, Any]) -> list[Path]:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{self.folder / INDEX}: weight_map is no object of tensor and file names")
        files = [self.folder / shard for shard in sorted(set(weight_map.values()))]
        if outside := [file.name for file in files if file.parent != self.folder]:
            raise CheckpointError(f"{self.folder / INDEX}: shard {outside[0]} is not in the index's own folder")
        if missing := [file for file in files if not file.is_file()]:
            raise CheckpointError(f"{missing[0]}: the shard is missing; download the checkpoint again")
        return files

    def _check_index(self) -> None:
        """Every tensor that the index names must be in the shard that it names."""
        for name, shard in self.optional_json(INDEX).get("weight_map", {}).items():
            if name not in self._tensors:
                raise CheckpointError(f"{self.folder / INDEX}: names {name}, but no shard has it")
            if self._tensors[name].file.name != shard:
                raise CheckpointError(f"{self.place(name)} should be in {shard}, says {INDEX}")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _read_header(file: Path) -> list[tuple[str, TensorEntry]]:
    with _open_shard(file) as shard:
        slices = [(name, shard.get_slice(name)) for name in shard.keys()]  # noqa: SIM118 - not a dict
        return [(name, TensorEntry(file, tuple(part.get_shape()), part.get_dtype())) for name, part in slices]


def _open_shard(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
