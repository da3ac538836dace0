"""The artifact format: a folder of plain files under a manifest that lists each with its size and SHA-256.

The runtime reads it and `export` imports it to write; knows nothing of how a file's content was made.

- A name is plain (`[A-Za-z0-9._-]`), so none leads out of the folder. The folder may be reached through a symbolic
  link, its files may not be links. Hard links are allowed: a digest holds the content, whatever other name it has.
- `manifest_sha256` is the digest of the rest of the manifest, so a flipped bit in a number does not go unseen.
- Files that the manifest does not list are never read.
"""

import hashlib
import json
import os
import re
import reprlib
import stat
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from runtime.errors import ArtifactError, RequestError
from runtime.layout import (
    DECODER,
    DECODER_DATA,
    DRAFTER,
    DRAFTER_DATA,
    EMBED,
    LAYOUTS,
    Layout,
    graph_file,
    other_layout,
)
from runtime.matrix_spec import MatrixSpec, TableSpec, check_matrices
from runtime.model_config import DrafterConfig, ModelConfig, StackConfig
from runtime.sampling import SamplingParams
from runtime.strict_json import (
    MANIFEST,
    WAY_OUT,
    bad_field,
    integer,
    list_of,
    object_of,
    one_of,
    parse,
    sha256_digest,
    string,
)
from runtime.verified_cache import recall, record_path, remember

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "FileEntry",
    "Manifest",
    "check_files",
    "damaged",
    "file_entry",
    "read_manifest",
    "verify_digests",
]

FORMAT_VERSION = 4
TOKENIZER = "tokenizer.json"

_MAX_MANIFEST_BYTES = 16 * 2**20
# Coarsest file clock in use (FAT). A younger file could change again without a new stamp, so it is not remembered.
_SETTLED_NS = 2_000_000_000
_OWN_DIGEST = "manifest_sha256"
_GENERATION_KEYS = ("temperature", "top_k", "top_p", "eos_token_ids")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]([A-Za-z0-9._-]{0,198}[A-Za-z0-9_-])?")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}

