"""Text to token ids and back, one piece at a time. Knows nothing of turns: `chat` writes those.

Source: tokenizers' `decoders.ByteFallback`, whose handling of broken UTF-8 is not kept: it voids a whole run of byte
tokens when the last of them is wrong, so that nothing of the run could ever be streamed.
"""

import codecs
import json
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import normalizers

from runtime.errors import ArtifactError, RequestError
from runtime.memory import release_free_memory

# A noncharacter (Unicode 16, section 23.7): breaks up special tokens and is dropped once those have been looked for.
GUARD = "\ufdd0"
# Decoders that give a token the same text wherever it stands; only then can pieces be joined.
PLACELESS_DECODERS = {"Sequence", "Replace", "ByteFallback", "Fuse"}


class Tokenizer:
    """A `tokenizers.Tokenizer` in Gemma's manner: `▁`-spaces, byte fallback, special tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, bos_token_id: int) -> None:
        """Takes `tokenizer` over; raises ArtifactError where its decoder does not work token by token."""
        foreign = _decoder_kinds(tokenizer) - PLACELESS_DECODERS
        if foreign:
            raise ArtifactError(
                f"tokenizer.json: decoder {', '.join(sorted(foreign))} cannot be streamed, expected only "
                f"{', '.join(sorted(PLACELESS_DECODERS))}; export a Gemma tokenizer"
            )
        tokenizer.no_truncation()  # a file may carry either, and both would change a prompt silently
        tokenizer.no_padding()
        stages = [normalizers.Replace(GUARD, ""), *filter(None, [tokenizer.normalizer])]
        tokenizer.normalizer = normalizers.Sequence(stages)
        special = {id_: token for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        contents = sorted(re.escape(token.content) for token in special.values())
        bytes_by_id = {tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        self._tokenizer = tokenizer
        self._bos_token_id = bos_token_id
        self._bytes_by_id = {id_: byte for id_, byte in bytes_by_id.items() if id_ is not None and id_ not in special}
        self._special = {id_: token.content for id_, token in special.items()}
        self._special_start = re.compile(f"(?=(?:{'|'.join(contents) or '(?!)'})).", re.DOTALL)

    @classmethod
    def load(cls, path: Path, *, bos_token_id: int) -> Self:
        """The tokenizer of a `tokenizer.json`; raises ArtifactError where it does not parse."""
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises bare Exception, and pyo3's panics are not even that
            reason = " ".join(str(error).split())  # it may quote tokens that are line breaks
            raise ArtifactError(f"{path}: not a tokenizer: {reason}; re-export the model") from error
        finally:
            release_free_memory()  # what parsing took: of 262,144 tokens twice what the tokenizer keeps
        return cls(tokenizer, bos_token_id)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ArtifactError where the tokenizer is not one of a model with `vocab_size` token ids."""
        token, largest = max(self._tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
        if largest >= vocab_size:
            raise ArtifactError(
                f"tokenizer.json: token {reprlib.repr(token)} has id {largest:,}, expected ids below {vocab_size:,}"
            )
        if self._tokenizer.id_to_token(self._bos_token_id) is None:
            raise ArtifactError(f"tokenizer.json: no token has id {self._bos_token_id}, which is the model's BOS")
        try:
            self.encode("\u2603 x", add_bos=True)
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"tokenizer.json: cannot encode text: {error}") from error

    def token(self, token_id: int) -> str:
        """What a token is called in the file, "" where there is none of this id."""
        return self._tokenizer.id_to_token(token_id) or ""

    def special_token(self, token_id: int) -> str:
        """The name of a special token, "" of any other."""
        return self._special.get(token_id, "")

    def special_id(self, name: str) -> int | None:
        """The id of a special token, None where the vocabulary has none of this name."""
        return next((id_ for id_, token in self._special.items() if token == name), None)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size())

    def literal(self, text: str) -> str:
        """`text` with its special tokens broken up: `encode` reads them as the characters that they are."""
        return self._special_start.sub(lambda start: start[0] + GUARD, text)

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Token ids; with `add_bos` the first is BOS, once, even where `text` begins with it."""
        if not isinstance(text, str):
            raise RequestError(f"text must be a string, got {type(text).__name__}")
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            place = next(index for index, char in enumerate(text) if "\ud800" <= char <= "\udfff")
            raise RequestError(f"text: character {place} is a lone surrogate and no Unicode text") from error
        return [self._bos_token_id, *ids] if add_bos and ids[:1] != [self._bos_token_id] else list(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.finish()])

    def stream(self) -> "TextStream":
        """A decoder that is fed one token at a time."""
        return TextStream(self._tokenizer, self._bytes_by_id)


class TextStream:
    """Text of a growing sequence of tokens; the pieces joined are `Tokenizer.decode` of all ids.

    Tokens are decoded alone: only byte tokens depend on their neighbours, and of those at most three bytes wait.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, bytes_by_id: dict[int, int]) -> None:
        """Made by `Tokenizer.stream`."""
        self._tokenizer = tokenizer
        self._bytes_by_id = bytes_by_id
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain now; a character that began as bytes waits for its last one."""
        byte = self._bytes_by_id.get(token_id)
        if byte is not None:
            return self._utf8.decode(bytes([byte]))
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=True)
        # a special token is no text, so it does not end a run of bytes
        return self.finish() + text if text else ""

    def finish(self) -> str:
        """The rest: U+FFFD where bytes of a character are missing, else nothing."""
        return self._utf8.decode(b"", final=True)


def _decoder_kinds(tokenizer: tokenizers.Tokenizer) -> set[str]:
    """Names of the decoder's stages; {"none"} without a decoder, which would join tokens by spaces."""
    if tokenizer.decoder is None:
        return {"none"}
    decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return {decoder["type"]} | {stage["type"] for stage in decoder.get("decoders", ())}
