"""From an error to an HTTP answer: one body shape for all of them, `{"error": {message, type, param, code}}`.

Messages are cleaned on the way out: no path, no address, no traceback leaves the process. Details are in the log, under
the request id that the answer carries.
"""

from __future__ import annotations

import logging
import re
from typing import ClassVar

import msgspec
from aiohttp import web

from ..core.errors import BadRequest, DeadlineExceeded, InternalError, ServeError, TooManyRequests
from .call import Handler, current_call

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 600
RETRY_AFTER_S = 1
SERVER_NAME = "penstock"  # instead of the library's name and version

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_UNSAFE = (
    (re.compile(r"Traceback \(most recent call last\).*", re.DOTALL), "<traceback>"),
    (re.compile(r"\b(?:tcp|ipc|inproc|https?|file|unix)://\S+"), "<address>"),
    (re.compile(r"\b0x[0-9a-fA-F]+"), "<address>"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"), "<address>"),
    (re.compile(r"(?<![\w<])/(?:[\w.+@-]+/)+[\w.+@-]*"), "<path>"),
)


class RouteNotFound(BadRequest):
    code = "not_found"
    status = 404


class MethodNotAllowed(BadRequest):
    code = "method_not_allowed"
    status = 405


class BodyTimeout(BadRequest):
    code = "request_timeout"
    status = 408


class BodyTooLarge(BadRequest):
    code = "request_too_large"
    status = 413


class NotJson(BadRequest):
    code = "unsupported_media_type"
    status = 415


class Unsupported(BadRequest):
    """A parameter that other servers know and we refuse rather than ignore."""

    code = "unsupported_parameter"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class HttpRefusal(ServeError):
    """An answer of the HTTP library itself (a bad Expect header, say); the status is its own."""

    code: ClassVar[str] = "http_error"

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.http_status = status


def http_status(error: ServeError) -> int:
    return error.http_status if isinstance(error, HttpRefusal) else error.status


def clean_message(text: str) -> str:
    """`text` without paths, addresses and tracebacks, at most MAX_MESSAGE_CHARS long."""
    text = text[: 4 * MAX_MESSAGE_CHARS]
    for pattern, replacement in _UNSAFE:
        text = pattern.sub(replacement, text)
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"


def error_type(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(error: ServeError) -> dict[str, dict[str, str | None]]:
    """The JSON body for `error`. An InternalError says nothing but that it happened."""
    message = clean_message(str(error)) or error.code
    if isinstance(error, InternalError):
        message = "internal error; the server's log has the details under this request id"
    param = error.param if isinstance(error, BadRequest) else None
    return {
        "error": {
            "message": message,
            "type": error_type(http_status(error)),
            "param": None if param is None else clean_message(param)[:200],
            "code": error.code,
        }
    }


def error_response(error: ServeError, was_spent: bool) -> web.Response:
    """The answer for `error`; `was_spent` tells clients not to repeat what has already cost tokens."""
    status = http_status(error)
    response = web.Response(status=status, body=msgspec.json.encode(error_body(error)), content_type="application/json")
    if status in (429, 503):
        after_s = error.retry_after_s if isinstance(error, TooManyRequests) else RETRY_AFTER_S
        response.headers["Retry-After"] = str(after_s)
    if was_spent or isinstance(error, DeadlineExceeded):
        response.headers["x-should-retry"] = "false"
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if status in (408, 413):
        response.force_close()  # the rest of the body is not read
    return response


def from_http_exception(request: web.Request, error: web.HTTPException) -> ServeError:
    """The library's own refusals in our words."""
    if error.status == 404:
        return RouteNotFound(f"no route for this URL with {request.method}; see the API's list of routes")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"method {request.method} is not allowed here; allowed: {allowed}")
    if error.status == 413:
        return BodyTooLarge("the request body is larger than this server accepts")
    if error.status >= 500:
        return InternalError(error.reason)
    return HttpRefusal(error.status, error.reason)


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure of a handler becomes one JSON answer. The last line of defence logs what nobody expected."""
    try:
        return await handler(request)
    except ServeError as err:
        failure = err
        if isinstance(err, InternalError):
            logger.exception("request failed request_id=%s", current_call().request_id)
    except web.HTTPException as err:
        failure = from_http_exception(request, err)
    except ConnectionError:
        raise  # the client is gone; there is nobody to answer
    except Exception:
        logger.exception("request failed unexpectedly request_id=%s", current_call().request_id)
        failure = InternalError("unexpected")
    response = error_response(failure, current_call().is_spent)
    if isinstance(failure, MethodNotAllowed):
        response.headers["Allow"] = str(failure).rpartition("allowed: ")[2]
    return response
