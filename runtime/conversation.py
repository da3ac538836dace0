"""A conversation: its messages, and the turns that answer them. Holds no KV rows: the runtime knows what is cached."""

import copy
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Unpack

from runtime.errors import BusyError, RequestError
from runtime.options import GenerationOptions, OptionArguments
from runtime.prefix import Parked
from runtime.prompts import Prompts
from runtime.saved_conversation import SavedConversation, write_conversation
from runtime.stream import Generation, GenerationStream
from runtime.tool_calls import ToolCall
from runtime.tools import Tool, result_of

MAX_ROUNDS = 8

Message = Mapping[str, Any]


class Host(Protocol):
    """What a conversation needs of the runtime."""

    @property
    def prompts(self) -> Prompts:
        """How messages become token ids."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What rows of the KV cache depend on."""
        ...

    def answer(
        self, prompt_ids: list[int], options: GenerationOptions, thinking: bool, on_end: Callable[[Generation], None]
    ) -> GenerationStream:
        """The answer to a prompt."""
        ...

    def rows_of(self, token_ids: Sequence[int]) -> AbstractContextManager[Parked]:
        """Rows of as many of the first of these tokens as are cached; within, nothing changes them."""
        ...


class Conversation:
    """A chat that goes on. Made by `Runtime.conversation` and `Runtime.resume`.

    Each answer prefills what is new, behind what the KV cache holds of the conversation from before. Several
    conversations, also in several threads, take turns on one runtime; one conversation answers one thread at a time.
    """

    def __init__(
        self,
        host: Host,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        thinking: bool,
        options: OptionArguments,
        *,
        token_ids: Sequence[int] = (),
    ) -> None:
        GenerationOptions(**options).check()
        self.tools = tuple(tools)
        self.thinking = thinking
        self._host = host
        self._options = options
        self._messages = [copy.deepcopy(dict(message)) for message in messages]
        self._token_ids = list(token_ids)  # of the last turn's prompt and answer
        self._lock = threading.Lock()
        self._stream: weakref.ref[GenerationStream] | None = None  # one that is dropped ends
        self._turn = object()  # the answer that will be remembered
        if self._messages:
            self._prompt_ids(self._messages, add_generation_prompt=False)  # refuses what the template does

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What was said, as `Runtime.chat` takes it; a copy."""
        return copy.deepcopy(self._messages)

    @property
    def options(self) -> OptionArguments:
        """Its answers' defaults; a copy."""
        return self._options.copy()

    @property
    def num_tokens(self) -> int:
        """Tokens that the messages take in the model's chat format."""
        return len(self._prompt_ids(self._messages, add_generation_prompt=False)) if self._messages else 0

    def send(self, message: str | Message | Sequence[Message], **options: Unpack[OptionArguments]) -> Generation:
        """The answer to a message, both of which the conversation remembers.

        Args:
            message: a user's text, or a message, or several, such as the results of tools
            options: instead of the conversation's own, see `GenerationOptions`

        Raises:
            RequestError: the message or an option cannot be served.
            BusyError: another thread's answer is in progress in this conversation.
            ToolCallError: the model wrote a tool call that is none. Here and below nothing is remembered of the turn.
            InferenceError: the model produced NaN or infinite numbers.
        """
        return self.stream(message, **options).finish()

    async def asend(self, message: str | Message | Sequence[Message], **options: Unpack[OptionArguments]) -> Generation:
        """As `send`, without blocking the event loop; cancelling the task ends the answer."""
        return await self.stream(message, **options).afinish()

    def stream(
        self, message: str | Message | Sequence[Message], **options: Unpack[OptionArguments]
    ) -> GenerationStream:
        """As `send`, but yields pieces, whose `kind` is "thinking" or "text".

        An answer that is ended early is remembered as far as it came.
        """
        with self._lock:
            self._end_abandoned()
            asked = [*self._messages, *_messages_of(message)]
            prompt_ids = self._prompt_ids(asked)
            chosen = GenerationOptions(**self._merged(options))

            turn = object()

            def remember(generation: Generation) -> None:
                if generation.token_ids and self._turn is turn:
                    self._messages = [*asked, _answer(generation)]
                    self._token_ids = [*prompt_ids, *generation.token_ids]

            stream = self._host.answer(prompt_ids, chosen, self.thinking, remember)
            self._stream, self._turn = weakref.ref(stream), turn
        return stream

    def act(
        self,
        message: str | Message | Sequence[Message],
        *,
        approve: Callable[[ToolCall], bool] | None = None,
        max_rounds: int = MAX_ROUNDS,
        **options: Unpack[OptionArguments],
    ) -> Generation:
        """As `send`, but runs the functions that the model calls and goes on with their results.

        What a function raises, and that a call was not approved, is told to the model as its result.

        Args:
            approve: asked before each call; what it does not return True for is not run
            max_rounds: how often results are sent; the answer behind them may still have `tool_calls`
        """
        answer = self.send(message, **options)
        for _ in range(max_rounds):
            if not answer.tool_calls:
                break
            answer = self.send([self._result(call, approve) for call in answer.tool_calls], **options)
        return answer

    def cancel(self) -> None:
        """Ends the answer in progress, from any thread, within one step."""
        if (stream := self._present()) is not None:
            stream.cancel()

    def undo(self) -> list[dict[str, Any]]:
        """Forgets the last user's message and all behind it; returns them.

        Raises:
            RequestError: there is none.
        """
        with self._lock:
            self._end_abandoned()
            users = [place for place, message in enumerate(self._messages) if message["role"] == "user"]
            if not users:
                raise RequestError("the conversation has no user's message to undo")
            self._messages, undone = self._messages[: users[-1]], self._messages[users[-1] :]
            return undone

    def fork(self) -> "Conversation":
        """A conversation that begins as this one and goes its own way; what is cached serves both."""
        with self._lock:
            self._end_abandoned()
            return Conversation(
                self._host, self._messages, self.tools, self.thinking, self._options, token_ids=self._token_ids
            )

    def save(self, path: str | Path) -> None:
        """Writes messages, options and KV rows to one file, whole or not at all; see `Runtime.resume`.

        Raises:
            SessionError: the file cannot be written; one that was there is as before.
            BusyError: an answer is in progress.
        """
        with self._lock:
            self._end_abandoned()
            options = self._options.copy()
            options.pop("grammar", None)
            with self._host.rows_of(self._token_ids) as rows:
                saved = SavedConversation(self._messages, self.tools, self.thinking, options, rows)
                write_conversation(Path(path), self._host.identity, saved)

    def _merged(self, options: OptionArguments) -> OptionArguments:
        merged = self._options.copy()
        merged.update(options)
        return merged

    def _prompt_ids(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        return self._host.prompts.chat_ids(
            messages,
            self.tools,
            thinking=self.thinking,
            is_literal=True,
            add_generation_prompt=add_generation_prompt,
        )

    def _present(self) -> GenerationStream | None:
        """The last stream, while somebody has it."""
        return self._stream() if self._stream is not None else None

    def _end_abandoned(self) -> None:
        """Ends an answer that nobody draws on; BusyError where somebody does."""
        stream = self._present()
        if stream is None or stream.generation is not None:
            return
        if stream.is_in_use:
            raise BusyError("another thread's answer is in progress in this conversation; wait for it or cancel() it")
        stream.close()

    def _result(self, call: ToolCall, approve: Callable[[ToolCall], bool] | None) -> dict[str, Any]:
        is_approved = approve is None or approve(call) is True
        content = result_of(self.tools, call) if is_approved else "error: the user did not approve this call"
        return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}


def _messages_of(message: str | Message | Sequence[Message]) -> list[dict[str, Any]]:
    if isinstance(message, str):
        return [{"role": "user", "content": message}]
    if isinstance(message, Mapping):
        return [dict(message)]
    if not isinstance(message, Sequence) or not all(isinstance(one, Mapping) for one in message):
        raise RequestError(f"a message must be text, a mapping or a list of mappings, got {message!r:.40}")
    return [dict(one) for one in message if isinstance(one, Mapping)]


def _answer(generation: Generation) -> dict[str, Any]:
    """The message that a template is given for an answer."""
    message: dict[str, Any] = {"role": "assistant", "content": generation.text}
    if generation.thinking:
        message["reasoning_content"] = generation.thinking
    if generation.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in generation.tool_calls
        ]
    return message
