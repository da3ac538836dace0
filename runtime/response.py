"""The model's answer taken apart: text, thoughts and tool calls, told from each other by special tokens.

Source: transformers 5.24 `cli/serving/utils.py`, the response template of gemma4.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from runtime.errors import ToolCallError
from runtime.stopping import StopScanner
from runtime.tokenizer import Tokenizer
from runtime.tool_calls import ToolCall, parse_tool_call

PieceKind = Literal["text", "thinking"]
Part = tuple[PieceKind, str]


class Piece(str):
    """A piece of streamed text, with what was generated, drafted and accepted up to it; `kind` tells thoughts apart."""

    kind: PieceKind
    num_tokens: int
    num_drafted: int
    num_accepted: int

    def __new__(
        cls, text: str, kind: PieceKind = "text", *, num_tokens: int = 0, num_drafted: int = 0, num_accepted: int = 0
    ) -> Self:
        """A string like any other."""
        piece = super().__new__(cls, text)
        piece.kind = kind
        piece.num_tokens, piece.num_drafted, piece.num_accepted = num_tokens, num_drafted, num_accepted
        return piece


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """Special tokens of Gemma 4's answers; None where a vocabulary lacks one."""

    thought_start: int | None
    thought_end: int | None
    call_start: int | None
    call_end: int | None
    result_start: int | None  # behind its calls the model waits for their results

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Those of a vocabulary."""
        names = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>")
        return cls(*map(tokenizer.special_id, names))


class ResponseScanner:
    """Turns tokens into text and thoughts as they become certain; collects tool calls and looks for stop strings.

    Without a format everything is text, and special tokens have none.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], format: ResponseFormat | None = None) -> None:
        """Raises RequestError where `stops` is not a list of non-empty strings."""
        self.tool_calls: list[ToolCall] = []
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._format = format
        self._stream = tokenizer.stream()
        self._scanner = StopScanner(stops)
        self._region: Literal["text", "channel", "thinking", "call"] = "text"
        self._raw = ""  # of the channel's name, or of the call

    def push(self, token_id: int) -> list[Part]:
        """What is certain now.

        Raises:
            ToolCallError: a tool call ended that is none.
        """
        parts = self._enter(token_id) if self._format is not None else None
        if parts is not None:
            return parts
        if self._region == "call" and (name := self._tokenizer.special_token(token_id)):
            self._raw += self._stream.finish() + name
            return []
        return self._take(self._stream.push(token_id))

    def finish(self, *, has_stopped: bool) -> list[Part]:
        """The rest; where the model has stopped by itself no tool call may be open."""
        rest = self._take(self._stream.finish())
        if self._region == "call" and has_stopped:
            raise ToolCallError("the answer ends within a tool call", self._raw)
        if self._region == "text" and not self.is_stopped:
            rest.append(("text", self._scanner.finish()))
        return [part for part in rest if part[1]]

    def _enter(self, token_id: int) -> list[Part] | None:
        """What was left of a region where a token ends it; None where it is a token of the region."""
        form = self._format
        assert form is not None
        if self._region == "text" and token_id in (form.thought_start, form.call_start):
            rest = self._take(self._stream.finish())
            self._region, self._raw = ("channel" if token_id == form.thought_start else "call"), ""
            return rest
        if self._region in ("channel", "thinking") and token_id == form.thought_end:
            rest = self._take(self._stream.finish())
            self._region = "text"
            return rest
        if self._region == "call" and token_id == form.call_end:
            raw = self._raw + self._stream.finish()
            self._region = "text"
            self.tool_calls.append(replace(parse_tool_call(raw), id=f"call_{len(self.tool_calls)}"))
            return []
        return None

    def _take(self, text: str) -> list[Part]:
        if self._region == "text":
            emitted, self.is_stopped = self._scanner.push(text)
            return [("text", emitted)] if emitted else []
        if self._region == "thinking":
            return [("thinking", text)] if text else []
        self._raw += text
        if self._region == "channel" and "\n" in self._raw:
            self._region = "thinking"
            return self._take(self._raw.partition("\n")[2])
        return []
