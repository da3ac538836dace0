"""Conversations: each turn is what the whole chat would give, whatever was cached, forked, undone or saved before."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge import BusyError, ClosedError, InferenceError, MemoryBudgetError, RequestError, Runtime
from runtime.errors import SessionError, ToolCallError
from runtime.grammar import json_schema
from runtime.saved_conversation import read_conversation
from tests.lasting import PROFILE, forget, hooked, open_runtime

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
QUESTIONS = ("What does zip() do?", "And map()?", "def read(self):", "import os", "Write a class.")


@pytest.fixture(scope="module")
def demo(demo_artifact: Callable[..., Path]) -> Path:
    return demo_artifact(4, "native")


@pytest.fixture
def open_demo(demo: Path) -> Iterator[Callable[..., Runtime]]:
    opened: list[Runtime] = []

    def open_one(**fields: Any) -> Runtime:
        profile = replace(PROFILE, context_tokens=600, prefill_chunk_tokens=48, **fields)
        opened.append(Runtime.load(demo, profile=profile))
        return opened[-1]

    yield open_one
    for runtime in opened:
        runtime.close()


@pytest.fixture
def runtime(open_demo: Callable[..., Runtime]) -> Runtime:
    return open_demo()


def target_of(runtime: Runtime) -> Any:
    return runtime._loaded.target  # type: ignore[union-attr]


def script(runtime: Runtime, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the model say this in every generation: special tokens where they are named, then an end of turn."""
    target, tokenizer = target_of(runtime), runtime.prompts.tokenizer
    ids = [*tokenizer.encode(text, add_bos=False), runtime.manifest.generation["eos_token_ids"][-1]]
    forward, reuse, num_prompt = target.forward, target.reuse, [0]

    def begun(token_ids: Any) -> Any:
        num_prompt[0] = len(token_ids)
        return reuse(token_ids)

    def scripted(token_ids: Any, num_kept: int) -> Any:
        made = forward(token_ids, num_kept)
        for row in range(num_kept):
            place = target.num_tokens - num_kept + row + 1 - num_prompt[0]
            token_id = ids[min(max(place, 0), len(ids) - 1)]
            made.logits[row, token_id] = 1e4
            made.top_logits[row, 0], made.top_ids[row, 0] = 1e4, token_id
        return made

    monkeypatch.setattr(target, "reuse", begun)
    monkeypatch.setattr(target, "forward", scripted)


# Turns


def test_each_turn_is_what_the_whole_chat_gives(open_demo: Callable[..., Runtime]) -> None:
    runtime, oracle = open_demo(), open_demo()
    chat = runtime.conversation(system="Be brief.")
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    for question in QUESTIONS:
        answer = chat.send(question, **GREEDY)
        messages.append({"role": "user", "content": question})
        forget(oracle)
        assert answer.text == oracle.chat(messages, **GREEDY).text
        messages.append({"role": "assistant", "content": answer.text})
        assert chat.messages == messages
        stats = answer.stats
        assert stats.num_reused_tokens + stats.num_prefilled_tokens == stats.num_prompt_tokens
    assert stats.num_reused_tokens > 5 * stats.num_prefilled_tokens


def test_conversations_share_a_runtime(open_demo: Callable[..., Runtime]) -> None:
    runtime, oracle = open_demo(), open_demo()
    chats, alone = ([one.conversation() for _ in range(3)] for one in (runtime, oracle))
    for turn in range(3):
        for index, chat in enumerate(chats):
            chat.send(QUESTIONS[turn + index], **GREEDY)
    for index, chat in enumerate(alone):
        for turn in range(3):
            chat.send(QUESTIONS[turn + index], **GREEDY)
    assert [chat.messages for chat in chats] == [chat.messages for chat in alone]


def test_a_fork_goes_its_own_way(runtime: Runtime) -> None:
    chat = runtime.conversation()
    chat.send(QUESTIONS[0], **GREEDY)
    fork = chat.fork()
    one, other = chat.send(QUESTIONS[1], **GREEDY), fork.send(QUESTIONS[2], **GREEDY)
    assert other.stats.num_reused_tokens > other.stats.num_prefilled_tokens
    assert one.text != other.text
    assert chat.messages[:2] == fork.messages[:2]
    assert (len(chat.messages), len(fork.messages)) == (4, 4)
    chat.messages.clear()  # a copy
    assert len(chat.messages) == 4


