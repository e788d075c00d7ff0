"""Everything that can go wrong with a request, one exception type a code.

    MnemeshError                      root; carries `code`, `message`, `retry_after_ms`
     ├─ BadRequest    (ValueError)    bad_request  the request itself is wrong; do not retry
     ├─ Denied        (PermissionError) denied     the caller may not do this; do not retry
     ├─ NotFound      (LookupError)   not_found    no such entity (or space, or operation)
     ├─ Conflict                      conflict     compare-and-set failed, or an id already holds another write
     ├─ Stale                         stale        the replica could not catch up within the budget
     ├─ Busy                          busy         a mailbox is full; retry after `retry_after_ms`
     ├─ Timeout       (TimeoutError)  timeout      the budget is spent; a write may or may not have happened
     ├─ Unavailable   (ConnectionError) unavailable nobody serves this, or the link is down
     ├─ TooLarge      (ValueError)    too_large    over the server's `max_payload` or the operation's limit
     └─ Internal                      internal     a bug on the far side; its log has the details

Every type survives the connection: none of them closes it. The same codes travel on the wire in the
`Nats-Service-Error-Code` header and in the reply's body. Looks at nothing else in the package.
"""

from __future__ import annotations

from typing import ClassVar


class MnemeshError(Exception):
    """Root of every error that Mnemesh raises. `code` is the word that travels on the wire."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms


class BadRequest(MnemeshError, ValueError):
    """The request is malformed or asks for something that cannot be. Retrying will not help."""

    code = "bad_request"


class Denied(MnemeshError, PermissionError):
    """The broker or a guard refused this caller."""

    code = "denied"


class NotFound(MnemeshError, LookupError):
    """What was named does not exist (as of the watermark that was read)."""

    code = "not_found"


class Conflict(MnemeshError):
    """Compare-and-set failed: the entity changed since the version that the caller expected."""

    code = "conflict"


class Stale(MnemeshError):
    """The replica did not reach the demanded position within the budget. Another try may succeed."""

    code = "stale"
    retryable = True


class Busy(MnemeshError):
    """A bounded mailbox was full, so the request was refused at once, before any work was done on it."""

    code = "busy"
    retryable = True


class Timeout(MnemeshError, TimeoutError):
    """The budget ran out. The far side may still have acted: repeat a write only under the same id."""

    code = "timeout"
    retryable = True


class Unavailable(MnemeshError, ConnectionError):
    """Nobody listens on the subject, or the connection to the server is down."""

    code = "unavailable"
    retryable = True


class TooLarge(MnemeshError, ValueError):
    """A request or a reply is over the limit. Nothing was sent."""

    code = "too_large"


class Internal(MnemeshError):
    """The far side failed in a way that it did not foresee. Its own log says more; the wire does not."""

    code = "internal"


BY_CODE: dict[str, type[MnemeshError]] = {
    kind.code: kind
    for kind in (
        BadRequest,
        Denied,
        NotFound,
        Conflict,
        Stale,
        Busy,
        Timeout,
        Unavailable,
        TooLarge,
        Internal,
    )
}
