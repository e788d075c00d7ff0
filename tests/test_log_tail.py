"""The tail of a log: whoever follows it gets every message once and in order, from wherever he begins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
import pytest_asyncio
from conftest import SITE, OpenAsker
from test_follower import LOG, fill, sequences, take
from test_log_writer import running

from cli.server import NatsServer
from mnemesh.asker import Asker
from mnemesh.follower import StreamShrank
from mnemesh.jetstream import api, ensure_log, stream_state
from mnemesh.log_writer import LogWriter
from services import log_tail
from services.log_tail import LogTail


@pytest_asyncio.fixture
async def hub(own_mesh_server: NatsServer, open_asker: OpenAsker) -> Asker:
    return await open_asker("hub", own_mesh_server)


@pytest_asyncio.fixture
async def operator(own_mesh_server: NatsServer, open_asker: OpenAsker) -> Asker:
    return await open_asker("operator", own_mesh_server)


@pytest_asyncio.fixture
async def writer(own_mesh_server: NatsServer, open_asker: OpenAsker) -> AsyncIterator[LogWriter]:
    async with running(await open_asker("gateway", own_mesh_server)) as writer:
        yield writer


@asynccontextmanager
async def tail_of(hub: Asker) -> AsyncIterator[LogTail]:
    """A tail that reads."""
    tail = LogTail(hub.link, hub.inbox, LOG)
    reading = asyncio.create_task(tail.run())
    try:
        while not await consumers_of(hub):
            pass
        yield tail
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def consumers_of(hub: Asker) -> int:
    """How many read the log."""
    count: int = (await api(hub.inbox, f"STREAM.INFO.{LOG}"))["state"]["consumer_count"]
    return count


async def incarnation_of(hub: Asker) -> str:
    return (await stream_state(hub.inbox, LOG)).incarnation


async def test_all_who_are_at_the_end_share_one_reading(hub: Asker, writer: LogWriter) -> None:
    await fill(writer, "old", 10)
    async with tail_of(hub) as tail:
        incarnation = await incarnation_of(hub)
        readers = [tail.batches(10, incarnation) for _ in range(5)]
        waiting = [asyncio.create_task(take(reader, 1200)) for reader in readers]
        await fill(writer, "new", 1200)
        for taken in await asyncio.gather(*waiting):
            assert sequences(taken) == list(range(11, 1211))
        assert await consumers_of(hub) < 5


async def test_who_is_behind_comes_up_to_it(hub: Asker, writer: LogWriter) -> None:
    await fill(writer, "old", 1500)
    async with tail_of(hub) as tail, aclosing(tail.batches(700, await incarnation_of(hub))) as batches:
        assert sequences(await take(batches, 800)) == list(range(701, 1501))
        alone = len(hub.link.client._subs)
        waiting = asyncio.create_task(take(batches, 5))
        await fill(writer, "new", 5)
        assert sequences(await waiting) == list(range(1501, 1506))
        assert len(hub.link.client._subs) == alone - 1


@pytest.mark.parametrize("limit", [("KEPT_BYTES", 1000), ("KEPT_S", 0.05)])
async def test_who_is_too_slow_for_it_misses_nothing(
    hub: Asker, writer: LogWriter, monkeypatch: pytest.MonkeyPatch, limit: tuple[str, float]
) -> None:
    monkeypatch.setattr(log_tail, *limit)
    async with tail_of(hub) as tail, aclosing(tail.batches(0, await incarnation_of(hub))) as batches:
        await fill(writer, "a", 5, size=100)
        first = await anext(batches)
        await fill(writer, "b", 50, size=100)
        while tail._begins_after < 20:
            await fill(writer, "c", 1)
        head = (await stream_state(hub.inbox, LOG)).last_sequence
        rest = await take(batches, head - first[-1].sequence)
        assert sequences([*first, *rest]) == list(range(1, head + 1))
        assert sequences(await tail.next(0, await incarnation_of(hub)))[:10] == list(range(1, 11))


async def test_it_forgets_what_was_written_long_ago(
    hub: Asker, writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_tail, "KEPT_S", 0.05)
    async with tail_of(hub) as tail:
        await fill(writer, "a", 5)
        async with asyncio.timeout(10):
            while tail._ends < 5 or tail._kept:
                await hub.link.flush()
        assert tail._bytes == 0
        assert sequences(await tail.next(0, await incarnation_of(hub))) == [1, 2, 3, 4, 5]
        assert await tail.next(5, await incarnation_of(hub)) == []


async def test_a_log_that_was_made_anew_is_told_and_followed(hub: Asker, writer: LogWriter, operator: Asker) -> None:
    await fill(writer, "a", 10)
    async with tail_of(hub) as tail:
        before = await incarnation_of(hub)
        async with aclosing(tail.batches(10, before)) as batches:
            waiting = asyncio.create_task(anext(batches))
            await hub.link.flush()
            await api(operator.inbox, f"STREAM.DELETE.{LOG}")
            await ensure_log(operator.inbox, SITE)
            async with asyncio.timeout(20):
                with pytest.raises(StreamShrank, match="made anew"):
                    await waiting
        after = await incarnation_of(hub)
        async with asyncio.timeout(20):
            while tail._incarnation != after:
                await hub.link.flush()
        with pytest.raises(StreamShrank, match="another one"):
            await tail.next(10, before)
        async with aclosing(tail.batches(0, after)) as batches:
            waiting = asyncio.create_task(take(batches, 3))
            await fill(writer, "b", 3)
            assert sequences(await waiting) == [1, 2, 3]