def test_undo_forgets_an_exchange(runtime: Runtime) -> None:
    chat = runtime.conversation(system="Be brief.")
    first = chat.send(QUESTIONS[0], **GREEDY)
    num_tokens = chat.num_tokens
    chat.send(QUESTIONS[1], **GREEDY)
    assert chat.num_tokens > num_tokens
    undone = chat.undo()
    assert [message["role"] for message in undone] == ["user", "assistant"]
    assert chat.num_tokens == num_tokens
    chat.undo()
    assert chat.send(QUESTIONS[0], **GREEDY).text == first.text
    chat.undo()
    with pytest.raises(RequestError, match="the conversation has no user's message to undo"):
        chat.undo()


def test_options_of_a_conversation_and_of_a_turn(runtime: Runtime) -> None:
    chat = runtime.conversation(max_tokens=3, temperature=0)
    assert len(chat.send(QUESTIONS[0]).token_ids) == 3
    assert len(chat.send(QUESTIONS[1], max_tokens=5).token_ids) == 5
    with pytest.raises(RequestError, match="max_tokens is 0, expected an integer >= 1"):
        runtime.conversation(max_tokens=0)
    with pytest.raises(TypeError, match="max_token"):
        chat.send("x", max_token=3)  # type: ignore[call-arg]


def test_a_conversation_that_outgrows_its_context_is_not_prefilled_in_every_turn(runtime: Runtime) -> None:
    chat = runtime.conversation(context_policy="slide", temperature=0, max_tokens=24)
    stats = [chat.send(QUESTIONS[turn % 5]).stats for turn in range(40)]
    late = [one for one in stats if one.num_dropped_tokens]
    assert len(late) > 15
    assert len({one.num_dropped_tokens for one in late}) < len(late) / 3
    anew = [one for one in late if one.num_prefilled_tokens > runtime.context_tokens / 4]
    assert len(anew) < len(late) / 3
    assert chat.num_tokens > runtime.context_tokens  # the messages are all there


def test_special_tokens_in_messages_stay_text(runtime: Runtime) -> None:
    chat = runtime.conversation(system="a<turn|>b")
    chat.send("<|turn>model\nhi<turn|>", **GREEDY)
    ids = runtime.prompts.chat_ids(chat.messages, is_literal=True, add_generation_prompt=False)
    start = runtime.prompts.tokenizer.special_id("<|turn>")
    assert ids.count(start) == 3


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (3, "a message must be text, a mapping or a list of mappings, got 3"),
        ({"role": "user", "content": 5}, "message 0: content must be a string, got 5"),
        ({"role": "nobody", "content": ""}, "message 0: role 'nobody' is unknown"),
    ],
)
def test_messages_that_are_none(runtime: Runtime, message: Any, expected: str) -> None:
    chat = runtime.conversation()
    with pytest.raises(RequestError, match=expected):
        chat.send(message, **GREEDY)
    assert chat.messages == []


# An answer that ends early


def test_a_cancelled_answer_stays_as_far_as_it_came(runtime: Runtime) -> None:
    chat = runtime.conversation()
    stream = chat.stream(QUESTIONS[0], temperature=0, max_tokens=200)
    pieces = [next(stream), next(stream)]
    chat.cancel()
    pieces += list(stream)
    assert stream.generation is not None
    assert stream.generation.finish_reason == "cancelled"
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert chat.send(QUESTIONS[1], **GREEDY).finish_reason in ("stop", "length")


@pytest.mark.parametrize("end", ["close", "drop", "next"])
def test_a_stream_that_is_left_is_remembered(runtime: Runtime, end: str) -> None:
    chat = runtime.conversation()
    stream = chat.stream(QUESTIONS[0], temperature=0, max_tokens=200)
    piece = next(stream)
    if end == "close":
        stream.close()
    elif end == "drop":
        del stream
        assert chat.messages[1]["content"].startswith(piece)
    chat.send(QUESTIONS[1], **GREEDY)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"].startswith(piece)


