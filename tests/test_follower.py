"""The follower: every message once and in order, whatever operators, servers and slow readers do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import count

import pytest
import pytest_asyncio
from conftest import SITE, OpenAsker
from test_connection import connected_again
from test_log_writer import running, write

from cli.server import NatsServer
from mnemesh import follower as following
from mnemesh import subjects
from mnemesh.asker import Asker
from mnemesh.connection import Callback, Message
from mnemesh.follower import Follower, StreamShrank
from mnemesh.jetstream import Stored, api, ensure_log, stream_state
from mnemesh.log_writer import LogWriter, Position

LOG = subjects.log_stream(SITE)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost consumer is noticed after 0.6 s here instead of 3."""
    monkeypatch.setattr(following, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(following, "SILENCE_S", 0.6)


@pytest_asyncio.fixture
async def server(own_mesh_server: NatsServer) -> NatsServer:
    return own_mesh_server


@pytest_asyncio.fixture
async def operator(server: NatsServer, open_asker: OpenAsker) -> Asker:
    return await open_asker("operator", server)


@pytest_asyncio.fixture
async def shard(server: NatsServer, open_asker: OpenAsker) -> Asker:
    return await open_asker("shard", server)


@pytest_asyncio.fixture
async def writer(server: NatsServer, open_asker: OpenAsker) -> AsyncIterator[LogWriter]:
    async with running(await open_asker("gateway", server)) as writer:
        yield writer


async def fill(writer: LogWriter, name: str, count: int, *, size: int = 10) -> None:
    outcomes = await writer.append_each([write(f"{name}{number}", size=size) for number in range(count)])
    assert all(isinstance(outcome, Position) for outcome in outcomes)


async def follow(shard: Asker, *, after: int = 0) -> Follower:
    incarnation = (await stream_state(shard.inbox, LOG)).incarnation
    return Follower(shard.link, shard.inbox, LOG, after=after, incarnation=incarnation)


async def take(batches: AsyncIterator[list[Stored]], count: int) -> list[Stored]:
    """The next `count` messages, and not one more."""
    taken: list[Stored] = []
    async with asyncio.timeout(20):
        while len(taken) < count:
            taken += await anext(batches)
    assert len(taken) == count
    return taken


def sequences(messages: list[Stored]) -> list[int]:
    return [message.sequence for message in messages]


async def test_it_starts_after_the_watermark_and_goes_on_with_what_is_appended(shard: Asker, writer: LogWriter) -> None:
    await fill(writer, "old", 2500)
    follower = await follow(shard, after=700)
    async with aclosing(follower.batches(1000)) as batches:
        assert sequences(await take(batches, 1800)) == list(range(701, 2501))
        await fill(writer, "new", 5, size=77)
        messages = await take(batches, 5)
    assert sequences(messages) == list(range(2501, 2506))
    assert messages[0].message.subject == write("new0").subject
    assert len(messages[0].message.data) == 77
    assert messages[-1].following == 0
    assert 0 <= messages[-1].recorded_at - messages[0].recorded_at < 10_000
    assert follower.recreated == 0


async def test_it_survives_a_consumer_that_an_operator_deletes(
    shard: Asker, operator: Asker, writer: LogWriter
) -> None:
    await fill(writer, "a", 10)
    follower = await follow(shard)
    async with aclosing(follower.batches(1000)) as batches:
        assert sequences(await take(batches, 10)) == list(range(1, 11))
        for name in (await api(operator.inbox, f"CONSUMER.NAMES.{LOG}"))["consumers"]:
            await api(operator.inbox, f"CONSUMER.DELETE.{LOG}.{name}")
        await fill(writer, "b", 10)
        assert sequences(await take(batches, 10)) == list(range(11, 21))
    assert follower.recreated == 1


async def test_it_survives_a_killed_server_without_gap_or_duplicate(
    server: NatsServer, shard: Asker, writer: LogWriter
) -> None:
    await fill(writer, "a", 100)
    async with aclosing((await follow(shard)).batches(1)) as batches:
        assert sequences(await take(batches, 30)) == list(range(1, 31))
        await server.kill()
        await server.start()
        await connected_again(shard.link)
        assert sequences(await take(batches, 70)) == list(range(31, 101))


async def test_a_lost_connection_is_enough_to_make_the_consumer_anew(
    server: NatsServer, shard: Asker, writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the silence after it: for three seconds a shard would be stale after each restart of its server."""
    monkeypatch.setattr(following, "SILENCE_S", 3600)
    await fill(writer, "a", 1)
    async with aclosing((await follow(shard)).batches(100)) as batches:
        await take(batches, 1)
        await server.kill()
        await server.start()
        await fill(writer, "b", 1)
        assert sequences(await take(batches, 1)) == [2]


async def test_messages_that_get_lost_on_the_way_are_fetched_again_in_order(
    shard: Asker, writer: LogWriter, operator: Asker
) -> None:
    """The connection drops without the server's end, so the consumer lives on and sends into the void."""
    follower = await follow(shard)
    async with aclosing(follower.batches(1000)) as batches:
        await fill(writer, "a", 10)
        await take(batches, 10)
        for number in range(5):
            shard.link.client.abort()
            await fill(writer, f"b{number}", 500)
        assert sequences(await take(batches, 2500)) == list(range(11, 2511))


async def test_messages_that_were_lost_on_the_way_are_fetched_again_in_order(shard: Asker, writer: LogWriter) -> None:
    follower = await follow(shard)
    async with aclosing(follower.batches(1000)) as batches:
        await fill(writer, "a", 1)
        await take(batches, 1)
        callbacks = shard.link._client._callbacks
        newest = max(callbacks)
        arrived = count()

        def lossy(message: Message, take: Callback = callbacks[newest]) -> None:
            if next(arrived) % 100 != 50:
                take(message)

        callbacks[newest] = lossy
        await fill(writer, "b", 2000, size=200)
        assert sequences(await take(batches, 2000)) == list(range(2, 2002))
    assert follower.recreated > 0


async def test_a_slow_reader_slows_the_server_and_nothing_piles_up(
    shard: Asker, operator: Asker, writer: LogWriter
) -> None:
    size, count = 10_000, 4000
    await fill(writer, "large", count, size=size)
    follower = await follow(shard)
    async with aclosing(follower.batches(1)) as batches:
        await anext(batches)
        (name,) = (await api(operator.inbox, f"CONSUMER.NAMES.{LOG}"))["consumers"]
        sent, unchanged = 0, 0
        while unchanged < 100:  # until the server has stopped sending: for good, or because it waits for us
            info = await api(operator.inbox, f"CONSUMER.INFO.{LOG}.{name}")
            sent, before = info["delivered"]["stream_seq"], sent
            unchanged = unchanged + 1 if sent == before else 0
        assert follower.waiting * size < 8_000_000 < count * size
        assert sequences(await take(batches, count - 1)) == list(range(2, count + 1))
    assert follower.recreated == 0


async def test_a_message_without_a_payload_is_a_message(shard: Asker, writer: LogWriter) -> None:
    await fill(writer, "empty", 3, size=0)
    async with aclosing((await follow(shard)).batches(1000)) as batches:
        assert sequences(await take(batches, 3)) == [1, 2, 3]


async def test_erased_messages_are_no_gap(shard: Asker, operator: Asker, writer: LogWriter) -> None:
    await writer.append_each([write("same", str(number)) for number in range(11)])
    await api(operator.inbox, f"STREAM.PURGE.{LOG}", {"keep": 1})
    async with aclosing((await follow(shard, after=3)).batches(1000)) as batches:
        assert sequences(await take(batches, 1)) == [11]


async def test_a_stream_that_was_made_anew_is_told(shard: Asker, operator: Asker, writer: LogWriter) -> None:
    await fill(writer, "a", 10)
    async with aclosing((await follow(shard)).batches(1000)) as batches:
        await take(batches, 10)
        await api(operator.inbox, f"STREAM.DELETE.{LOG}")
        await ensure_log(operator.inbox, SITE)
        async with asyncio.timeout(10):
            with pytest.raises(StreamShrank, match="made anew"):
                await anext(batches)


async def test_a_stream_that_ends_before_what_was_read_is_told(shard: Asker, writer: LogWriter) -> None:
    await fill(writer, "a", 10)
    async with aclosing((await follow(shard, after=11)).batches(1000)) as batches:
        with pytest.raises(StreamShrank, match="ends at 10; 11"):
            await anext(batches)


async def test_a_reader_that_leaves_takes_its_subscription_along(shard: Asker, writer: LogWriter) -> None:
    await fill(writer, "a", 10)
    before = len(shard.link.client._subs)
    async with aclosing((await follow(shard)).batches(1000)) as batches:
        await take(batches, 10)
        assert len(shard.link.client._subs) == before + 1
    assert len(shard.link.client._subs) == before
