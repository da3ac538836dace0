"""One generation at a time: who comes while one runs waits in a queue of bounded length, first come, first served."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from edge.serve.errors import RETRY_SECONDS, ServeError
from runtime.response import Piece
from runtime.stream import Generation, GenerationStream

Result = TypeVar("Result")


class Desk:
    """Where generations are asked for. All its methods are for the event loop's thread."""

    def __init__(self, max_waiting: int) -> None:
        self.num_waiting = 0
        self.max_waiting = max_waiting
        self._turn = asyncio.Lock()  # wakes those that wait in their order
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    @property
    def is_busy(self) -> bool:
        """Whether a generation runs."""
        return self._turn.locked()

    async def generate(self, begin: Callable[[], GenerationStream], emit: Callable[[Piece], None]) -> Generation:
        """Waits for its turn, then generates; cancelling the task ends it wherever it is.

        Args:
            begin: makes the stream, in a worker thread
            emit: is given each piece; must not block

        Raises:
            ServeError: too many wait (429), or the server shuts down (503).
            EdgeError: the generation failed.
        """
        async with self._stoppable(), self._my_turn():
            stream = await in_thread(begin)
            try:
                async for piece in stream:
                    emit(piece)
            finally:
                stream.close()
        generation = stream.generation
        if generation is None or generation.finish_reason == "cancelled":
            raise ServeError(503, "the generation was cancelled from outside; send the request again", code="cancelled")
        return generation

    def close(self) -> None:
        """Ends all generations, those that wait too, and lets no other begin."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()

    @asynccontextmanager
    async def _my_turn(self) -> AsyncIterator[None]:
        if self._turn.locked() and self.num_waiting >= self.max_waiting:
            raise ServeError(
                429,
                f"{self.num_waiting} requests wait already and no more may; try again later",
                code="queue_full",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        self.num_waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self.num_waiting -= 1
        try:
            yield
        finally:
            self._turn.release()

    @asynccontextmanager
    async def _stoppable(self) -> AsyncIterator[None]:
        """Within, `close` raises an error that can be told."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._is_closed:
                raise _shutting_down()
            yield
        except asyncio.CancelledError:
            if not self._is_closed:
                raise
            raise _shutting_down() from None
        finally:
            self._tasks.discard(task)


async def in_thread(call: Callable[[], Result]) -> Result:
    """What a call in a worker thread returns; where the task is cancelled meanwhile, the call is waited for."""
    working = asyncio.get_running_loop().run_in_executor(None, call)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        if not working.cancelled():
            working.exception()  # it is nobody's now
        raise


async def ahead(
    work: Callable[[Callable[[Piece], None]], Awaitable[Generation]],
) -> AsyncGenerator[Piece | Generation, None]:
    """Pieces, then the generation; runs ahead of who takes them, so that one that reads slowly holds up nobody else.

    Args:
        work: generates, given what to call with each piece
    """
    events: asyncio.Queue[Piece | Generation | Exception] = asyncio.Queue()

    async def run() -> None:
        try:
            events.put_nowait(await work(events.put_nowait))
        except Exception as error:
            events.put_nowait(error)

    running = asyncio.create_task(run())
    try:
        while True:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, Generation):
                return
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _shutting_down() -> ServeError:
    return ServeError(503, "the server is shutting down", code="shutting_down")
