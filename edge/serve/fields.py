"""Fields of a request: which are known, which may only have the value that changes nothing, and the options they make.

A field that is unknown is ignored, as other servers do, unless its name is a slip of the pen for one that is known.
"""

import difflib
import reprlib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from edge.serve.errors import ServeError, bad_request
from runtime.options import OptionArguments

MAX_FIELDS = 100  # each unknown name is compared with all that are known
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MISSPELLED = 0.85  # how alike two names are where one is a slip of the pen

# What cannot be served, and the values with which it asks for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
SAMPLING = frozenset(
    {"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options"}
)
HARMLESS = frozenset(
    {
        *("metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "safety_identifier", "service_tier"),
        *("store", "user", "verbosity"),
    }
)
TYPE_NAMES = {bool: "true or false", str: "text", dict: "an object", list: "a list", int: "an integer"}

Value = TypeVar("Value")


def check_fields(body: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ServeError for a field that cannot be served or whose name is misspelled."""
    if len(body) > MAX_FIELDS:
        raise bad_request(f"the body has {len(body):,} fields, expected at most {MAX_FIELDS}")
    for name, value in body.items():
        if name in known or name in HARMLESS:
            continue
        if name in UNSUPPORTED:
            if value is not None and not any(_is_same(value, neutral) for neutral in UNSUPPORTED[name]):
                neutrals = " or ".join(map(repr, UNSUPPORTED[name])) or "null"
                raise bad_request(
                    f"{name} is {reprlib.repr(value)}, which cannot be served; leave it out or send {neutrals}",
                    name,
                    "unsupported_parameter",
                )
        elif near := difflib.get_close_matches(name[:80], {*known, *UNSUPPORTED}, 1, MISSPELLED):
            raise bad_request(f"unknown field {reprlib.repr(name)}, did you mean {near[0]!r}?", near[0])


def field_of(body: Mapping[str, Any], name: str, kind: type[Value]) -> Value | None:
    """A field's value, None where it is missing or null; raises ServeError where it is of another type."""
    value = body.get(name)
    if value is not None and type(value) is not kind:
        raise bad_request(f"{name} is {reprlib.repr(value)}, expected {TYPE_NAMES[kind]}", name)
    return value


def sampling_options(body: Mapping[str, Any]) -> OptionArguments:
    """Options that both kinds of generation have; their ranges are the runtime's to check."""
    options = OptionArguments(
        max_tokens=field_of(body, "max_tokens", int), seed=field_of(body, "seed", int), stop=_stops(body.get("stop"))
    )
    temperature, top_p = body.get("temperature"), body.get("top_p")
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if value is not None and type(value) not in (int, float):
            raise bad_request(f"{name} is {reprlib.repr(value)}, expected a number", name)
    options["temperature"], options["top_p"] = temperature, top_p
    options["top_k"] = field_of(body, "top_k", int)
    return options


def includes_usage(body: Mapping[str, Any]) -> bool:
    """Whether the stream is to end with what it took."""
    options = field_of(body, "stream_options", dict) or {}
    return field_of(options, "include_usage", bool) or False


def check_model(body: Mapping[str, Any], served: str) -> None:
    """Raises ServeError where another model is asked for than the one that is served."""
    asked = field_of(body, "model", str)
    if asked and asked != served:
        raise ServeError(
            404,
            f"the model {reprlib.repr(asked)} is not served here; ask for {served!r} or leave the model out",
            param="model",
            code="model_not_found",
        )


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise bad_request(f"stop is {reprlib.repr(value)}, expected text or a list of at most {MAX_STOPS}", "stop")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            found = reprlib.repr(stop)
            raise bad_request(f"stop holds {found}, expected text of 1 to {MAX_STOP_CHARS:,} characters", "stop")
    return stops


def _is_same(value: Any, neutral: Any) -> bool:
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)
