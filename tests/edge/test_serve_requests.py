"""What requests may say, what they are refused for, and what comes back: over a scripted runtime, without a socket."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from runtime.errors import BusyError, ClosedError, InferenceError, RequestError, ToolCallError
from runtime.tool_calls import ToolCall
from tests.serving import Script

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = ToolCall("weather", {"city": "Würzburg"})


@pytest.fixture
def script() -> Script:
    return Script([("thinking", "so"), ("text", "He"), ("text", "llo")])


@pytest.fixture
def client(script: Script) -> Iterator[TestClient]:
    with script.test_client() as client:
        yield client


def ask(client: TestClient, path: str = CHAT, **fields: Any) -> httpx.Response:
    start = {"messages": HELLO} if path == CHAT else {"prompt": "def "}
    return client.post(path, json={**start, **fields})


def events(response: httpx.Response) -> list[Any]:
    """Data of all events."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


# What is passed on

MEANINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "max_tokens": ({"max_tokens": 7}, {"max_tokens": 7}),
    "max_completion_tokens": ({"max_tokens": 7, "max_completion_tokens": 8}, {"max_tokens": 8}),
    "null is nothing": ({"max_tokens": None, "seed": None, "stop": None, "tools": None}, {"max_tokens": None}),
    "sampling": (
        {"temperature": 0.5, "top_p": 1, "top_k": 3, "seed": 4},
        {"temperature": 0.5, "top_p": 1, "top_k": 3, "seed": 4},
    ),
    "one stop": ({"stop": "END"}, {"stop": ["END"]}),
    "stops": ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
    "no thinking": ({}, {"thinking": False, "thinking_budget": None}),
    "thinking": ({"thinking": True, "thinking_budget": 9}, {"thinking": True, "thinking_budget": 9}),
    "template kwargs": ({"chat_template_kwargs": {"enable_thinking": True}}, {"thinking": True}),
    "effort": ({"reasoning_effort": "low"}, {"thinking": True, "thinking_budget": 1024}),
    "no effort": ({"reasoning_effort": "none"}, {"thinking": False, "thinking_budget": None}),
    "thinking before effort": ({"thinking": False, "reasoning_effort": "low"}, {"thinking": False}),
    "no tools": ({"tools": [WEATHER], "tool_choice": "none"}, {"tools": ()}),
    "ignored": ({"user": "me", "metadata": {}, "a_field_of_the_future": 1, "n": 1, "logprobs": False}, {}),
    "neutral": ({"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "min_p": None}, {}),
    "name": ({"model": "scripted"}, {}),
    "no name": ({"model": ""}, {}),
    "text": ({"response_format": {"type": "text"}}, {"grammar": None}),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_fields_are_the_runtime_s_options(client: TestClient, script: Script, case: str) -> None:
    fields, expected = MEANINGS[case]
    response = ask(client, **fields)
    assert response.status_code == 200, response.text
    (call,) = script.calls
    assert {name: call[name] for name in expected} == expected


def test_messages_keep_what_templates_read(client: TestClient, script: Script) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain", "annotations": [1]},
        {"role": "user", "content": [{"type": "text", "text": "so?"}], "name": None},
    ]
    assert ask(client, messages=messages).status_code == 200
    assert script.calls[0]["messages"] == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "user", "content": [{"type": "text", "text": "so?"}]},
    ]


@pytest.mark.parametrize("prompt", ["def ", ["def "], [1, 2], [[1, 2]]])
def test_a_prompt_is_text_or_token_ids(client: TestClient, script: Script, prompt: Any) -> None:
    assert ask(client, COMPLETION, prompt=prompt).status_code == 200
    assert script.calls[0]["prompt"] in ("def ", [1, 2])
    assert script.calls[0]["max_tokens"] == 16


# What is refused

