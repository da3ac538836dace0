"""What a generated text must match, as llguidance's grammar text. Knows no tokens: `grammar_compiler` does.

What is refused here would crash the compiler or hold it up, which bounds neither a schema's stack nor its time.

Source: llguidance 1.9.1, docs/json_schema.md and docs/syntax.md.
"""

import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn

from runtime.errors import RequestError

MAX_DEPTH = 64  # of a schema's objects and arrays, one within the other
MAX_SCHEMA_BYTES = 256 * 1024
MAX_RULES_BYTES = 32 * 1024  # of a regex or Lark text; a chain of rules as long takes 20 MiB of stack
MAX_LEVELS = 8192  # of a schema whose references are followed; the worst seen takes 5 KiB of stack for each
MAX_PROPERTIES = 512  # of one object; compiling takes their square, 0.5 s for 2,500
MAX_PATTERN_PROPERTIES = 32  # compared pair by pair, 15 s for 400
MAX_JOINED_PATTERNS = 12  # an intersection takes twice the time for each one more, 28 s for 20
MAX_MULTIPLE = 100_000  # states of a number's remainder: 0.15 s, and 7 s for 700,000
MAX_LENGTH = 4096  # of a string that has bounds: it takes 8 states for each character, of 50,000 that there may be
# One space, or one line break and its indent. Were more allowed, a model could write nothing else for ever.
WHITESPACE = r"(?: |\n {0,32})?"
# Without it a mask allows one tokenization of bytes that must come, and so fewer tokens than a draft is checked for.
NO_FORCING = '%llguidance {"no_forcing": true}'

_MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar that was checked as far as it can be without tokens."""

    source: str  # llguidance's JSON form of one Lark text


def json_schema(schema: Mapping[str, Any] | str) -> Grammar:
    """JSON that a schema (draft 2020-12) accepts, with its properties in the schema's order.

    Keywords that cannot be enforced are refused when the grammar is compiled, none is ignored; unknown ones are
    annotations.

    Raises:
        RequestError: `schema` is no plain JSON object, is too deep, large or costly, or refers to another document.
    """
    value = _parsed(schema) if isinstance(schema, str) else schema
    if not isinstance(value, Mapping):
        raise RequestError(f"schema must be a JSON object, got {reprlib.repr(value)}")
    plain = _PlainCopy().of(value)
    if "x-guidance" in plain:
        raise RequestError("schema has the key 'x-guidance', which would switch checks off; remove it")
    _check_cost(list(_objects(plain)), _depth(plain))
    plain["x-guidance"] = {"whitespace_pattern": WHITESPACE}
    return _grammar(f"start: %json {json.dumps(plain, ensure_ascii=False, separators=(',', ':'))}", "schema")


def json_object() -> Grammar:
    """Any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> Grammar:
    """Text that a regular expression matches as a whole; Rust's syntax, without look-around and back-references."""
    _check_text("regex", pattern, MAX_RULES_BYTES)
    escaped = pattern.replace("\n", r"\n")
    return _grammar(f"start: /{_escaped_slashes(escaped)}/", "regex")


def choice(texts: Sequence[str]) -> Grammar:
    """One of `texts`, word for word."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise RequestError(f"choices must be a list of at least one string, got {reprlib.repr(texts)}")
    for text in texts:
        _check_text("a choice", text, MAX_SCHEMA_BYTES)
    # a terminal: as alternatives of a rule 10,000 would each be looked for at once, and most not found
    return _grammar(f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, texts))}", "choices")


def lark(grammar: str) -> Grammar:
    """Text of a grammar in llguidance's variant of Lark, whose first rule is `start`; its tokens stay plain text."""
    _check_text("Lark grammar", grammar, MAX_RULES_BYTES)
    if not grammar.strip():
        raise RequestError("Lark grammar is empty, expected a rule 'start: ...'")
    for directive in ("%json", "%llguidance"):
        if directive in grammar:
            raise RequestError(f"Lark grammar has {directive}, which cannot be checked; leave it out")
    return _grammar(grammar, "Lark grammar")


def _grammar(rules: str, name: str) -> Grammar:
    _check_text(name, rules, MAX_SCHEMA_BYTES + 1024)  # its frame
    return Grammar(json.dumps({"grammars": [{"lark_grammar": f"{rules}\n{NO_FORCING}"}]}))


def _check_text(name: str, text: object, max_bytes: int) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{name} must be a string, got {reprlib.repr(text)}")
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}: character {error.start:,} is a lone surrogate and no Unicode text") from error
    if num_bytes > max_bytes:
        raise RequestError(f"{name} has {num_bytes:,} bytes, expected at most {max_bytes:,}; shorten it")


def _escaped_slashes(pattern: str) -> str:
    """`pattern` so that no slash ends it; one behind a backslash already is escaped."""
    characters = iter(pattern)
    pieces = (char + next(characters, "") if char == "\\" else char.replace("/", r"\/") for char in characters)
    return "".join(pieces)


