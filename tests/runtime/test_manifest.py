import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import manifest as module
from runtime.errors import ArtifactError
from runtime.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileEntry,
    Manifest,
    check_files,
    file_entry,
    read_manifest,
    verify_digests,
)
from runtime.matrix_spec import MatrixSpec, TableSpec
from runtime.model_config import DrafterConfig, LayerConfig, ModelConfig, RopeConfig

ROPE = {"sliding": RopeConfig(1e4, 1.0), "full": RopeConfig(1e6, 0.25)}
LAYERS = (LayerConfig("sliding", 16, 1, 64, 0), LayerConfig("full", 32, 1, 64, 1))
MODEL = ModelConfig(8, 32, 2, 16, 1e-6, ROPE, LAYERS, 16, 64, 30.0, 2, (1, 3))
DRAFTER = DrafterConfig(8, 16, 2, 16, 1e-6, ROPE, LAYERS, 32, 0, 0)
# padded to 32 rows: of 32 bytes and a scale of 2 bytes; of 16 bytes and 2 scales
TOKEN_TABLE = TableSpec("token_table.bin", 8, 32, 8, 32, "portable", 5.5)
PLE_TABLE = TableSpec("ple_table.bin", 8, 32, 4, 16, "portable", 16.0)
# 40 rows are two panels of 32 x (2 * 18) bytes
MATRIX = MatrixSpec("decoder.onnx.data", 4096, 40, 2, 16)
MATRICES = (TOKEN_TABLE.matrix, replace(MATRIX, offset=0), MATRIX, MatrixSpec("drafter.onnx.data", 0, 1, 1, 32))
SIZES = {
    "decoder.onnx": 100,
    "decoder.onnx.data": 4096 + 2304,
    "decoder.onnx.native": 80,
    "drafter.onnx": 50,
    "drafter.onnx.data": 1088,
    "drafter.onnx.native": 40,
    "embed.onnx": 70,
    "token_table.bin": 1088,
    "ple_table.bin": 640,
    "tokenizer.json": 20,
    "chat_template.jinja": 10,
}


def make_artifact(folder: Path) -> Manifest:
    folder.mkdir()
    for index, (name, size) in enumerate(SIZES.items()):
        (folder / name).write_bytes(bytes([index]) * size)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        layout="portable",
        model=MODEL,
        drafter=DRAFTER,
        token_table=TOKEN_TABLE,
        ple_table=PLE_TABLE,
        matrices=MATRICES,
        recipe={"matrices": {"bits": 4, "block_size": 32}, "activations": "int8"},
        sources={"target/model.safetensors": "ab" * 32},
        generation={"temperature": 1.0, "top_k": 64, "top_p": 0.95, "eos_token_ids": [1, 3]},
        files={name: file_entry(folder / name) for name in SIZES},
        producer="gemma-edge 0.1.0",
    )
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    make_artifact(tmp_path / "artifact")
    return tmp_path / "artifact"


def refuses(folder: Path, match: str) -> None:
    """Reading fails with one short line of ASCII or the folder's name."""
    with pytest.raises(ArtifactError, match=match) as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_bytes())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


# The format


def test_what_was_written_is_read(artifact: Path, tmp_path: Path) -> None:
    manifest = read_manifest(artifact)
    assert manifest == make_artifact(tmp_path / "again")
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    check_files(artifact, manifest)
    verify_digests(artifact, manifest, cache=None)