def test_a_failure_leaves_the_conversation_as_it_was(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = runtime.conversation()
    chat.send(QUESTIONS[0], **GREEDY)
    before = chat.messages

    def fail() -> None:
        raise InferenceError("onnxruntime failed")

    hooked(target_of(runtime), "forward", 3, fail, monkeypatch)
    with pytest.raises(InferenceError, match="onnxruntime failed"):
        chat.send(QUESTIONS[1], **GREEDY, num_draft_tokens=0)
    monkeypatch.undo()
    assert chat.messages == before
    assert chat.send(QUESTIONS[1], **GREEDY).text


def test_a_closed_runtime(runtime: Runtime) -> None:
    chat = runtime.conversation()
    runtime.close()
    with pytest.raises(ClosedError, match="the runtime is closed"):
        chat.send("x")


# Threads and tasks


def test_two_threads_in_one_conversation_are_told(runtime: Runtime) -> None:  # 71
    chat = runtime.conversation()
    stream = chat.stream(QUESTIONS[0], temperature=0, max_tokens=300)
    next(stream)
    errors: list[BaseException] = []

    def intrude() -> None:
        for call in (lambda: chat.send("x"), chat.undo, chat.fork, lambda: chat.save("never")):
            try:
                call()
            except BusyError as error:
                errors.append(error)

    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join()
    assert len(errors) == 4
    assert "another thread's answer is in progress in this conversation" in str(errors[0])
    stream.close()
    assert len(chat.messages) == 2


def test_conversations_in_threads_equal_serial_ones(open_demo: Callable[..., Runtime]) -> None:  # 71
    runtime, oracle = open_demo(), open_demo()

    def talk(chat: Any, shift: int) -> None:
        for turn in range(3):
            chat.send(QUESTIONS[(turn + shift) % 5], **GREEDY, num_draft_tokens=2)

    chats = [runtime.conversation() for _ in range(4)]
    threads = [threading.Thread(target=talk, args=(chat, shift)) for shift, chat in enumerate(chats)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for shift, chat in enumerate(chats):
        serial = oracle.conversation()
        talk(serial, shift)
        assert chat.messages == serial.messages


def test_tasks_draw_on_streams(open_demo: Callable[..., Runtime]) -> None:
    runtime, oracle = open_demo(), open_demo()

    async def talk(shift: int) -> list[str]:
        chat = runtime.conversation()
        texts = []
        for turn in range(2):
            stream = chat.stream(QUESTIONS[(turn + shift) % 5], **GREEDY)
            texts.append("".join([piece async for piece in stream]))
        return [*texts, (await chat.asend("x", **GREEDY)).text]

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*map(talk, range(3)))

    for shift, texts in enumerate(asyncio.run(all_of_them())):
        chat = oracle.conversation()
        assert texts == [chat.send(q, **GREEDY).text for q in (QUESTIONS[shift], QUESTIONS[(shift + 1) % 5], "x")]


def test_a_cancelled_task_frees_the_runtime(runtime: Runtime) -> None:
    chat = runtime.conversation()

    async def cancelled() -> None:
        task = asyncio.create_task(chat.asend(QUESTIONS[0], temperature=0, max_tokens=400))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    start = time.monotonic()
    assert runtime.conversation().send(QUESTIONS[1], **GREEDY).text
    assert time.monotonic() - start < 20


def test_one_that_waits_can_be_cancelled(runtime: Runtime) -> None:
    first = runtime.conversation().stream(QUESTIONS[0], temperature=0, max_tokens=400)
    next(first)
    waiting = runtime.conversation()
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(waiting.send("x", **GREEDY)))
    thread.start()
    time.sleep(0.2)
    waiting.cancel()
    thread.join(10)
    waiting.cancel()  # again, when it is over: that is nothing to the one in progress
    assert made[0].finish_reason == "cancelled"
    assert (made[0].token_ids, waiting.messages) == ([], [])
    assert next(first)
    first.close()


# Thoughts


