"""Errors as clients of OpenAI's API read them: a status, and {"error": {"message", "type", "param", "code"}}."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from runtime.errors import BusyError, ClosedError, EdgeError, InferenceError, RequestError, ToolCallError

MAX_RAW_CHARS = 4000  # of a malformed tool call that are told
RETRY_SECONDS = 1
CLIENT_GONE = 499  # nobody reads it; the figures count it


class ServeError(EdgeError):
    """What a client is told; `param` names the field of its request, `code` is one word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ServeError:
    """An error that the client can mend."""
    return ServeError(400, message, param=param, code=code)


def told(error: Exception) -> ServeError:
    """Any error as it is told; of one that is nobody's to see, only that it happened."""
    match error:
        case ServeError():
            return error
        case RequestError():
            return bad_request(str(error))
        case ToolCallError():
            message = f"{error}; the model wrote: {error.raw[:MAX_RAW_CHARS]}"
            return ServeError(500, message, code="malformed_tool_call")
        case InferenceError():
            return ServeError(500, str(error), code="inference_failed")
        case BusyError() | ClosedError():
            return ServeError(503, str(error), code="unavailable", headers={"Retry-After": str(RETRY_SECONDS)})
        case EdgeError():
            return ServeError(500, str(error))
        case HTTPException():
            return ServeError(error.status_code, error.detail, headers=error.headers)
    return ServeError(500, "internal error; the server's log has more", code="internal_error")


def error_body(error: ServeError) -> dict[str, Any]:
    """The JSON of an error."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(error.status, kind)
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def json_bytes(value: Any) -> bytes:
    """JSON in ASCII: what clients sent may hold lone surrogates, which no UTF-8 has."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON."""
    return Response(json_bytes(value), status, headers, "application/json")


def error_response(error: ServeError) -> Response:
    """The response that tells an error."""
    return json_response(error_body(error), error.status, error.headers)


async def tell_error(request: Request, error: Exception) -> Response:
    """Starlette's hook for errors of any kind."""
    return error_response(told(error))
