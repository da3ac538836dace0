"""The response that generates: whole or as server-sent events, given up as soon as its client has gone."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge.serve.asked import Asked
from edge.serve.desk import Desk, ahead
from edge.serve.errors import CLIENT_GONE, error_body, json_bytes, json_response, told
from edge.serve.figures import Figures
from edge.serve.wire import Wire
from runtime.response import Piece
from runtime.stream import Generation

SEND_SECONDS = 60.0  # in which a client must take a chunk once the buffers in front of it are full
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


class Answer(Response):
    """One generation, from its place in the queue to the last byte."""

    def __init__(self, desk: Desk, figures: Figures, asked: Asked, wire: Wire) -> None:
        super().__init__()
        self._desk, self._figures, self._asked, self._wire = desk, figures, asked, wire
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what can be told as a response of its own: as long as nothing was sent."""
        work = self._send_chunks(send) if self._asked.is_streamed else self._send_whole(scope, receive, send)
        if not await unless_gone(receive, work) and not self._has_begun:
            await Response(status_code=CLIENT_GONE)(scope, receive, send)  # goes nowhere, but is counted

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = await self._generate(lambda piece: None)
        self._has_begun = True
        await json_response(self._wire.whole(generation))(scope, receive, send)

    async def _send_chunks(self, send: Send) -> None:
        """Nothing is sent before the first piece, so that what fails until then has a status of its own."""
        try:
            async with aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    if not self._has_begun:
                        self._has_begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                    await _send_event(send, json_bytes(chunk))
                await _send_event(send, b"[DONE]")
        except TimeoutError:
            pass  # the client is there and reads nothing; the response stays unfinished
        except Exception as error:
            if not self._has_begun:
                raise
            await _send_event(send, json_bytes(error_body(told(error))))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            if told(error).code == "internal_error":
                raise
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        is_first = True
        async with aclosing(ahead(self._generate)) as events:
            async for event in events:
                if is_first:
                    is_first = False
                    for chunk in self._wire.opening():
                        yield chunk
                if isinstance(event, Piece):
                    yield self._wire.piece(event)
                else:
                    for chunk in self._wire.ending(event):
                        yield chunk

    async def _generate(self, emit: Callable[[Piece], None]) -> Generation:
        generation = await self._desk.generate(self._asked.begin, emit)
        self._figures.count(generation.stats)
        self._asked.check(generation)
        return generation


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Does the work, unless the client goes first, which cancels it; returns whether it was done."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        is_done = working.done()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.wait({working, gone})
    if is_done:
        working.result()
    elif not working.cancelled():
        working.exception()  # there is nobody to tell
    return is_done


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_event(send: Send, data: bytes) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