REFUSED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "n": ({"n": 2}, "n is 2, which cannot be served; leave it out or send 1", "n"),
    "n true": ({"n": True}, "n is True, which cannot be served", "n"),
    "logprobs": (
        {"logprobs": True},
        "logprobs is True, which cannot be served; leave it out or send False",
        "logprobs",
    ),
    "penalty": ({"presence_penalty": 0.5}, "presence_penalty is 0.5, which cannot be served", "presence_penalty"),
    "functions": ({"functions": [{}]}, "functions is", "functions"),
    "misspelled": ({"max_token": 3}, "unknown field 'max_token', did you mean 'max_tokens'?", "max_tokens"),
    "fields": ({str(number): 0 for number in range(100)}, "the body has 101 fields, expected at most 100", None),
    "required": ({"tools": [WEATHER], "tool_choice": "required"}, "no call can be forced", "tool_choice"),
    "choice": ({"tool_choice": {"type": "function"}}, 'expected "auto" or "none"', "tool_choice"),
    "tool type": ({"tools": [{"type": "web_search"}]}, "tools holds type 'web_search', expected 'function'", "tools"),
    "tool name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tool: name is 'a b'", None),
    "tools and format": (
        {"tools": [WEATHER], "response_format": {"type": "json_object"}},
        "response_format forbids what is no such JSON",
        "response_format",
    ),
    "format": (
        {"response_format": {"type": "xml"}},
        "expected type text, json_object, or json_schema",
        "response_format",
    ),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        "json_schema.schema",
        "response_format",
    ),
    "reference": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://a"}}}},
        "schema refers to 'http://a'",
        None,
    ),
    "max_tokens": ({"max_tokens": 1.5}, "max_tokens is 1.5, expected an integer", "max_tokens"),
    "temperature": ({"temperature": "hot"}, "temperature is 'hot', expected a number", "temperature"),
    "seed": ({"seed": True}, "seed is True, expected an integer", "seed"),
    "stop": ({"stop": [""]}, "stop holds '', expected text of 1 to 1,000 characters", "stop"),
    "stops": ({"stop": ["a"] * 17}, "expected text or a list of at most 16", "stop"),
    "stream": ({"stream": "yes"}, "stream is 'yes', expected true or false", "stream"),
    "stream options": ({"stream_options": []}, r"stream_options is [], expected an object", "stream_options"),
    "effort": ({"reasoning_effort": "huge"}, "expected one of none, minimal, low", "reasoning_effort"),
    "kwargs": ({"chat_template_kwargs": {"a": 1}}, "expected enable_thinking alone", "chat_template_kwargs"),
    "messages": ({"messages": []}, "messages is [], expected a list of at least one", "messages"),
    "many": ({"messages": HELLO * 1025}, "messages has 1,025 entries, the context holds 1,024 tokens", "messages"),
    "long": (
        {"messages": [{"role": "user", "content": "a" * 65_537}]},
        "messages has 65,541 characters, the context holds 1,024 tokens; shorten it",
        "messages",
    ),
    "message": ({"messages": ["a"]}, "message 0 is 'a', expected an object", "messages"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused(client: TestClient, script: Script, case: str) -> None:
    fields, message, param = REFUSED[case]
    response = ask(client, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]
    assert not script.calls


@pytest.mark.parametrize("prompt", [None, ["a", "b"], [1, "a"], {}, [True], [[1], [2]]])
def test_prompts_that_are_none(client: TestClient, prompt: Any) -> None:
    error = ask(client, COMPLETION, prompt=prompt).json()["error"]
    assert error["param"] == "prompt"


def test_another_model_is_not_found(client: TestClient) -> None:
    response = ask(client, model="gpt-4o")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert client.get("/v1/models/gpt-4o").status_code == 404


BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the body is not JSON"),
    "no JSON": (b'{"messages":', "the body is not JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "the body is not JSON"),
    "a list": (b"[]", "the body is a JSON list, expected an object"),
    "NaN": (b'{"temperature": NaN}', "NaN is no JSON number"),
    "many digits": (b'{"seed": ' + b"9" * 5000 + b"}", "the body is not JSON"),
    "deep lists": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 128"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper than 128"),
    "somewhat deep": (b'{"messages": ' + b"[" * 200 + b"]" * 200 + b"}", "nested deeper than 128"),
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_no_requests(client: TestClient, case: str) -> None:
    body, message = BODIES[case]
    response = client.post(CHAT, content=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_a_body_has_a_limit(script: Script) -> None:
    def in_chunks() -> Iterator[bytes]:
        yield from [b" " * 600] * 3

    with script.test_client(max_body_bytes=1000) as client:
        assert client.post(CHAT, content=b" " * 1000).status_code == 400
        for content in (b" " * 1001, in_chunks()):
            response = client.post(CHAT, content=content)
            assert response.status_code == 413
            assert "at most 1,000 are read" in response.json()["error"]["message"]


# What comes back


def test_thoughts_stand_apart(client: TestClient) -> None:
    answer = ask(client).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello", "reasoning_content": "so"}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {
            "reasoning_tokens": 4,
            "accepted_prediction_tokens": 2,
            "rejected_prediction_tokens": 1,
        },
    }


