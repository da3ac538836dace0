"""Chat messages as templates read them: checked, in plain JSON types, text in one piece. Knows no template.

Source: the messages of OpenAI's chat API, and the fields that Gemma 4's template reads of them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from profiles.errors import shown
from runtime.errors import RequestError

MAX_DEPTH = 80  # of lists and mappings in a message
LEVELS_AROUND_ARGUMENTS = 4  # the message, its calls, a call and its function
ROLES = ("system", "developer", "user", "assistant", "model", "tool")


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
