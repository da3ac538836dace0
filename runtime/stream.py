"""One generation as a stream of text: turns steps of tokens into pieces, and stops where it should."""

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
import onnxruntime as ort

from runtime.drafter import DrafterModel
from runtime.errors import BusyError, ClosedError, InferenceError
from runtime.generation import Request, generate_blocks
from runtime.stats import GenerationStats, StatsRecorder
from runtime.stopping import StopScanner
from runtime.target import TargetModel
from runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation.

    `token_ids` holds what was generated, an end-of-sequence token included; `text` has neither special tokens nor the
    stop string. `finish_reason` is "stop" (end of sequence or stop string), "length" or "cancelled". "length" is both
    `max_tokens` and the end of the context; `context_full` is true where it was the context.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: GenerationStats
    context_full: bool = False


class Host(Protocol):
    """What a generation needs of the runtime that it runs on."""

    def step(self) -> AbstractContextManager[None]:
        """Held while a step runs."""
        ...

    def claim(self, run: "GenerationRun") -> tuple[TargetModel, DrafterModel | None]:
        """Makes a generation the one in progress, on an empty cache."""
        ...


class GenerationStream:
    """Iterates over pieces of text. `generation` is there once it is over; closing or dropping it ends it early."""

    def __init__(self, run: "GenerationRun") -> None:
        """Made by `Runtime.stream`."""
        self._run = run
        self._pieces = run.pieces()
        self._turn = threading.Lock()

    @property
    def generation(self) -> Generation | None:
        """The result; None while the generation goes on."""
        return self._run.generation

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self._turn.acquire(blocking=False):
            raise BusyError("another thread draws on this stream; wait for it or cancel() it")
        try:
            return next(self._pieces)
        finally:
            self._turn.release()

    def finish(self) -> Generation:
        """Runs to the end and returns the result."""
        for _ in self:
            pass
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
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        stop: Sequence[str],
    ) -> None:
        self.generation: Generation | None = None
        self._host = host
        self._request = request
        self._rng = rng
        self._eos_ids = eos_ids
        self._text = tokenizer.stream()
        self._scanner = StopScanner(stop)
        self._cancelled = threading.Event()
        self._run_options: ort.RunOptions | None = None
        self._token_ids: list[int] = []
        self._emitted: list[str] = []
        self._reason: FinishReason | None = None
        self._thread = threading.current_thread()  # the last one that asked for a piece
        self._is_stepping = False

    @property
    def is_in_use(self) -> bool:
        """Whether a thread other than this one still draws on it.

        A stream that this thread left unfinished, or that was cancelled, or whose thread has ended, is abandoned.
        """
        if self.generation is not None:
            return False
        if self._thread is threading.current_thread():
            return self._is_stepping  # as in a signal handler
        return self._thread.is_alive() and not self._cancelled.is_set()

    def cancel(self) -> None:
        """Ends the generation at its next check, or within the forward that is running."""
        self._cancelled.set()
        if self._run_options is not None:
            self._run_options.terminate = True

    def pieces(self) -> Generator[str, None, None]:
        """Generates; yields text as it becomes certain."""
        recorder = StatsRecorder(len(self._request.prompt_ids), self._request.costs)
        self._thread = threading.current_thread()
        target, drafter = self._host.claim(self)
        self._run_options = target.run_options
        blocks = generate_blocks(target, drafter, self._request, self._rng, recorder.counts, self._cancelled.is_set)
        try:
            while self._reason is None:
                with self._host.step():
                    block = self._next_block(blocks)
                if block is None:
                    self._reason = "cancelled"
                    break
                recorder.step(len(block))
                if piece := self._take(block):
                    yield piece
            if piece := self._rest():
                yield piece
        finally:
            text, stats = "".join(self._emitted), recorder.finish(len(self._token_ids))
            context_full = self._reason == "length" and self._request.fills_context
            self.generation = Generation(text, self._token_ids, self._reason or "cancelled", stats, context_full)

    def _next_block(self, blocks: Iterator[list[int]]) -> list[int] | None:
        """The next step's tokens; None where the generation was cancelled."""
        if self._cancelled.is_set():
            return None
        self._thread, self._is_stepping = threading.current_thread(), True
        try:
            return next(blocks, None)
        except InferenceError:
            if self._cancelled.is_set():  # a terminated run fails
                return None
            raise
        finally:
            self._is_stepping = False

    def _take(self, block: list[int]) -> str:
        """Accepts a step's tokens up to where the generation ends; returns the text that is now certain."""
        text = ""
        for token_id in block:
            self._token_ids.append(token_id)
            emitted, stopped = self._scanner.push(self._text.push(token_id))
            text += emitted
            if stopped or token_id in self._eos_ids:
                self._reason = "stop"
                break
            if len(self._token_ids) == self._request.max_tokens:
                self._reason = "length"
        self._emitted.append(text)
        return text

    def _rest(self) -> str:
        """Text that waited for a stop string or for the rest of a character."""
        emitted, stopped = self._scanner.push(self._text.finish())
        rest = emitted if stopped else emitted + self._scanner.finish()
        self._emitted.append(rest)
        return rest
