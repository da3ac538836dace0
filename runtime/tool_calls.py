"""Tool calls as Gemma 4 writes them: `call:NAME{key:<|"|>text<|"|>,n:42,list:[1,{a:true}]}`.

Text between two `<|"|>` is literal and may hold anything else. Keys are bare or quoted. Strings in double quotes are
JSON's. A call that is not exactly of this form is refused: what was meant is not guessed.

Source: transformers 5.24 `utils/chat_parsing/content_parsers.py` (`_json`), which replaces and re-parses text instead.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from runtime.errors import ToolCallError

MAX_DEPTH = 64
MAX_NUMBER_CHARS = 400
QUOTE = '<|"|>'

NAME = re.compile(r"[A-Za-z_][\w.-]{0,127}", re.ASCII)
_HEAD = re.compile(rf"\s*call:({NAME.pattern})\s*", re.ASCII)
_SPACE = re.compile(r"[ \t\n\r]*")
_BARE_KEY = re.compile(r"[\w$.-]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None}
_WORD = re.compile("true|false|null")
_JSON_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool; `id` tells it from the others of an answer."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


def parse_tool_call(raw: str) -> ToolCall:
    """A call from what stands between `<|tool_call>` and `<tool_call|>`; raises ToolCallError where it is none."""
    reader = _Reader(raw)
    head = _HEAD.match(raw)
    if head is None:
        reader.fail("'call:' and a name", 0)
    reader.place = head.end()
    arguments = reader.object(1)
    reader.space()
    if reader.place < len(raw):
        reader.fail("the end")
    return ToolCall(head[1], arguments)


class _Reader:
    """Reads values from `place` on."""

    def __init__(self, raw: str) -> None:
        self.raw = raw
        self.place = 0

    def fail(self, expected: str, place: int | None = None) -> NoReturn:
        place = self.place if place is None else place
        found = repr(self.raw[place : place + 12]) if place < len(self.raw) else "the end"
        raise ToolCallError(f"tool call: expected {expected} at character {place}, found {found}", self.raw)

    def space(self) -> None:
        match = _SPACE.match(self.raw, self.place)
        assert match is not None
        self.place = match.end()

    def takes(self, token: str) -> bool:
        """Steps over a token, if it is next."""
        self.space()
        if not self.raw.startswith(token, self.place):
            return False
        self.place += len(token)
        return True

    def object(self, depth: int) -> dict[str, Any]:
        if not self.takes("{"):
            self.fail("{")
        values: dict[str, Any] = {}
        while not (not values and self.takes("}")):
            place = self.place
            key = self._key()
            if key in values:
                self.fail("a key that was not there before", place)
            if not self.takes(":"):
                self.fail("a colon")
            values[key] = self.value(depth)
            if self.takes("}"):
                break
            if not self.takes(","):
                self.fail("a comma or }")
        return values

    def value(self, depth: int) -> Any:
        self.space()
        if depth >= MAX_DEPTH and self.raw.startswith(("{", "["), self.place):
            self.fail(f"at most {MAX_DEPTH} levels")
        if self.raw.startswith("{", self.place):
            return self.object(depth + 1)
        if self.raw.startswith("[", self.place):
            return self._list(depth + 1)
        if (text := self._string()) is not None:
            return text
        if word := _WORD.match(self.raw, self.place):
            self.place = word.end()
            return _WORDS[word[0]]
        return self._number()

    def _list(self, depth: int) -> list[Any]:
        self.takes("[")
        values: list[Any] = []
        while not (not values and self.takes("]")):
            values.append(self.value(depth))
            if self.takes("]"):
                break
            if not self.takes(","):
                self.fail("a comma or ]")
        return values

    def _key(self) -> str:
        self.space()
        if (text := self._string()) is not None:
            return text
        key = _BARE_KEY.match(self.raw, self.place)
        if key is None:
            self.fail("a key")
        self.place = key.end()
        return key[0]

    def _string(self) -> str | None:
        if self.raw.startswith(QUOTE, self.place):
            start = self.place + len(QUOTE)
            end = self.raw.find(QUOTE, start)
            if end < 0:
                self.fail(f"a second {QUOTE}", len(self.raw))
            self.place = end + len(QUOTE)
            return self.raw[start:end]
        match = _JSON_STRING.match(self.raw, self.place)
        if match is None:
            return None
        try:
            text: str = json.loads(match[0])
            text.encode()  # \ud800 alone is JSON, but no text that a prompt could hold
        except ValueError:
            self.fail("a JSON string")
        self.place = match.end()
        return text

    def _number(self) -> int | float:
        match = _NUMBER.match(self.raw, self.place)
        if match is None or len(match[0]) > MAX_NUMBER_CHARS:
            self.fail("a value")
        is_integer = match[1] is None and match[2] is None
        if not is_integer and not math.isfinite(float(match[0])):
            self.fail("a finite number")
        self.place = match.end()
        return int(match[0]) if is_integer else float(match[0])
