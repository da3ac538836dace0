"""Figures of a server for Prometheus: requests, tokens, speed, memory.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/, text format 0.0.4.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.serve.desk import Desk
from runtime.memory import memory_usage
from runtime.stats import GenerationStats

ROUTES = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(slots=True)
class Figures:
    """Counts since the server began, and the last generation's speed."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    num_generations: int = 0
    num_cached_tokens: int = 0
    decode_tokens_per_second: float = 0.0
    prefill_tokens_per_second: float = 0.0

    def count(self, stats: GenerationStats) -> None:
        """Adds a generation."""
        self.num_generations += 1
        self.tokens["prompt"] += stats.num_prompt_tokens
        self.tokens["reused"] += stats.num_reused_tokens
        self.tokens["generated"] += stats.num_generated_tokens
        self.tokens["drafted"] += stats.num_drafted
        self.tokens["accepted"] += stats.num_accepted
        self.num_cached_tokens = stats.num_prompt_tokens - stats.num_dropped_tokens + stats.num_generated_tokens
        self.decode_tokens_per_second = stats.decode_tokens_per_second
        self.prefill_tokens_per_second = stats.prefill_tokens_per_second

    def text(self, desk: Desk, context_tokens: int) -> str:
        """All figures in Prometheus' text form."""
        return "".join(f"{line}\n" for line in self._lines(desk, context_tokens))

    def _lines(self, desk: Desk, context_tokens: int) -> Iterator[str]:
        requests = {
            f'{{route="{route}",status="{status}"}}': count for (route, status), count in sorted(self.requests.items())
        }
        yield from _metric("requests_total", "counter", "Requests by route and status.", requests)
        kinds = ("prompt", "reused", "generated", "drafted", "accepted")
        tokens = {f'{{kind="{kind}"}}': self.tokens[kind] for kind in kinds}
        yield from _metric("tokens_total", "counter", "Tokens by kind; reused ones are prompt tokens too.", tokens)
        yield from _metric("generations_total", "counter", "Generations that ended.", {"": self.num_generations})
        yield from _metric("generations_in_progress", "gauge", "Generations that run.", {"": int(desk.is_busy)})
        yield from _metric("requests_queued", "gauge", "Requests that wait for their turn.", {"": desk.num_waiting})
        speeds = {
            '{phase="prefill"}': self.prefill_tokens_per_second,
            '{phase="decode"}': self.decode_tokens_per_second,
        }
        yield from _metric("last_tokens_per_second", "gauge", "Speed of the last generation.", speeds)
        cache = {'{state="used"}': self.num_cached_tokens, '{state="most"}': context_tokens}
        yield from _metric("cache_tokens", "gauge", "Tokens behind the last generation, and the context.", cache)
        usage = memory_usage()
        memory = {'{kind="anonymous"}': usage.anonymous_bytes, '{kind="mapped"}': usage.mapped_bytes}
        yield from _metric("memory_bytes", "gauge", "Resident memory of the process.", memory)


def _metric(name: str, kind: str, help_text: str, values: Mapping[str, float]) -> Iterator[str]:
    yield f"# HELP edge_{name} {help_text}"
    yield f"# TYPE edge_{name} {kind}"
    for labels, value in values.items():
        yield f"edge_{name}{labels} {value:.10g}"


class CountRequests:
    """ASGI middleware that counts responses by route and status."""

    def __init__(self, app: ASGIApp, figures: Figures) -> None:
        self._app, self._figures = app, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts a response when it starts."""
        path = scope.get("path", "")
        route = path if path in ROUTES else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._figures.requests[route, message["status"]] += 1
            await send(message)

        await self._app(scope, receive, counted)
