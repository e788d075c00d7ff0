"""One request under way: who asks, how long is left, and how that travels.

The budget is milliseconds left, never a wall-clock time; it shrinks along the call chain because each hop sends what
is left of its own. `current` is the call that the running task works on. Looks at `errors` and `contract`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextvars import ContextVar
from math import ceil

import msgspec

from mnemesh.contract import AnyOperation
from mnemesh.errors import BY_CODE, BadRequest, Internal, MnemeshError

BUDGET = "Mnemesh-Budget-Ms"
CONTRACT = "Mnemesh-Contract"
MESSAGE_ID = "Nats-Msg-Id"
TRACE = "traceparent"
ERROR = "Nats-Service-Error"
ERROR_CODE = "Nats-Service-Error-Code"

SMALLEST_BUDGET_MS = 1
_HEADER_VALUE = re.compile(r"[!-~]([ -~]{0,126}[!-~])?")
LONGEST_MESSAGE = 2000
"""Characters of an error's message that travel; it may quote what the caller sent."""


class Caller(msgspec.Struct, frozen=True):
    """Who is asking, from the subject that the broker let it publish on."""

    tenant: str
    agent: str


class Call(msgspec.Struct, frozen=True):
    """A request that a handler works on. `deadline` is in the event loop's time, in seconds."""

    operation: AnyOperation
    caller: Caller
    deadline: float
    tokens: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}

    def remaining_s(self) -> float:
        """Seconds left of the budget; negative when it is spent."""
        return self.deadline - asyncio.get_running_loop().time()


current: ContextVar[Call | None] = ContextVar("mnemesh_call", default=None)


def budget_s(operation: AnyOperation, headers: Mapping[str, str] | None) -> float:
    """The budget that a request names, else its operation's own, in seconds. Raises `BadRequest`."""
    text = headers.get(BUDGET) if headers else None
    if text is None:
        return operation.budget_ms / 1000
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = float("nan")
    if not 0 <= milliseconds <= 86_400_000:
        raise BadRequest(f"{BUDGET} must be milliseconds from 0 to 86400000, not {text[:40]!r}")
    return milliseconds / 1000


def check_message_id(named: str) -> str:
    """The name of a write as a header can carry it. Others would be cut, told apart no more, or end the header."""
    if not _HEADER_VALUE.fullmatch(named):
        raise BadRequest(f"{MESSAGE_ID} must be 1 to 128 printable ASCII characters, without a space at either end")
    return named


def outgoing(operation: AnyOperation, remaining_s: float, *, message_id: str | None = None) -> dict[str, str] | None:
    """Headers of a request made with this much budget left, under the current call's trace.

    The operation's own budget is not spelled out: headers cost both sides more than a small payload does.
    """
    headers = {}
    remaining_ms = max(SMALLEST_BUDGET_MS, ceil(remaining_s * 1000))
    if remaining_ms != operation.budget_ms:
        headers[BUDGET] = str(remaining_ms)
    if message_id is not None:
        headers[MESSAGE_ID] = message_id
    call = current.get()
    if call is not None and (trace := call.headers.get(TRACE)):
        headers[TRACE] = trace
    return headers or None


def error_headers(error: MnemeshError) -> dict[str, str]:
    """ADR-32's two error headers."""
    return {ERROR: error.message[:200].encode("ascii", "replace").decode(), ERROR_CODE: error.code}


def error_body(error: MnemeshError) -> dict[str, object]:
    """The body of an error reply."""
    message = error.message[:LONGEST_MESSAGE].encode(errors="replace").decode()
    body: dict[str, object] = {"code": error.code, "message": message}
    if error.retry_after_ms is not None:
        body["retry_after_ms"] = error.retry_after_ms
    return body


def error_from(code: str, body: object) -> MnemeshError:
    """The exception that an error reply stands for."""
    kind = BY_CODE.get(code, Internal)
    fields = body if isinstance(body, dict) else {}
    retry_after = fields.get("retry_after_ms")
    return kind(
        str(fields.get("message") or code),
        retry_after_ms=retry_after if isinstance(retry_after, int) else None,
    )
