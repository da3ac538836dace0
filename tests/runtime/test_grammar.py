"""What can be refused without tokens is, on one line; what cannot is well-formed."""

import json
import math
import re
from types import MappingProxyType
from typing import Any

import pytest

from runtime.errors import RequestError
from runtime.grammar import Grammar, choice, json_object, json_schema, lark, regex


def nested(depth: int, keyword: str = "items") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {keyword: schema}
    return schema


def references(count: int) -> dict[str, Any]:
    chain = {f"a{index}": {"$ref": f"#/$defs/a{index + 1}"} for index in range(count)}
    return {"$defs": {**chain, f"a{count}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def cyclic() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    return schema


def doubling() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(60):
        schema = {"a": schema, "b": schema}
    return schema


def patterns(count: int) -> dict[str, Any]:
    return {"allOf": [{"type": "string", "pattern": f".*{chr(97 + index)}.*"} for index in range(count)]}


def rules(grammar: Grammar) -> str:
    text, _, directive = json.loads(grammar.source)["grammars"][0]["lark_grammar"].rpartition("\n")
    assert directive == '%llguidance {"no_forcing": true}'
    return str(text)


def test_a_schema_is_kept_in_its_order() -> None:
    schema = {"type": "object", "properties": {"z": {"const": "é"}, "a": {"enum": (1, 2.5, True, None)}}}
    kept = json.loads(rules(json_schema(MappingProxyType(schema))).removeprefix("start: %json "))
    assert list(kept["properties"]) == ["z", "a"]
    assert kept["properties"]["a"] == {"enum": [1, 2.5, True, None]}
    assert json_schema(schema) == json_schema(json.dumps(schema))
    assert json_object() == json_schema('{"type": "object"}')


REFUSED = [
    (True, "schema must be a JSON object, got True"),
    ([], r"schema must be a JSON object, got \[\]"),
    ("[1]", r"schema must be a JSON object, got \[1\]"),
    ("{", "schema is not JSON: .* line 1 column 2"),
    ('{"a": NaN}', "schema has the number NaN, expected finite"),
    ('{"a": 1, "a": 2}', "schema has a key twice in an object of 2 keys"),
    ('{"a": "\ud800"}', "schema: character 7 is a lone surrogate"),
    ('{"a": "\\ud800"}', "schema: a key or value: character 0 is a lone surrogate"),
    ('{"a": 1e999}', "schema has a value of inf, expected a finite number, integers below 2.63"),
    ('{"items":' * 60_000 + "{}" + "}" * 60_000, "schema has 600,002 bytes, expected at most 262,144"),
    ('{"a":' * 30_000 + "{}" + "}" * 30_000, "schema is nested deeper than 64; flatten it or use recursive"),
    (nested(64), "schema is nested deeper than 64"),
    (cyclic(), "schema is nested deeper than 64"),
    (doubling(), "schema has more than 262,144 bytes"),
    ({"enum": ["x" * 300_000]}, "schema: a key or value has 300,000 bytes, expected at most 262,144"),
    ({"const": 2**63}, "schema has a value of 64 bits, expected a finite number, integers below"),
    ({"const": math.nan}, "schema has a value of nan, expected a finite number"),
    ({"const": {1, 2}}, r"schema has a value of \{1, 2\}, expected JSON"),
    ({1: {}}, "schema: a key or value must be a string, got 1"),
    ({"$ref": "http://example.org/a"}, "schema refers to 'http://example.org/a', and nothing is looked up"),
    ({"items": {"$ref": "other.json#/a"}}, "schema refers to 'other.json#/a'"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "schema has the key 'x-guidance', which would switch checks off"),
    (references(3000), "schema has 3,001 references and is 3 deep: 9,006 levels, expected at most 8,192"),
    ({"properties": {str(index): {} for index in range(513)}}, "schema has 513 properties in an object, .* most 512"),
    ({"patternProperties": {str(n): {} for n in range(33)}}, "schema has 33 patternProperties .* at most 32"),
    ({"type": "string", "maxLength": 5000}, "schema has maxLength 5,000, expected at most 4,096; leave it out"),
    (patterns(13), "schema joins schemas and has 13 patterns and formats, expected at most 12"),
    ({"type": "integer", "multipleOf": 999_983}, "least common multiple is above 100,000"),
    ({"allOf": [{"multipleOf": 97}, {"multipleOf": 89}, {"multipleOf": 0.83}]}, "multiple is above 100,000"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_schema_that_cannot_be_served_is_refused_on_one_line(schema: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        json_schema(schema)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("schema", [nested(63), references(2700), patterns(12), {"multipleOf": 0.01, "const": 5}])
def test_a_schema_at_its_limits_is_taken(schema: dict[str, Any]) -> None:
    assert isinstance(json_schema(schema), Grammar)


def test_a_regex_is_written_between_slashes() -> None:
    assert rules(regex("a/b\\/\\\\/\n")) == r"start: /a\/b\/\\\/\n/"


def test_texts_are_checked() -> None:
    with pytest.raises(RequestError, match="regex must be a string, got None"):
        regex(None)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="regex has 40,000 bytes, expected at most 32,768; shorten it"):
        regex("a" * 40_000)
    with pytest.raises(RequestError, match="regex: character 1 is a lone surrogate"):
        regex("a\ud800")
    with pytest.raises(RequestError, match=re.escape("choices must be a list of at least one string, got 'ab'")):
        choice("ab")
    with pytest.raises(RequestError, match=re.escape("choices must be a list of at least one string, got []")):
        choice([])
    with pytest.raises(RequestError, match="a choice must be a string, got 1"):
        choice([1])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="choices has 300,.* bytes, expected at most 263,168"):
        choice(["x" * 100_000] * 3)
    with pytest.raises(RequestError, match="Lark grammar is empty, expected a rule 'start: ...'"):
        lark(" \n")
    with pytest.raises(RequestError, match="Lark grammar has %json, which cannot be checked"):
        lark("start: %json {}")
    with pytest.raises(RequestError, match="Lark grammar has %llguidance, which cannot be checked"):
        lark('start: "a"\n%llguidance {}')
    with pytest.raises(RequestError, match="Lark grammar has 40,000 bytes, expected at most 32,768"):
        lark("a" * 40_000)
