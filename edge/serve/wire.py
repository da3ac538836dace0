"""Answers as OpenAI's API writes them: whole, or in chunks. Knows no HTTP."""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edge.serve.asked import Asked
from runtime.response import Piece, ResponseFormat
from runtime.stats import GenerationStats
from runtime.stream import Generation
from runtime.tool_calls import ToolCall

SHOWN_STATS = (
    *("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_ms", "acceptance_rate"),
    *("mean_acceptance_length", "peak_anonymous_bytes", "peak_mapped_bytes"),
)

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wire:
    """Writes one answer."""

    asked: Asked
    model: str
    form: ResponseFormat
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, generation: Generation) -> Object:
        """The answer in one object."""
        return {
            **self._head("chat.completion" if self.asked.is_chat else "text_completion"),
            "choices": [self._choice(self._content(generation), generation.finish_reason)],
            "usage": usage(generation, self.form),
            "stats": shown_stats(generation.stats),
        }

    def opening(self) -> Iterator[Object]:
        """Chunks in front of all text."""
        if self.asked.is_chat:
            yield self._chunk({"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> Object:
        """The chunk of a piece of text or thoughts."""
        if not self.asked.is_chat:
            return self._chunk(str(piece))
        return self._chunk({"reasoning_content" if piece.kind == "thinking" else "content": str(piece)})

    def ending(self, generation: Generation) -> Iterator[Object]:
        """Chunks behind all text."""
        if calls := self._calls(generation):
            yield self._chunk({"tool_calls": [{"index": index, **call} for index, call in enumerate(calls)]})
        last = self._chunk({} if self.asked.is_chat else "", generation.finish_reason)
        yield {**last, "stats": shown_stats(generation.stats)}
        if self.asked.has_usage:
            yield {**self._head(self._chunk_kind()), "choices": [], "usage": usage(generation, self.form)}

    def _content(self, generation: Generation) -> Object | str:
        if not self.asked.is_chat:
            return generation.text
        calls = self._calls(generation)
        message: Object = {"role": "assistant", "content": generation.text or (None if calls else "")}
        if generation.thinking:
            message["reasoning_content"] = generation.thinking
        return {**message, "tool_calls": calls} if calls else message

    def _calls(self, generation: Generation) -> list[Object]:
        return [_call(call) for call in generation.tool_calls[: self.asked.max_calls]]

    def _chunk(self, content: Object | str, finish_reason: str | None = None) -> Object:
        head = self._head(self._chunk_kind())
        no_usage = {"usage": None} if self.asked.has_usage else {}
        return {**head, "choices": [self._choice(content, finish_reason, is_chunk=True)], **no_usage}

    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.asked.is_chat else "text_completion"

    def _choice(self, content: Object | str, finish_reason: str | None, *, is_chunk: bool = False) -> Object:
        key = "text" if isinstance(content, str) else "delta" if is_chunk else "message"
        return {"index": 0, key: content, "logprobs": None, "finish_reason": finish_reason}

    def _head(self, kind: str) -> Object:
        prefix = "chatcmpl" if self.asked.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def usage(generation: Generation, form: ResponseFormat) -> Object:
    """Tokens as OpenAI counts them; drafts that stood and fell are its predictions."""
    stats = generation.stats
    return {
        "prompt_tokens": stats.num_prompt_tokens,
        "completion_tokens": stats.num_generated_tokens,
        "total_tokens": stats.num_prompt_tokens + stats.num_generated_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.num_reused_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": num_thought(generation.token_ids, form),
            "accepted_prediction_tokens": stats.num_accepted,
            "rejected_prediction_tokens": stats.num_drafted - stats.num_accepted,
        },
    }


def shown_stats(stats: GenerationStats) -> Object:
    """Figures beside OpenAI's own, for people to look at."""
    figures = asdict(stats)
    return {name: figures[name] for name in SHOWN_STATS}


def num_thought(token_ids: Sequence[int], form: ResponseFormat) -> int:
    """Tokens of thoughts, with those that start and end them."""
    number, is_thought = 0, False
    for token_id in token_ids:
        is_thought = is_thought or token_id == form.thought_start
        number += is_thought
        is_thought = is_thought and token_id != form.thought_end
    return number


def _call(call: ToolCall) -> Object:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