def _parsed(text: str) -> object:
    _check_text("schema", text, MAX_SCHEMA_BYTES)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RequestError:
        raise
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise RequestError(f"schema is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise RequestError(f"schema has a key twice in an object of {len(pairs)} keys, expected each once")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise RequestError(f"schema has the number {text}, expected finite ones")


def _too_deep() -> RequestError:
    return RequestError(f"schema is nested deeper than {MAX_DEPTH}; flatten it or use recursive references")


class _PlainCopy:
    """Copies plain JSON and counts what it copies: shared parts make a small schema a huge text."""

    def __init__(self) -> None:
        self._num_bytes = 0

    def of(self, value: object, depth: int = 0) -> Any:
        """`value` in dicts, lists and what JSON has; raises RequestError where it is anything else."""
        self._count(1)
        if depth >= MAX_DEPTH and isinstance(value, (Mapping, list, tuple)):
            raise _too_deep()
        if isinstance(value, Mapping):
            return {self._key(key): self.of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(item, depth + 1) for item in value]
        return self._key(value) if isinstance(value, str) else _plain_number(value)

    def _key(self, key: object) -> str:
        _check_text("schema: a key or value", key, MAX_SCHEMA_BYTES)
        self._count(len(str(key)))
        return str(key)

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > MAX_SCHEMA_BYTES:
            raise RequestError(f"schema has more than {MAX_SCHEMA_BYTES:,} bytes; shorten it")


def _plain_number(value: object) -> bool | int | float | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= _MAX_INTEGER:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    expected = "a finite number, integers below 2^63" if isinstance(value, (int, float)) else "JSON"
    kind = f"{value.bit_length():,} bits" if isinstance(value, int) else reprlib.repr(value)
    raise RequestError(f"schema has a value of {kind}, expected {expected}")


def _depth(value: object) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(_depth, items), default=0)


def _objects(value: object) -> Iterator[dict[str, Any]]:
    """Every object of plain JSON, data in `const` or `enum` too."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(item)


def _check_cost(objects: list[dict[str, Any]], depth: int) -> None:
    """Raises RequestError for what the compiler would take too much stack or time for."""
    references = {ref for found in objects if isinstance(ref := found.get("$ref"), str)}
    for reference in references:
        if not reference.startswith("#"):
            raise RequestError(
                f"schema refers to {reprlib.repr(reference)}, and nothing is looked up; put it into $defs and refer "
                "to '#/$defs/...'"
            )
    if (num_levels := (len(references) + 1) * depth) > MAX_LEVELS:
        raise RequestError(
            f"schema has {len(references):,} references and is {depth} deep: {num_levels:,} levels, expected at most "
            f"{MAX_LEVELS:,}; flatten it or refer to less"
        )
    for keyword, most in (("properties", MAX_PROPERTIES), ("patternProperties", MAX_PATTERN_PROPERTIES)):
        largest = max((len(found[keyword]) for found in objects if isinstance(found.get(keyword), dict)), default=0)
        if largest > most:
            raise RequestError(f"schema has {largest:,} {keyword} in an object, expected at most {most:,}; split it")
    for keyword in ("minLength", "maxLength"):
        longest = max((found[keyword] for found in objects if isinstance(found.get(keyword), (int, float))), default=0)
        if longest > MAX_LENGTH:
            raise RequestError(f"schema has {keyword} {longest:,}, expected at most {MAX_LENGTH:,}; leave it out")
    _check_joined(objects)
    _check_multiples(objects)


def _check_joined(objects: list[dict[str, Any]]) -> None:
    joining = ("$ref", "anyOf", "oneOf", "pattern", "format")
    if any("allOf" in found or sum(key in found for key in joining) > 1 for found in objects):
        patterns = {str(found[key]) for found in objects for key in ("pattern", "format") if key in found}
        if len(patterns) > MAX_JOINED_PATTERNS:
            raise RequestError(
                f"schema joins schemas and has {len(patterns):,} patterns and formats, expected at most "
                f"{MAX_JOINED_PATTERNS} beside allOf or siblings of a reference; join them by hand"
            )


def _check_multiples(objects: list[dict[str, Any]]) -> None:
    """Multiples may be joined, so what counts is their least common one, in units of their last decimal place."""
    values = {found["multipleOf"] for found in objects if isinstance(found.get("multipleOf"), (int, float))}
    fractions = [Fraction(repr(value)) for value in values if not isinstance(value, bool) and value > 0]
    unit = math.lcm(*(fraction.denominator for fraction in fractions))
    if math.lcm(*(int(fraction * unit) for fraction in fractions)) > MAX_MULTIPLE:
        raise RequestError(
            f"schema has multipleOf whose least common multiple is above {MAX_MULTIPLE:,}; choose rounder or fewer ones"
        )