def test_equal_manifests_are_equal_bytes(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    shuffled = replace(manifest, files=dict(reversed(manifest.files.items())))
    content = manifest.to_bytes()
    assert shuffled.to_bytes() == content == (artifact / MANIFEST).read_bytes()
    assert content.endswith(b"}\n")
    assert content.startswith(b'{\n "drafter"')


def test_no_bit_of_the_manifest_flips_unseen(artifact: Path) -> None:
    intact = read_manifest(artifact)
    content = (artifact / MANIFEST).read_bytes()
    for bit in range(0, len(content) * 8, 61):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (artifact / MANIFEST).write_bytes(flipped)
        try:
            assert read_manifest(artifact) == intact  # a line break that became another blank
        except ArtifactError as error:
            assert "\n" not in str(error)


def test_an_edited_number_is_seen(artifact: Path) -> None:
    edit(artifact, lambda content: content["model"].update(sliding_window=17))
    refuses(artifact, "manifest_sha256 is '.*', expected .* for this content: damaged or edited")
    edit(artifact, lambda content: content.pop("manifest_sha256"))
    refuses(artifact, "manifest_sha256 is None")


# Not an artifact, not JSON


def test_a_folder_that_is_none(artifact: Path, tmp_path: Path) -> None:
    refuses(tmp_path / "absent", "absent: No such file or directory; make an artifact with edge-export")
    refuses(tmp_path, "holds no manifest.json: not an artifact; make one with edge-export")
    refuses(artifact / "decoder.onnx", "decoder.onnx is a file, expected an artifact folder")
    refuses(tmp_path / ("x" * 300), "File name too long")
    refuses(tmp_path / "nul\0", "embedded null byte")


def test_a_folder_with_an_odd_name(tmp_path: Path) -> None:
    make_artifact(tmp_path / "Модель 4 é")
    read_manifest(tmp_path / "Модель 4 é")


def test_a_folder_behind_a_symbolic_link_is_read(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(artifact)
    check_files(tmp_path / "link", read_manifest(tmp_path / "link"))


@pytest.mark.parametrize("kind", ["folder", "symlink", "fifo", "socket"])
def test_a_manifest_that_is_no_file(artifact: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(artifact, MANIFEST, kind, monkeypatch)
    refuses(artifact, "manifest.json is a .*, expected a regular file")


def test_a_manifest_of_a_gigabyte(artifact: Path) -> None:
    os.truncate(artifact / MANIFEST, 2**30)
    refuses(artifact, "manifest.json is 1,073,741,824 bytes, expected at most 16,777,216")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not JSON: Expecting value"),
        (b"\0" * 4096, "not JSON"),
        (b"[]", "the manifest is .*, expected an object"),
        (b"\xef\xbb\xbf{}", "starts with a byte order mark"),
        ("{}".encode("utf-16"), "not UTF-8 at byte 0"),
        (b'{"a": "\xe9"}', "not UTF-8 at byte 7"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"a": {"b": 1, "b": 2}}', "key 'b' is there 2 times, expected once"),
        (b'{"a": NaN}', "a number is 'NaN', expected a finite one"),
        (b'{"a": -Infinity}', "a number is '-Infinity', expected a finite one"),
        (b'{"a": 1e400}', "a number is '1e400', expected a finite one"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
)
def test_what_is_not_strict_json(artifact: Path, content: bytes, match: str) -> None:
    (artifact / MANIFEST).write_bytes(content)
    refuses(artifact, match)


def test_a_cut_manifest(artifact: Path) -> None:
    os.truncate(artifact / MANIFEST, 1000)
    refuses(artifact, "not JSON")


# Fields


@pytest.mark.parametrize(
    ("version", "match"),
    [
        (5, "format version 5 is newer than 4, which this program reads; update gemma-edge or re-export"),
        (3, "format version 3 is older than 4, which this program reads; re-export"),
        (0, "format version 0 is older than 4, which this program reads; re-export"),
        ("1", "format_version is '1', expected an integer"),
        (True, "format_version is True, expected an integer"),
        (None, "format_version is None, expected an integer"),
        (10**100, "format_version is 1000"),
    ],
)
def test_another_format_version(artifact: Path, version: object, match: str) -> None:
    # whatever else a newer format has is not looked at
    edit(artifact, lambda content: content.update(format_version=version, files="elsewhere"))
    refuses(artifact, match)


@pytest.mark.parametrize("size", [1.0, -1, True, "5", None, 2**63, 1e300])
def test_a_size_that_is_none(artifact: Path, size: object) -> None:
    edit(artifact, lambda content: content["files"]["embed.onnx"].update(size_bytes=size))
    refuses(artifact, "files.embed.onnx.size_bytes is .*, expected an integer of 0 to 2")


@pytest.mark.parametrize(
    ("digest", "found"),
    [("ab" * 31, "of 62 characters"), ("ab" * 64, "of 128 characters"), ("md5:" + "a" * 60, "of 64 "), ("AB" * 32, "")],
)
def test_a_digest_that_is_none(artifact: Path, digest: str, found: str) -> None:
    edit(artifact, lambda content: content["files"]["embed.onnx"].update(sha256=digest))
    refuses(artifact, f"files.embed.onnx.sha256 is .*{found}.*, expected a SHA-256 of 64 hexadecimal digits")


def test_a_digest_that_is_missing(artifact: Path) -> None:
    edit(artifact, lambda content: content["files"]["embed.onnx"].pop("sha256"))
    refuses(artifact, "files.embed.onnx lacks 'sha256'")
    edit(artifact, lambda content: content["files"].update({"embed.onnx": None}))
    refuses(artifact, "files.embed.onnx is None, expected an object")


@pytest.mark.parametrize("field", [field for field in Manifest.__slots__ if field not in ("format_version", "drafter")])
def test_a_field_that_is_missing_or_of_another_type(artifact: Path, field: str) -> None:
    edit(artifact, lambda content: content.update({field: 5}))
    refuses(artifact, f"{field} is 5, expected")
    edit(artifact, lambda content: content.pop(field))
    refuses(artifact, f"the manifest lacks '{field}'")


def test_a_field_that_is_unknown(artifact: Path) -> None:
    edit(artifact, lambda content: content.update({"comp\nression": 5}))
    refuses(artifact, r"the manifest has the unknown key 'comp\\nression'")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vocab_size": -1}, "model: vocab_size is -1"),
        ({"rope": "full"}, "model: ModelConfig"),
        ({"a\nb": 1}, "model: ModelConfig.*'a b'"),
        ({"layers": "full"}, "model: ModelConfig"),
        ({"vocab_size": "x" * 10_000}, "model: vocab_size is 'xxx"),
    ],
)
def test_a_model_that_is_none(artifact: Path, change: dict[str, object], match: str) -> None:
    edit(artifact, lambda content: content["model"].update(change))
    refuses(artifact, match)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../passwd", "letters, digits"),
        ("..", "letters, digits"),
        ("/etc/passwd", "letters, digits"),
        ("a/b", "letters, digits"),
        ("a\\b", "letters, digits"),
        ("a\0b", "letters, digits"),
        ("C:a", "letters, digits"),
        (".hidden", "letters, digits"),
        ("dot.", "letters, digits"),
        ("line\n", "letters, digits"),
        ("", "letters, digits"),
        ("é", "letters, digits"),
        ("\ud800", "letters, digits"),
        ("x" * 201, "letters, digits"),
        ("con", "one that Windows does not reserve"),
        ("NUL.bin", "one that Windows does not reserve"),
        ("Com1.tar.gz", "one that Windows does not reserve"),
        ("Decoder.ONNX", "one that differs from 'decoder.onnx' in more than case"),
        ("MANIFEST.json", "one that differs from 'manifest.json' in more than case"),
        ("manifest.json", "one that differs from 'manifest.json'"),
    ],
)
def test_a_name_that_is_unsafe(artifact: Path, name: str, reason: str) -> None:
    edit(artifact, lambda content: content["files"].update({name: {"size_bytes": 1, "sha256": "0" * 64}}))
    refuses(artifact, f"a file name is .*, expected {reason}")


