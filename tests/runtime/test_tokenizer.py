"""Pieces joined are the decoded text, whatever the bytes; BOS comes once; special tokens in user text stay text."""

import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, normalizers, processors

from export.demo.tokenizer import SPECIAL_TOKENS, train_tokenizer
from runtime.errors import ArtifactError, RequestError
from runtime.tokenizer import GUARD, Tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog\n", "  Zwölf Boxkämpfer jagen\n\nViktor", "hello world 1234"] * 9
BOS = SPECIAL_TOKENS.index("<bos>")
UNSEEN = "naïve €5 😀👩‍👩‍👧 漢字 \x00 <|tu rn>"


@pytest.fixture(scope="module")
def trained() -> str:
    return train_tokenizer(TEXTS, 400).to_str()


@pytest.fixture
def raw(trained: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(trained)


@pytest.fixture
def tokenizer(trained: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(trained), BOS)


def byte_ids(raw: tokenizers.Tokenizer, data: bytes) -> list[int]:
    return [raw.token_to_id(f"<0x{byte:02X}>") for byte in data]


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.finish()]


@pytest.mark.parametrize("text", [*TEXTS[:3], UNSEEN, " leading", "trailing ", "▁ under", "\n\n\n", ""])
def test_text_survives_encode_and_decode(tokenizer: Tokenizer, raw: tokenizers.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_bos=True)
    assert tokenizer.decode(ids) == raw.decode(ids) == text.replace("▁", " ")
    assert "".join(pieces(tokenizer, ids)) == text.replace("▁", " ")


def test_valid_ids_decode_as_the_library_does(tokenizer: Tokenizer, raw: tokenizers.Tokenizer) -> None:
    """Random tokens, special ones among them, and whole characters as bytes."""
    rng = random.Random(0)
    others = [id_ for id_ in range(raw.get_vocab_size()) if not raw.id_to_token(id_).startswith("<0x")]
    for _ in range(300):
        parts = [
            [rng.choice(others)] if rng.random() < 0.6 else byte_ids(raw, rng.choice("é€😀a\0").encode())
            for _ in "x" * 9
        ]
        ids = [id_ for part in parts for id_ in part]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == raw.decode(ids)


def test_any_ids_decode_as_their_bytes_do(tokenizer: Tokenizer, raw: tokenizers.Tokenizer) -> None:
    """Random bytes between random tokens: the text is that of all bytes together, invalid ones replaced."""
    rng = random.Random(1)
    size = raw.get_vocab_size()
    for _ in range(300):
        ids = [rng.choice(byte_ids(raw, b"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xff")) for _ in range(6)]
        ids += rng.choices(range(size), k=4)
        rng.shuffle(ids)
        tokens = [raw.id_to_token(id_) for id_ in ids if raw.id_to_token(id_) not in SPECIAL_TOKENS]
        data = b"".join(
            bytes([int(t[3:5], 16)]) if t.startswith("<0x") else t.replace("▁", " ").encode() for t in tokens
        )
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == data.decode("utf-8", "replace")


def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer, raw: tokenizers.Tokenizer) -> None:
    ids = byte_ids(raw, "€é".encode())
    assert pieces(tokenizer, ids) == ["", "", "€", "", "é", ""]
    assert pieces(tokenizer, [ids[0], BOS, *ids[1:3]]) == ["", "", "", "€", ""]  # a special token is no text
    assert pieces(tokenizer, [*ids[:2], raw.token_to_id("h")]) == ["", "", "�h", ""]
    assert pieces(tokenizer, ids[:2]) == ["", "", "�"]


def test_ids_beyond_the_vocabulary_are_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, 10**6]) == ""


@pytest.mark.parametrize("adds_bos_itself", [False, True])
def test_bos_comes_exactly_once(raw: tokenizers.Tokenizer, adds_bos_itself: bool) -> None:
    if adds_bos_itself:
        raw.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
        )
    tokenizer = Tokenizer(raw, BOS)
    plain = tokenizer.encode("hello", add_bos=False)
    assert BOS not in plain
    assert SPECIAL_TOKENS.index("<eos>") not in plain
    assert tokenizer.encode("hello", add_bos=True) == [BOS, *plain]
    assert tokenizer.encode("<bos>hello", add_bos=True) == [BOS, *plain]
    assert tokenizer.encode("<bos>hello", add_bos=False) == [BOS, *plain]
    assert tokenizer.encode("", add_bos=True) == [BOS]


def test_truncation_and_padding_of_the_file_are_ignored(raw: tokenizers.Tokenizer) -> None:
    raw.enable_truncation(2)
    raw.enable_padding(length=64)
    assert 2 < len(Tokenizer(raw, BOS).encode("hello world hello", add_bos=True)) < 64


@pytest.mark.parametrize(
    "text", ["<|turn>user", "a<bos>b<eos>", "<|turn><|turn>", "<<|turn>|turn>", '<|"|>', "no token"]
)
def test_special_tokens_in_literal_text_stay_text(trained: str, tokenizer: Tokenizer, text: str) -> None:
    reference = tokenizers.Tokenizer.from_str(trained)
    reference.encode_special_tokens = True
    ids = tokenizer.encode(tokenizer.literal(text), add_bos=False)
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_special_tokens_elsewhere_are_tokens(tokenizer: Tokenizer) -> None:
    prompt = "<|turn>user\n" + tokenizer.literal("<turn|>") + "<turn|>"
    ids = tokenizer.encode(prompt, add_bos=False)
    assert ids.count(SPECIAL_TOKENS.index("<turn|>")) == 1
    assert ids[0] == SPECIAL_TOKENS.index("<|turn>")
    assert GUARD not in tokenizer.decode(ids)


def test_the_guard_is_the_one_character_that_no_prompt_can_hold(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(f"a{GUARD}b", add_bos=False)) == "ab"


def test_a_tokenizer_without_special_tokens_or_normalizer_works(raw: tokenizers.Tokenizer) -> None:
    bare = tokenizers.Tokenizer(raw.model)
    bare.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(bare, BOS)
    assert tokenizer.literal("<|turn>") == "<|turn>"
    assert tokenizer.decode(tokenizer.encode("hello", add_bos=False)) == "hello"


def test_a_file_loads_as_the_object_does(raw: tokenizers.Tokenizer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    raw.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json", bos_token_id=BOS)
    assert loaded.vocab_size == tokenizer.vocab_size == raw.get_vocab_size()
    assert loaded.encode(UNSEEN, add_bos=True) == tokenizer.encode(UNSEEN, add_bos=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 7}', "[" * 100_000, "\ufeff{}", None])
def test_a_damaged_file_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"{path}: not a tokenizer: .*; re-export the model"):
        Tokenizer.load(path, bos_token_id=BOS)


@pytest.mark.parametrize("decoder", [decoders.ByteLevel(), decoders.Metaspace(), decoders.WordPiece(), None])
def test_a_decoder_that_looks_at_neighbours_is_refused(raw: tokenizers.Tokenizer, decoder: Any) -> None:
    raw.decoder = decoder
    with pytest.raises(ArtifactError, match=r"decoder \w+ cannot be streamed"):
        Tokenizer(raw, BOS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\ud800", "character 2 is a lone surrogate"),
        (b"ab", "got bytes"),
        (None, "got NoneType"),
        (["a"], "got list"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer: Tokenizer, text: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tokenizer.encode(text, add_bos=True)


def test_a_normalizer_of_the_file_still_works(raw: tokenizers.Tokenizer) -> None:
    raw.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    tokenizer = Tokenizer(raw, BOS)
    assert tokenizer.decode(tokenizer.encode("HELLO World", add_bos=True)) == "hello world"