Config = TypeVar("Config", bound=StackConfig)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a listed file must be."""

    size_bytes: int
    sha256: str

    @classmethod
    def from_json(cls, value: object, field: str) -> Self:
        """The entry under `field` of the manifest."""
        entry = object_of(value, field, _names(cls))
        size = integer(entry["size_bytes"], f"{field}.size_bytes", 0)
        return cls(size, sha256_digest(entry["sha256"], f"{field}.sha256"))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is: model, drafter, tables, files. `sources` maps a source file's name to its SHA-256.

    `matrices` are those that a conversion to the other layout permutes; none where the artifact has but one layout.
    """

    format_version: int
    layout: Layout
    model: ModelConfig
    drafter: DrafterConfig | None
    token_table: TableSpec
    ple_table: TableSpec
    matrices: tuple[MatrixSpec, ...]
    recipe: dict[str, Any]
    sources: dict[str, str]
    generation: dict[str, Any]
    files: dict[str, FileEntry]
    producer: str

    @classmethod
    def from_json(cls, value: object) -> Self:
        """The manifest of plain values; raises ArtifactError naming the first field that is not usable."""
        _check_version(value)
        content = object_of(value, "the manifest", _names(cls))
        files = object_of(content["files"], "files")
        _check_names(files)
        sources = object_of(content["sources"], "sources")
        manifest = cls(
            format_version=FORMAT_VERSION,
            layout=one_of(content["layout"], "layout", LAYOUTS),
            model=_config(ModelConfig, content["model"], "model"),
            drafter=None if content["drafter"] is None else _config(DrafterConfig, content["drafter"], "drafter"),
            token_table=TableSpec.from_json(content["token_table"], "token_table"),
            ple_table=TableSpec.from_json(content["ple_table"], "ple_table"),
            matrices=tuple(
                MatrixSpec.from_json(entry, f"matrices[{index}]")
                for index, entry in enumerate(list_of(content["matrices"], "matrices"))
            ),
            recipe=object_of(content["recipe"], "recipe"),
            sources={name: sha256_digest(digest, f"sources.{reprlib.repr(name)}") for name, digest in sources.items()},
            generation=object_of(content["generation"], "generation"),
            files={name: FileEntry.from_json(entry, f"files.{name}") for name, entry in files.items()},
            producer=string(content["producer"], "producer"),
        )
        manifest.check()
        return manifest

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def to_bytes(self) -> bytes:
        """The canonical content of manifest.json: equal manifests give equal bytes."""
        content = self.to_json()
        lines = json.dumps(content | {_OWN_DIGEST: _own_digest(content)}, sort_keys=True, indent=1, allow_nan=False)
        return f"{lines}\n".encode("ascii")

    @property
    def is_convertible(self) -> bool:
        """Whether the artifact holds the graphs of both layouts."""
        return bool(self.matrices)

    @property
    def required_files(self) -> tuple[str, ...]:
        """Files that the runtime opens in this layout or after a conversion."""
        graphs = (DECODER, DRAFTER) if self.drafter else (DECODER,)
        data = (DECODER_DATA, DRAFTER_DATA) if self.drafter else (DECODER_DATA,)
        twins = [graph_file(graph, other_layout(self.layout), self.layout) for graph in graphs if self.is_convertible]
        embed = graph_file(EMBED, "portable", self.layout)
        return (*graphs, *twins, embed, *data, self.token_table.file, self.ple_table.file, TOKENIZER)

    def check(self) -> None:
        """Raises ArtifactError where a file that the runtime opens is not listed or a table does not fit the model."""
        for name in self.required_files:
            if name not in self.files:
                raise ArtifactError(f"{MANIFEST}: files lacks {reprlib.repr(name)}, which the runtime opens; {WAY_OUT}")
        widths = (self.model.hidden_size, len(self.model.layers) * self.model.ple_size)
        for table, width in zip((self.token_table, self.ple_table), widths, strict=True):
            if (table.num_rows, table.width) != (self.model.vocab_size, width):
                shape = f"[{table.num_rows:,}, {table.width:,}]"
                expected = f"[{self.model.vocab_size:,}, {width:,}]"
                raise ArtifactError(f"{MANIFEST}: {table.file} is {shape}, the model needs {expected}; {WAY_OUT}")
            table.check(self.files[table.file].size_bytes)
        self._check_layout()
        if self.drafter is not None:
            self.drafter.check_pairing(self.model)
        _check_generation(self.generation, self.model.vocab_size)

    def _check_layout(self) -> None:
        if self.token_table.layout != self.layout:
            raise bad_field("token_table.layout", self.token_table.layout, f"{self.layout}, the artifact's")
        if self.ple_table.layout != "portable":
            raise bad_field("ple_table.layout", self.ple_table.layout, "portable: its rows are never multiplied")
        if self.layout == "native" and not self.is_convertible:
            raise bad_field("matrices", [], "those that the native layout holds as panels")
        if self.is_convertible and (not self.token_table.is_quantized or self.token_table.matrix not in self.matrices):
            raise bad_field("matrices", len(self.matrices), f"{self.token_table.file} among them", " entries")
        data = (DECODER_DATA, DRAFTER_DATA, self.token_table.file)
        check_matrices(self.matrices, {name: self.files[name].size_bytes for name in data if name in self.files})