def test_names_that_only_look_reserved(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    names = ("console.bin", "com10", "nul-l", "_a", "-a", "a..b", "x" * 200)
    kept = replace(manifest, files=manifest.files | dict.fromkeys(names, FileEntry(1, "0" * 64)))
    (artifact / MANIFEST).write_bytes(kept.to_bytes())
    assert read_manifest(artifact) == kept


@pytest.mark.parametrize(
    "name",
    [
        *("decoder.onnx", "decoder.onnx.native", "drafter.onnx.native", "drafter.onnx.data", "embed.onnx"),
        *("ple_table.bin", "tokenizer.json"),
    ],
)
def test_a_file_that_the_runtime_needs_is_not_listed(artifact: Path, name: str) -> None:
    edit(artifact, lambda content: content["files"].pop(name))
    refuses(artifact, f"files lacks '{name}', which the runtime opens")


def test_a_drafter_is_optional(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith("drafter")}
    matrices = tuple(matrix for matrix in MATRICES if not matrix.file.startswith("drafter"))
    plain = replace(manifest, drafter=None, files=files, matrices=matrices)
    (artifact / MANIFEST).write_bytes(plain.to_bytes())
    assert read_manifest(artifact) == plain


# Tables


@pytest.mark.parametrize(
    ("spec", "num_rows", "row_bytes", "size"),
    [
        (TOKEN_TABLE, 32, 32, 32 * 34),
        (replace(TOKEN_TABLE, layout="native"), 32, 32, 32 * 34),
        (replace(TOKEN_TABLE, num_rows=33), 64, 32, 64 * 34),  # padded to 2 panels
        (PLE_TABLE, 32, 16, 32 * 20),
        (replace(PLE_TABLE, width=33), 32, 24, 32 * 30),  # padded to 3 blocks
        (TableSpec("t", 8, 32, 16, 0, "portable", 1.0), 8, 64, 512),
        (TableSpec("t", 8, 33, 32, 0, "portable", 1.0), 8, 132, 1056),
    ],
)
def test_a_table_fills_its_file(spec: TableSpec, num_rows: int, row_bytes: int, size: int) -> None:
    assert spec.row_bytes == row_bytes
    spec.check(size)
    for wrong in (0, size - 1, size + 1):
        with pytest.raises(
            ArtifactError, match=f"is {wrong:,} bytes, expected {size:,}: {num_rows} rows of {row_bytes} bytes"
        ):
            spec.check(wrong)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": 5}, "bits is 5, expected 4, 8, 16 or 32"),
        ({"bits": 16}, "block_size is 16, expected 0 at 16 bits"),
        ({"bits": 16, "block_size": 0, "layout": "native"}, "layout is 'native', expected portable at 16 bits"),
        ({"block_size": 0}, "block_size is 0, expected 4 bytes of codes or multiples"),
        ({"block_size": 15}, "block_size is 15, expected 4 bytes of codes or multiples"),
        ({"block_size": 1.0}, "block_size is 1.0, expected an integer"),
        ({"layout": "panels"}, "ple_table.layout is 'panels', expected portable or native"),
        ({"layout": ["native"]}, r"ple_table.layout is \['native'\], expected portable or native"),
        ({"layout": "native"}, "ple_table.layout is 'native', expected portable"),
        ({"num_rows": 0}, "num_rows is 0, expected an integer of 1"),
        ({"num_rows": 9}, r"ple_table.bin is \[9, 32\], the model needs \[8, 32\]"),
        ({"width": 2**62}, r"ple_table.bin is \[8, 4,611,686,018,427,387,904\], the model needs \[8, 32\]"),
        ({"multiplier": 0}, "multiplier is 0, expected a number above 0"),
        ({"multiplier": True}, "multiplier is True, expected a number above 0"),
        ({"file": 5}, "ple_table.file is 5, expected a string"),
        ({"file": "../" * 1000}, r"files lacks '\.\./"),
        ({"file": "tokenizer.json"}, "tokenizer.json is 20 bytes, expected 640"),
        ({"rows": 5}, "ple_table has the unknown key 'rows'"),
    ],
)
def test_a_table_that_is_none(artifact: Path, change: dict[str, object], match: str) -> None:
    edit(artifact, lambda content: content["ple_table"].update(change))
    refuses(artifact, match)


