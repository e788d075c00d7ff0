"""The asking side: one operation of the contract over a link, typed on both ends.

`Asker` is what clients and actors share. It turns a request Struct into a message with the budget that is left, and
the reply into a Struct or an exception. Retries are the client's (`client.py`). Looks at `inbox`, `call` and `wire`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from mnemesh import wire
from mnemesh.call import ERROR_CODE, current, error_from, outgoing
from mnemesh.connection import Link, Message
from mnemesh.contract import AnyOperation, Operation, R
from mnemesh.errors import MnemeshError, Timeout, TooLarge
from mnemesh.inbox import Ask, Inbox


class Asker:
    """Asks operations over one link. `open` first."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.inbox = Inbox(link)

    async def open(self) -> Asker:
        await self.inbox.open()
        return self

    async def ask(
        self,
        operation: Operation[Any, R],
        subject: str,
        request: object,
        *,
        budget_s: float | None = None,
        message_id: str | None = None,
    ) -> R:
        """One request, one reply of type `operation.reply`. Raises any `MnemeshError`."""
        budget = self._budget(operation, budget_s)
        message = await self.inbox.request(
            subject,
            self._payload(operation, request),
            budget_s=budget,
            headers=outgoing(operation, budget, message_id=message_id),
        )
        return reply_of(operation, message)

    async def scatter(
        self,
        operation: Operation[Any, R],
        requests: Sequence[tuple[str, object]],
        *,
        budget_s: float | None = None,
    ) -> list[R | MnemeshError]:
        """Many (subject, request) at once; a reply or a `MnemeshError` for each, in order.

        A request object that appears several times is encoded once.
        """
        budget = self._budget(operation, budget_s)
        payloads = {id(request): request for _, request in requests}
        encoded = {key: self._payload(operation, request) for key, request in payloads.items()}
        asks = [Ask(subject, encoded[id(request)]) for subject, request in requests]
        messages = await self.inbox.scatter(asks, budget_s=budget, headers=outgoing(operation, budget))
        return [message if isinstance(message, MnemeshError) else _settled(operation, message) for message in messages]

    def _payload(self, operation: AnyOperation, request: object) -> bytes:
        payload = wire.encode(request)
        if len(payload) > operation.max_bytes:
            raise TooLarge(f"{operation.name} takes {operation.max_bytes} bytes; this request has {len(payload)}")
        return payload

    def _budget(self, operation: AnyOperation, budget_s: float | None) -> float:
        budget = operation.budget_ms / 1000 if budget_s is None else budget_s
        call = current.get()
        if call is not None:
            budget = min(budget, call.deadline - asyncio.get_running_loop().time())
        if budget <= 0:
            raise Timeout(f"the budget was spent before {operation.name} was asked")
        return budget


def reply_of(operation: Operation[Any, R], message: Message) -> R:
    """The reply in a message, or raise the error that it holds."""
    body = wire.decode(message.data)
    code = message.headers.get(ERROR_CODE)
    if code is not None:
        raise error_from(code, body)
    return wire.convert(body, operation.reply)


def _settled(operation: Operation[Any, R], message: Message) -> R | MnemeshError:
    try:
        return reply_of(operation, message)
    except MnemeshError as error:
        return error
