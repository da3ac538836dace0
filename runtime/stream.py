"""One generation as a stream of text: turns steps of tokens into pieces, and stops where it should."""

import itertools
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
import onnxruntime as ort

from runtime.drafter import DrafterModel
from runtime.errors import BusyError, ClosedError, InferenceError
from runtime.generation import Request, generate_blocks
from runtime.owner import Owner, acting_for
from runtime.response import Part, Piece, PieceKind, ResponseScanner
from runtime.stats import GenerationStats, StatsRecorder
from runtime.target import TargetModel
from runtime.tool_calls import ToolCall

FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation.

    `token_ids` holds what was generated, an end-of-sequence token included; `text` has neither special tokens nor the
    stop string. `finish_reason` is "stop" (end of sequence or stop string), "length", "cancelled" or, where a chat's
    answer calls tools, "tool_calls". "length" is both `max_tokens` and the end of the context; `context_full` is true
    where it was the context. Of a chat, thoughts are in `thinking` and calls in `tool_calls`, and neither in `text`.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: GenerationStats
    context_full: bool = False
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class Host(Protocol):
    """What a generation needs of the runtime that it runs on."""

    def step(self) -> AbstractContextManager[None]:
        """Held while a step runs."""
        ...

    def claim(self, run: "GenerationRun") -> tuple[TargetModel, DrafterModel | None]:
        """Makes a generation the one in progress; one that waits may have been cancelled when it returns."""
        ...

    def release(self, run: "GenerationRun") -> None:
        """Says that a generation is over."""
        ...