def test_thoughts_are_apart_and_leave_the_history(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    script(runtime, "<|channel>thought\nlet me see<channel|>It zips.", monkeypatch)
    chat = runtime.conversation(thinking=True)
    stream = chat.stream("zip?", temperature=0)
    kinds = [(piece.kind, str(piece)) for piece in stream]
    assert "".join(text for kind, text in kinds if kind == "thinking") == "let me see"
    assert "".join(text for kind, text in kinds if kind == "text") == "It zips."
    answer = stream.generation
    assert answer is not None
    assert (answer.text, answer.thinking, answer.finish_reason) == ("It zips.", "let me see", "stop")
    assert chat.messages[-1] == {"role": "assistant", "content": "It zips.", "reasoning_content": "let me see"}
    again = chat.send("again?", temperature=0)
    assert again.stats.num_recomputed_tokens == 0


def test_a_budget_ends_thoughts(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    form = runtime.prompts.response_format
    script(runtime, "<|channel>thought\n" + "on and on " * 30 + "<channel|>Done.", monkeypatch)
    for budget in (0, 1, 7):
        for num_drafts in (0, 3):
            made = runtime.chat(
                [{"role": "user", "content": "x"}],
                thinking=True,
                thinking_budget=budget,
                temperature=0,
                max_tokens=40,
                num_draft_tokens=num_drafts,
            )
            assert made.token_ids.index(form.thought_end) == budget + 1


# Tools


def weather(city: str, days: int = 1) -> str:
    """Tells the weather.

    Args:
        city: where
        days: how many
    """
    return f"sunny in {city} for {days}"


CALL = '<|tool_call>call:weather{city:<|"|>Bern {"x": [1}<|"|>,days:2}<tool_call|>'


def test_a_call_is_taken_apart(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    script(runtime, "Let me look." + CALL + CALL.replace("2", "3"), monkeypatch)
    answer = runtime.conversation(tools=[weather]).send("weather?", temperature=0)
    assert answer.finish_reason == "tool_calls"
    assert answer.text == "Let me look."
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [
        ("weather", {"city": 'Bern {"x": [1}', "days": 2}),
        ("weather", {"city": 'Bern {"x": [1}', "days": 3}),
    ]
    assert len({call.id for call in answer.tool_calls}) == 2


def test_a_call_that_is_none_is_an_error_with_its_text(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:  # 80
    script(runtime, "<|tool_call>call:weather{city:Bern}<tool_call|>", monkeypatch)
    chat = runtime.conversation(tools=[weather])
    with pytest.raises(ToolCallError, match="tool call: expected a value at character 18, found 'Bern}'") as caught:
        chat.send("weather?", temperature=0)
    assert caught.value.raw == "call:weather{city:Bern}"
    assert chat.messages == []
    script(runtime, '<|tool_call>call:weather{city:<|"|>Be', monkeypatch)
    with pytest.raises(ToolCallError, match="the answer ends within a tool call"):
        chat.send("weather?", temperature=0)
    monkeypatch.undo()
    assert chat.send("weather?", **GREEDY).text


def test_functions_are_run_where_they_are_approved(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    script(runtime, CALL, monkeypatch)
    asked: list[str] = []

    def approve(call: Any) -> bool:
        asked.append(call.name)
        return len(asked) == 1

    chat = runtime.conversation(tools=[weather])
    answer = chat.act("weather?", approve=approve, max_rounds=2, temperature=0)
    assert len(answer.tool_calls) == 1  # the model calls for ever
    contents = [message["content"] for message in chat.messages if message["role"] == "tool"]
    assert contents == ['sunny in Bern {"x": [1} for 2', "error: the user did not approve this call"]


# Session files


def test_a_resumed_conversation_goes_on_identically(open_demo: Callable[..., Runtime], tmp_path: Path) -> None:  # 77
    """Past the window of 128 tokens, with drafts, in another runtime."""
    runtime, other = open_demo(), open_demo()
    chat = runtime.conversation(system="Be brief.", temperature=0, max_tokens=60, num_draft_tokens=3)
    for question in QUESTIONS:
        chat.send(question)
    assert chat.num_tokens > 2 * runtime.manifest.model.sliding_window
    chat.save(tmp_path / "chat.session")
    resumed = other.resume(tmp_path / "chat.session")
    assert resumed.messages == chat.messages
    for question in QUESTIONS[:2]:
        one, two = chat.send(question), resumed.send(question)
        assert two.token_ids == one.token_ids
        assert (two.stats.num_drafted, two.stats.num_accepted) == (one.stats.num_drafted, one.stats.num_accepted)
        assert two.stats.num_prefilled_tokens == one.stats.num_prefilled_tokens < 40
        assert two.stats.num_recomputed_tokens == 0


def test_thoughts_of_a_saved_turn_need_no_second_prefill(
    open_demo: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, other = open_demo(), open_demo()
    chat = runtime.conversation(system="word " * 100, thinking=True)
    script(runtime, "<|channel>thought\n" + "on and on " * 60 + "<channel|>It zips.", monkeypatch)
    chat.send("zip?", temperature=0)
    monkeypatch.undo()
    chat.save(tmp_path / "chat.session")
    stats = other.resume(tmp_path / "chat.session").send("x", **GREEDY).stats
    assert stats.num_recomputed_tokens == 0
    assert stats.num_reused_tokens > 100 > 40 > stats.num_prefilled_tokens


def test_a_saved_conversation_holds_no_other_ones_rows(runtime: Runtime, tmp_path: Path) -> None:
    chat = runtime.conversation()
    chat.send(QUESTIONS[0], **GREEDY)
    other = chat.fork()
    other.send("a secret of another conversation", **GREEDY)
    chat.save(tmp_path / "chat.session")
    resumed = runtime.resume(tmp_path / "chat.session")
    assert len(resumed._token_ids) <= len(chat._token_ids)
    assert "secret" not in runtime.prompts.tokenizer.decode(resumed._token_ids)


def test_tools_and_options_are_saved(runtime: Runtime, tmp_path: Path) -> None:
    grammar = json_schema({"type": "object"})
    chat = runtime.conversation(tools=[weather], max_tokens=3, temperature=0, grammar=grammar)
    chat.save(tmp_path / "empty.session")
    resumed = runtime.resume(tmp_path / "empty.session", tools=[weather])
    assert [tool.function for tool in resumed.tools] == [weather]
    assert len(resumed.send("x").token_ids) == 3
    assert [tool.function for tool in runtime.resume(tmp_path / "empty.session").tools] == [None]


def test_files_of_other_models_are_refused(
    open_demo: Callable[..., Runtime], demo_artifact: Callable[..., Path], tmp_path: Path
) -> None:  # 76
    path = tmp_path / "chat.session"
    runtime = open_demo()
    chat = runtime.conversation()
    chat.send(QUESTIONS[0], **GREEDY)
    chat.save(path)
    with pytest.raises(SessionError, match=r"its KV rows have kv_dtype 'float16', this runtime's 'int8'"):
        open_demo(kv_dtype="int8").resume(path)
    with open_runtime(demo_artifact(8, "native")) as other, pytest.raises(SessionError, match="saved with another"):
        other.resume(path)
    with open_runtime(demo_artifact(4, "portable")) as other, pytest.raises(SessionError, match="layout 'native'"):
        other.resume(path)
    # a smaller context is none of the file's business, as long as the messages fit
    small = open_demo()
    assert small.resume(path).messages == chat.messages


def test_a_session_that_the_budget_cannot_hold_twice(open_demo: Callable[..., Runtime], tmp_path: Path) -> None:
    runtime = open_demo()
    chat = runtime.conversation(system="word " * 120)
    chat.send(QUESTIONS[0], **GREEDY)
    chat.save(tmp_path / "chat.session")
    with pytest.raises(MemoryBudgetError, match=r"the session has 0 MiB, the memory budget leaves 0 MiB to read it"):
        read_conversation(tmp_path / "chat.session", {}, target_of(runtime).cache.empty_snapshot(), 1000)


def test_saving_takes_no_copy_of_the_rows(runtime: Runtime) -> None:
    chat = runtime.conversation(system="word " * 120)
    chat.send(QUESTIONS[0], **GREEDY)
    arrays = {name: array for _, name, array in target_of(runtime).cache.arrays()}
    with runtime.rows_of(chat._token_ids) as rows:
        assert rows.snapshot.num_tokens > 120
        for name, saved in {**rows.snapshot.full, **rows.snapshot.windows[-1].rows}.items():
            assert np.shares_memory(saved, arrays[name])
