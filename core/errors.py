"""The one tree of errors. Callers catch at the level they mean.

    ServeError
    ├── BadRequest            the caller's fault; never retried
    │   └── ModelNotFound
    ├── Unauthorized
    ├── Overloaded            a queue is at its bound; retry after a while
    ├── Unavailable           no worker can take the request now
    ├── DeadlineExceeded
    ├── Cancelled             the client went away or asked to stop
    ├── NodeLost              a worker died; the router retries
    ├── TransferFailed        a hand-off broke; the router retries
    │   ├── LeaseExpired
    │   ├── LayoutMismatch    the two sides differ; the message names the field
    │   └── ChecksumMismatch
    ├── ProtocolError         a frame that is not one of ours
    ├── ModelFileError        a model file is broken, unsupported or missing
    ├── ConfigError           a setting or topology file is wrong
    └── InternalError         our bug; details stay in the log

`code` goes over the wire and into the HTTP body, `status` is the HTTP status, `retriable` says whether
another attempt elsewhere can help. `describe` builds the error again from its code.
"""

from __future__ import annotations

from typing import ClassVar


class ServeError(Exception):
    """Base of everything we raise on purpose. `str(error)` is safe to show to a client."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retriable: ClassVar[bool] = False


class BadRequest(ServeError):
    code = "bad_request"
    status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(BadRequest):
    code = "model_not_found"
    status = 404


class Unauthorized(ServeError):
    code = "invalid_api_key"
    status = 401


class Overloaded(ServeError):
    code = "overloaded"
    status = 503


class Unavailable(ServeError):
    code = "unavailable"
    status = 503


class DeadlineExceeded(ServeError):
    code = "deadline_exceeded"
    status = 504


class Cancelled(ServeError):
    code = "cancelled"
    status = 499


class NodeLost(ServeError):
    code = "node_lost"
    status = 503
    retriable = True


class TransferFailed(ServeError):
    code = "transfer_failed"
    status = 503
    retriable = True


class LeaseExpired(TransferFailed):
    code = "lease_expired"


class LayoutMismatch(TransferFailed):
    code = "layout_mismatch"


class ChecksumMismatch(TransferFailed):
    code = "checksum_mismatch"


class ProtocolError(ServeError):
    code = "protocol_error"
    status = 502


class ModelFileError(ServeError):
    code = "model_file_error"


class ConfigError(ServeError):
    code = "config_error"
    status = 400


class InternalError(ServeError):
    code = "internal_error"


def _leaves(root: type[ServeError]) -> dict[str, type[ServeError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _leaves(child)
    return found


BY_CODE: dict[str, type[ServeError]] = _leaves(ServeError) | {InternalError.code: InternalError}


def describe(code: str, message: str) -> ServeError:
    """The error that `code` names, or InternalError for a code we do not know."""
    return BY_CODE.get(code, InternalError)(message)
