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

from runtime.errors import ArtifactError, RequestError
from runtime.messages import plain_messages

MAX_CHARS = 4 * 1024 * 1024  # of the prompt, and of every text or list on the way to it
# a call is one, and so is a loop's iteration; Gemma's template looks back from each message over all before it
MAX_STEPS = 4_000_000
MAX_SECONDS = 5.0
MAX_INT_BITS = 64
MAX_INDENT = 16

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
        return self.render_plain(
            plain_messages(messages), add_generation_prompt=add_generation_prompt, tools=tools, thinking=thinking
        )

    def render_plain(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool,
    ) -> str:
        """As `render`, of messages that `plain_messages` made and nobody else has."""
        variables = {
            **self._special_tokens,
            "messages": messages,
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
