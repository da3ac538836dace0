"""The routes: OpenAI's API over one runtime, its figures, and the chat page."""

import base64
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from edge.serve.answers import Answer
from edge.serve.asked import Asked, Generates, asked_chat, asked_completion
from edge.serve.body import read_object
from edge.serve.desk import Desk
from edge.serve.errors import CLIENT_GONE, ServeError, json_response, tell_error
from edge.serve.figures import CONTENT_TYPE, CountRequests, Figures
from edge.serve.guard import Guard
from edge.serve.wire import Wire
from runtime.engine import Runtime
from runtime.errors import EdgeError
from runtime.turns import ContextPolicy

DEFAULT_QUEUE = 16
DEFAULT_MAX_BODY = 4 << 20

Ask = Callable[[Generates, dict[str, Any], str, ContextPolicy], Asked]


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How a server serves.

    Args:
        model: the name that clients ask for
        api_key: what they must send; None for nothing
        is_loopback: whether it is bound to this machine alone, which requests must then name
        max_waiting: requests that may wait while one is answered
        max_body_bytes: of a request
        context_policy: see `GenerationOptions`
    """

    model: str
    api_key: str | None = None
    is_loopback: bool = True
    max_waiting: int = DEFAULT_QUEUE
    max_body_bytes: int = DEFAULT_MAX_BODY
    context_policy: ContextPolicy = "stop"


@dataclass(slots=True)
class Server:
    """What the routes share."""

    runtime: Generates
    options: ServeOptions
    desk: Desk
    figures: Figures = field(default_factory=Figures)
    created: int = field(default_factory=lambda: int(time.time()))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, asked_chat)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, asked_completion)

    async def _answer(self, request: Request, ask: Ask) -> Response:
        options = self.options
        body = await read_object(request, options.max_body_bytes)
        asked = ask(self.runtime, body, options.model, options.context_policy)
        wire = Wire(asked, options.model, self.runtime.prompts.response_format)
        return Answer(self.desk, self.figures, asked, wire)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        if request.path_params["name"] != self.options.model:
            message = f"only {self.options.model!r} is served here"
            raise ServeError(404, message, param="model", code="model_not_found")
        return json_response(self._model())

    def _model(self) -> dict[str, Any]:
        name = self.options.model
        about = {"object": "model", "created": self.created, "owned_by": "gemma-edge"}
        return {"id": name, **about, "context_tokens": self.runtime.context_tokens}

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return json_response({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        text = self.figures.text(self.desk, self.runtime.context_tokens)
        return PlainTextResponse(text, headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})


def make_app(runtime: Runtime, options: ServeOptions) -> Starlette:
    """The application. Its `state.desk.close()` ends all generations, before a shutdown waits for their responses."""
    server = Server(runtime, options, Desk(options.max_waiting))
    routes = [
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.completion, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
        Route("/", _page()),
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(CountRequests, figures=server.figures),
            Middleware(Guard, api_key=options.api_key, is_loopback=options.is_loopback),
        ],
        exception_handlers={
            ClientDisconnect: _gone,
            EdgeError: tell_error,
            HTTPException: tell_error,
            Exception: tell_error,
        },
    )
    app.state.desk = server.desk
    return app


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


def _page() -> Callable[[Request], Any]:
    """The chat page's route; its script and style alone may run, by their hashes."""
    page = resources.files("edge.serve").joinpath("page.html").read_text(encoding="utf-8")
    sources = {
        f"{tag}-src": " ".join(map(_hash_source, re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)))
        for tag in ("script", "style")
    }
    policy = {
        "default-src": "'none'",
        **sources,
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {source}" for name, source in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def show(request: Request) -> Response:
        return Response(page, headers=headers, media_type="text/html")

    return show


def _hash_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
