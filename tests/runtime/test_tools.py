"""Tools of functions and of schemas come into the one form that Gemma 4's template reads, or are refused in a line."""

import functools
import json
import math
import typing
from collections.abc import Callable
from types import MappingProxyType
from typing import Annotated, Any, Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.demo.save import CHAT_TEMPLATE
from runtime.chat import ChatTemplate
from runtime.errors import RequestError, ToolCallError
from runtime.tool_calls import ToolCall
from runtime.tools import JSON_TYPES, Tool, check_arguments, result_of, result_text, tool_of, tools_of, with_functions

TEMPLATE = ChatTemplate(CHAT_TEMPLATE.read_text(encoding="utf-8"), {"bos_token": ""})


def rendered(tool: Tool) -> str:
    return TEMPLATE.render([{"role": "user", "content": ""}], tools=[tool.schema], add_generation_prompt=False)


def parameters_of(value: Any) -> dict[str, Any]:
    tool = tool_of(value)
    assert "<|tool>declaration:" in rendered(tool)
    parameters: dict[str, Any] = tool.schema["function"]["parameters"]
    return parameters


def with_property(schema: Any, **more: Any) -> dict[str, Any]:
    return {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}, **more}}


def deep(num_levels: int) -> Any:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(num_levels):
        schema = {"items": schema}
    return schema


# functions


def weather(city: str, days: int = 1, *, unit: Literal["C", "F"] = "C") -> str:
    """Says the weather
    of the next days.

    More that the model is not told.

    Args:
        city: Where,
            with its country: Rome, Italy
        days (int): How many

        unit: Of degrees

    Returns:
        text: a sentence
    """
    return f"{city} {days} {unit}"


class Station:
    def look(self, name: str) -> str:
        return name


def hinted(hint: Any) -> Callable[..., Any]:
    def f(a: Any) -> Any:
        return a

    f.__annotations__["a"] = hint
    return f


def test_a_function_is_described_by_its_signature_and_docstring() -> None:
    assert tool_of(weather).schema == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says the weather of the next days.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"description": "Where, with its country: Rome, Italy", "type": "string"},
                    "days": {"description": "How many", "type": "integer"},
                    "unit": {"description": "Of degrees", "type": "string", "enum": ["C", "F"]},
                },
                "required": ["city"],
            },
        },
    }
    assert 'city:{description:<|"|>Where, with its country: Rome, Italy<|"|>,type' in rendered(tool_of(weather))


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        ("float", {"type": "number"}),
        (Any, {"type": "string"}),
        (list, {"type": "array"}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (list[list[str]], {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}),
        (typing.List[bool], {"type": "array", "items": {"type": "boolean"}}),  # noqa: UP006 - older code has it
        (dict[str, int], {"type": "object"}),
        (int | None, {"type": "integer", "nullable": True}),
        (Optional[str], {"type": "string", "nullable": True}),  # noqa: UP045 - older code has it
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Literal[1, 2] | None, {"type": "integer", "enum": [1, 2], "nullable": True}),
        (Annotated[int, "any words"], {"type": "integer"}),
    ],
)
def test_a_hint_is_a_type(hint: Any, schema: dict[str, Any]) -> None:
    assert parameters_of(hinted(hint)) == {"type": "object", "properties": {"a": schema}, "required": ["a"]}


def test_without_hint_or_docstring() -> None:
    def f(a, b=None):  # type: ignore[no-untyped-def]
        return a, b

    assert tool_of(f).schema["function"]["description"] == ""
    assert parameters_of(f) == {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
        "required": ["a"],
    }
    assert parameters_of(Station().look)["required"] == ["name"]


async def waiting() -> None: ...


async def waiting_often() -> Any:
    yield 1


def with_args(*args: str) -> None: ...


def with_kwargs(**kwargs: str) -> None: ...


