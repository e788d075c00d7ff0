"""Buckets of the Object Store (ADR-20): objects of any size under names, as `nats object` shows them.

An object is messages of `PART` bytes on a subject of its own, then one that describes it, which makes it exist. What an
object is replaced by has other messages, so who reads the old one finds it whole or not at all. Looks at `jetstream`.

https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-20.md
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
from typing import Any

import nats.nuid

from mnemesh.errors import MnemeshError, NotFound
from mnemesh.inbox import Ask, Inbox
from mnemesh.jetstream import check, counts_of, last_of, next_of, purge

PART = 128 * 1024
"""Bytes in a message, as the clients of NATS have it."""
AT_ONCE = 32
"""Messages on their way before the first is acknowledged."""
WRITTEN_S = 30.0


async def put(inbox: Inbox, bucket: str, name: str, content: bytes) -> None:
    """Store an object under this name, in place of one that it may have. Raises what `Inbox.request` and `check` do."""
    before = await _described(inbox, bucket, name)
    id = nats.nuid.NUID().next().decode()
    parts = [content[start : start + PART] for start in range(0, len(content), PART)]
    try:
        for start in range(0, len(parts), AT_ONCE):
            await _store(inbox, [Ask(f"$O.{bucket}.C.{id}", part) for part in parts[start : start + AT_ONCE]])
        digest = await asyncio.to_thread(hashlib.sha256, content)
        described = {
            "name": name,
            "bucket": bucket,
            "nuid": id,
            "size": len(content),
            "chunks": len(parts),
            "digest": f"SHA-256={base64.urlsafe_b64encode(digest.digest()).decode()}",
            "options": {"max_chunk_size": PART},
        }
        await _store(inbox, [Ask(_described_at(bucket, name), json.dumps(described).encode())], {"Nats-Rollup": "sub"})
    except BaseException:
        with contextlib.suppress(MnemeshError):
            await asyncio.shield(purge(inbox, f"OBJ_{bucket}", f"$O.{bucket}.C.{id}"))
        raise
    if before is not None:
        await purge(inbox, f"OBJ_{bucket}", f"$O.{bucket}.C.{before['nuid']}")


async def get(inbox: Inbox, bucket: str, name: str) -> bytes:
    """The content of an object, its size compared. Raises `NotFound` where it is not there, or not all of it."""
    described = await _described(inbox, bucket, name)
    if described is None:
        raise NotFound(f"there is no object {name} in {bucket}")
    content: list[bytes] = []
    subject, sequence = f"$O.{bucket}.C.{described['nuid']}", 0
    while some := await next_of(inbox, f"OBJ_{bucket}", subject, after=sequence):
        content += [stored.message.data for stored in some]
        if not some[-1].following:
            break
        sequence = some[-1].sequence
    whole = b"".join(content)
    if len(whole) != described["size"]:
        raise NotFound(f"of object {name} in {bucket} there are {len(whole)} of {described['size']} bytes")
    return whole


async def names(inbox: Inbox, bucket: str) -> list[str]:
    """The names of all objects, and of those that `nats object rm` took out, in order."""
    subjects = await counts_of(inbox, f"OBJ_{bucket}", _described_at(bucket, None))
    return sorted(base64.urlsafe_b64decode(subject.rpartition(".")[2]).decode() for subject in subjects)


async def remove(inbox: Inbox, bucket: str, name: str) -> None:
    """Take an object out, with its description: nobody watches. One that is not there is no error."""
    described = await _described(inbox, bucket, name)
    await purge(inbox, f"OBJ_{bucket}", _described_at(bucket, name))
    if described is not None:
        await purge(inbox, f"OBJ_{bucket}", f"$O.{bucket}.C.{described['nuid']}")


async def _described(inbox: Inbox, bucket: str, name: str) -> dict[str, Any] | None:
    try:
        stored = await last_of(inbox, f"OBJ_{bucket}", _described_at(bucket, name))
    except NotFound:
        return None
    described: dict[str, Any] = json.loads(stored.message.data)
    return None if described.get("deleted") else described


async def _store(inbox: Inbox, asks: list[Ask], headers: dict[str, str] | None = None) -> None:
    """Have the stream take all of them, in order."""
    for reply in await inbox.scatter(asks, budget_s=WRITTEN_S, headers=headers):
        if isinstance(reply, MnemeshError):
            raise reply
        check(json.loads(reply.data))


def _described_at(bucket: str, name: str | None) -> str:
    """The subject of an object's description; that of all of them, by a wildcard, where none is named."""
    return f"$O.{bucket}.M.{'*' if name is None else base64.urlsafe_b64encode(name.encode()).decode()}"
