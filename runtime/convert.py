"""Converts an artifact to its other layout: permutes the bytes of its matrices and exchanges the names of its graphs.

Needs neither the checkpoint nor what an export needs. Streams in chunks of panels; the converted artifact is the one
that an export in that layout would have made, byte for byte.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from io import BufferedReader, BufferedWriter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.errors import ArtifactError, DestinationError, RequestError
from runtime.layout import Layout, converted_name
from runtime.manifest import MANIFEST, FileEntry, Manifest, check_files, damaged, file_entry, read_manifest
from runtime.matrix_spec import MatrixSpec
from runtime.panels import PANEL_ROWS, SCALE_BYTES, pack, unpack
from runtime.staging import staged_folder

CHUNK_BYTES = 8 << 20


def convert_artifact(folder: Path, destination: Path, layout: Layout) -> Manifest:
    """Writes the artifact in `folder` to `destination` in another layout, all of it or nothing; returns its manifest.

    Raises:
        ArtifactError: a file of the artifact is damaged or missing.
        RequestError: the artifact has the layout already, or has no other.
        DestinationError: the destination cannot be used, or the disk is full.
    """
    manifest = read_manifest(folder)
    if manifest.layout == layout:
        raise RequestError(f"{folder} is in the {layout} layout already; copy the folder, or pass the other --layout")
    if not manifest.is_convertible:
        raise RequestError(
            f"{folder} has the {manifest.layout} layout alone; export it again with 4 or 8 bits, int8 activations and "
            "a block size of 32, 64, 128 or 256"
        )
    check_files(folder, manifest)
    try:
        with staged_folder(destination, sources=[folder]) as staged:
            converted = replace(
                manifest,
                layout=layout,
                token_table=replace(manifest.token_table, layout=layout),
                files=_write_files(folder, staged, manifest, layout),
            )
            (staged / MANIFEST).write_bytes(converted.to_bytes())
            return converted
    except OSError as error:
        reason = f"{error.filename or destination}: {error.strerror or error}"
        raise DestinationError(f"{reason}; the conversion was given up, mend that and convert again") from error


def _write_files(folder: Path, staged: Path, manifest: Manifest, layout: Layout) -> dict[str, FileEntry]:
    """Writes every file but the manifest; a source that is not what its manifest says is an ArtifactError."""
    files = {}
    for name, entry in manifest.files.items():
        source, target = folder / name, staged / converted_name(name, layout)
        matrices = [matrix for matrix in manifest.matrices if matrix.file == name]
        if matrices:
            _permute(source, target, matrices, layout)
        else:
            shutil.copyfile(source, target)
        files[target.name] = file_entry(target)
        # after it was read, so that a change meanwhile is seen; an unchanged copy stands for its source
        found = file_entry(source) if matrices else files[target.name]
        if found != entry:
            raise damaged(name, found.sha256, entry.sha256)
    return files


def _permute(source: Path, target: Path, matrices: Sequence[MatrixSpec], layout: Layout) -> None:
    """Copies a file with its matrices in another layout."""
    size, end = source.stat().st_size, 0
    with source.open("rb") as reading, target.open("wb") as writing:
        for matrix in sorted(matrices, key=lambda matrix: matrix.offset):
            _copy(reading, writing, end, matrix.offset)
            num_panels = matrix.padded_rows // PANEL_ROWS
            step = max(1, CHUNK_BYTES // matrix.panel_bytes)
            for first in range(0, num_panels, step):
                convert_panels = _to_panels if layout == "native" else _to_rows
                convert_panels(reading, writing, matrix, first, min(step, num_panels - first))
            end = matrix.offset + matrix.num_bytes
        _copy(reading, writing, end, size)


def _to_panels(
    reading: BufferedReader, writing: BufferedWriter, matrix: MatrixSpec, first: int, num_panels: int
) -> None:
    num_rows = num_panels * PANEL_ROWS
    codes = np.empty((num_rows, matrix.num_blocks, matrix.block_bytes), np.uint8)
    scales = np.empty((num_rows, matrix.num_blocks), np.float16)
    code_offset, scale_offset = _row_offsets(matrix, first)
    _read(reading, code_offset, codes)
    _read(reading, scale_offset, scales)
    _write(writing, matrix.offset + first * matrix.panel_bytes, pack(codes, scales))


def _to_rows(reading: BufferedReader, writing: BufferedWriter, matrix: MatrixSpec, first: int, num_panels: int) -> None:
    panels = np.empty((num_panels, matrix.panel_bytes), np.uint8)
    _read(reading, matrix.offset + first * matrix.panel_bytes, panels)
    codes, scales = unpack(panels, matrix.num_blocks)
    code_offset, scale_offset = _row_offsets(matrix, first)
    _write(writing, code_offset, codes)
    _write(writing, scale_offset, scales)


def _row_offsets(matrix: MatrixSpec, panel: int) -> tuple[int, int]:
    """Where the codes and the scales of a panel's first row are in the portable layout."""
    num_blocks = panel * PANEL_ROWS * matrix.num_blocks
    return matrix.offset + num_blocks * matrix.block_bytes, matrix.scale_offset + num_blocks * SCALE_BYTES


def _copy(reading: BufferedReader, writing: BufferedWriter, start: int, stop: int) -> None:
    """Copies bytes [start, stop)."""
    for first in range(start, stop, CHUNK_BYTES):
        chunk = np.empty(min(CHUNK_BYTES, stop - first), np.uint8)
        _read(reading, first, chunk)
        _write(writing, first, chunk)


def _read(reading: BufferedReader, offset: int, array: npt.NDArray[np.generic]) -> None:
    reading.seek(offset)
    if reading.readinto(array.data) != array.nbytes:
        raise ArtifactError(
            f"{Path(reading.name).name} ends before byte {offset + array.nbytes:,}: it was cut meanwhile"
        )


def _write(writing: BufferedWriter, offset: int, array: npt.NDArray[np.generic]) -> None:
    writing.seek(offset)
    writing.write(array.data)
