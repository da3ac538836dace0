"""A checkpoint pair of a test's own, faults to put into it, and how an export must refuse them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.export_cli import main
from tests.commands import Capture, assert_fails, contents, run

if TYPE_CHECKING:
    from tests.checkpoints import TinyCheckpoint

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
GENERATION, TEMPLATE, INDEX = "generation_config.json", "chat_template.jinja", "model.safetensors.index.json"
Change = Callable[[Path], object]
Fault = tuple[Change, str]


@dataclass(frozen=True, slots=True)
class Pair:
    """Copies of a target and its assistant, and the folder that an export is to make."""

    target: Path
    assistant: Path
    out: Path
    capture: Capture

    def export(self, *options: object) -> int:
        """Exit code of an export without the drafter."""
        return run(main, [self.target, self.out, *options])

    def refused(self, match: str, *options: object) -> None:
        """An export with the drafter fails in one line; nothing is left, and the sources are as they were."""
        before = contents(self.target.parent)
        arguments = [self.target, self.out, "--drafter", self.assistant, *options]
        assert_fails(main, arguments, f"^edge-export: .*{match}", self.capture)
        assert contents(self.target.parent) == before


def copied_pair(pair: TinyCheckpoint, folder: Path, capture: Capture) -> Pair:
    """Copies in `folder`."""
    for source, name in ((pair.target, "target"), (pair.assistant, "assistant")):
        shutil.copytree(source, folder / name)
    return Pair(folder / "target", folder / "assistant", folder / "out", capture)


# Faults: functions that change a checkpoint's folder


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def config(**fields: object) -> Change:
    return edit(CONFIG, lambda content: content | fields)


def text_config(**fields: object) -> Change:
    return edit(CONFIG, lambda content: content | {"text_config": content["text_config"] | fields})


def without(field: str) -> Change:
    return edit(CONFIG, lambda content: {name: value for name, value in content.items() if name != field})


def generation(**fields: object) -> Change:
    return write(GENERATION, json.dumps(fields))


def edit(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))


def write(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def index(change: Callable[[dict[str, Any]], object]) -> Change:
    def write_index(folder: Path) -> None:
        header = split(folder)[0]
        weight_map: dict[str, Any] = {name: WEIGHTS for name in header if name != "__metadata__"}
        (folder / INDEX).write_text(json.dumps(change(weight_map)))

    return write_index


def split(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def header(change: Callable[[dict[str, Any]], dict[str, Any] | bytes]) -> Change:
    def rewrite(folder: Path) -> None:
        entries, body = split(folder)
        changed = change(entries)
        encoded = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)

    return rewrite


def entry(name: str, **fields: object) -> Change:
    return header(lambda entries: entries | {name: entries[name] | fields})


def twice(name: str, other: str) -> Change:
    """The key `name` a second time, with the entry of `other`."""
    return header(lambda entries: f'{json.dumps(entries)[:-1]}, "{name}": {json.dumps(entries[other])}}}'.encode())


def raw(change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def tensors(change: Callable[[dict[str, Any]], object]) -> Change:
    def rewrite(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        loaded = load_file(folder / WEIGHTS)
        change(loaded)
        save_file(loaded, folder / WEIGHTS)

    return rewrite


def last_weight(name: str, value: float) -> Change:
    def change(loaded: dict[str, Any]) -> None:
        loaded[name].view(-1)[-1] = value

    return tensors(change)


def folder_instead_of(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def fifo_instead_of(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def only_pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def tokenizer(**fields: object) -> Change:
    return edit(TOKENIZER, lambda content: content | fields)


def vocabulary(change: Callable[[dict[str, int]], dict[str, int]]) -> Change:
    def rewrite(content: dict[str, Any]) -> dict[str, Any]:
        return content | {"model": content["model"] | {"vocab": change(content["model"]["vocab"])}}

    return edit(TOKENIZER, rewrite)


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()