def positional(a: str, /) -> None: ...


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda a: a, r"tool '<lambda>': a function needs a name; use def, not lambda$"),
        (functools.partial(weather, "Rome"), r"tool '': a function needs a name"),
        (waiting, r"tool waiting: async functions cannot be run here; wrap it in a plain one$"),
        (waiting_often, r"tool waiting_often: async functions cannot be run here"),
        (with_args, r"tool with_args: parameter args cannot be given by name; list all by name$"),
        (with_kwargs, r"tool with_kwargs: parameter kwargs cannot be given by name"),
        (positional, r"tool positional: parameter a cannot be given by name"),
        (Station, r"tool Station: a class is no function; wrap it in one$"),
        (hinted(bytes), r"tool f: parameter a has type bytes, expected str, int, float, bool, list, dict or Literal$"),
        (hinted(None), r"parameter a has type NoneType, expected str"),
        (hinted(int | str), r"parameter a has type .*, expected str"),
        (hinted(list[bytes]), r"parameter a has type bytes, expected str"),
        (hinted(Literal["a", 1]), r"parameter a has type Literal.*, expected str"),
        (hinted(Callable[[], int]), r"parameter a has type Callable, expected str"),
        (hinted("Missing"), r"tool f: its signature cannot be read: name 'Missing' is not defined$"),
        (hinted("typing.Missing"), r"tool f: its signature cannot be read: module 'typing' has no attribute"),
        (hinted("1 +"), r"tool f: its signature cannot be read: Forward reference must be an expression"),
        (max, r"tool max: "),
        (7, r"a tool must be a function or a JSON schema, got 7$"),
        (None, r"a tool must be a function or a JSON schema, got None$"),
    ],
)
def test_what_cannot_be_called_by_name_is_refused(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        tool_of(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", ["weather", {"name": "f"}, weather, None, iter([weather])])
def test_tools_are_a_list(values: Any) -> None:
    with pytest.raises(RequestError, match=r"^tools must be a list of functions or JSON schemas, got "):
        tools_of(values)


def test_each_tool_has_a_name_of_its_own() -> None:
    assert [tool.name for tool in tools_of([weather, {"name": "f"}])] == ["weather", "f"]
    assert tools_of(()) == ()
    with pytest.raises(RequestError, match=r"^tools: weather is there twice; give each tool a name of its own$"):
        tools_of([weather, {"name": "f"}, {"name": "weather"}])


# JSON schemas


def test_the_forms_of_a_schema() -> None:
    bare = {"name": "f", "description": "Does.", "parameters": {"type": "object", "properties": {"a": {}}}}
    expected = {
        "name": "f",
        "description": "Does.",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    }
    for value in (
        bare,
        {"type": "function", "function": bare},
        {"type": "function", **bare},
        MappingProxyType(bare),
        tool_of(bare),
    ):
        assert tool_of(value).schema == {"type": "function", "function": expected}
    assert tool_of(bare).function is None


def test_a_schema_stays_the_callers() -> None:
    schema = with_property({"anyOf": [{"type": "null"}, {"enum": [1]}]}, required=["b"])
    before = json.dumps(schema)
    tool_of(schema)
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    "function",
    [
        {"name": "f"},
        {"name": "f", "description": None, "parameters": None},
        {"name": "f", "parameters": {}},
        {"name": "f", "parameters": {"type": "object"}},
        {"name": "f", "parameters": {"properties": None}},
        {"name": "f", "parameters": {"type": "object", "properties": {}, "required": []}},
    ],
)
def test_no_parameters(function: dict[str, Any]) -> None:
    assert parameters_of(function) == {"type": "object", "properties": {}}
    assert tool_of(function).schema["function"]["description"] == ""
    check_arguments(tool_of(function), ToolCall("f", {}))


NULLABLE = {"type": "string", "nullable": True}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, {"type": "string"}),
        (True, {"type": "string"}),
        (False, {"type": "string"}),
        ("no schema", {"type": "string"}),
        ({"type": "unknown"}, {"type": "string"}),
        ({"type": ["string", "null"]}, NULLABLE),
        ({"type": ["null", "integer", "string"]}, {"type": "integer", "nullable": True}),
        ({"type": ["null"]}, {"type": "null"}),
        ({"type": []}, {"type": "string"}),
        ({"type": [7]}, {"type": "string"}),
        ({"enum": ["a", "b"]}, {"type": "string", "enum": ["a", "b"]}),
        ({"enum": [1]}, {"type": "integer", "enum": [1]}),
        ({"enum": [None, 1.5]}, {"type": "number", "enum": [None, 1.5], "nullable": True}),
        ({"enum": [None]}, {"type": "string", "enum": [None], "nullable": True}),
        ({"enum": 7}, {"type": "string"}),
        ({"const": True}, {"type": "boolean", "enum": [True]}),
        ({"const": {"a": 1}}, {"type": "object", "enum": [{"a": 1}]}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, NULLABLE),
        ({"oneOf": [{"type": "null"}, {"enum": [1]}]}, {"type": "integer", "enum": [1], "nullable": True}),
        ({"anyOf": [{"type": "null"}]}, {"type": "null"}),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, {"type": "integer"}),
        ({"anyOf": [{"const": 1}, {"const": 2}]}, {"type": "integer"}),
        ({"anyOf": [True, {"type": "null"}]}, NULLABLE),
        ({"anyOf": 7}, {"type": "string"}),
        ({"description": "x", "allOf": [{"type": "integer"}]}, {"description": "x", "type": "integer"}),
        ({"items": {}}, {"type": "array", "items": {"type": "string"}}),
        ({"items": True}, {"type": "array"}),
        ({"items": [{"type": "string"}]}, {"type": "array"}),
        ({"prefixItems": [{}], "items": False}, {"type": "array", "prefixItems": [{}]}),
        ({"type": "array", "items": {"enum": [1]}}, {"type": "array", "items": {"type": "integer", "enum": [1]}}),
        ({"properties": {"b": {}}}, {"type": "object", "properties": {"b": {"type": "string"}}}),
        ({"type": "object", "properties": 7}, {"type": "object"}),
        (
            {"required": ["b", 7]},
            {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]},
        ),
        (
            {
                "allOf": [{"properties": {"b": {"type": "integer"}}}, {"properties": {"c": {}}, "required": ["c"]}],
                "properties": {"b": {"type": "number"}},
                "required": ["b"],
            },
            {
                "type": "object",
                "properties": {"c": {"type": "string"}, "b": {"type": "number"}},
                "required": ["b", "c"],
            },
        ),
        ({"type": "string", "required": True}, {"type": "string"}),
        ({"type": "string", "description": 7, "nullable": "no"}, {"type": "string"}),
        (
            {"properties": {"$ref": {"type": "string"}}, "default": {"$ref": "#"}},
            {"type": "object", "properties": {"$ref": {"type": "string"}}, "default": {"$ref": "#"}},
        ),
    ],
)
def test_an_odd_schema_gets_one_type(schema: Any, expected: dict[str, Any]) -> None:
    assert parameters_of(with_property(schema))["properties"]["a"] == expected


