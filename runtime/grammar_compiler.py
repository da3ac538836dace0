"""A grammar compiled for a vocabulary: which tokens may come next. Knows no logits.

Source: llguidance 1.9.1, `LLMatcher`. It is given the tokens' bytes and no tokenizer, which takes 125 MiB instead
of 296 for 262,144 tokens: `NO_FORCING` leaves it unused.
"""

import itertools
import json
import re
import threading
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from runtime.constraint import BoolArray
from runtime.errors import ArtifactError, InferenceError, RequestError
from runtime.grammar import Grammar
from runtime.memory import release_free_memory

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

STACK_BYTES = 64 * 1024 * 1024  # of the compiler, which recurses; `runtime.grammar` bounds how deep
MAX_MESSAGE_CHARACTERS = 160
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")

Result = TypeVar("Result")
_stack_size_lock = threading.Lock()  # it is one setting of the process


class GrammarCompiler:
    """Grammars for one vocabulary; what is shared by all is built with the first (1.7 s for 262,144 tokens)."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """Takes the text of a `tokenizer.json`, the model's number of logits, and its end-of-sequence tokens."""
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._tokenizer: LLTokenizer | None = None
        self._special_ids: tuple[int, ...] = ()

    def compile(self, grammar: Grammar) -> "GrammarConstraint":
        """A constraint at its start; raises RequestError where the grammar does not compile or allows no text."""
        llguidance = _llguidance()
        tokenizer = self._built()
        # With the default fuel an expression such as ((a{1000}){1000}){1000} took 0.7 s and 250 MB, with this 0.1 s and
        # 45 MB. A state takes 5 KiB, and a string of bounded length 8 for each character.
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=200_000,
            step_lexer_fuel=100_000,
            max_lexer_states=50_000,
            max_grammar_size=200_000,
            verbose_errors=False,
        )

        def compiled() -> GrammarConstraint:
            matcher = llguidance.LLMatcher(tokenizer, grammar.source, log_level=0, limits=limits)
            if matcher.is_error():
                raise InferenceError(f"the grammar does not compile: {_reason(matcher)}")
            constraint = GrammarConstraint(matcher, self._vocab_size, self._eos_ids, self._special_ids)
            constraint.masks([])
            return constraint

        try:
            return _on_deep_stack(compiled)
        except InferenceError as error:
            raise RequestError(f"{error}; change or simplify it") from error

    def _built(self) -> "LLTokenizer":
        if self._tokenizer is None:
            tokens, self._special_ids = _token_bytes(self._tokenizer_json, self._vocab_size)
            wrapper = _Vocabulary(tokens, self._special_ids, self._eos_ids[0])
            try:
                self._tokenizer = _llguidance().LLTokenizer(
                    wrapper, n_vocab=self._vocab_size, eos_token=list(self._eos_ids)
                )
            except ValueError as error:
                raise ArtifactError(f"tokenizer.json: llguidance cannot use it: {_one_line(str(error))}") from error
            self._tokenizer_json = ""
            release_free_memory()
        return self._tokenizer


