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
        raise RequestError(f"tools must be a list of functions or JSON schemas, got {values!r:.40}")
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
        raise RequestError(f"a tool must be a function or a JSON schema, got {value!r:.40}")
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
            raise ToolCallError(f"{tool.name}: there is no argument {name!r:.40}", raw)
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
        return f"error: {type(error).__name__}: {error}"


def result_text(value: Any) -> str:
    """A result as text: text as it is, else JSON; raises RequestError where it is neither."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"a tool's result must be text or JSON: {error}") from error


def _check_value(tool: Tool, name: str, value: Any, schema: Mapping[str, Any], raw: str) -> None:
    expected = JSON_TYPES.get(schema.get("type", ""), (object,))
    is_number_as_bool = isinstance(value, bool) and bool not in expected and object not in expected
    is_null = value is None and schema.get("nullable") is True
    if not is_null and (is_number_as_bool or not isinstance(value, expected)):
        raise ToolCallError(f"{tool.name}: argument {name} is {value!r:.40}, expected {schema['type']}", raw)
    if "enum" in schema and value not in schema["enum"]:
        raise ToolCallError(f"{tool.name}: argument {name} is {value!r:.40}, expected one of {schema['enum']}", raw)


# JSON schemas


def _checked_schema(value: Mapping[str, Any]) -> dict[str, Any]:
    plain = _plain(value)
    function = plain["function"] if plain.get("type") == "function" and "function" in plain else plain
    if not isinstance(function, dict):
        raise RequestError(f"tool: function is {function!r:.40}, expected an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RequestError(
            f"tool: name is {name!r:.40}, expected up to 128 letters, digits, _, - and ., the first no digit"
        )
    description = function.get("description", "")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(description, str) or not isinstance(parameters, dict):
        raise RequestError(f"tool {name}: description must be text and parameters a JSON schema")
    if parameters.get("type", "object") != "object":
        raise RequestError(f"tool {name}: parameters has type {parameters.get('type')!r:.40}, expected 'object'")
    described = {"name": name, "description": description, "parameters": _normalized(parameters, name)}
    return {"type": "function", "function": described}


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        text = json.dumps(value, allow_nan=False)
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


def _normalized(schema: Any, tool: str) -> dict[str, Any]:
    """A schema with one type, a string, here and in all that it holds."""
    if not isinstance(schema, dict):
        return {"type": "string"}  # true, false, or what is no schema
    if "$ref" in schema or "$dynamicRef" in schema:
        raise RequestError(f"tool {tool}: $ref is not resolved here; write the schema in place")
    own = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf", "allOf")}
    kinds = _kinds(schema)
    own["type"] = next((kind for kind in kinds if kind != "null"), "null" if kinds else _guessed(schema))
    if "null" in kinds and len(kinds) > 1:
        own["nullable"] = True
    branch = _only_branch(schema)
    own = {**_normalized(branch, tool), **own} if branch is not None else own
    if isinstance(own.get("properties"), dict):
        own["properties"] = {name: _normalized(value, tool) for name, value in own["properties"].items()}
    else:
        own.pop("properties", None)
    if "items" in own:
        own["items"] = _normalized(own["items"], tool)
    required = own.get("required")
    own["required"] = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    return own if own["required"] else {key: value for key, value in own.items() if key != "required"}


def _branches(schema: Mapping[str, Any]) -> list[Any]:
    return [one for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list) for one in schema[key]]


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    """Types that a schema names, in itself or in its branches."""
    named = schema.get("type")
    kinds = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    if not kinds:
        kinds = [kind for branch in _branches(schema) if isinstance(branch, dict) for kind in _kinds(branch)]
    return [kind for kind in kinds if isinstance(kind, str) and kind in JSON_TYPES]


def _only_branch(schema: Mapping[str, Any]) -> Any:
    """The one branch that is not null, if there is one."""
    branches = [one for one in _branches(schema) if not (isinstance(one, dict) and one.get("type") == "null")]
    return branches[0] if len(branches) == 1 else None


def _guessed(schema: Mapping[str, Any]) -> str:
    if isinstance(schema.get("properties"), dict):
        return "object"
    if "items" in schema or "prefixItems" in schema:
        return "array"
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return TYPES.get(type(values[0]), "string") if isinstance(values, list) and values else "string"


# functions


def _function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    name = getattr(function, "__name__", "")
    if not NAME.fullmatch(name):
        raise RequestError(f"tool {name!r:.40}: a function needs a name; use def, not lambda")
    if inspect.iscoroutinefunction(function):
        raise RequestError(f"tool {name}: async functions cannot be run here; wrap it in a plain one")
    try:
        hints = typing.get_type_hints(function)
        parameters = list(inspect.signature(function).parameters.values())
    except (NameError, TypeError, ValueError) as error:
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
