"""Faults of an artifact, met where a user meets them: `edge-generate` and `Runtime.load`.

The numbers are those of the project's list of faults. What each layer refuses by itself, `runtime/test_manifest.py`
holds.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge import ArtifactError, Runtime
from edge.generate_cli import main
from profiles import DeviceProfile
from runtime.manifest import MANIFEST, file_entry, read_manifest
from tests.commands import Capture, assert_fails, contents, run

SHAPE = ("one_shared", 4)
FILES = (
    *("decoder.onnx", "decoder.onnx.data", "drafter.onnx", "drafter.onnx.data", "embed.onnx", "token_table.bin"),
    *("ple_table.bin", "tokenizer.json", "generation_config.json", "chat_template.jinja"),
)
Artifacts = Callable[..., Path]


@pytest.fixture
def artifact(tiny_artifact: Artifacts, tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    shutil.copytree(tiny_artifact(*SHAPE), folder)
    return folder


@pytest.fixture
def refused(one_thread: DeviceProfile, capfd: Capture) -> Callable[[Path, str], None]:
    """refused(folder, match): by the command line and by `Runtime.load`, with the same message, changing nothing."""

    def check(folder: Path, match: str) -> None:
        before = contents(folder)
        assert_fails(main, [folder, "--prompt-ids", "2,5", "--max-tokens", "3"], f"^edge-generate: .*{match}", capfd)
        with pytest.raises(ArtifactError, match=match) as caught:
            Runtime.load(folder, profile=one_thread)
        assert "\n" not in str(caught.value)
        assert contents(folder) == before

    return check


Refused = Callable[[Path, str], None]


def cut(num_bytes: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:num_bytes]


def flip(place: Callable[[int], int]) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        index = place(len(content))
        return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]

    return change


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "1-2-cut-to-a-byte": (cut(1), "is 1 bytes, expected [0-9,]+: truncated; copy or export it again"),
    "1-2-cut-in-half": (lambda content: content[: len(content) // 2], "is [0-9,]+ bytes, expected [0-9,]+: truncated"),
    "1-2-cut-by-a-byte": (cut(-1), "is [0-9,]+ bytes, expected [0-9,]+: truncated"),
    "3-last-page-cut": (lambda content: content[: max(len(content) - 4096, 0)], "expected [0-9,]+: truncated"),
    "4-empty": (cut(0), "is 0 bytes, expected [0-9,]+: truncated"),
    "5-6-first-bit-flipped": (flip(lambda size: 0), "has SHA-256 .{8}..., expected .{8}...: damaged or exchanged"),
    "5-6-middle-bit-flipped": (flip(lambda size: size // 2), "damaged or exchanged"),
    "5-6-last-bit-flipped": (flip(lambda size: size - 1), "damaged or exchanged"),
    "7-header-zeroed": (lambda content: bytes(64) + content[64:], "damaged or exchanged"),
    "8-trailing-bytes": (lambda content: content + bytes(1), "has trailing bytes; copy or export it again"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(artifact: Path, refused: Refused, name: str, damage: str) -> None:  # 1-8
    change, match = DAMAGE[damage]
    path = artifact / name
    path.write_bytes(change(path.read_bytes()))
    refused(artifact, f"{re.escape(name)} .*{match}")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(artifact: Path, refused: Refused, name: str) -> None:  # 9
    (artifact / name).unlink()
    refused(artifact, f"{re.escape(name)} is missing; copy the artifact again or re-export it with edge-export")


def test_files_of_equal_size_exchanged(tiny_artifact: Artifacts, artifact: Path, refused: Refused) -> None:  # 10
    other = tiny_artifact(*SHAPE, "float32") / "decoder.onnx"  # differs in the numbers of a few attributes only
    assert other.stat().st_size == (artifact / "decoder.onnx").stat().st_size
    shutil.copyfile(other, artifact / "decoder.onnx")
    refused(artifact, "decoder.onnx has SHA-256 .*damaged or exchanged")


def test_damage_of_the_manifest_is_named(artifact: Path, refused: Refused) -> None:  # 1, 4, 6, 7
    path = artifact / MANIFEST
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        refused(artifact, MANIFEST)
    for place in range(0, len(whole) - 1, len(whole) // 12):
        path.write_bytes(flip(lambda size, place=place: place)(whole))  # type: ignore[misc]  # a default in a lambda
        refused(artifact, MANIFEST)
    path.write_bytes(bytes(64) + whole[64:])
    refused(artifact, f"{MANIFEST} is not JSON")


def test_what_was_mended_loads_again(artifact: Path, refused: Refused, one_thread: DeviceProfile) -> None:
    path = artifact / "decoder.onnx.data"
    whole = path.read_bytes()
    with Runtime.load(artifact, profile=one_thread) as runtime:
        tokens = runtime.generate([2, 5], max_tokens=3, temperature=0).token_ids
    path.write_bytes(flip(lambda size: size // 3)(whole))
    refused(artifact, "decoder.onnx.data has SHA-256")
    path.write_bytes(whole)
    with Runtime.load(artifact, profile=one_thread) as runtime:
        assert runtime.generate([2, 5], max_tokens=3, temperature=0).token_ids == tokens


# What is damaged or foreign, but carries the right digests


def sign(folder: Path, change: Callable[[dict[str, Any]], object] = lambda content: None) -> None:
    """Rewrites a manifest for the files as they are, after a change: its digests are right again."""
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    del content["manifest_sha256"]
    for name in content["files"]:
        entry = file_entry(folder / name)
        content["files"][name] = {"size_bytes": entry.size_bytes, "sha256": entry.sha256}
    change(content)
    own = json.dumps(content, sort_keys=True).encode()
    path.write_text(json.dumps(content | {"manifest_sha256": hashlib.sha256(own).hexdigest()}))


@pytest.mark.parametrize(
    ("version", "match"),
    [
        (5, "format version 5 is newer than 4, which this program reads; update gemma-edge or re-export"),
        (3, "format version 3 is older than 4, which this program reads; re-export"),
    ],
)
def test_another_format_version(artifact: Path, refused: Refused, version: int, match: str) -> None:  # 18
    sign(artifact, lambda content: content.update(format_version=version))
    refused(artifact, match)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/hostname", "a/b.bin", "..", "C:b.bin"])
def test_a_path_out_of_the_folder(artifact: Path, refused: Refused, name: str) -> None:  # 21, 22
    (artifact.parent / "outside.bin").write_bytes(b"x")

    def change(content: dict[str, Any]) -> None:
        content["files"][name] = content["files"].pop("chat_template.jinja")

    sign(artifact, change)
    refused(artifact, f"a file name is {re.escape(repr(name))}, expected letters, digits")


def test_a_symlink_out_of_the_folder(artifact: Path, refused: Refused) -> None:  # 23
    (artifact / "ple_table.bin").rename(artifact.parent / "outside.bin")
    (artifact / "ple_table.bin").symlink_to(artifact.parent / "outside.bin")
    refused(artifact, "ple_table.bin is a symbolic link, expected a regular file")


def test_a_symlinked_parent_is_followed(artifact: Path, one_thread: DeviceProfile) -> None:  # 24: allowed, documented
    link = artifact.parent / "link"
    link.symlink_to(artifact, target_is_directory=True)
    with Runtime.load(link / ".." / "artifact", profile=one_thread) as runtime:
        assert runtime.manifest == read_manifest(link)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"temperature": "hot"}, "generation: temperature must be a finite number >= 0 .*got 'hot'"),
        ({"top_k": -1}, "generation: top_k must be a whole number >= 0 .*got -1"),
        ({"top_p": 0}, "generation: top_p must be a number above 0 .*got 0"),
        ({"eos_token_ids": None}, "generation.eos_token_ids is None, expected a list of token ids below 512"),
        ({"eos_token_ids": []}, r"generation.eos_token_ids is \[\], expected"),
        ({"eos_token_ids": [512]}, r"generation.eos_token_ids is \[512\], expected"),
        ({"eos_token_ids": ["1"]}, r"generation.eos_token_ids is \['1'\], expected"),
        ({"mood": 1}, "generation has the unknown key 'mood'"),
    ],
)
def test_sampling_defaults_that_are_none(
    artifact: Path, refused: Refused, change: dict[str, object], match: str
) -> None:
    sign(artifact, lambda content: content["generation"].update(change))
    refused(artifact, f"{MANIFEST}: {match}")


def test_token_ids_beyond_the_vocabulary(artifact: Path, refused: Refused) -> None:
    sign(artifact, lambda content: content["model"].update(bos_token_id=512))
    refused(artifact, f"{MANIFEST}: model: BOS or EOS token 512 is no id below 512")


DAMAGED_GRAPHS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "decoder-cut": ("decoder.onnx", cut(20_000), "decoder.onnx: onnxruntime refuses the graph"),
    "decoder-empty": ("decoder.onnx", cut(0), "decoder.onnx: onnxruntime refuses the graph"),
    "weights-cut": ("decoder.onnx.data", cut(40_000), "decoder.onnx.data at .*: ends at .*, the file at 40,000"),
    "drafter-cut": ("drafter.onnx", cut(9_000), "drafter.onnx: onnxruntime refuses the graph"),
    "drafter-weights-empty": ("drafter.onnx.data", cut(0), "drafter.onnx.data at 0: ends at .*, the file at 0"),
    "table-cut": ("ple_table.bin", cut(5000), "ple_table.bin is 5,000 bytes, expected"),
    "tokenizer-cut": ("tokenizer.json", cut(5000), "tokenizer.json: not a tokenizer"),
    "tokenizer-empty": ("tokenizer.json", cut(0), "tokenizer.json: not a tokenizer"),
    "tokenizer-no-object": ("tokenizer.json", lambda content: b"[]", "tokenizer.json: not a tokenizer"),
    "template-not-utf8": ("chat_template.jinja", lambda content: b"\xff", "chat_template.jinja: not UTF-8 at byte 0"),
    "template-syntax": ("chat_template.jinja", lambda content: b"{% if %}", "chat template, line 1: "),
}


@pytest.mark.parametrize("fault", DAMAGED_GRAPHS)
def test_damage_before_the_digests_were_made(artifact: Path, refused: Refused, fault: str) -> None:  # 1, 2, 3, 4
    name, change, match = DAMAGED_GRAPHS[fault]
    (artifact / name).write_bytes(change((artifact / name).read_bytes()))
    sign(artifact)
    refused(artifact, match)


@pytest.mark.parametrize(
    ("taken", "put", "match"),
    [
        ("narrow", "decoder.onnx", "decoder.onnx: onnxruntime refuses the graph"),  # its weights lie elsewhere
        ("own", "embed.onnx as decoder.onnx", "decoder.onnx: input full_mask is not there, by manifest.json it is of"),
        ("own", "decoder.onnx as drafter.onnx", "drafter.onnx: onnxruntime refuses the graph|drafter.onnx: input "),
        ("wide", "drafter.onnx drafter.onnx.data", "drafter.onnx: .*by manifest.json.*: the graph is of another model"),
        ("narrow", "drafter.onnx drafter.onnx.data", "drafter.onnx: .*by manifest.json.*export target and drafter tog"),
    ],
)
def test_a_graph_of_another_model(  # 54, 56, 59
    tiny_artifact: Artifacts, artifact: Path, refused: Refused, taken: str, put: str, match: str
) -> None:
    source = artifact if taken == "own" else tiny_artifact(taken, 4)
    if " as " in put:
        found, name = put.split(" as ")
        shutil.copyfile(source / found, artifact / name)
    else:
        for name in put.split():
            shutil.copyfile(source / name, artifact / name)
    sign(artifact)
    refused(artifact, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"backbone_hidden_size": 96}, r"\(96, 512\), the model has \(40, 512\); export them together"),  # 54
        ({"vocab_size": 1000}, r"\(40, 1000\), the model has \(40, 512\); export them together"),  # 55
        ({"num_centroids": 64, "num_active_centroids": 8}, "drafter.onnx: output candidate_ids is not there"),  # 56
    ],
)
def test_a_drafter_entry_of_another_target(
    artifact: Path, refused: Refused, change: dict[str, object], match: str
) -> None:
    sign(artifact, lambda content: content["drafter"].update(change))
    refused(artifact, match)


def test_a_drafter_that_reads_other_kv(artifact: Path, refused: Refused) -> None:  # 56, 59
    sign(artifact, lambda content: content["drafter"]["layers"][3].update(num_kv_heads=2))
    refused(artifact, "drafter layer 3 cannot read layer [0-9]+'s KV; re-export")


# Declared, and so no fault


def test_without_a_drafter_the_runtime_is_plain(  # 57
    artifact: Path, one_thread: DeviceProfile, capfd: Capture
) -> None:
    with Runtime.load(artifact, profile=one_thread) as runtime:
        drafted = runtime.generate([2, 5], max_tokens=20, temperature=0, num_draft_tokens=0)

    def change(content: dict[str, Any]) -> None:
        content["drafter"] = None
        content["matrices"] = [entry for entry in content["matrices"] if entry["file"] != "drafter.onnx.data"]
        for name in ("drafter.onnx", "drafter.onnx.native", "drafter.onnx.data"):
            del content["files"][name]
            (artifact / name).unlink()

    sign(artifact, change)
    with Runtime.load(artifact, profile=one_thread) as runtime:
        assert runtime.manifest.drafter is None
        plain = runtime.generate([2, 5], max_tokens=20, temperature=0, num_draft_tokens=8)
    assert plain.token_ids == drafted.token_ids
    assert (plain.stats.num_drafted, plain.stats.num_drafter_faults) == (0, 0)
    arguments = [artifact, "--prompt-ids", "2,5", "--max-tokens", "20", "--temperature", "0", "--json"]
    capfd.readouterr()
    assert run(main, arguments) == 0
    assert json.loads(capfd.readouterr().out)["token_ids"] == plain.token_ids


def test_a_window_beyond_the_memory_takes_no_more_than_the_context(artifact: Path, one_thread: DeviceProfile) -> None:
    def change(content: dict[str, Any]) -> None:
        content["model"]["sliding_window"] = 2**31 - 1

    sign(artifact, change)
    with Runtime.load(artifact, profile=one_thread) as runtime:
        rows = next(part.num_bytes for part in runtime.plan.parts if part.name == "KV windows")
        assert rows < runtime.context_tokens * 4096
        assert len(runtime.generate([2, 5, 7], max_tokens=4, num_draft_tokens=2).token_ids) > 0


def test_a_folder_that_is_no_artifact(tmp_path: Path, capfd: Capture) -> None:  # 9
    prompt = ["--prompt-ids", "2"]
    assert_fails(main, [tmp_path, *prompt], f"{tmp_path} holds no manifest.json: not an artifact; make one", capfd)
    assert_fails(main, [tmp_path / "none", *prompt], "none: No such file or directory; make an artifact with", capfd)
    (tmp_path / "file").touch()
    assert_fails(main, [tmp_path / "file", *prompt], "file is a file, expected an artifact folder", capfd)
    os.mkfifo(tmp_path / "manifest.json")
    assert_fails(main, [tmp_path, *prompt], "manifest.json is a FIFO, expected a regular file", capfd)  # 20
