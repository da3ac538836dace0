"""Held-out prompts of the demo: pieces of source files and questions that the pair was not trained on."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from export.demo import corpus

MIN_CHARS, MAX_CHARS = 100, 400
BUNDLED_PROMPTS = Path(__file__).parent / "checkpoint" / "held_out.json"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text without its `<bos>`, which the tokenizer puts before it."""

    text: str
    kind: Literal["code", "chat"]


def held_out_prompts(num_prompts: int, seed: int) -> list[Prompt]:
    """Half code, half chat, spread over the held-out files; none occurs in a training document."""
    trained_on = "\0".join(corpus.documents(held_out=False))
    rng = np.random.default_rng(seed)
    sources = corpus.texts(held_out=True)
    picks = {
        "code": [[Prompt(t, "code") for t in _code_pieces(s)] for s in sources],
        "chat": [[Prompt(t, "chat") for t in _questions(s)] for s in sources],
    }
    prompts: list[Prompt] = []
    for by_source in picks.values():
        prompts += _spread(by_source, trained_on, num_prompts // 2, rng)
    return prompts


def _spread(by_source: list[list[Prompt]], trained_on: str, count: int, rng: np.random.Generator) -> list[Prompt]:
    """`count` prompts in rounds over the sources, at random within each."""
    shuffled = [[prompts[i] for i in rng.permutation(len(prompts))] for prompts in by_source]
    order = rng.permutation(len(shuffled))
    rounds = (shuffled[i][depth] for depth in range(count) for i in order if depth < len(shuffled[i]))
    fresh = dict.fromkeys(prompt for prompt in rounds if prompt.text not in trained_on)
    return list(fresh)[:count]


def _code_pieces(source: str) -> Iterator[str]:
    """Whole lines that begin at a definition, without the last line break."""
    lines = source.splitlines(keepends=True)
    for start, line in enumerate(lines):
        if line.lstrip().startswith(("def ", "class ")):
            piece = ""
            for more in lines[start:]:
                if len(piece) + len(more) > MAX_CHARS:
                    break
                piece += more
            if len(piece.rstrip()) >= MIN_CHARS:
                yield piece.rstrip()


def _questions(source: str) -> Iterator[str]:
    """Chats up to where the model begins to answer."""
    for chat in corpus.chats(source):
        head, mark, _ = chat.partition("<|turn>model\n")
        if MIN_CHARS <= len(head + mark) <= MAX_CHARS:
            yield head + mark


def save_prompts(prompts: list[Prompt], file: Path) -> None:
    """Writes a JSON list of `{"text", "kind"}`."""
    file.write_text(json.dumps([asdict(p) for p in prompts], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_prompts(file: Path = BUNDLED_PROMPTS) -> list[Prompt]:
    """Reads what `save_prompts` wrote."""
    return [Prompt(**value) for value in json.loads(file.read_text(encoding="utf-8"))]
