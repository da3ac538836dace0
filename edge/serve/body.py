"""Reads a request's body: JSON of bounded size and depth, or an error that says what is wrong with it."""

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from edge.serve.errors import ServeError, bad_request

MAX_DEPTH = 128  # of objects and lists within each other; a schema's own limit is lower
BODY_SECONDS = 60.0  # in which a body must have arrived


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object that is the body.

    Raises:
        ServeError: it is of another type (415), too large (413), too slow (408), or no such JSON (400).
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ServeError(415, f"content-type is {content_type or 'missing'!r:.80}, expected application/json")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            raw = await _read(request, max_bytes)
    except TimeoutError:
        raise ServeError(408, f"the body did not arrive within {BODY_SECONDS:g} s; send it again") from None
    return parse_object(raw)


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of some bytes; raises ServeError where they are none."""
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # UnicodeDecodeError and numbers of too many digits too
        raise bad_request(f"the body is not JSON: {error}"[:300]) from None
    if not isinstance(value, dict):
        raise bad_request(f"the body is a JSON {type(value).__name__}, expected an object")
    _check_depth(value)
    return value


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > max_bytes:
        raise _too_large(f"{int(declared):,} bytes", max_bytes)
    body = bytearray()
    async for chunk in request.stream():  # in chunks no length is declared
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(f"more than {max_bytes:,} bytes", max_bytes)
    return bytes(body)


def _too_large(found: str, max_bytes: int) -> ServeError:
    message = f"the body has {found}, at most {max_bytes:,} are read; send less or start with a larger --max-body"
    return ServeError(413, message, headers={"Connection": "close"})


def _check_depth(value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner = (one for item in level for one in (item.values() if isinstance(item, dict) else _items(item)))
        level = [one for one in inner if isinstance(one, dict | list)]
        if not level:
            return
    raise _too_deep()


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _too_deep() -> ServeError:
    return bad_request(f"the body is nested deeper than {MAX_DEPTH}; flatten it")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")
