"""What a request asks for, read from its JSON: messages or a prompt, tools, and the runtime's options."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

from edge.serve.errors import bad_request
from edge.serve.fields import SAMPLING, check_fields, check_model, field_of, includes_usage, sampling_options
from runtime.errors import ToolCallError
from runtime.grammar import Grammar, json_object, json_schema
from runtime.options import OptionArguments
from runtime.prompts import Prompts
from runtime.stream import Generation, GenerationStream
from runtime.tool_calls import ToolCall
from runtime.tools import Tool, check_arguments, tools_of
from runtime.turns import ContextPolicy

CHAT_FIELDS = SAMPLING | {
    *("messages", "tools", "tool_choice", "response_format", "max_completion_tokens", "reasoning_effort"),
    *("thinking", "thinking_budget", "chat_template_kwargs"),
}
COMPLETION_FIELDS = SAMPLING | {"prompt"}
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
MAX_TOOLS = 128
MOST_TOKEN_CHARS = 64  # longer than tokens are: a text of more for each token of the context cannot fit
COMPLETION_TOKENS = 16  # OpenAI's own default of /v1/completions
# Tokens of thoughts for each effort; None for any number. Source: litellm/constants.py, DEFAULT_REASONING_EFFORT_*.
EFFORTS: Mapping[str, int | None] = {"minimal": 128, "low": 1024, "medium": 2048, "high": 4096, "xhigh": None}


class Generates(Protocol):
    """What is needed of the runtime."""

    context_tokens: int

    @property
    def prompts(self) -> Prompts:
        """How messages become token ids."""
        ...

    def stream(self, prompt: str | list[int], **options: Unpack[OptionArguments]) -> GenerationStream:
        """Goes on with a prompt."""
        ...

    def stream_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: tuple[Tool, ...] = (),
        thinking: bool = False,
        **options: Unpack[OptionArguments],
    ) -> GenerationStream:
        """Answers messages."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Args:
        begin: makes the stream that answers it; takes a while, as prompts and grammars are compiled
        is_chat: whether the answer is a message
        is_streamed: whether it comes in pieces
        has_usage: whether a streamed answer ends with what it took
        check: raises ToolCallError where the answer must not be passed on
        max_calls: tool calls that are passed on; None for all
    """

    begin: Callable[[], GenerationStream]
    is_chat: bool
    is_streamed: bool
    has_usage: bool
    check: Callable[[Generation], None]
    max_calls: int | None = None


def asked_completion(runtime: Generates, body: Mapping[str, Any], model: str, policy: ContextPolicy) -> Asked:
    """A request to /v1/completions; raises ServeError or RequestError where it cannot be served."""
    check_model(body, model)
    check_fields(body, COMPLETION_FIELDS)
    options = sampling_options(body)
    if "max_tokens" not in body:
        options["max_tokens"] = COMPLETION_TOKENS
    options["context_policy"] = policy
    prompt = _one_prompt(body.get("prompt"))
    if isinstance(prompt, str):
        _check_size(prompt, "prompt", runtime.context_tokens)
    return Asked(
        begin=lambda: runtime.stream(prompt, **options),
        is_chat=False,
        is_streamed=field_of(body, "stream", bool) or False,
        has_usage=includes_usage(body),
        check=lambda generation: None,
    )


def asked_chat(runtime: Generates, body: Mapping[str, Any], model: str, policy: ContextPolicy) -> Asked:
    """A request to /v1/chat/completions; raises ServeError or RequestError where it cannot be served."""
    check_model(body, model)
    check_fields(body, CHAT_FIELDS)
    messages = _messages(body.get("messages"))
    _check_size(messages, "messages", runtime.context_tokens)
    tools, strict = _tools(body)
    thinking, budget = _thinking(body)
    options = sampling_options(body)
    if (max_tokens := field_of(body, "max_completion_tokens", int)) is not None:
        options["max_tokens"] = max_tokens
    options["thinking_budget"] = budget
    options["context_policy"] = policy
    options["grammar"] = grammar = _grammar(body.get("response_format"))
    if grammar is not None and tools:
        raise bad_request(
            'response_format forbids what is no such JSON, calls of tools too; send tool_choice "none" with it, or no '
            "response_format",
            "response_format",
        )
    return Asked(
        begin=lambda: runtime.stream_chat(messages, tools=tools, thinking=thinking, **options),
        is_chat=True,
        is_streamed=field_of(body, "stream", bool) or False,
        has_usage=includes_usage(body),
        check=lambda generation: _check_calls(generation.tool_calls, tools, strict),
        max_calls=1 if field_of(body, "parallel_tool_calls", bool) is False else None,
    )


def _one_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        raise bad_request(f"prompt is {reprlib.repr(prompt)}, expected one text or one list of token ids", "prompt")
    return prompt


def _check_size(value: str | list[Any], name: str, context_tokens: int) -> None:
    """Refuses at once what would be tokenized for seconds, in vain."""
    num_items = len(value) if isinstance(value, list) else 0  # each takes a token at least
    if num_items > context_tokens or (num_chars := _num_chars(value)) > context_tokens * MOST_TOKEN_CHARS:
        found = f"{num_items:,} entries" if num_items > context_tokens else f"{num_chars:,} characters"
        raise bad_request(f"{name} has {found}, the context holds {context_tokens:,} tokens; shorten it", name)


def _num_chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_num_chars, inner))


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Messages with the fields that chat templates read, without those that are null."""
    if not isinstance(messages, list) or not messages:
        raise bad_request(f"messages is {reprlib.repr(messages)}, expected a list of at least one", "messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise bad_request(f"message {index} is {reprlib.repr(message)}, expected an object", "messages")
    kept = [{name: message[name] for name in MESSAGE_FIELDS if message.get(name) is not None} for message in messages]
    return [one if "content" in one else {**one, "content": None} for one in kept]


def _tools(body: Mapping[str, Any]) -> tuple[tuple[Tool, ...], frozenset[str]]:
    """Tools that the model may call, and the names of those whose arguments must fit."""
    schemas = field_of(body, "tools", list) or []
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise bad_request(
            f'tool_choice is {reprlib.repr(choice)}, expected "auto" or "none": no call can be forced', "tool_choice"
        )
    if len(schemas) > MAX_TOOLS or not all(isinstance(schema, dict) for schema in schemas):
        raise bad_request(f"tools must be a list of at most {MAX_TOOLS} objects", "tools")
    for schema in schemas:
        if schema.get("type") != "function":
            raise bad_request(f"tools holds type {reprlib.repr(schema.get('type'))}, expected 'function'", "tools")
    tools = tools_of(schemas)
    functions = [schema["function"] for schema in schemas if isinstance(schema.get("function"), dict)]
    strict = frozenset(function["name"] for function in functions if function.get("strict") is True)
    return ((), frozenset()) if choice == "none" else (tools, strict)


def _check_calls(calls: Sequence[ToolCall], tools: Sequence[Tool], strict: frozenset[str]) -> None:
    known = {tool.name: tool for tool in tools}
    for call in calls:
        if call.name not in known:
            raise ToolCallError("the model called none of the tools", f"{call.name}{call.arguments}")
        if call.name in strict:
            check_arguments(known[call.name], call)


def _thinking(body: Mapping[str, Any]) -> tuple[bool, int | None]:
    """Whether the model may think, and for how many tokens: said by any of the names that clients know for it."""
    effort = field_of(body, "reasoning_effort", str)
    if effort is not None and effort != "none" and effort not in EFFORTS:
        expected = ", ".join(["none", *EFFORTS])
        raise bad_request(f"reasoning_effort is {reprlib.repr(effort)}, expected one of {expected}", "reasoning_effort")
    kwargs = field_of(body, "chat_template_kwargs", dict) or {}
    for name in kwargs:
        if name != "enable_thinking":
            raise bad_request(
                f"chat_template_kwargs has {reprlib.repr(name)}, expected enable_thinking alone", "chat_template_kwargs"
            )
    said = field_of(body, "thinking", bool)
    said = field_of(kwargs, "enable_thinking", bool) if said is None else said
    thinking = effort not in (None, "none") if said is None else said
    budget = field_of(body, "thinking_budget", int)
    return thinking, EFFORTS.get(effort or "") if thinking and budget is None else budget


def _grammar(form: Any) -> Grammar | None:
    """What `response_format` asks for; strict or not, the answer is held to it."""
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return json_object()
    described = form.get("json_schema") if kind == "json_schema" else None
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        raise bad_request(
            f"response_format is {reprlib.repr(form)}, expected type text, json_object, or json_schema with "
            "json_schema.schema",
            "response_format",
        )
    return json_schema(described["schema"])
