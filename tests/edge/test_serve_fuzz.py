"""Bodies of any kind: each has a valid answer or an error of the client's; a bug would raise here."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from edge import Runtime
from edge.serve.app import ServeOptions, make_app
from edge.serve.asked import CHAT_FIELDS, COMPLETION_FIELDS
from edge.serve.fields import UNSUPPORTED

TEXTS = st.text(st.characters(codec=None), max_size=12)  # lone surrogates too
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def one_of(*usual: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(usual)


CALLS = st.fixed_dictionaries(
    {
        "id": one_of("call_1"),
        "type": one_of("function"),
        "function": st.fixed_dictionaries({"name": one_of("f", "g"), "arguments": one_of("{}", '{"a": 1}', "{")}),
    }
)
MESSAGES = st.fixed_dictionaries(
    {"role": one_of("user", "user", "assistant", "system", "tool"), "content": TEXTS},
    optional={"tool_calls": st.lists(CALLS, max_size=2), "tool_call_id": one_of("call_1"), "name": TEXTS},
)
SCHEMAS = st.dictionaries(
    st.sampled_from(["type", "properties", "items", "enum", "required", "anyOf", "$ref", "pattern", "maxLength"]),
    one_of("object", "string", ["a"], [{"type": "null"}], {"a": {"type": "integer"}}, "#", 3),
    max_size=3,
)
TOOLS = st.fixed_dictionaries(
    {"type": one_of("function"), "function": st.fixed_dictionaries({"name": one_of("f"), "parameters": SCHEMAS})}
)
FORMATS = st.fixed_dictionaries(
    {"type": one_of("json_schema"), "json_schema": st.fixed_dictionaries({"schema": SCHEMAS})}
)
USUAL: dict[str, st.SearchStrategy[Any]] = {
    "model": one_of("bits4", ""),
    "temperature": one_of(0, 0.5, 1e308, -1),
    "top_p": one_of(0.9, 1, 5e-324),
    "top_k": one_of(0, 1, 10**30),
    "seed": one_of(0, 2**64, 10**40),
    "stop": one_of("a", ["a", "b"], []),
    "stream": one_of(True, False),
    "stream_options": one_of({"include_usage": True}),
    "tools": st.lists(TOOLS, max_size=2),
    "tool_choice": one_of("auto", "none", "required"),
    "response_format": FORMATS | one_of({"type": "text"}, {"type": "json_object"}),
    "max_completion_tokens": one_of(1, 2, None),
    "reasoning_effort": one_of("low", "none"),
    "thinking": one_of(True, False),
    "thinking_budget": one_of(0, 1, 10**30),
    "chat_template_kwargs": one_of({"enable_thinking": True}),
}
ODD = st.sampled_from([*UNSUPPORTED, *CHAT_FIELDS, "max_token", "user", "\ud800"])
CHATS = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES, min_size=1, max_size=3), "max_tokens": one_of(1, 2, 3)}, optional=USUAL
)
COMPLETIONS = st.fixed_dictionaries(
    {"prompt": st.one_of(TEXTS, st.lists(st.integers(0, 2050), max_size=6)), "max_tokens": one_of(1, 2, 3)},
    optional={name: values for name, values in USUAL.items() if name in COMPLETION_FIELDS},
)
OFTEN = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def damaged(draw: st.DrawFn, bodies: st.SearchStrategy[Any]) -> Any:
    """A usual body in which at most two values, however deep, are any others."""
    body = copy.deepcopy(draw(bodies))
    for _ in range(draw(st.integers(0, 2))):
        places = list(_places(body))
        holder, key = draw(st.sampled_from(places))
        holder[key] = draw(VALUES)
    return body


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


@pytest.fixture(scope="module")
def client(demo_artifact: Callable[..., Path]) -> Iterator[TestClient]:
    with Runtime.load(demo_artifact(4), profile="laptop", context_tokens=512) as runtime:
        app = make_app(runtime, ServeOptions(model="bits4"))
        with TestClient(app, base_url="http://localhost", headers={"content-type": "application/json"}) as client:
            yield client


def assert_answered(client: TestClient, path: str, content: bytes) -> None:
    response = client.post(path, content=content)
    if response.status_code != 200:
        assert 400 <= response.status_code < 500
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert isinstance(error["message"], str) and len(error["message"]) < 1000
    elif response.headers["content-type"].startswith("text/event-stream"):
        *chunks, done = response.text.removesuffix("\n\n").split("\n\n")
        assert done == "data: [DONE]"
        assert all("choices" in json.loads(chunk.removeprefix("data: ")) for chunk in chunks)
    else:
        assert response.json()["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")


@OFTEN
@given(body=damaged(CHATS), odd=st.one_of(st.just({}), st.dictionaries(ODD, VALUES, max_size=1)))
def test_any_chat_is_answered_or_refused(client: TestClient, body: dict[str, Any], odd: dict[str, Any]) -> None:
    assert_answered(client, "/v1/chat/completions", json.dumps({**body, **odd}).encode())


@OFTEN
@given(body=damaged(COMPLETIONS))
def test_any_completion_is_answered_or_refused(client: TestClient, body: dict[str, Any]) -> None:
    assert_answered(client, "/v1/completions", json.dumps(body).encode())


@OFTEN
@given(body=st.one_of(st.binary(max_size=60), VALUES.map(lambda value: json.dumps(value).encode())))
def test_any_bytes_are_refused(client: TestClient, body: bytes) -> None:
    assert client.post("/v1/chat/completions", content=body).status_code == 400
