"""Tools that a model may call: Python functions, described by their signatures, or JSON schemas of tools elsewhere.

Schemas are brought into the form that Gemma 4's chat template reads: each property has one `type`, a string. The
template raises an error on what else JSON Schema allows, such as an enum without a type.
"""

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from profiles.errors import shown
from runtime.errors import RequestError, ToolCallError
from runtime.tool_calls import NAME, ToolCall

MAX_DEPTH = 64
MAX_SCHEMA_CHARS = 256 * 1024
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
DATA = ("enum", "const", "default", "examples")  # keywords that hold values, not schemas

_ARGS_SECTION = re.compile(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", re.MULTILINE)
# a name, perhaps a type, and what is said of it, on further lines too where these are indented more
_ARGUMENT = re.compile(r"^[ \t]{1,8}(\w+)(?: \([^)]*\))?: (.*(?:\n[ \t]{5,}\S.*)*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool: {"type": "function", "function": {"name", "description", "parameters"}}, and what it runs, if any."""

    schema: dict[str, Any]
    function: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """What the model calls it by."""
        return str(self.schema["function"]["name"])


ToolLike = Callable[..., Any] | Mapping[str, Any] | Tool


def tools_of(values: Sequence[Any]) -> tuple[Tool, ...]:
    """Tools from functions and schemas; raises RequestError where one is not usable or a name is there twice."""
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise RequestError(f"tools must be a list of functions or JSON schemas, got {shown(values):.60}")
    tools = tuple(map(tool_of, values))
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"tools: {name} is there twice; give each tool a name of its own")
    return tools


def tool_of(value: Any) -> Tool:
    """A tool from a function, an OpenAI tool schema, or what such a schema holds under "function"."""
    if isinstance(value, Tool):
        return value
    if isinstance(value, Mapping):
        return Tool(_checked_schema(value))
    if not callable(value):
        raise RequestError(f"a tool must be a function or a JSON schema, got {shown(value):.60}")
    return Tool(_function_schema(value), value)


def check_arguments(tool: Tool, call: ToolCall) -> None:
    """Raises ToolCallError where arguments are missing, unknown or of another JSON type than the tool's."""
    parameters = tool.schema["function"].get("parameters") or {}
    properties = parameters.get("properties") or {}
    raw = json.dumps(call.arguments, ensure_ascii=False)
    for name in parameters.get("required") or ():
        if name not in call.arguments:
            raise ToolCallError(f"{tool.name}: argument {name} is missing", raw)
    for name, value in call.arguments.items():
        if name not in properties:
            raise ToolCallError(f"{tool.name}: there is no argument {shown(name):.60}", raw)
        _check_value(tool, name, value, properties[name], raw)


def result_of(tools: Sequence[Tool], call: ToolCall) -> str:
    """What the model is told of a call: the function's result, or what went wrong."""
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None or tool.function is None:
        return f"error: there is no tool {call.name} that can be run here"
    try:
        check_arguments(tool, call)
        return result_text(tool.function(**call.arguments))
    except Exception as error:  # whatever a user's function raises
        text = f"error: {type(error).__name__}: {error}"
        return text.encode(errors="backslashreplace").decode()  # a path that is no Unicode, and so no prompt either


def result_text(value: Any) -> str:
    """A result as text: text as it is, else JSON; raises RequestError where it is neither."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"a tool's result must be text or JSON: {error}") from error


def _check_value(tool: Tool, name: str, value: Any, schema: Mapping[str, Any], raw: str) -> None:
    expected = JSON_TYPES.get(schema.get("type", ""), (object,))
    is_number_as_bool = isinstance(value, bool) and bool not in expected and object not in expected
    is_null = value is None and schema.get("nullable") is True
    if not is_null and (is_number_as_bool or not isinstance(value, expected)):
        raise ToolCallError(f"{tool.name}: argument {name} is {shown(value):.60}, expected {schema['type']}", raw)
    if not is_null and "enum" in schema and value not in schema["enum"]:
        raise ToolCallError(
            f"{tool.name}: argument {name} is {shown(value):.60}, expected one of {shown(schema['enum']):.60}", raw
        )


# JSON schemas


def _checked_schema(value: Mapping[str, Any]) -> dict[str, Any]:
    plain = _plain(value)
    function = plain["function"] if plain.get("type") == "function" and "function" in plain else plain
    if not isinstance(function, dict):
        raise RequestError(f"tool: function is {shown(function):.60}, expected an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RequestError(
            f"tool: name is {shown(name):.60}, expected up to 128 letters, digits, _, - and ., the first no digit"
        )
    description = "" if function.get("description") is None else function["description"]
    parameters = {} if function.get("parameters") is None else function["parameters"]
    if not isinstance(description, str) or not isinstance(parameters, dict):
        raise RequestError(f"tool {name}: description must be text and parameters a JSON schema")
    if parameters.get("type", "object") != "object":
        raise RequestError(f"tool {name}: parameters has type {shown(parameters.get('type')):.60}, expected 'object'")
    _refuse_references(parameters, name)
    properties = parameters["properties"] if isinstance(parameters.get("properties"), dict) else {}
    normalized = _normalized({**parameters, "type": "object", "properties": properties})
    described = {"name": name, "description": description, "parameters": normalized}
    return {"type": "function", "function": described}


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        text = json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"a tool's schema must be plain JSON of at most {MAX_DEPTH} levels: {reason}") from error
    if len(text) > MAX_SCHEMA_CHARS or _depth(text) > MAX_DEPTH:
        raise RequestError(
            f"a tool's schema has {len(text):,} characters and {_depth(text)} levels, at most {MAX_SCHEMA_CHARS:,} and "
            f"{MAX_DEPTH} are read; describe the tool more briefly"
        )
    plain: dict[str, Any] = json.loads(text)
    return plain


def _depth(text: str) -> int:
    depth = most = 0
    for bracket in re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        depth += 1 if bracket in "[{" else -1
        most = max(most, depth)
    return most


def _refuse_references(schema: Any, tool: str) -> None:
    """Raises RequestError where a schema refers to another; a property may have such a name, its value is no text."""
    if isinstance(schema, list):
        for one in schema:
            _refuse_references(one, tool)
    elif isinstance(schema, dict):
        for key, one in schema.items():
            if key in REFERENCES and isinstance(one, str):
                raise RequestError(f"tool {tool}: {key} is not resolved here; write the schema in place")
            if key not in DATA:
                _refuse_references(one, tool)


def _normalized(schema: Any) -> dict[str, Any]:
    """A schema with one type, a string, here and in all that it holds."""
    if not isinstance(schema, dict):
        return {"type": "string"}  # true, false, or what is no schema
    own = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf", "allOf", "const", "enum")}
    if values := _values(schema):
        own["enum"] = values
    if not isinstance(own.get("description", ""), str):
        del own["description"]
    if own.get("nullable") is not True:
        own.pop("nullable", None)
    kinds = _kinds(schema)
    own["type"] = next((kind for kind in kinds if kind != "null"), "null")
    if own["type"] != "null" and ("null" in kinds or None in values):
        own["nullable"] = True
    own = _with_parts(own)
    for branch in _binding(schema):
        own = _both(own, _normalized(branch))
    return own


def _with_parts(own: dict[str, Any]) -> dict[str, Any]:
    """A schema whose properties and items are normalized; what is required is a property, of any type if need be."""
    required = own.pop("required", None)
    required = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    properties = own.pop("properties", None)
    properties = dict(properties) if isinstance(properties, dict) else None
    if properties is not None or (required and own["type"] == "object"):
        properties = properties or {}
        properties |= {name: True for name in required if name not in properties}
        own["properties"] = {name: _normalized(value) for name, value in properties.items()}
        own |= {"required": required} if required else {}
    items = own.pop("items", None)
    return {**own, "items": _normalized(items)} if isinstance(items, dict) else own


def _both(own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What two normalized schemas say, `own` first."""
    merged = {**other, **own}
    if "properties" in other:
        merged["properties"] = {**other["properties"], **own.get("properties", {})}
    if required := list(dict.fromkeys([*own.get("required", ()), *other.get("required", ())])):
        merged["required"] = required
    return merged


def _values(schema: Mapping[str, Any]) -> list[Any]:
    """All values that a schema allows, where it lists them."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else []


def _branches(schema: Mapping[str, Any], *keys: str) -> list[Any]:
    return [one for key in keys if isinstance(schema.get(key), list) for one in schema[key]]


def _binding(schema: Mapping[str, Any]) -> list[Any]:
    """Branches that hold of every value: those of allOf, and the one that is not null where there is but one."""
    others = [one for one in _branches(schema, "anyOf", "oneOf") if _kinds(one) != ["null"]]
    return _branches(schema, "allOf") + (others if len(others) == 1 else [])


def _kinds(schema: Any) -> list[str]:
    """Types that a schema names, in itself or in its branches, or else that it looks like."""
    if not isinstance(schema, dict):
        return ["string"]
    named = schema.get("type")
    kinds = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    if not kinds:
        kinds = [kind for branch in _branches(schema, "anyOf", "oneOf", "allOf") for kind in _kinds(branch)]
    return [kind for kind in kinds if isinstance(kind, str) and kind in JSON_TYPES] or [_guessed(schema)]


def _guessed(schema: Mapping[str, Any]) -> str:
    if isinstance(schema.get("properties"), dict) or isinstance(schema.get("required"), list):
        return "object"
    if "items" in schema or "prefixItems" in schema:
        return "array"
    kinds = [TYPES.get(type(value), "string") for value in _values(schema) if value is not None]
    return kinds[0] if kinds else "string"


# functions


def _function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    name = getattr(function, "__name__", "")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RequestError(f"tool {shown(name):.60}: a function needs a name; use def, not lambda")
    if isinstance(function, type):
        raise RequestError(f"tool {name}: a class is no function; wrap it in one")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise RequestError(f"tool {name}: async functions cannot be run here; wrap it in a plain one")
    try:
        hints = typing.get_type_hints(function)
        parameters = list(inspect.signature(function).parameters.values())
    except Exception as error:  # hints may be text, and any code is evaluated
        raise RequestError(f"tool {name}: its signature cannot be read: {error}") from error
    description, arguments = _documented(inspect.getdoc(function) or "")
    properties, required = {}, []
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise RequestError(f"tool {name}: parameter {parameter.name} cannot be given by name; list all by name")
        schema = _type_schema(hints.get(parameter.name, str), f"tool {name}: parameter {parameter.name}")
        if parameter.name in arguments:
            schema = {"description": arguments[parameter.name], **schema}
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    schema = {"type": "object", "properties": properties, **({"required": required} if required else {})}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    """JSON Schema of a type hint."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type_schema(arguments[0], where)
    if origin in (typing.Union, types.UnionType):
        others = [one for one in arguments if one is not type(None)]
        if len(others) == 1:
            return {**_type_schema(others[0], where), "nullable": True}
    if origin is Literal:
        values = list(arguments)
        kinds = {TYPES.get(type(value)) for value in values}
        if len(kinds) == 1 and None not in kinds:
            return {"type": kinds.pop(), "enum": values}
    if hint is Any:
        return {"type": "string"}
    kind = TYPES.get(origin or hint) if isinstance(origin or hint, type) else None
    if kind is None:
        found = getattr(hint, "__name__", str(hint))
        raise RequestError(f"{where} has type {found}, expected str, int, float, bool, list, dict or Literal")
    if kind == "array" and arguments:
        return {"type": kind, "items": _type_schema(arguments[0], where)}
    return {"type": kind}


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph of a docstring, and what its `Args:` section says of each parameter."""
    description = " ".join(text.partition("\n\n")[0].split())
    section = _ARGS_SECTION.search(text)
    said = _ARGUMENT.findall(section[1]) if section else []
    arguments = {name: " ".join(words.split()) for name, words in said}
    return description, arguments


def with_functions(tools: Sequence[Tool], functions: Sequence[Tool]) -> tuple[Tool, ...]:
    """Tools with the functions that others of their names have."""
    known = {tool.name: tool.function for tool in functions}
    return tuple(replace(tool, function=known.get(tool.name, tool.function)) for tool in tools)