def file_entry(path: Path) -> FileEntry:
    """The entry of a file as it is."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(file.tell(), digest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`; reads no other file.

    Raises:
        ArtifactError: there is no artifact, or its manifest is damaged, unsafe or of another format version.
    """
    content = object_of(parse(_read(folder)), "the manifest")
    expected = content.pop(_OWN_DIGEST, None)
    manifest = Manifest.from_json(content)
    found = _own_digest(content)
    if expected != found:
        raise bad_field(_OWN_DIGEST, expected, f"{found[:8]}... for this content: damaged or edited")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises ArtifactError unless every listed file is a regular file of its size; reads none."""
    for name, entry in manifest.files.items():
        size = _regular(folder / name).st_size
        if size != entry.size_bytes:
            fault = "truncated" if size < entry.size_bytes else "has trailing bytes"
            raise ArtifactError(
                f"{name} is {size:,} bytes, expected {entry.size_bytes:,}: {fault}; copy or export it again"
            )


def damaged(name: str, found: str, expected: str) -> ArtifactError:
    """The error of a file that has not the SHA-256 it should have."""
    return ArtifactError(
        f"{name} has SHA-256 {found[:8]}..., expected {expected[:8]}...: damaged or exchanged; {WAY_OUT}"
    )


def verify_digests(folder: Path, manifest: Manifest, *, cache: Path | None) -> None:
    """Raises ArtifactError unless every listed file has its SHA-256; includes `check_files`.

    Hashing gigabytes at each load is too slow, so the stamp of a verified file (device, inode, size, times, digest) is
    remembered under `cache`, and only files whose stamp changed are hashed again. A write changes the stamp; a disk
    that rots does not, and `cache=None` hashes everything.

    Args:
        cache: folder of the remembered stamps, `user_cache_folder()`. Damaged or not writable, it is ignored.
    """
    check_files(folder, manifest)
    record = record_path(cache, folder) if cache else None
    remembered = recall(record) if record else {}
    verified = {}
    for name, entry in manifest.files.items():
        stamp = _stamp(folder / name, entry)
        settled = time.time_ns() - max(stamp[3], stamp[4]) >= _SETTLED_NS
        if remembered.get(name) != stamp:
            _verify(folder / name, entry)
        if settled:
            verified[name] = stamp
    if record and verified != remembered:
        remember(record, verified)


def _read(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}: {_reason(error)}; make an artifact with edge-export") from error
    if not is_folder:
        raise ArtifactError(f"{folder} is a file, expected an artifact folder; make one with edge-export")
    if not os.path.lexists(path):
        raise ArtifactError(f"{folder} holds no {MANIFEST}: not an artifact; make one with edge-export")
    size = _regular(path).st_size
    if size > _MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{MANIFEST} is {size:,} bytes, expected at most {_MAX_MANIFEST_BYTES:,}; {WAY_OUT}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{MANIFEST} cannot be read: {_reason(error)}; {WAY_OUT}") from error


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode("ascii")).hexdigest()


def _check_version(value: object) -> None:
    found = integer(object_of(value, "the manifest").get("format_version"), "format_version", 0)
    if found != FORMAT_VERSION:
        age = "newer than" if found > FORMAT_VERSION else "older than"
        way_out = "update gemma-edge or re-export" if found > FORMAT_VERSION else "re-export"
        raise ArtifactError(
            f"{MANIFEST}: format version {found} is {age} {FORMAT_VERSION}, which this program reads; {way_out}"
        )


def _check_names(names: Iterable[str]) -> None:
    seen = {MANIFEST: MANIFEST}
    for name in names:
        if not _FILE_NAME.fullmatch(name):
            raise bad_field("a file name", name, "letters, digits, '.', '_' and '-' only, no '.' first or last")
        if _RESERVED.fullmatch(name):
            raise bad_field("a file name", name, "one that Windows does not reserve")
        if name.lower() in seen:
            raise bad_field("a file name", name, f"one that differs from {seen[name.lower()]!r} in more than case")
        seen[name.lower()] = name


def _check_generation(value: object, vocab_size: int) -> None:
    defaults = object_of(value, "generation", _GENERATION_KEYS)
    try:
        SamplingParams(defaults["temperature"], defaults["top_k"], defaults["top_p"]).check()
    except RequestError as error:
        raise ArtifactError(f"{MANIFEST}: generation: {error}; {WAY_OUT}") from error
    ids = defaults["eos_token_ids"]
    if not isinstance(ids, list) or not ids or not all(type(id_) is int and 0 <= id_ < vocab_size for id_ in ids):
        raise bad_field("generation.eos_token_ids", ids, f"a list of token ids below {vocab_size:,}")


def _config(kind: type[Config], value: object, field: str) -> Config:
    content = object_of(value, field)
    try:
        return kind.from_json(content)
    except (TypeError, ValueError) as error:
        # a key of the file may hold a line break, and a message is one line
        reason = " ".join(str(error).split())[:300].removeprefix(f"{MANIFEST}: ").removesuffix("; re-export the model")
        raise ArtifactError(f"{MANIFEST}: {field}: {reason}; {WAY_OUT}") from error


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _regular(path: Path) -> os.stat_result:
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path.name} is missing; {WAY_OUT}") from error
    except OSError as error:
        raise ArtifactError(f"{path.name}: {_reason(error)}; {WAY_OUT}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
        raise ArtifactError(f"{path.name} is {kind}, expected a regular file; put the file itself there")
    return status


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _stamp(path: Path, entry: FileEntry) -> list[Any]:
    status = _regular(path)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, entry.sha256]


def _verify(path: Path, entry: FileEntry) -> None:
    try:
        found = file_entry(path).sha256
    except OSError as error:
        raise ArtifactError(f"{path.name} cannot be read: {_reason(error)}; {WAY_OUT}") from error
    if found != entry.sha256:
        raise damaged(path.name, found, entry.sha256)