class GrammarConstraint:
    """A matcher that is asked ahead and rolled back. Ends are counted here: it would roll one back as a token."""

    def __init__(
        self, matcher: "LLMatcher", vocab_size: int, eos_ids: Sequence[int], special_ids: Sequence[int]
    ) -> None:
        """Made by `GrammarCompiler.compile`."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._no_text = frozenset(special_ids) | self._eos_ids
        self._eos_indices, self._no_text_indices = np.array(sorted(self._eos_ids)), np.array(sorted(self._no_text))
        self._num_consumed = 0
        self._has_ended = False

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens are allowed, one behind the other, from the current state."""
        text = [] if self._has_ended else list(itertools.takewhile(self._is_text, token_ids))
        num_valid = self._matcher.validate_tokens(text)
        self._check()
        if num_valid < len(text):
            return num_valid
        num_ends = _num_leading(self._eos_ids, token_ids[len(text) :])
        return num_valid + (num_ends if num_ends and self._may_end_behind(text) else 0)

    def masks(self, token_ids: Sequence[int]) -> list[BoolArray | None]:
        """Allowed tokens [vocab_size] now and behind each of `token_ids`, all of which are allowed."""
        text = [] if self._has_ended else list(itertools.takewhile(self._is_text, token_ids))
        masks: list[BoolArray | None] = []
        num_ahead = 0
        try:
            for token_id in text:
                masks.append(self._mask())
                self._advance([token_id])
                num_ahead += 1
            masks.append(self._mask())
        finally:
            self._matcher.rollback(num_ahead)
        self._check()
        return masks + [self._ends() for _ in token_ids[len(text) :]]

    def consume(self, token_ids: Sequence[int]) -> None:
        """Goes on behind what was generated."""
        text = [] if self._has_ended else list(itertools.takewhile(self._is_text, token_ids))
        self._advance(text)
        self._num_consumed += len(text)
        if len(text) < len(token_ids):
            if token_ids[len(text)] not in self._eos_ids or not self.num_allowed(token_ids[len(text) :]):
                raise self._error(f"token {token_ids[len(text)]} is not allowed here")
            self._has_ended = True

    @property
    def is_complete(self) -> bool:
        """True where nothing but an end-of-sequence token can follow."""
        return self._has_ended or self._matcher.is_stopped()

    def _is_text(self, token_id: int) -> bool:
        return 0 <= token_id < self._vocab_size and token_id not in self._no_text

    def _may_end_behind(self, text: Sequence[int]) -> bool:
        if self._has_ended or not text:
            return self._has_ended or self._matcher.is_accepting()
        self._advance(text)
        may_end = self._matcher.is_accepting()
        self._matcher.rollback(len(text))
        self._check()
        return may_end

    def _advance(self, text: Sequence[int]) -> None:
        if text and not self._matcher.consume_tokens(list(text)):
            self._check()

    def _mask(self) -> BoolArray:
        if self._has_ended:
            return self._ends()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        mask[self._no_text_indices] = False  # a Lark grammar can name special tokens
        mask[self._eos_indices] = self._matcher.is_accepting()
        if not mask.any():
            raise self._error("no token of text can follow")
        return mask

    def _ends(self) -> BoolArray:
        mask = np.zeros(self._vocab_size, np.bool_)
        mask[self._eos_indices] = True
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            raise self._error(_reason(self._matcher))

    def _error(self, reason: str) -> InferenceError:
        return InferenceError(f"the grammar fails behind {self._num_consumed:,} tokens: {reason}")


class _Vocabulary:
    """What `LLTokenizer` asks of a tokenizer; it tokenizes nothing here."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_ids: Sequence[int], eos_id: int) -> None:
        self.tokens = tokens
        self.special_token_ids = list(special_ids)
        self.eos_token_id = eos_id

    def __call__(self, text: str) -> list[int]:
        return []


def _token_bytes(tokenizer_json: str, vocab_size: int) -> tuple[list[bytes], tuple[int, ...]]:
    """The bytes of each token [vocab_size], none where there is no such token, and the special tokens' ids."""
    try:
        file: dict[str, Any] = json.loads(tokenizer_json)
        replaced = _replacements(file["decoder"])
        added = {token["id"]: token for token in file["added_tokens"]}
        ids = {**file["model"]["vocab"], **{token["content"]: id_ for id_, token in added.items()}}
        special = {id_: token["content"] for id_, token in added.items() if token["special"]}
        tokens = [b""] * vocab_size
        for text, id_ in ids.items():
            if id_ < vocab_size:
                tokens[id_] = text.encode() if id_ in special else _bytes_of(text, replaced)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"tokenizer.json: no grammar can read its tokens: {_one_line(repr(error))}; export a Gemma tokenizer"
        ) from error
    return tokens, tuple(sorted(special))


def _replacements(decoder: dict[str, Any]) -> list[tuple[str, str]]:
    stages = decoder.get("decoders", [decoder])
    return [(stage["pattern"]["String"], stage["content"]) for stage in stages if stage["type"] == "Replace"]


def _bytes_of(token: str, replaced: Iterable[tuple[str, str]]) -> bytes:
    if byte := BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(byte[1])
    for pattern, content in replaced:
        token = token.replace(pattern, content)
    return token.encode()


def _num_leading(ids: Container[int], token_ids: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(ids.__contains__, token_ids))


def _on_deep_stack(call: Callable[[], Result]) -> Result:
    """The result of `call` in a thread of its own: the caller's may have half a megabyte of stack."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        with _stack_size_lock:
            previous = threading.stack_size(STACK_BYTES)
            try:
                future = pool.submit(call)  # starts the thread
            finally:
                threading.stack_size(previous)
        return future.result()


def _reason(matcher: "LLMatcher") -> str:
    return _one_line(matcher.get_error())


def _one_line(text: str) -> str:
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= MAX_MESSAGE_CHARACTERS else line[: MAX_MESSAGE_CHARACTERS - 3] + "..."


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError("structured output needs llguidance; install gemma-edge[constrain]") from error
    return llguidance
