"""uvicorn, set up so that a shutdown ends what generates instead of waiting for it."""

import socket

import uvicorn
from starlette.applications import Starlette

SHUTDOWN_SECONDS = 5


class ListeningServer(uvicorn.Server):
    """A server of one application made by `make_app`."""

    def __init__(self, app: Starlette, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._desk = app.state.desk

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends generations, then waits for their responses."""
        self._desk.close()
        await super().shutdown(sockets)


def make_server(app: Starlette) -> ListeningServer:
    """A server that says nothing of requests, and of bugs on standard error."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return ListeningServer(app, config)
