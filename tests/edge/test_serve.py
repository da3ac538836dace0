"""A server of the demo artifact, asked by OpenAI's own client, and by clients that go away."""

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from runtime.errors import InferenceError
from runtime.memory import memory_usage
from tests.serving import Served, connect, raw_request, serving

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
MIB = 1 << 20


@pytest.fixture(scope="module")
def served(demo_artifact: Callable[..., Path]) -> Iterator[Served]:
    with serving(demo_artifact(4), max_waiting=64) as served:
        served.runtime.manifest.generation["eos_token_ids"] = [1]
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> OpenAI:
    return served.client()


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(client: OpenAI, text: str = "What does zip() do?", **options: Any) -> Any:
    return client.chat.completions.create(model="bits4", messages=user(text), **{**GREEDY, **options})


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# Answers


def test_a_chat_is_the_runtime_s(served: Served, client: OpenAI) -> None:
    answer = chat(client)
    generation = served.runtime.chat(user("What does zip() do?"), **GREEDY)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", generation.text)
    assert choice.finish_reason == generation.finish_reason
    assert answer.usage.prompt_tokens == generation.stats.num_prompt_tokens
    assert answer.usage.completion_tokens == len(generation.token_ids)


def test_a_stream_is_the_answer_in_pieces(client: OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(chunks) > 6


def test_a_completion_goes_on_with_text_or_tokens(served: Served, client: OpenAI) -> None:
    generation = served.runtime.generate("def main", **GREEDY)
    by_text = client.completions.create(model="bits4", prompt="def main", **GREEDY)
    assert by_text.choices[0].text == generation.text
    ids = served.runtime._prompt_ids("def main")
    pieces = client.completions.create(model="bits4", prompt=ids, stream=True, **GREEDY)
    assert "".join(piece.choices[0].text for piece in pieces) == generation.text


def test_the_model_is_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["bits4"]
    assert client.models.retrieve("bits4").id == "bits4"


def test_stop_strings_end_the_text(client: OpenAI) -> None:
    text = chat(client).choices[0].message.content
    stop = text[8:12]
    (choice,) = chat(client, stop=stop).choices
    assert (choice.message.content, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_seed_repeats_an_answer(served: Served, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    stream_chat = served.runtime.stream_chat  # how many drafts pay is decided by times, and drafts take numbers too
    monkeypatch.setattr(
        served.runtime, "stream_chat", lambda *args, **options: stream_chat(*args, **{**options, "num_draft_tokens": 0})
    )
    texts = [chat(client, seed=seed, temperature=1, max_tokens=40).choices[0].message.content for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_an_answer_is_held_to_a_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "number": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["kind", "number"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema}}
    for seed in range(4):
        (choice,) = chat(client, response_format=form, temperature=1, seed=seed, max_tokens=200).choices
        jsonschema.validate(json.loads(choice.message.content), schema)
        assert choice.finish_reason == "stop"


def test_a_prefix_that_is_known_is_not_computed_again(client: OpenAI) -> None:
    text = " ".join(f"the {number}th word" for number in range(60))
    first, second = (chat(client, text + end).usage for end in (" and so", " but not"))
    assert first.prompt_tokens > 300
    assert second.prompt_tokens_details.cached_tokens > 250


def test_what_the_template_refuses_is_the_client_s_fault(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi"}, {"role": "system", "content": "late"}]
    with pytest.raises(openai.BadRequestError, match="chat template, line [0-9]+: .*expected user"):
        client.chat.completions.create(model="bits4", messages=messages, **GREEDY)


# Errors


def test_errors_are_the_client_s_own(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be a finite number >= 0"):
        chat(client, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="the prompt has [0-9,]+ tokens, the context holds 1,024"):
        chat(client, "a1 " * 2000, stream=True)
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-4o' is not served here"):
        client.chat.completions.create(model="gpt-4o", messages=user("a"))
    with pytest.raises(openai.BadRequestError, match="prompt token 1 is 2048, expected an integer 0-2,047"):
        client.completions.create(model="bits4", prompt=[2, 2048])


def test_a_failure_within_a_stream_is_raised(served: Served, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    target = served.runtime._open_or_raise().target
    forward, calls = target.forward, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise InferenceError("the model overflowed")
        return forward(*args, **options)

    monkeypatch.setattr(target, "forward", failing)
    pieces = []
    with pytest.raises(openai.APIError, match="the model overflowed"):
        for chunk in chat(client, stream=True):
            pieces.append(chunk)
    assert len(pieces) > 1
    monkeypatch.undo()
    assert chat(client).choices[0].message.content


# Clients that wait, and clients that go


def test_a_full_queue_refuses(demo_artifact: Callable[..., Path]) -> None:
    with serving(demo_artifact(4), max_waiting=1) as served:
        client = served.client()
        running, waiting = connect(served.port), connect(served.port)
        body = json.dumps({"messages": user("a"), "max_tokens": 1000, "seed": 1}).encode()
        turn = served.desk._turn
        asyncio.run(turn.acquire())  # as a generation that takes long
        running.sendall(raw_request(served.port, body))
        wait_until(lambda: served.desk.num_waiting == 1)
        with pytest.raises(openai.RateLimitError, match="1 requests wait already and no more may") as raised:
            chat(client)
        assert raised.value.response.headers["retry-after"] == "1"
        running.close()  # it waited, and gives its place up
        wait_until(lambda: served.desk.num_waiting == 0)
        waiting.sendall(raw_request(served.port, body))
        wait_until(lambda: served.desk.num_waiting == 1)
        waiting.close()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_goes_ends_its_generation(served: Served, client: OpenAI, is_streamed: bool) -> None:
    body = json.dumps({"messages": user("a"), "max_tokens": 1000, "stream": is_streamed}).encode()
    connection = connect(served.port)
    connection.sendall(raw_request(served.port, body))
    wait_until(lambda: served.desk.is_busy)
    connection.close()
    wait_until(lambda: not served.desk.is_busy, 1)
    started = time.monotonic()
    chat(client, max_tokens=2)
    assert time.monotonic() - started < 1


def test_a_client_that_does_not_read_holds_up_nobody(served: Served, client: OpenAI) -> None:
    body = json.dumps({"messages": user("a"), "max_tokens": 900, "stream": True, "temperature": 0}).encode()
    connection = connect(served.port)
    connection.sendall(raw_request(served.port, body))
    assert chat(client).choices[0].message.content
    connection.close()


def test_cancelled_requests_leave_nothing(served: Served, client: OpenAI) -> None:
    def cancel_one(number: int) -> None:
        body = json.dumps({"messages": user(f"{number}"), "max_tokens": 1000, "stream": number % 2 == 0}).encode()
        connection = connect(served.port)
        connection.sendall(raw_request(served.port, body))
        time.sleep(number % 5 * 0.004)
        connection.close()

    def settled() -> tuple[int, int]:
        wait_until(lambda: not served.desk.is_busy and not served.desk.num_waiting and not served.desk._tasks)
        chat(client)
        gc.collect()
        return memory_usage().anonymous_bytes, threading.active_count()

    for number in range(40):
        cancel_one(number)
    bytes_before, threads_before = settled()
    for number in range(200):
        cancel_one(number)
    bytes_behind, threads_behind = settled()
    assert threads_behind <= threads_before + 4  # the loop's pool of worker threads may still have been growing
    assert (
        bytes_behind - bytes_before < 4 * MIB
    )  # a lost generation keeps its prompt, matcher and queue: 10 KiB or more


def test_streams_side_by_side_are_not_mixed(served: Served, client: OpenAI) -> None:
    prompts = [f"def number_{number}(" for number in range(8)]
    alone = [chat(client, prompt).choices[0].message.content for prompt in prompts]

    def streamed(prompt: str) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in chat(client, prompt, stream=True))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(streamed, prompts)) == alone


def test_a_shutdown_ends_what_generates(demo_artifact: Callable[..., Path]) -> None:
    async def ask(served: Served) -> list[str]:
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        stream = await client.completions.create(model="bits4", prompt="def ", stream=True, max_tokens=1000)
        pieces = [(await anext(stream)).choices[0].text]
        waiting = asyncio.create_task(client.completions.create(model="bits4", prompt="def ", max_tokens=1000))
        while not served.desk.num_waiting:
            await asyncio.sleep(0.001)
        served.call(served.desk.close)
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            async for piece in stream:
                pieces.append(piece.choices[0].text)
        with pytest.raises(openai.InternalServerError, match="the server is shutting down"):
            await waiting
        return pieces

    started = time.monotonic()
    with serving(demo_artifact(4)) as served:
        assert asyncio.run(ask(served))
    assert time.monotonic() - started < 5


def test_a_client_that_goes_is_counted_once(demo_artifact: Callable[..., Path]) -> None:
    with serving(demo_artifact(4)) as served:
        served.runtime.manifest.generation["eos_token_ids"] = []
        for is_streamed in (False, True):
            body = json.dumps({"messages": user("a"), "max_tokens": 1000, "stream": is_streamed}).encode()
            with connect(served.port) as connection:
                connection.sendall(raw_request(served.port, body))
                if is_streamed:
                    connection.recv(1)
                wait_until(lambda: served.desk.is_busy)
            wait_until(lambda: not served.desk.is_busy)
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    counted = [line.rpartition("status=")[2] for line in lines if 'route="/v1/chat' in line]
    assert counted == ['"200"} 1', '"499"} 1']


def test_figures_follow_the_runtime(served: Served, client: OpenAI) -> None:
    def tokens(kind: str) -> int:
        text = httpx.get(f"{served.url}/metrics").text
        (line,) = (line for line in text.splitlines() if line.startswith(f'edge_tokens_total{{kind="{kind}"}}'))
        return int(line.split()[1])

    before = tokens("generated"), tokens("prompt")
    usage = chat(client).usage
    assert (tokens("generated"), tokens("prompt")) == (
        before[0] + usage.completion_tokens,
        before[1] + usage.prompt_tokens,
    )
