"""Strict reading of JSON, and of manifest.json: plain values in, one-line ArtifactErrors that name the field out.

Knows the shape of no field: `runtime.manifest` does.
"""

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from runtime.errors import ArtifactError

MANIFEST = "manifest.json"
WAY_OUT = "copy the artifact again or re-export it with edge-export"

Choice = TypeVar("Choice", bound=str)

_MAX_INTEGER = 2**63 - 1


class JsonError(ValueError):
    """What is wrong with a JSON text, worded to follow the name of its file."""


def parse(content: bytes) -> object:
    """The values of manifest.json: UTF-8 without BOM, no key twice, finite numbers only."""
    try:
        return json_values(content)
    except JsonError as fault:
        raise ArtifactError(f"{MANIFEST}{fault}; {WAY_OUT}") from fault


def json_values(content: bytes) -> object:
    """The values of any JSON text, as strictly as `parse`; raises JsonError."""
    if content.startswith(b"\xef\xbb\xbf"):
        raise JsonError(" starts with a byte order mark, expected plain UTF-8")
    try:
        text = content.decode()
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    except JsonError:
        raise
    except UnicodeDecodeError as error:
        raise JsonError(f" is not UTF-8 at byte {error.start:,}") from error
    except RecursionError as error:
        raise JsonError(" is nested too deep to be read") from error
    except ValueError as error:
        raise JsonError(f" is not JSON: {error}") from error


def object_of(value: object, field: str, names: Sequence[str] | None = None) -> dict[str, Any]:
    """`value` if it is an object; with `names`, one of exactly these keys."""
    if not isinstance(value, dict):
        raise bad_field(field, value, "an object")
    for name in names or ():
        if name not in value:
            raise ArtifactError(f"{MANIFEST}: {field} lacks {name!r}; {WAY_OUT}")
    for name in value:
        if names and name not in names:
            raise ArtifactError(f"{MANIFEST}: {field} has the unknown key {reprlib.repr(name)}; {WAY_OUT}")
    return value


def integer(value: object, field: str, low: int) -> int:
    """`value` if it is an integer of `low` to 2^63 - 1; True and 1.0 are none."""
    if type(value) is not int or not low <= value <= _MAX_INTEGER:
        raise bad_field(field, value, f"an integer of {low} to 2^63 - 1")
    return value


def string(value: object, field: str) -> str:
    """`value` if it is a string."""
    if not isinstance(value, str):
        raise bad_field(field, value, "a string")
    return value


def list_of(value: object, field: str) -> list[Any]:
    """`value` if it is a list."""
    if not isinstance(value, list):
        raise bad_field(field, value, "a list")
    return value


def one_of(value: object, field: str, choices: Sequence[Choice]) -> Choice:
    """`value` if it is one of the choices."""
    for choice in choices:
        if value == choice:
            return choice
    raise bad_field(field, value, " or ".join(choices))


def sha256_digest(value: object, field: str) -> str:
    """`value` if it is a SHA-256 in lower-case hexadecimal digits."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        length = f" of {len(value)} characters" if isinstance(value, str) else ""
        raise bad_field(field, value, "a SHA-256 of 64 hexadecimal digits", length)
    return value


def bad_field(field: str, found: object, expected: str, detail: str = "") -> ArtifactError:
    """The error of one field; `found` is shortened, so a hostile value stays one line."""
    return ArtifactError(f"{MANIFEST}: {field} is {reprlib.repr(found)}{detail}, expected {expected}; {WAY_OUT}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        [(name, times)] = Counter(name for name, _ in pairs).most_common(1)
        raise JsonError(f": key {reprlib.repr(name)} is there {times} times, expected once")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise JsonError(f": a number is {reprlib.repr(text)}, expected a finite one")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse_constant(text)
    return value
