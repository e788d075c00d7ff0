"""KV buckets (ADR-8): writing keys, and `BucketView`, a bucket's content kept in memory.

https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-8.md
"""

from __future__ import annotations

import asyncio
import json

from mnemesh.connection import Link
from mnemesh.errors import NotFound
from mnemesh.follower import Follower
from mnemesh.inbox import Inbox
from mnemesh.jetstream import API_BUDGET_S, check, counts_of, last_of, stream_state

EXPECTED = "Nats-Expected-Last-Subject-Sequence"
OPERATION = "KV-Operation"


async def put(inbox: Inbox, bucket: str, key: str, value: bytes) -> int:
    """Set a key; returns its revision."""
    return await _write(inbox, bucket, key, value, None)


async def create(inbox: Inbox, bucket: str, key: str, value: bytes) -> int:
    """Set a key that must not exist. Raises `Conflict` if it does."""
    return await _write(inbox, bucket, key, value, {EXPECTED: "0"})


async def update(inbox: Inbox, bucket: str, key: str, value: bytes, revision: int) -> int:
    """Set a key that is at this revision (0: that never was). Raises `Conflict` if it is at another."""
    return await _write(inbox, bucket, key, value, {EXPECTED: str(revision)})


async def delete(inbox: Inbox, bucket: str, key: str) -> None:
    """Put a delete marker on a key, as `nats kv del` does."""
    await _write(inbox, bucket, key, b"", {OPERATION: "DEL"})


async def get(inbox: Inbox, bucket: str, key: str) -> bytes | None:
    """The value of a key; `None` where it has none."""
    return (await entry(inbox, bucket, key))[1]


async def entry(inbox: Inbox, bucket: str, key: str) -> tuple[int, bytes | None]:
    """The revision of a key (0 where it never was) and its value; `None` where it has none."""
    try:
        stored = await last_of(inbox, f"KV_{bucket}", f"$KV.{bucket}.{key}")
    except NotFound:
        return 0, None
    is_gone = stored.message.headers.get(OPERATION) in ("DEL", "PURGE")
    return stored.sequence, None if is_gone else stored.message.data


async def keys(inbox: Inbox, bucket: str) -> list[str]:
    """Every key that has a value or a delete marker."""
    return sorted(subject.removeprefix(f"$KV.{bucket}.") for subject in await counts_of(inbox, f"KV_{bucket}", ">"))


async def _write(inbox: Inbox, bucket: str, key: str, value: bytes, headers: dict[str, str] | None) -> int:
    reply = await inbox.request(f"$KV.{bucket}.{key}", value, budget_s=API_BUDGET_S, headers=headers)
    revision: int = check(json.loads(reply.data))["seq"]
    return revision


class BucketView:
    """The current keys and values of a bucket. `follow` keeps them current; `ready` is set once they are complete."""

    def __init__(self, bucket: str) -> None:
        self.entries: dict[str, bytes] = {}
        self.version = 0
        self.ready = asyncio.Event()
        self._revision = 0
        self._bucket = bucket
        self._changed = asyncio.Condition()

    async def follow(self, link: Link, inbox: Inbox) -> None:
        """Follow the bucket for ever. Raises `StreamShrank` if it is made anew; follow it again then."""
        stream = f"KV_{self._bucket}"
        prefix = f"$KV.{self._bucket}."
        state = await stream_state(inbox, stream)
        entries: dict[str, bytes] = {}
        complete = not state.messages
        if complete:
            await self._show(entries)
        follower = Follower(link, inbox, stream, incarnation=state.incarnation)
        async for batch in follower.batches(1000):
            for _, _, message, _ in batch:
                key = message.subject.removeprefix(prefix)
                if message.headers.get(OPERATION) in ("DEL", "PURGE"):
                    entries.pop(key, None)
                else:
                    entries[key] = message.data
            complete = complete or not batch[-1].following or batch[-1].sequence >= state.last_sequence
            if complete:
                self._revision = batch[-1].sequence
                await self._show(entries)

    async def wait_for(self, key: str) -> bytes:
        """The value of a key, as soon as there is one."""
        async with self._changed:
            await self._changed.wait_for(lambda: key in self.entries)
            return self.entries[key]

    async def changed(self, version: int) -> None:
        """Return once the view is another than that of this `version`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.version != version)

    async def reached(self, revision: int) -> None:
        """Return once the view is as of this revision or later."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._revision >= revision)

    async def _show(self, entries: dict[str, bytes]) -> None:
        async with self._changed:
            self.entries = entries
            self.version += 1
            self.ready.set()
            self._changed.notify_all()
