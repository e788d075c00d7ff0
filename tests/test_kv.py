"""KV buckets: keys that are created once, and a view that is complete before it is ready."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from conftest import OpenAsker

from cli.server import NatsServer
from mnemesh import follower, kv, subjects
from mnemesh.asker import Asker
from mnemesh.errors import Conflict, Denied
from mnemesh.follower import StreamShrank
from mnemesh.jetstream import api, ensure_bucket
from mnemesh.kv import BucketView
from mnemesh.supervision import Supervisor

BUCKET = subjects.TENANTS.name


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(follower, "SILENCE_S", 0.6)


@pytest_asyncio.fixture
async def operator(own_mesh_server: NatsServer, open_asker: OpenAsker) -> Asker:
    return await open_asker("operator", own_mesh_server)


@pytest_asyncio.fixture
async def reader(own_mesh_server: NatsServer, open_asker: OpenAsker) -> Asker:
    return await open_asker("gateway", own_mesh_server)


@contextlib.asynccontextmanager
async def viewed(asker: Asker, bucket: str = BUCKET) -> AsyncIterator[BucketView]:
    """A view that is followed as an actor does."""
    view = BucketView(bucket)
    supervisor = Supervisor("view", lambda: view.follow(asker.link, asker.inbox))
    follow = asyncio.ensure_future(supervisor.run())
    try:
        async with asyncio.timeout(20):
            await view.ready.wait()
            yield view
    finally:
        follow.cancel()
        await asyncio.wait([follow])


async def test_a_view_is_ready_with_all_that_was_there_and_follows_every_change(operator: Asker, reader: Asker) -> None:
    for number in range(2500):
        await operator.link.publish(f"$KV.{BUCKET}.bulk-{number}", b"x")
    await kv.delete(operator.inbox, BUCKET, "bulk-7")
    async with viewed(reader) as view:
        assert set(view.entries) == {"acme", "zeta"} | {f"bulk-{n}" for n in range(2500) if n != 7}
        arrival = asyncio.ensure_future(view.wait_for("newcomer"))
        await kv.put(operator.inbox, BUCKET, "newcomer", b"one")
        assert await arrival == b"one"
        await kv.put(operator.inbox, BUCKET, "newcomer", b"two")
        await kv.delete(operator.inbox, BUCKET, "acme")
        await kv.put(operator.inbox, BUCKET, "last", b"")
        await view.wait_for("last")
        assert view.entries["newcomer"] == b"two"
        assert "acme" not in view.entries


async def test_an_empty_bucket_is_ready_at_once(operator: Asker, reader: Asker) -> None:
    async with viewed(reader, subjects.SPACES.name) as view:
        assert view.entries == {}


@pytest.mark.parametrize("kept", [0, 1])
async def test_a_bucket_whose_last_messages_were_purged_is_ready_too(operator: Asker, reader: Asker, kept: int) -> None:
    await kv.put(operator.inbox, BUCKET, "omega", b"last")
    purge = {"filter": f"$KV.{BUCKET}.omega"} if kept else {}
    await api(operator.inbox, f"STREAM.PURGE.KV_{BUCKET}", purge)
    async with viewed(reader) as view:
        assert set(view.entries) == ({"acme", "zeta"} if kept else set())


async def test_a_key_is_created_once(operator: Asker) -> None:
    revision = await kv.create(operator.inbox, BUCKET, "only", b"first")
    with pytest.raises(Conflict):
        await kv.create(operator.inbox, BUCKET, "only", b"second")
    assert await kv.put(operator.inbox, BUCKET, "only", b"third") == revision + 1
    assert "only" in await kv.keys(operator.inbox, BUCKET)


async def test_who_may_not_write_is_denied(reader: Asker) -> None:
    with pytest.raises(Denied):
        await kv.put(reader.inbox, BUCKET, "forged", b"")


async def test_a_bucket_that_is_made_anew_ends_the_view_and_its_next_follow_shows_the_new_one(
    operator: Asker, reader: Asker
) -> None:
    async with viewed(reader) as view:
        assert "acme" in view.entries
        await api(operator.inbox, f"STREAM.DELETE.KV_{BUCKET}")
        await ensure_bucket(operator.inbox, BUCKET)
        await kv.put(operator.inbox, BUCKET, "fresh", b"")
        await view.wait_for("fresh")
        assert set(view.entries) == {"fresh"}


async def test_a_view_says_that_its_bucket_shrank(operator: Asker, reader: Asker) -> None:
    view = BucketView(BUCKET)
    follow = asyncio.ensure_future(view.follow(reader.link, reader.inbox))
    await view.ready.wait()
    await api(operator.inbox, f"STREAM.DELETE.KV_{BUCKET}")
    await ensure_bucket(operator.inbox, BUCKET)
    async with asyncio.timeout(10):
        with pytest.raises(StreamShrank):
            await follow


async def test_more_keys_than_the_server_tells_at_once_are_all_listed(operator: Asker) -> None:
    names = [str(number) for number in range(100_500)]
    for start in range(0, len(names), 1_000):
        *some, last = names[start : start + 1_000]
        for name in some:
            await operator.link.publish(f"$KV.{BUCKET}.{name}", b"")
        await kv.put(operator.inbox, BUCKET, last, b"")  # the server drops what comes faster than it can store
    assert set(await kv.keys(operator.inbox, BUCKET)) >= set(names)
