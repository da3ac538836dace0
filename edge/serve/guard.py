"""Who may ask: the key, and for a server of this machine's own programs that no web page asks in their name.

A page can point a name of its own at 127.0.0.1 (DNS rebinding): the Host header tells. It can also post to 127.0.0.1
without reading the answer: the Origin header tells. No header lets other origins read anything.
"""

import hmac
import ipaddress
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from edge.serve.errors import ServeError, error_response
from runtime.errors import RequestError

OPEN_PATHS = ("/", "/health")
SAFE_METHODS = ("GET", "HEAD")
KEY = re.compile(r"[!-~]{1,256}")  # what fits into a header


class Guard:
    """ASGI middleware that lets through what may ask."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, is_loopback: bool) -> None:
        self._app, self._api_key, self._is_loopback = app, api_key, is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers what may not ask with an error."""
        if scope["type"] == "http":
            try:
                self._check(scope, Headers(scope=scope))
            except ServeError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._is_loopback and not is_loopback(host_name(host)):
            raise ServeError(
                403, f"host {host!r:.80} is not this machine's own; ask for 127.0.0.1", code="foreign_host"
            )
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in SAFE_METHODS and not _is_of(origin, host):
            raise ServeError(403, f"origin {origin!r:.80} is not this server's", code="foreign_origin")
        if self._api_key is not None and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            raise ServeError(
                401,
                "the key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        assert self._api_key is not None
        is_equal = hmac.compare_digest(key.strip().encode(), self._api_key.encode())
        return scheme.lower() == "bearer" and is_equal


def host_name(host: str) -> str:
    """The name of a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower().rstrip(".")


def is_loopback(name: str) -> bool:
    """Whether a name or address can only be this machine."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_access(host: str, api_key: str | None) -> None:
    """Raises RequestError where others could ask without a key, or the key is none that a header can hold."""
    if api_key is not None and not KEY.fullmatch(api_key):
        raise RequestError("the API key must be 1 to 256 printable ASCII characters without spaces")
    if api_key is None and not is_loopback(host):
        raise RequestError(
            f"--host {host} lets other machines ask; set a key with EDGE_API_KEY or --api-key, or use 127.0.0.1"
        )


def _is_of(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower() != ""