class GenerationStream:
    """Iterates over pieces of text, also with `async for`. `generation` is there once it is over.

    Closing or dropping it ends it early, and so does cancelling the task that draws on it.
    """

    def __init__(self, run: "GenerationRun", on_end: Callable[[Generation], None] | None = None) -> None:
        """Made by `Runtime.stream` and others.

        Args:
            on_end: told of the result, unless it failed
        """
        self._run = run
        self._pieces = run.pieces(on_end)
        self._turn = threading.Lock()

    @property
    def generation(self) -> Generation | None:
        """The result; None while the generation goes on."""
        return self._run.generation

    @property
    def is_in_use(self) -> bool:
        """Whether a thread or task other than this one draws on it."""
        return self._run.is_in_use

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        if not self._turn.acquire(blocking=False):
            raise BusyError("another thread draws on this stream; wait for it or cancel() it")
        try:
            return next(self._pieces)
        finally:
            self._turn.release()

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        import asyncio  # 30 ms that other programs need not spend

        task = asyncio.current_task()

        def next_piece() -> Piece | None:
            with acting_for(task):
                return next(self, None)

        drawing = asyncio.get_running_loop().run_in_executor(None, next_piece)
        try:
            piece = await asyncio.shield(drawing)
        except asyncio.CancelledError:
            self.cancel()
            drawing.add_done_callback(lambda done: done.exception())  # it ends within a step; its error is nobody's
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    def finish(self) -> Generation:
        """Runs to the end and returns the result."""
        for _ in self:
            pass
        return self._result()

    async def afinish(self) -> Generation:
        """As `finish`, without blocking the event loop."""
        async for _ in self:
            pass
        return self._result()

    def _result(self) -> Generation:
        if self.generation is None:
            raise ClosedError("the stream was closed before it began")
        return self.generation

    def cancel(self) -> None:
        """Ends the generation from any thread, in the midst of a forward too."""
        self._run.cancel()

    def close(self) -> None:
        """Ends the generation; the runtime is free for the next one. From any thread, as `cancel`."""
        self._run.cancel()
        if self._turn.acquire(blocking=False):  # else the thread that draws on it ends it
            self._pieces.close()
            self._turn.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class GenerationRun:
    """The state of one generation. Apart from its stream, so that a dropped stream is freed, and ends, at once."""

    def __init__(
        self,
        host: Host,
        request: Request,
        rng: np.random.Generator,
        eos_ids: frozenset[int],
        scanner: ResponseScanner,
        *,
        waits: bool = False,
    ) -> None:
        """`waits` says that a generation in progress elsewhere is waited for."""
        self.generation: Generation | None = None
        self.waits = waits
        self._host = host
        self._request = request
        self._rng = rng
        self._eos_ids = eos_ids
        self._scanner = scanner
        self._cancelled = threading.Event()
        self._run_options: ort.RunOptions | None = None
        self._token_ids: list[int] = []
        self._parts: list[Part] = []
        self._reason: FinishReason | None = None
        self._owner = Owner.current()  # the last one that asked for a piece
        self._is_stepping = False

    @property
    def is_cancelled(self) -> bool:
        """Whether its end was asked for."""
        return self._cancelled.is_set()

    @property
    def is_own(self) -> bool:
        """Whether this thread or task is the last one that drew on it."""
        return self._owner == Owner.current()

    @property
    def is_in_use(self) -> bool:
        """Whether a thread or task other than this one still draws on it.

        A stream that this one left unfinished, or that was cancelled, or whose thread or task has ended, is abandoned.
        """
        if self.generation is not None:
            return False
        if self.is_own:
            return self._is_stepping  # as in a signal handler
        return self._owner.is_alive and not self.is_cancelled

    def cancel(self) -> None:
        """Ends the generation at its next check, or within the forward that is running."""
        self._cancelled.set()
        if self._run_options is not None:
            self._run_options.terminate = True

    def pieces(self, on_end: Callable[[Generation], None] | None = None) -> Generator[Piece, None, None]:
        """Generates; yields text as it becomes certain."""
        self._owner = Owner.current()
        target, drafter = self._host.claim(self)
        recorder = StatsRecorder(len(self._request.prompt_ids), self._request.costs)
        if not self.is_cancelled:  # one that was cancelled while it waited has no runs of its own
            self._run_options = target.run_options
        blocks = generate_blocks(target, drafter, self._request, self._rng, recorder.counts, self._cancelled.is_set)
        has_failed = True
        try:
            while self._reason is None:
                with self._host.step():
                    block = self._next_block(blocks)
                if block is None:
                    self._reason = "cancelled"
                    break
                recorder.step(len(block))
                yield from self._pieces_of(self._take(block), recorder)
            yield from self._pieces_of(self._rest(), recorder)
            has_failed = False
        except GeneratorExit:
            has_failed = False
            raise
        except InferenceError:
            with self._host.step():
                target.clear()  # its rows may hold what the logits do
            raise
        finally:
            self.generation = self._result(recorder)
            self._host.release(self)
            if on_end is not None and not has_failed:
                on_end(self.generation)

    def _next_block(self, blocks: Iterator[list[int]]) -> list[int] | None:
        """The next step's tokens; None where the generation was cancelled."""
        if self._cancelled.is_set():
            return None
        self._owner, self._is_stepping = Owner.current(), True
        try:
            return next(blocks, None)
        except InferenceError:
            if self._cancelled.is_set():  # a terminated run fails
                return None
            raise
        finally:
            self._is_stepping = False

    def _take(self, block: list[int]) -> list[Part]:
        """Accepts a step's tokens up to where the generation ends; returns what is now certain."""
        parts: list[Part] = []
        for token_id in block:
            self._token_ids.append(token_id)
            parts += self._scanner.push(token_id)
            if self._scanner.is_stopped or token_id in self._eos_ids:
                self._reason = "stop"
                break
            if len(self._token_ids) == self._request.max_tokens:
                constraint = self._request.constraint
                self._reason = "stop" if constraint is not None and constraint.is_complete else "length"
        return parts

    def _rest(self) -> list[Part]:
        """Text that waited for a stop string or for the rest of a character."""
        rest = self._scanner.finish(has_stopped=self._reason == "stop")
        if self._reason == "stop" and self._scanner.tool_calls:
            self._reason = "tool_calls"
        return rest

    def _pieces_of(self, parts: list[Part], recorder: StatsRecorder) -> Iterator[Piece]:
        """A piece for each stretch of one kind."""
        self._parts += parts
        for kind, group in itertools.groupby(parts, key=lambda part: part[0]):
            yield Piece(
                "".join(text for _, text in group),
                kind,
                num_tokens=len(self._token_ids),
                num_drafted=recorder.counts.num_drafted,
                num_accepted=recorder.counts.num_accepted,
            )

    def _joined(self, kind: PieceKind) -> str:
        return "".join(text for own, text in self._parts if own == kind)

    def _result(self, recorder: StatsRecorder) -> Generation:
        return Generation(
            text=self._joined("text"),
            token_ids=self._token_ids,
            finish_reason=self._reason or "cancelled",
            stats=recorder.finish(len(self._token_ids)),
            context_full=self._reason == "length" and self._request.fills_context,
            thinking=self._joined("thinking").strip(),
            tool_calls=tuple(self._scanner.tool_calls),
        )
