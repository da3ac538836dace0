"""Renders chat messages to the text of a prompt; knows no token ids.

A template comes with the model and is foreign code. It runs in jinja2's sandbox, sees plain JSON only, may use the
listed filters and methods only, and has a budget of steps, seconds and characters. What the budget cannot see is the
work inside one operation, such as comparing two lists of lists.

Source: transformers/utils/chat_template_utils.py (`_cached_compile_jinja_template`).
"""

import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from profiles.errors import shown
from runtime.errors import ArtifactError, RequestError

MAX_CHARS = 4 * 1024 * 1024  # of the prompt, and of every text or list on the way to it
# a call is one, and so is a loop's iteration; Gemma's template looks back from each message over all before it
MAX_STEPS = 4_000_000
MAX_SECONDS = 5.0
MAX_INT_BITS = 64
MAX_INDENT = 16
MAX_DEPTH = 80  # of lists and mappings in a message
LEVELS_AROUND_ARGUMENTS = 4  # the message, its calls, a call and its function

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "join", "last"),
    *("length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "select"),
    *("selectattr", "sort", "string", "title", "tojson", "trim", "unique", "upper"),
)
STR_METHODS = (
    *("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isspace"),
    *("isupper", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex", "rpartition"),
    *("rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper"),
)
METHODS: Mapping[type, Sequence[str]] = {
    str: STR_METHODS,
    dict: ("get", "items", "keys", "values"),
    **dict.fromkeys((list, tuple, range), ("count", "index")),
    **dict.fromkeys((int, float, bytes, type), ()),
}


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ArtifactError where `source` does not parse.

        Args:
            source: The text of a `chat_template.jinja`.
            special_tokens: Variables such as `bos_token` and their text.
        """
        self._special_tokens = dict(special_tokens)
        sandbox = _Sandbox()
        try:
            self._template = sandbox.from_string(_Metered().visit(sandbox.parse(source)))
        # SyntaxError, RecursionError, MemoryError: nested deeper than Python or jinja2 can compile
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise ArtifactError(f"chat template{_place(error)}: {_reason(error)}; re-export the model") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
    ) -> str:
        """The prompt; with `add_generation_prompt` it ends where the model is to answer.

        Args:
            tools: schemas of tools that the model may call
            thinking: whether it may think first

        Raises:
            RequestError: a message is not usable, or the template fails or exceeds its budget.
        """
        variables = {
            **self._special_tokens,
            "messages": plain_messages(messages),
            "tools": list(tools) if tools else None,
            "enable_thinking": thinking,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        before = _budget.set(_Budget(MAX_STEPS, time.monotonic() + MAX_SECONDS))
        try:
            return self._template.render(variables)
        except Exception as error:  # foreign code can raise anything
            raise RequestError(f"chat template{_place(error)}: {_reason(error)}") from error
        finally:
            _budget.reset(before)


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy in plain JSON types, which a template can neither change nor call; text in parts becomes one text.

    Raises:
        RequestError: a message is not of the form that Gemma 4's template reads.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"messages must be a list of at least one mapping, got {shown(messages):.60}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"message {index} must be a mapping with role and content, got {shown(message):.60}")
        if not isinstance(message.get("role"), str):
            raise RequestError(f"message {index}: role must be a string, got {shown(message.get('role')):.60}")
        if message["role"] not in ROLES:
            raise RequestError(f"message {index}: role {shown(message['role']):.60} is unknown; use {', '.join(ROLES)}")
        if _is_deeper(message, MAX_DEPTH):
            raise RequestError(
                f"message {index} is nested more than {MAX_DEPTH} levels deep; send what it holds as text"
            )
    try:
        copy: list[dict[str, Any]] = json.loads(json.dumps([dict(message) for message in messages], allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RequestError(f"messages must hold JSON values only: {error}") from error
    calls: dict[str, str] = {}
    for index, message in enumerate(copy):
        _check_message(message, index, calls)
    return copy


def guarded(value: Any, literal: Callable[[str], str]) -> Any:
    """A JSON value with `literal` of every string, keys included."""
    if isinstance(value, str):
        return literal(value)
    if isinstance(value, Mapping):
        return {literal(str(key)): guarded(one, literal) for key, one in value.items()}
    return [guarded(one, literal) for one in value] if isinstance(value, list | tuple) else value


def _is_deeper(value: Any, num_levels: int) -> bool:
    if not isinstance(value, Mapping | list | tuple):
        return False
    return num_levels == 0 or any(
        _is_deeper(one, num_levels - 1) for one in (value.values() if isinstance(value, Mapping) else value)
    )


def _check_message(message: dict[str, Any], index: int, calls: dict[str, str]) -> None:
    """Brings a message into the form that templates read; `calls` holds the ids of the last calls and their names."""
    role, is_model = message["role"], message["role"] in ("assistant", "model")
    message["content"] = _content(message, index)
    if message.get("tool_calls") is not None:
        if not is_model:
            raise RequestError(f"message {index}: only an assistant's message can have tool_calls")
        message["tool_calls"] = _tool_calls(message["tool_calls"], index)
    else:
        message.pop("tool_calls", None)
    for key in ("reasoning_content", "tool_call_id", "name"):
        if message.get(key) is None:
            message.pop(key, None)
        elif not isinstance(message[key], str):
            raise RequestError(f"message {index}: {key} must be a string, got {shown(message[key]):.60}")
    if role == "tool":
        if (id_ := message.get("tool_call_id")) is not None and id_ not in calls:
            raise RequestError(
                f"message {index}: no call before it has the id {shown(id_):.60}; answer one of the model's"
            )
        message.setdefault("name", calls.get(message.get("tool_call_id", ""), "unknown"))
    else:
        calls.clear()
        calls.update({call["id"]: call["function"]["name"] for call in message.get("tool_calls", ()) if "id" in call})


def _content(message: Mapping[str, Any], index: int) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, list):
        raise RequestError(f"message {index}: content must be a string, got {shown(content):.60}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"message {index}: content holds {shown(part):.60}, expected parts of type 'text'; "
                "images and audio are not there yet"
            )
    return "".join(part["text"] for part in content)


def _tool_calls(calls: Any, index: int) -> list[dict[str, Any]]:
    """Calls with their arguments as mappings."""
    if not isinstance(calls, list):
        raise RequestError(f"message {index}: tool_calls must be a list, got {shown(calls):.60}")
    return [_tool_call(call, index) for call in calls]


def _tool_call(call: Any, index: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    arguments = _arguments(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise RequestError(
            f"message {index}: tool_calls holds {shown(call):.60}, expected "
            "{'function': {'name': text, 'arguments': mapping or JSON text}}"
        )
    id_ = call.get("id")
    if not isinstance(id_, str | None):
        raise RequestError(f"message {index}: the id of a tool call must be a string, got {shown(id_):.60}")
    own = {} if id_ is None else {"id": id_}
    return {**own, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(text: str) -> Any:
    """Arguments that came as JSON text; None where they are none."""
    try:
        value = json.loads(text or "{}")
        json.dumps(value, allow_nan=False)  # 1e999 and NaN are read, but are no JSON
    except (ValueError, RecursionError):
        return None
    return None if _is_deeper(value, MAX_DEPTH - LEVELS_AROUND_ARGUMENTS) else value


def _place(error: BaseException) -> str:
    """The template's line that raised, which jinja2 writes into tracebacks; "" where no one line did."""
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
    for frame, number in traceback.walk_tb(error.__traceback__):
        line = number if frame.f_code.co_filename == "<template>" else line
    return f", line {line}" if line else ""


def _reason(error: BaseException) -> str:
    message = error.message if isinstance(error, jinja2.TemplateError) else None
    text = " ".join((message or str(error)).split())[:200]
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"


@dataclass(slots=True)
class _Budget:
    steps_left: int
    deadline: float


# One per rendering, not per template: two threads may render at once.
_budget: ContextVar[_Budget] = ContextVar("_budget")


class _Metered(NodeTransformer):
    """Makes every loop iteration a step, and sends `~` to the bounded `concat`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2's naming
        self.generic_visit(node)
        if node.recursive:  # it is entered with other values than these
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None, lineno=node.lineno)
            node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        else:  # one call for all: a call in the body costs 5 us each time
            metered = nodes.EnvironmentAttribute("metered")
            node.iter = nodes.Call(metered, [node.iter], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - jinja2's naming
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Call(nodes.EnvironmentAttribute("concat"), [parts], [], None, None, lineno=node.lineno)


class _GenerationTag(Extension):
    """`{% generation %}`, which marks the model's words for training: here its body alone."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, cut down and metered."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        extensions = [loopcontrols, _GenerationTag]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_text)
        own = {"tojson": _tojson, "join": _join_filter, "replace": _replace, "string": _text}
        self.filters = {name: own.get(name) or self.filters[name] for name in FILTERS}
        self.globals = {
            "dict": dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "range": safe_range,
            "strftime_now": _strftime_now,
        }

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call is a step."""
        self.step()
        return super().call(context, function, *args, **kwargs)

    def step(self) -> None:
        """Takes one step from the budget."""
        budget = _budget.get()
        budget.steps_left -= 1
        if budget.steps_left < 0:
            raise SecurityError(f"the template takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > budget.deadline:
            raise SecurityError(f"the template takes more than {MAX_SECONDS:g} s")

    def metered(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values of a loop, each of which is a step."""
        for value in values:
            self.step()
            yield value

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Looks up what namespaces hold, which templates do often, at once: no name there is underscored."""
        if type(obj) is not _Namespace or attribute.startswith("_"):
            return super().getattr(obj, attribute)
        try:
            return getattr(obj, attribute)
        except AttributeError:
            return self.undefined(obj=obj, name=attribute)

    @staticmethod
    def concat(parts: Iterable[Any]) -> str:
        """jinja2 joins with this what a template, a macro and a block wrote."""
        return _join("", map(_text, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The four operators that can make much of little."""
        if operator == "**" or (operator == "%" and not isinstance(left, int | float)):
            raise SecurityError(f"operator {operator} on {type(left).__name__} is not available")
        for value, factor in ((left, right), (right, left)):
            if isinstance(value, Sequence):
                _check_size(len(value) * factor if operator == "*" and isinstance(factor, int) else len(value))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_INT_BITS:
            raise SecurityError(f"a whole number exceeds {MAX_INT_BITS} bits")
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Only listed methods of Python's own types."""
        listed = next((names for kind, names in METHODS.items() if isinstance(obj, kind)), None)
        return super().is_safe_attribute(obj, attr, value) and (listed is None or attr in listed)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Bounded twins of two methods of str; None leaves the others, `format` too, to `is_safe_attribute`."""
        owner = getattr(value, "__self__", None)
        twin = BOUNDED_METHODS.get(getattr(value, "__name__", "")) if isinstance(owner, str) else None
        return partial(twin, owner) if twin else None


class _Namespace(Namespace):
    """Keeps no underscored names, by which Python's own attributes are reached."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r:.40}")
        super().__setitem__(name, value)


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise SecurityError(f"a text or list exceeds {MAX_CHARS:,} characters or entries")


def _text(value: Any) -> str:
    """What may be written: `[x, x]` nested 40 times is a short template and 2^40 characters."""
    if value is None or isinstance(value, str | int | float | jinja2.Undefined):
        return str(value)
    raise SecurityError(f"{type(value).__name__} cannot be written as text; use the filter tojson")


def _join(separator: str, parts: Iterable[str]) -> str:
    pieces: list[str] = []
    num_chars = 0
    for piece in parts:
        num_chars += len(piece) + (len(separator) if pieces else 0)
        _check_size(num_chars)
        pieces.append(piece)
    return separator.join(pieces)


def _join_filter(parts: Iterable[Any], d: str = "") -> str:
    return _join(d, map(_text, parts))


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    _check_size(len(text) + text.count(old) * len(new))
    return text.replace(old, new, count)


BOUNDED_METHODS: Mapping[str, Callable[..., str]] = {"join": _join, "replace": _replace}


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise SecurityError(f"tojson: indent must be 0 to {MAX_INDENT}, got {indent!r:.40}")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _join("", encoder.iterencode(value))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(_text(message))