def test_branches_of_the_parameters_themselves_are_kept() -> None:
    parameters = {"allOf": [{"properties": {"b": {}}}, {"required": ["c"]}], "additionalProperties": False}
    made = parameters_of({"name": "f", "parameters": parameters})
    assert (made["type"], set(made["properties"]), made["required"]) == ("object", {"b", "c"}, ["c"])


keywords = st.sampled_from(
    ["type", "properties", "items", "anyOf", "allOf", "enum", "const", "required", "description", "nullable", "a"]
)
leaves = st.sampled_from([*JSON_TYPES, "a", None, True, 1, ["string", "null"], ["a"]])
schemas = st.recursive(
    leaves, lambda inner: st.dictionaries(keywords, inner, max_size=4) | st.lists(inner, max_size=3), max_leaves=20
)


@settings(deadline=None)
@given(schemas)
def test_any_schema_renders_or_is_refused_and_normalizing_twice_changes_nothing(schema: Any) -> None:
    try:
        tool = tool_of(with_property(schema))
    except RequestError:
        return
    assert tool_of(tool.schema).schema == tool.schema
    assert rendered(tool)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, r"^tool: name is None, expected up to 128 letters, digits, _, - and \., the first no digit$"),
        ({"name": "a b"}, r"^tool: name is 'a b', expected"),
        ({"name": "é"}, r"^tool: name is 'é', expected"),
        ({"name": "a" * 129}, r"^tool: name is 'aaa.*, expected"),
        ({"name": "f<tool|>"}, r"^tool: name is 'f<tool\|>', expected"),
        ({"type": "function", "function": "f"}, r"^tool: function is 'f', expected an object with a name$"),
        ({"name": "f", "description": 7}, r"^tool f: description must be text and parameters a JSON schema$"),
        ({"name": "f", "parameters": []}, r"^tool f: description must be text and parameters a JSON schema$"),
        ({"name": "f", "parameters": {"type": "array"}}, r"^tool f: parameters has type 'array', expected 'object'$"),
        (with_property({"$ref": "#/x"}), r"^tool f: \$ref is not resolved here; write the schema in place$"),
        (with_property({"items": {"$dynamicRef": "#x"}}), r"^tool f: \$dynamicRef is not resolved here"),
        (with_property({"anyOf": [{}, {"type": "null"}, {"$ref": "http://x"}]}), r"^tool f: \$ref is not resolved"),
        (with_property({"additionalProperties": {"$ref": "#"}}), r"^tool f: \$ref is not resolved here"),
        ({"name": "f", "parameters": {"$ref": "#"}}, r"^tool f: \$ref is not resolved here"),
        ({"name": "f", "x": {1, 2}}, r"^a tool's schema must be plain JSON of at most 64 levels: Object of type set"),
        (with_property({"const": math.nan}), r"must be plain JSON of at most 64 levels: Out of range float"),
        (with_property(deep(60_000)), r"must be plain JSON of at most 64 levels: it is nested too deeply$"),
        (with_property(deep(200)), r"^a tool's schema has 2,\d\d\d characters and 20\d levels, at most 262,144 and 64"),
        (
            {"name": "f", "description": "x" * 300_000},
            r"^a tool's schema has 300,\d\d\d characters and 1 levels, at most 262,144 and 64 are read; describe the",
        ),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        tool_of(value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_deepest_schema_renders() -> None:
    assert rendered(tool_of(with_property(deep(60)))).count("items:{") == 60


# arguments and results

CHECKED = tool_of(
    {
        "name": "f",
        "parameters": {
            "properties": {
                "text": {"type": "string"},
                "n": {"type": "integer"},
                "x": {"type": "number"},
                "yes": {"type": "boolean"},
                "some": {"type": "array"},
                "map": {"type": "object"},
                "unit": {"enum": ["C", "F"]},
                "maybe": {"type": ["integer", "null"], "enum": [1, 2]},
                "nothing": {"type": "null"},
            },
            "required": ["text"],
        },
    }
)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"n": -1}, {"x": 1}, {"x": 1.5}, {"yes": False}, {"some": []}, {"map": {"a": 1}}),
        *({"unit": "C"}, {"maybe": 2}, {"maybe": None}, {"nothing": None}),
    ],
)
def test_arguments_that_fit(arguments: dict[str, Any]) -> None:
    check_arguments(CHECKED, ToolCall("f", {"text": "", **arguments}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"^f: argument text is missing: '{}'$"),
        ({"text": "", "other": 1}, r"^f: there is no argument 'other'"),
        ({"text": 7}, r"^f: argument text is 7, expected string: '{\"text\": 7}'$"),
        ({"text": None}, r"^f: argument text is None, expected string"),
        ({"text": "", "n": True}, r"^f: argument n is True, expected integer"),
        ({"text": "", "n": 1.0}, r"^f: argument n is 1.0, expected integer"),
        ({"text": "", "x": False}, r"^f: argument x is False, expected number"),
        ({"text": "", "yes": 1}, r"^f: argument yes is 1, expected boolean"),
        ({"text": "", "some": {}}, r"^f: argument some is {}, expected array"),
        ({"text": "", "map": []}, r"^f: argument map is \[\], expected object"),
        ({"text": "", "unit": "K"}, r"^f: argument unit is 'K', expected one of \['C', 'F'\]"),
        ({"text": "", "maybe": 3}, r"^f: argument maybe is 3, expected one of \[1, 2\]"),
        ({"text": "", "nothing": 0}, r"^f: argument nothing is 0, expected null"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolCallError, match=message) as caught:
        check_arguments(CHECKED, ToolCall("f", arguments))
    assert json.loads(caught.value.raw) == arguments


def test_null_fits_an_optional_literal() -> None:
    def f(a: Literal["x"] | None = None) -> str:
        return str(a)

    assert result_of([tool_of(f)], ToolCall("f", {"a": None})) == "None"


def returning(value: Any) -> Tool:
    def f() -> Any:
        return value

    return tool_of(f)


def raising(error: BaseException) -> Tool:
    def f() -> None:
        raise error

    return tool_of(f)


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        (returning("é\n"), "é\n"),
        (returning({"é": [1, None, True]}), '{"é": [1, null, true]}'),
        (returning(None), "null"),
        (returning({1, 2}), r"error: RequestError: a tool's result must be text or JSON: Object of type set is not"),
        (returning(math.inf), "error: RequestError: a tool's result must be text or JSON: Out of range float"),
        (returning(deep(60_000)), "error: RequestError: a tool's result must be text or JSON: maximum recursion"),
        (returning("\ud800"), "error: RequestError: a tool's result must be text or JSON: 'utf-8' codec can't"),
        (returning(["\ud800"]), "error: RequestError: a tool's result must be text or JSON: 'utf-8' codec can't"),
        (raising(KeyError("x")), "error: KeyError: 'x'"),
        (raising(OSError("\udcff")), "error: OSError: \\udcff"),
    ],
)
def test_the_model_is_told_what_came_of_a_call(tool: Tool, text: str) -> None:
    assert result_of([tool], ToolCall("f", {})).startswith(text)


def test_a_call_is_run_with_its_arguments_or_not_at_all() -> None:
    tools = tools_of([weather, {"name": "elsewhere"}])
    assert result_of(tools, ToolCall("weather", {"city": "Rome", "unit": "F"})) == "Rome 1 F"
    assert result_of(tools, ToolCall("weather", {})).startswith("error: ToolCallError: weather: argument city is missi")
    assert result_of(tools, ToolCall("other", {})) == "error: there is no tool other that can be run here"
    assert result_of(tools, ToolCall("elsewhere", {})) == "error: there is no tool elsewhere that can be run here"


def test_an_interrupt_is_no_result() -> None:
    with pytest.raises(KeyboardInterrupt):
        result_of([raising(KeyboardInterrupt())], ToolCall("f", {}))


def test_a_result_that_is_neither_text_nor_json_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^a tool's result must be text or JSON: Object of type object is not JSON"):
        result_text(object())


def test_functions_join_schemas_of_their_names() -> None:
    [first, second] = with_functions(tools_of([{"name": "weather"}, {"name": "f"}]), tools_of([weather]))
    assert (first.function, second.function) == (weather, None)
    assert first.schema["function"]["parameters"] == {"type": "object", "properties": {}}
