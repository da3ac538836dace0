"""The tokenizer of an artifact is the checkpoint's, whatever form it is written in."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from export.demo.tokenizer import SPECIAL_TOKENS, train_tokenizer
from export.dummy import RandomCheckpoint
from export.text_files import compact_tokenizer, copy_text_files
from runtime.tokenizer import Tokenizer

Content = dict[str, Any]

CORPUS = [
    "the quick brown fox\n\njumps over",
    "  Zwölf Boxkämpfer jagen\n\n\n",
    "hello #version 1234\t\t",
    "日本語の文章",
] * 9
TEXTS = [
    *CORPUS[:4],
    *("", " ", "  leading", "trailing  ", "\n \n", "\r\n\x00\x7f", "▁▁ under", "<bos><|turn>user\nhi<turn|>", "<bos"),
    *("naïve €5 👩‍👩‍👧 漢字 \ufffd\ufeff", "e\u0301 \u00e9 \u202e", '\\"\\u0041\\', "#version: 0.2"),
]
BOS = SPECIAL_TOKENS.index("<bos>")


@pytest.fixture(scope="module")
def trained() -> str:
    return train_tokenizer(CORPUS, 420).to_str()


@pytest.fixture
def content(trained: str) -> Content:
    value: Content = json.loads(trained)
    return value


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: Content, **options: Any) -> Path:
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(content, **options), encoding="utf-8")
        return file

    return write


def compact(file: Path) -> bytes:
    written = compact_tokenizer(file)
    assert written is not None
    return written


@pytest.mark.parametrize("options", [{}, {"indent": 2, "ensure_ascii": False}, {"separators": (",", ":")}])
def test_the_tokenizer_is_the_same(write: Callable[..., Path], content: Content, options: dict[str, Any]) -> None:
    file = write(content, **options)
    written = compact(file)
    assert json.loads(written)["model"]["merges"] == [" ".join(merge) for merge in content["model"]["merges"]]
    assert len(written) < file.stat().st_size
    ours, theirs = tokenizers.Tokenizer.from_buffer(written), tokenizers.Tokenizer.from_file(str(file))
    assert ours.to_str() == theirs.to_str()
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)
    assert ours.get_added_tokens_decoder() == theirs.get_added_tokens_decoder()


def test_the_runtime_reads_it_alike(write: Callable[..., Path], content: Content, tmp_path: Path) -> None:
    file, rewritten = write(content), tmp_path / "rewritten.json"
    rewritten.write_bytes(compact(file))
    theirs, ours = (Tokenizer.load(path, bos_token_id=BOS) for path in (file, rewritten))
    for text in TEXTS:
        ids = ours.encode(text, add_bos=True)
        assert ids == theirs.encode(text, add_bos=True)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.encode(ours.literal(text), add_bos=False) == theirs.encode(theirs.literal(text), add_bos=False)
    assert [ours.token(id_) for id_ in range(ours.vocab_size)] == [theirs.token(id_) for id_ in range(ours.vocab_size)]


def test_it_depends_on_the_content_alone(write: Callable[..., Path], content: Content, tmp_path: Path) -> None:
    first = compact(write(content, indent=2))
    assert compact(write(content, ensure_ascii=False)) == first
    (tmp_path / "tokenizer.json").write_bytes(first)
    assert compact(tmp_path / "tokenizer.json") == first


def test_merges_with_a_space_stay_pairs(write: Callable[..., Path], content: Content) -> None:
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    content["normalizer"] = content["pre_tokenizer"] = None
    for token in (" ", "t ", " t"):
        vocabulary[token] = len(vocabulary)
    merges += [["t", " "], [" ", "t"]]
    file = write(content)
    written = compact(file)
    assert json.loads(written)["model"]["merges"] == merges
    text = "the t t tt  t"
    ours, theirs = tokenizers.Tokenizer.from_buffer(written), tokenizers.Tokenizer.from_file(str(file))
    assert ours.encode(text).tokens == theirs.encode(text).tokens
    assert "t " in ours.encode(text).tokens


def test_a_merge_that_the_older_form_skips_as_a_comment(write: Callable[..., Path], content: Content) -> None:
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    tokens = ["#version"[:length] for length in range(1, 9)]
    for token in [*"#version", *tokens, "#versions"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges += [[shorter, longer[-1]] for shorter, longer in pairwise(tokens)] + [["#version", "s"]]
    assert compact_tokenizer(write(content)) is None


def two_tokens_of_one_id(content: Content) -> None:
    content["model"]["vocab"]["twin"] = 5


def a_gap_between_ids(content: Content) -> None:
    content["model"]["vocab"]["far"] = 10**6


def half_a_character(content: Content) -> None:
    content["model"]["comment"] = "\ud800"


def no_dictionary(content: Content) -> None:
    content["model"] = json.loads(models.Unigram([("<unk>", 0.0), ("a", -1.5)], 0).__getstate__())
    content["added_tokens"], content["post_processor"] = [], None


@pytest.mark.parametrize("change", [two_tokens_of_one_id, a_gap_between_ids, half_a_character, no_dictionary])
def test_what_cannot_be_proved_the_same_is_left(
    write: Callable[..., Path], content: Content, change: Callable[[Content], None], capfd: pytest.CaptureFixture[str]
) -> None:
    change(content)
    assert compact_tokenizer(write(content)) is None
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("change", [None, a_gap_between_ids])
def test_what_is_copied(
    write: Callable[..., Path], content: Content, tmp_path: Path, change: Callable[[Content], None] | None
) -> None:
    if change:
        change(content)
    file = write(content)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "artifact").mkdir()
    copy_text_files(RandomCheckpoint(tmp_path, {}), tmp_path / "artifact")
    assert (tmp_path / "artifact" / file.name).read_bytes() == (file.read_bytes() if change else compact(file))
    assert {path.name for path in (tmp_path / "artifact").iterdir()} == {file.name, "generation_config.json"}
