"""Random JSON schemas of what structured output supports, the same ones for the same seed."""

import random
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]

NAMES = ("name", "size", "kind", "tags", "größe", 'a "quoted" key', "x", "nested item")
PATTERNS = ("^[a-z]{2,5}$", "^(red|green|blue)$", r"^\d{3}-\d{2}$", "^[A-Z][a-z]*$")
CONSTANTS = (0, -7, 2.5, True, None, "text", 'q"\\\n', "é😀", [1, "a"], {"k": None})


def random_schemas(count: int, seed: int) -> Iterator[Schema]:
    """Objects, mostly, as a caller would ask for them."""
    rng = random.Random(seed)
    for _ in range(count):
        yield _object(rng, 2) if rng.random() < 0.8 else _any(rng, 2)


def _any(rng: random.Random, depth: int) -> Schema:
    flat: list[Callable[[random.Random], Schema]] = [_integer, _number, _string, _enum, _const, _boolean, _null]
    deep: list[Callable[[random.Random, int], Schema]] = [_object, _array, _any_of]
    return rng.choice(deep)(rng, depth - 1) if depth and rng.random() < 0.5 else rng.choice(flat)(rng)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(NAMES, rng.randrange(5))
    schema: Schema = {"type": "object", "properties": {name: _any(rng, depth) for name in names}}
    if rng.random() < 0.7:
        schema["required"] = [name for name in names if rng.random() < 0.6]
    if rng.random() < 0.8:
        schema["additionalProperties"] = False if rng.random() < 0.8 else _any(rng, 0)
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "array", "items": _any(rng, depth), "maxItems": rng.randrange(2, 5)}
    if rng.random() < 0.5:
        schema["minItems"] = rng.randrange(3)
    if rng.random() < 0.2:
        schema["prefixItems"] = [_any(rng, 0)]
    return schema


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randrange(1, 4))]}


def _integer(rng: random.Random) -> Schema:
    low = rng.randrange(-1000, 1000)
    bounds = {"minimum": low, "maximum": low + rng.randrange(500), "exclusiveMaximum": low + 700}
    return {"type": "integer", **{key: value for key, value in bounds.items() if rng.random() < 0.7}}


def _number(rng: random.Random) -> Schema:
    return {"type": "number", "minimum": rng.choice([-1.5, 0, 2]), "maximum": rng.choice([2.25, 10, 99.5])}


def _string(rng: random.Random) -> Schema:
    if rng.random() < 0.4:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    low = rng.randrange(4)
    lengths = {"minLength": low, "maxLength": low + rng.randrange(8)}
    return {"type": "string", **{key: value for key, value in lengths.items() if rng.random() < 0.7}}


def _enum(rng: random.Random) -> Schema:
    return {"enum": rng.sample(CONSTANTS, rng.randrange(1, 5))}


def _const(rng: random.Random) -> Schema:
    return {"const": rng.choice(CONSTANTS)}


def _boolean(rng: random.Random) -> Schema:
    return {"type": "boolean"}


def _null(rng: random.Random) -> Schema:
    return {"type": rng.choice(["null", ["null", "integer"]])}
