"""The mux inbox: one subscription for the replies to every request and scatter of a connection.

Each request gets a subject under the private inbox prefix; its reply completes a future, and the entry is gone
whatever happened (nats-py's own response map keeps the entries of requests that failed). Looks at `connection`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import nats.nuid

from mnemesh.connection import Link, Message, denied_error
from mnemesh.deadline import Deadline
from mnemesh.errors import MnemeshError, Timeout, Unavailable


class Ask(NamedTuple):
    """One request of a scatter."""

    subject: str
    payload: bytes


class _Pending(NamedTuple):
    subject: str
    reply: asyncio.Future[Message]


class Inbox:
    """Request and scatter over one `Link`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._prefix = f"{link.options.inbox_prefix}.{nats.nuid.NUID().next().decode()}."
        self._pending: dict[str, _Pending] = {}
        self._counter = 0
        link.on_denied(self._fail_denied)
        link.on_lost(self._fail_all)

    async def open(self) -> None:
        """Subscribe. Call once, before the first request. Raises `Denied` if the prefix is not this user's."""
        await self._link.subscribe(f"{self._prefix}*", self._on_reply)
        await self._link.confirm()

    def __len__(self) -> int:
        """How many requests wait for a reply."""
        return len(self._pending)

    async def request(
        self, subject: str, payload: bytes, *, budget_s: float, headers: dict[str, str] | None = None
    ) -> Message:
        """Send one request and return its reply, whatever it says.

        Raises `Timeout` after `budget_s`, `Unavailable` at once if nobody listens or the connection drops,
        `Denied` if the server refused the subject, `TooLarge` if it would.
        """
        self._counter += 1
        token = format(self._counter, "x")
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Message] = loop.create_future()
        self._pending[token] = _Pending(subject, reply)
        try:
            with Deadline(loop.time() + budget_s):
                await self._link.publish(subject, payload, reply=self._prefix + token, headers=headers)
                return await reply
        except TimeoutError as error:
            raise Timeout(f"no reply from {subject} within {budget_s * 1000:.0f} ms") from error
        finally:
            del self._pending[token]

    async def scatter(
        self, asks: Sequence[Ask], *, budget_s: float, headers: dict[str, str] | None = None
    ) -> list[Message | MnemeshError]:
        """Send all requests at once; return each one's reply or error, in the order of `asks`."""
        if len(asks) == 1:
            return [await self._settled(asks[0], budget_s, headers)]
        return await asyncio.gather(*(self._settled(ask, budget_s, headers) for ask in asks))

    async def gather(
        self,
        subject: str,
        payload: bytes,
        *,
        most: int,
        wait_s: float,
        is_last: Callable[[Message], bool] = lambda message: False,
    ) -> list[Message]:
        """Send one request and collect all replies, until there are `most`, the last one, or `wait_s` is over."""
        replies: list[Message] = []
        enough = asyncio.Event()

        def collect(message: Message) -> None:
            if not _is_no_responders(message):
                replies.append(message)
            if len(replies) >= most or is_last(message):
                enough.set()

        inbox = f"{self._link.options.inbox_prefix}.{nats.nuid.NUID().next().decode()}"
        subscription = await self._link.subscribe(inbox, collect)
        try:
            await self._link.publish(subject, payload, reply=inbox)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await enough.wait()
        finally:
            await subscription.unsubscribe()
        return replies

    async def _settled(self, ask: Ask, budget_s: float, headers: dict[str, str] | None) -> Message | MnemeshError:
        try:
            return await self.request(ask.subject, ask.payload, budget_s=budget_s, headers=headers)
        except MnemeshError as error:
            return error

    def _on_reply(self, message: Message) -> None:
        pending = self._pending.get(message.subject[len(self._prefix) :])
        if pending is None or pending.reply.done():
            return
        if _is_no_responders(message):
            pending.reply.set_exception(Unavailable(f"nobody serves {pending.subject}", retry_after_ms=100))
        else:
            pending.reply.set_result(message)

    def _fail_denied(self, subject: str) -> None:
        """The server names the subject after its mapping, where the identity still ends the subject."""
        ending = subject.split(".")[-3:]
        for pending in list(self._pending.values()):
            asked = pending.subject.lower()
            if not pending.reply.done() and (asked == subject or asked.split(".")[-3:] == ending):
                pending.reply.set_exception(denied_error(pending.subject))

    def _fail_all(self) -> None:
        for pending in list(self._pending.values()):
            if not pending.reply.done():
                pending.reply.set_exception(
                    Unavailable(f"the connection dropped while {pending.subject} was under way")
                )


def _is_no_responders(message: Message) -> bool:
    return not message.data and message.status == "503"
