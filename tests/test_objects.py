"""The Object Store: what the runtime keeps there, any client of NATS can read."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from conftest import OpenAsker, open_raw
from nats.js.object_store import ObjectStore

from cli.server import NatsServer
from mnemesh import objects, subjects
from mnemesh.errors import NotFound
from mnemesh.inbox import Inbox
from mnemesh.jetstream import counts_of, delete_message, next_of

BUCKET = subjects.SNAPSHOTS.name
STREAM = f"OBJ_{BUCKET}"


@pytest_asyncio.fixture
async def inbox(open_asker: OpenAsker) -> Inbox:
    return (await open_asker("shard")).inbox


@asynccontextmanager
async def other_client(server: NatsServer, user: str) -> AsyncIterator[ObjectStore]:
    """nats-py's own: that of the operator may list and read, that of a shard write."""
    raw = await open_raw(server, user)
    try:
        yield await raw.client.jetstream().object_store(BUCKET)
    finally:
        await raw.client.close()


async def test_another_client_reads_an_object_and_lists_it(inbox: Inbox, mesh_server: NatsServer) -> None:
    content = os.urandom(2 * objects.PART + 17)
    await objects.put(inbox, BUCKET, "a/b c", content)
    async with other_client(mesh_server, "operator") as other:
        info = await other.get_info("a/b c")
        assert (info.size, info.chunks) == (len(content), 3)
        assert (await other.get("a/b c")).data == content  # it compares the digest
        assert "a/b c" in [held.name for held in await other.list()]
    await objects.remove(inbox, BUCKET, "a/b c")


async def test_what_another_client_stores_is_read(inbox: Inbox, mesh_server: NatsServer) -> None:
    content = os.urandom(3 * objects.PART)
    async with other_client(mesh_server, "shard") as other:
        await other.put("theirs", content)
    assert await objects.get(inbox, BUCKET, "theirs") == content
    await objects.remove(inbox, BUCKET, "theirs")


async def test_an_object_takes_the_place_of_another_and_leaves_nothing_of_it(inbox: Inbox) -> None:
    await objects.put(inbox, BUCKET, "twice", os.urandom(objects.PART * 2))
    await objects.put(inbox, BUCKET, "twice", b"second")
    assert await objects.get(inbox, BUCKET, "twice") == b"second"
    assert sum((await counts_of(inbox, STREAM, f"$O.{BUCKET}.C.*")).values()) == 1
    await objects.remove(inbox, BUCKET, "twice")
    assert await counts_of(inbox, STREAM, ">") == {}


async def test_an_empty_object_is_one(inbox: Inbox) -> None:
    await objects.put(inbox, BUCKET, "empty", b"")
    assert await objects.get(inbox, BUCKET, "empty") == b""
    await objects.remove(inbox, BUCKET, "empty")


async def test_an_object_of_which_a_part_is_gone_is_not_found(inbox: Inbox, open_asker: OpenAsker) -> None:
    await objects.put(inbox, BUCKET, "torn", os.urandom(objects.PART * 3))
    part = (await next_of(inbox, STREAM, f"$O.{BUCKET}.C.*", after=0))[1]
    await delete_message((await open_asker("operator")).inbox, STREAM, part.sequence)
    with pytest.raises(NotFound, match=f"of object torn in {BUCKET} there are {2 * objects.PART} of"):
        await objects.get(inbox, BUCKET, "torn")
    await objects.remove(inbox, BUCKET, "torn")


async def test_what_is_not_there_is_not_found_and_may_be_removed(inbox: Inbox) -> None:
    with pytest.raises(NotFound, match="no object nobody"):
        await objects.get(inbox, BUCKET, "nobody")
    await objects.remove(inbox, BUCKET, "nobody")
    assert await objects.names(inbox, BUCKET) == []