# Layouts


def test_a_native_artifact(artifact: Path) -> None:
    manifest = as_native(artifact)
    (artifact / MANIFEST).write_bytes(manifest.to_bytes())
    assert read_manifest(artifact) == manifest
    edit(artifact, lambda content: content["files"].pop("embed.onnx.portable"))
    refuses(artifact, "files lacks 'embed.onnx.portable'")


def as_native(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    names = {"embed.onnx": "embed.onnx.portable"} | {
        f"{graph}.onnx.native": f"{graph}.onnx.portable" for graph in ("decoder", "drafter")
    }
    files = {names.get(name, name): entry for name, entry in manifest.files.items()}
    return replace(manifest, layout="native", token_table=replace(TOKEN_TABLE, layout="native"), files=files)


def test_an_artifact_of_one_layout_has_no_twins(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    files = {name: entry for name, entry in manifest.files.items() if not name.endswith(".native")}
    alone = replace(manifest, matrices=(), files=files)
    (artifact / MANIFEST).write_bytes(alone.to_bytes())
    assert read_manifest(artifact) == alone
    native = replace(as_native(artifact), matrices=())
    (artifact / MANIFEST).write_bytes(native.to_bytes())
    refuses(artifact, r"matrices is \[\], expected those that the native layout holds as panels")


@pytest.mark.parametrize(
    ("index", "change", "match"),
    [
        (2, {"offset": 4095}, r"matrices\[2\].offset is 4095, expected a multiple of 64"),
        (2, {"offset": -4096}, r"matrices\[2\].offset is -4096, expected an integer of 0"),
        (2, {"offset": 8192}, "decoder.onnx.data at 8,192: ends at 10,496, the file at 6,400"),
        (2, {"offset": 0}, "decoder.onnx.data at 0 is 0, expected at least 2,304, where the matrix before it ends"),
        (2, {"num_rows": 65}, "decoder.onnx.data at 4,096: ends at 7,552, the file at 6,400"),
        (2, {"num_rows": 0}, r"matrices\[2\].num_rows is 0, expected an integer of 1"),
        (2, {"num_blocks": 2**62}, "ends at [0-9,]+, the file at 6,400"),
        (2, {"block_bytes": 18}, r"matrices\[2\].block_bytes is 18, expected a multiple of 4"),
        (2, {"block_bytes": 1.5}, r"matrices\[2\].block_bytes is 1.5, expected an integer"),
        (2, {"file": "ple_table.bin"}, "a matrix's file is 'ple_table.bin', expected a file of weights"),
        (2, {"file": "../x"}, r"a matrix's file is '\.\./x', expected a file of weights"),
        (2, {"file": 5}, r"matrices\[2\].file is 5, expected a string"),
        (2, {"panels": 5}, r"matrices\[2\] has the unknown key 'panels'"),
        (0, {"num_rows": 9}, "matrices is 4 entries, expected token_table.bin among them"),
    ],
)
def test_a_matrix_that_is_none(artifact: Path, index: int, change: dict[str, object], match: str) -> None:
    edit(artifact, lambda content: content["matrices"][index].update(change))
    refuses(artifact, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layout": "panels"}, "layout is 'panels', expected portable or native"),
        ({"layout": None}, "layout is None, expected portable or native"),
        ({"layout": "native"}, "files lacks 'decoder.onnx.portable', which the runtime opens"),
        ({"matrices": [5]}, r"matrices\[0\] is 5, expected an object"),
        ({"matrices": {}}, "matrices is {}, expected a list"),
    ],
)
def test_a_layout_that_is_none(artifact: Path, change: dict[str, object], match: str) -> None:
    edit(artifact, lambda content: content.update(change))
    refuses(artifact, match)


def test_a_token_table_of_the_other_layout(artifact: Path) -> None:
    edit(artifact, lambda content: content["token_table"].update(layout="native"))
    refuses(artifact, "token_table.layout is 'native', expected portable, the artifact's")


# Files


def replace_file(folder: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / name
    path.rename(folder.parent / "moved")
    if kind == "folder":
        path.mkdir()
    elif kind == "symlink":
        path.symlink_to(folder.parent / "moved")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(folder)  # a socket's path is at most 108 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)


@pytest.mark.parametrize(
    ("size", "fault"), [(0, "truncated"), (1024, "truncated"), (6399, "truncated"), (6401, "has trailing bytes")]
)
def test_a_file_of_another_size(artifact: Path, size: int, fault: str) -> None:
    manifest = read_manifest(artifact)
    os.truncate(artifact / "decoder.onnx.data", size)
    expected = f"decoder.onnx.data is {size:,} bytes, expected 6,400: {fault}; copy or export it again"
    with pytest.raises(ArtifactError, match=expected):
        check_files(artifact, manifest)


def test_a_file_that_is_missing(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    (artifact / "decoder.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"decoder\.onnx\.data is missing; copy"):
        check_files(artifact, manifest)


@pytest.mark.parametrize(
    ("kind", "found"), [("folder", "folder"), ("symlink", "symbolic link"), ("fifo", "FIFO"), ("socket", "socket")]
)
def test_a_file_that_is_none(artifact: Path, kind: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(artifact)
    replace_file(artifact, "ple_table.bin", kind, monkeypatch)
    for check in (check_files, lambda *given: verify_digests(*given, cache=None)):
        with pytest.raises(ArtifactError, match=f"ple_table.bin is a {found}, expected a regular file"):
            check(artifact, manifest)


def test_a_device_is_no_file(artifact: Path) -> None:
    manifest = replace(read_manifest(artifact), files={"null": FileEntry(0, "0" * 64)})
    with pytest.raises(ArtifactError, match="null is a device, expected a regular file"):
        check_files(Path("/dev"), manifest)


def test_a_hard_link_is_a_file(artifact: Path, tmp_path: Path) -> None:
    os.link(artifact / "ple_table.bin", tmp_path / "other")
    verify_digests(artifact, read_manifest(artifact), cache=None)


# Digests


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed; files count as settled at once."""
    names: list[str] = []

    def note(path: Path) -> FileEntry:
        names.append(path.name)
        return file_entry(path)

    monkeypatch.setattr(module, "file_entry", note)
    monkeypatch.setattr(module, "_SETTLED_NS", -(10**18))
    return names


@pytest.mark.parametrize("name", SIZES)
def test_a_flipped_bit_names_its_file(artifact: Path, name: str) -> None:
    manifest = read_manifest(artifact)
    content = bytearray((artifact / name).read_bytes())
    content[len(content) // 2] ^= 1
    (artifact / name).write_bytes(content)
    expected = manifest.files[name].sha256[:8]
    with pytest.raises(ArtifactError, match=rf"{name} has SHA-256 \w{{8}}\.\.\., expected {expected}"):
        verify_digests(artifact, manifest, cache=None)


def test_swapped_files_are_seen(tmp_path: Path, artifact: Path) -> None:
    (artifact / "drafter.onnx").write_bytes(b"d" * 70)
    manifest = read_manifest(artifact)
    manifest = replace(manifest, files=manifest.files | {"drafter.onnx": file_entry(artifact / "drafter.onnx")})
    (artifact / "drafter.onnx").rename(tmp_path / "spare")
    (artifact / "embed.onnx").rename(artifact / "drafter.onnx")
    (tmp_path / "spare").rename(artifact / "embed.onnx")
    check_files(artifact, manifest)
    with pytest.raises(ArtifactError, match=r"SHA-256 .*damaged or exchanged"):
        verify_digests(artifact, manifest, cache=None)


def test_only_changed_files_are_hashed_again(artifact: Path, tmp_path: Path, hashed: list[str]) -> None:
    manifest, cache = read_manifest(artifact), tmp_path / "new" / "cache"
    verify_digests(artifact, manifest, cache=cache)
    assert sorted(hashed) == sorted(SIZES)
    hashed.clear()
    verify_digests(artifact, manifest, cache=cache)
    assert hashed == []
    os.utime(artifact / "embed.onnx", ns=(1, 1))
    verify_digests(artifact, manifest, cache=cache)
    verify_digests(artifact, manifest, cache=cache)
    assert hashed == ["embed.onnx"]
    verify_digests(artifact, manifest, cache=None)
    assert len(hashed) == 1 + len(SIZES)


def test_damage_behind_the_cache_is_seen(artifact: Path, tmp_path: Path, hashed: list[str]) -> None:
    manifest = read_manifest(artifact)
    verify_digests(artifact, manifest, cache=tmp_path)
    before = (artifact / "embed.onnx").stat()
    (artifact / "embed.onnx").write_bytes(b"x" * SIZES["embed.onnx"])
    os.utime(artifact / "embed.onnx", ns=(before.st_atime_ns, before.st_mtime_ns))  # the change time still tells
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"embed\.onnx has SHA-256"):
            verify_digests(artifact, manifest, cache=tmp_path)


def test_another_expected_digest_is_not_taken_from_the_cache(artifact: Path, tmp_path: Path, hashed: list[str]) -> None:
    manifest = read_manifest(artifact)
    verify_digests(artifact, manifest, cache=tmp_path)
    other = manifest.files | {"embed.onnx": FileEntry(SIZES["embed.onnx"], "0" * 64)}
    with pytest.raises(ArtifactError, match=r"embed.onnx has SHA-256 \w+\.\.\., expected 00000000"):
        verify_digests(artifact, replace(manifest, files=other), cache=tmp_path)


def test_a_file_of_this_moment_is_not_remembered(
    artifact: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLED_NS", 10**18)
    for _ in range(2):
        verify_digests(artifact, read_manifest(artifact), cache=tmp_path)
    assert len(hashed) == 2 * len(SIZES)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"embed.onnx": 5}'])
def test_a_corrupt_cache_is_ignored(artifact: Path, tmp_path: Path, hashed: list[str], content: bytes) -> None:
    manifest, cache = read_manifest(artifact), tmp_path / "cache"
    verify_digests(artifact, manifest, cache=cache)
    [record] = cache.iterdir()
    record.write_bytes(content)
    hashed.clear()
    verify_digests(artifact, manifest, cache=cache)
    assert len(hashed) == len(SIZES)
    assert list(cache.iterdir()) == [record]


def test_a_cache_that_cannot_be_written_is_ignored(artifact: Path, tmp_path: Path, hashed: list[str]) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        verify_digests(artifact, read_manifest(artifact), cache=tmp_path / "file" / "cache")
    assert len(hashed) == 2 * len(SIZES)
