"""JetStream's atomic batch publish: many messages of one stream, stored at consecutive sequences or not at all.

The stream keeps the headers of a batch, so a reader knows one. Most batches are of writes that only share a commit; the
messages of one that is `WHOLE` are one write, and are to have their effects together.

https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-50.md
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import nats.nuid

from mnemesh.connection import Link, Message
from mnemesh.errors import Internal, Timeout
from mnemesh.inbox import Inbox
from mnemesh.jetstream import check

BATCH_ID = "Nats-Batch-Id"
BATCH_SEQUENCE = "Nats-Batch-Sequence"
BATCH_COMMIT = "Nats-Batch-Commit"
WHOLE = "Mnemesh-Whole"

MOST_IN_BATCH = 1000
"""nats-server's limit for one atomic batch."""
MOST_BYTES_IN_BATCH = 8 * 1024 * 1024

_nuid = nats.nuid.NUID()


ROLLUP = "Nats-Rollup"


class Outgoing(NamedTuple):
    """One message on its way to a stream."""

    subject: str
    payload: bytes
    headers: Mapping[str, str]


def whole_of(message: Message) -> str:
    """The id of the batch that a message of the log is to have its effects together with; empty where it has none."""
    headers = message.headers
    return headers.get(BATCH_ID, "") if WHOLE in headers else ""


def ends_whole(message: Message) -> bool:
    """Whether it is the last one of its batch, unless that one was erased."""
    return BATCH_COMMIT in message.headers


def without_erased(messages: Sequence[Outgoing]) -> list[Outgoing]:
    """Leave out what a later message of the same batch erases: nats-server 2.15 refuses to do it for us (10111)."""
    erased: set[str] = set()
    kept = []
    for message in reversed(messages):
        if message.subject not in erased:
            kept.append(message)
        if ROLLUP in message.headers:
            erased.add(message.subject)
    return kept[::-1]


async def publish_all(link: Link, inbox: Inbox, messages: Sequence[Outgoing], *, budget_s: float) -> int:
    """Store 1 to 1,000 messages, all or none; returns the sequence of the last. Raises what `publish_batch` does."""
    if len(messages) > 1:
        return await publish_batch(link, inbox, messages, budget_s=budget_s) + len(messages) - 1
    (message,) = messages
    reply = await inbox.request(message.subject, message.payload, budget_s=budget_s, headers=dict(message.headers))
    sequence: int = check(json.loads(reply.data))["seq"]
    return sequence


async def publish_batch(link: Link, inbox: Inbox, messages: Sequence[Outgoing], *, budget_s: float) -> int:
    """Store 2 to 1,000 messages as one; returns the sequence of the first.

    Raises what `jetstream.check` raises for the batch as a whole, `Timeout`, or `Unavailable`: then it may have been
    stored all the same.
    """
    batch = {BATCH_ID: _nuid.next().decode()}
    *others, last = [
        message._replace(headers={**message.headers, **batch, BATCH_SEQUENCE: str(sequence)})
        for sequence, message in enumerate(messages, 1)
    ]
    try:
        async with asyncio.timeout(budget_s):
            for subject, payload, headers in others:
                await link.publish(subject, payload, headers=dict(headers))
    except TimeoutError as error:
        raise Timeout(f"a batch could not be sent within {budget_s} s") from error
    commit = {**last.headers, BATCH_COMMIT: "1"}
    reply = await inbox.request(last.subject, last.payload, budget_s=budget_s, headers=commit)
    ack = check(json.loads(reply.data))
    if ack.get("count") != len(messages):
        raise Internal(f"{ack.get('count')} of {len(messages)} messages of a batch were acknowledged")
    first: int = ack["seq"] - len(messages) + 1
    return first