def test_a_stream_says_the_same_in_pieces(client: TestClient) -> None:
    *chunks, last, done = events(ask(client, stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "so"},
        {"content": "He"},
        {"content": "llo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert last["choices"] == []
    assert last["usage"] == ask(client).json()["usage"]
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


def test_calls_of_tools(client: TestClient, script: Script) -> None:
    script.pieces, script.tool_calls, script.finish_reason = (), (CALL, CALL), "tool_calls"
    (choice,) = ask(client, tools=[WEATHER]).json()["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    first, second = choice["message"]["tool_calls"]
    assert first["id"] != second["id"]
    assert (first["type"], first["function"]["name"]) == ("function", "weather")
    assert json.loads(first["function"]["arguments"]) == CALL.arguments
    chunks = events(ask(client, tools=[WEATHER], stream=True, parallel_tool_calls=False))
    (call,) = chunks[1]["choices"][0]["delta"]["tool_calls"]
    assert (call["index"], call["function"]) == (0, first["function"])
    assert chunks[2]["choices"][0]["finish_reason"] == "tool_calls"


MISFITS = {
    "unknown": (ToolCall("stocks", {}), "the model called none of the tools"),
    "strict": (ToolCall("weather", {"city": 5}), "argument city is 5, expected string"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_calls_that_do_not_fit_are_no_answer(client: TestClient, script: Script, case: str) -> None:
    call, message = MISFITS[case]
    script.tool_calls, script.finish_reason = (call,), "tool_calls"
    response = ask(client, tools=[WEATHER])
    assert response.status_code == 500
    assert message in response.json()["error"]["message"]


ERRORS: dict[str, tuple[Exception, int, str]] = {
    "request": (RequestError("the prompt is empty"), 400, "the prompt is empty"),
    "tool call": (ToolCallError("expected {", "call:" + "x" * 500), 500, "call:" + "x" * 500),
    "inference": (InferenceError("the largest logit is nan"), 500, "the largest logit is nan"),
    "busy": (BusyError("another thread"), 503, "another thread"),
    "closed": (ClosedError("the runtime is closed"), 503, "the runtime is closed"),
}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("case", ERRORS)
def test_an_error_before_the_text_is_a_status(client: TestClient, script: Script, case: str, is_streamed: bool) -> None:
    script.pieces, (script.error, status, message) = (), ERRORS[case]
    response = ask(client, stream=is_streamed)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_within_the_text_ends_the_stream(client: TestClient, script: Script, case: str) -> None:
    script.error, _, message = ERRORS[case]
    *chunks, last = events(ask(client, stream=True))
    assert len(chunks) == 4
    assert message in last["error"]["message"]


def test_a_bug_tells_nothing_of_itself(script: Script) -> None:
    script.error = KeyError("secret")
    with script.test_client() as client:
        with pytest.raises(KeyError):
            ask(client)
        with pytest.raises(KeyError):
            ask(client, stream=True)
    client = TestClient(client.app, base_url="http://localhost", raise_server_exceptions=False)
    response = ask(client)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "internal error; the server's log has more"


def test_paths_and_methods(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/models").json()["data"][0]["id"] == "scripted"
    assert client.get("/v1/models/scripted").json()["object"] == "model"
    for response, status in ((client.get("/nothing"), 404), (client.get(CHAT), 405), (client.options(CHAT), 405)):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_figures_count_what_was_served(client: TestClient) -> None:
    ask(client)
    ask(client, n=3)
    lines = client.get("/metrics").text.splitlines()
    assert 'edge_requests_total{route="/v1/chat/completions",status="200"} 1' in lines
    assert 'edge_requests_total{route="/v1/chat/completions",status="400"} 1' in lines
    assert 'edge_tokens_total{kind="accepted"} 2' in lines
    assert "edge_requests_queued 0" in lines


# Who may ask


def test_a_key_is_asked_for(script: Script) -> None:
    with script.test_client(api_key="secret") as client:
        assert client.get("/health").status_code == client.get("/").status_code == 200
        for key in ("", "Bearer", "Bearer wrong", "Bearer secret2", "Basic secret", "secret", "Bearer sécret".encode()):
            response = client.get("/v1/models", headers={"authorization": key})
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/metrics", "/v1/models", "/nothing"):
            assert client.get(path).status_code == 401
        assert ask(client).status_code == 401
        client.headers["authorization"] = "Bearer secret"
        assert ask(client).status_code == client.get("/metrics").status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.:8000", "127.0.0.1:80", "127.8.0.1", "[::1]:8000"])
def test_hosts_of_this_machine(client: TestClient, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["", "example.org", "localhost.example.org", "127.0.0.1.nip.io:8000", "[::2]", "["])
def test_other_hosts_are_refused(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["null", "http://example.org", "http://localhost:1", "file://", "http://[", ""])
def test_pages_of_others_post_nothing(client: TestClient, script: Script, origin: str) -> None:
    response = client.post(CHAT, json={"messages": HELLO}, headers={"origin": origin})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "foreign_origin")
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert not script.calls


def test_the_page_s_own_origin_posts(client: TestClient) -> None:
    headers = {"origin": "http://localhost"}
    assert client.post(CHAT, json={"messages": HELLO}, headers=headers).status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_forms_of_pages_post_nothing(client: TestClient, content_type: str) -> None:
    response = client.post(CHAT, content=b'{"messages": []}', headers={"content-type": content_type})
    assert response.status_code == 415
