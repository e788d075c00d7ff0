"""The log writer: group commit, compare-and-set, and writes that happen once however often they are tried."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from conftest import SITE, OpenAsker
from test_connection import lost

from cli.server import NatsServer
from mnemesh import subjects
from mnemesh.asker import Asker
from mnemesh.atomic_batch import MOST_IN_BATCH, ROLLUP
from mnemesh.errors import Busy, Conflict, MnemeshError, TooLarge, Unavailable
from mnemesh.jetstream import stream_state
from mnemesh.log_writer import LEARN_EVERY, MOST_WAITING, Append, LogWriter, Pace, Position

LOG = subjects.log_stream(SITE)
RUN = time.time_ns()
"""Keeps the ids of this run apart from those that the shared log still remembers."""


def write(name: str, event: str = "1", *, expected: int | None = None, rollup: bool = False, size: int = 10) -> Append:
    subject = subjects.log_event(SITE, "acme", 7, f"{name}-{RUN}")
    return Append(subject, bytes(size), f"{name}-{event}-{RUN}", expected, {ROLLUP: "sub"} if rollup else {})


@contextlib.asynccontextmanager
async def running(asker: Asker) -> AsyncIterator[LogWriter]:
    writer = LogWriter(asker.link, asker.inbox)
    run = asyncio.ensure_future(writer.run())
    try:
        yield writer
    finally:
        run.cancel()
        await asyncio.wait([run])


@pytest_asyncio.fixture
async def gateway(open_asker: OpenAsker) -> Asker:
    return await open_asker("gateway")


@pytest_asyncio.fixture
async def writer(gateway: Asker) -> AsyncIterator[LogWriter]:
    async with running(gateway) as writer:
        yield writer


async def stored(gateway: Asker) -> int:
    return (await stream_state(gateway.inbox, LOG)).messages


# ── commits ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_success_is_a_place_in_the_log(writer: LogWriter, gateway: Asker) -> None:
    before = await stream_state(gateway.inbox, LOG)
    position = await writer.append(write("lone"))
    assert position == Position(before.last_sequence + 1, False)
    assert (await stream_state(gateway.inbox, LOG)).last_sequence == position.sequence


async def test_writes_that_wait_share_a_commit(writer: LogWriter, gateway: Asker) -> None:
    before = await stored(gateway)

    async def keep_writing(name: int) -> list[int]:
        return [(await writer.append(write(f"group{name}", str(number)))).sequence for number in range(20)]

    sequences = await asyncio.gather(*(keep_writing(name) for name in range(64)))
    assert all(one == sorted(one) for one in sequences)
    assert len({sequence for one in sequences for sequence in one}) == 64 * 20
    assert await stored(gateway) == before + 64 * 20
    assert writer.appended == 64 * 20
    assert writer.commits <= 64 * 20 / 16


async def test_more_than_a_batch_is_split_and_keeps_its_order(writer: LogWriter) -> None:
    outcomes = await writer.append_each([write(f"many{number}") for number in range(2 * MOST_IN_BATCH + 500)])
    sequences = [outcome.sequence for outcome in outcomes if isinstance(outcome, Position)]
    assert len(sequences) == len(outcomes)
    assert sequences == sorted(sequences)
    assert writer.commits == 3


async def test_a_batch_of_large_messages_is_split_by_size(writer: LogWriter) -> None:
    outcomes = await writer.append_each([write(f"large{number}", size=3_000_000) for number in range(6)])
    assert all(isinstance(outcome, Position) for outcome in outcomes)
    assert writer.commits == 3


async def test_what_is_too_large_is_told_so_and_its_neighbours_are_stored(writer: LogWriter, gateway: Asker) -> None:
    small = asyncio.ensure_future(writer.append(write("beside")))
    with pytest.raises(TooLarge):
        await writer.append(write("huge", size=gateway.link.max_payload))
    assert not (await small).duplicate
    with pytest.raises(TooLarge, match="at most 1000"):
        await writer.append_all([write(f"throng{number}") for number in range(MOST_IN_BATCH + 1)])


async def test_beyond_what_may_wait_writers_are_told_busy(gateway: Asker) -> None:
    async with running(gateway) as writer:
        with pytest.raises(Busy) as refusal:
            await writer.append_each([write("crowd")] * (MOST_WAITING + 1))
    assert refusal.value.retry_after_ms


async def test_nothing_to_append_is_nothing(writer: LogWriter) -> None:
    assert await writer.append_each([]) == []
    assert await writer.append_all([]) == []


# ── compare-and-set ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_failed_compare_and_set_is_a_conflict_for_that_write_alone(writer: LogWriter) -> None:
    first = await writer.append(write("cas", expected=0))
    outcomes = await writer.append_each(
        [
            write("cas-left"),
            write("cas", "2", expected=0),
            write("cas", "3", expected=first.sequence),
            write("cas-right", expected=0),
            write("cas-far", expected=4711),
        ]
    )
    assert [isinstance(outcome, Conflict) for outcome in outcomes] == [False, True, False, False, True]
    assert all(isinstance(outcome, Position | Conflict) for outcome in outcomes)


async def test_all_or_none(writer: LogWriter, gateway: Asker) -> None:
    await writer.append(write("all", expected=0))
    before = await stored(gateway)
    with pytest.raises(Conflict):
        await writer.append_all([write("all-new"), write("all", "2", expected=0)])
    assert await stored(gateway) == before
    positions = await writer.append_all([write("all-new"), write("all", "2")])
    assert positions[1].sequence == positions[0].sequence + 1


# ── once ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("expected", [None, 0])
async def test_a_retry_is_a_duplicate_with_the_original_sequence(
    writer: LogWriter, gateway: Asker, expected: int | None
) -> None:
    """Also of a compare-and-set, which nats-server refuses before it looks whether it has the id."""
    name = f"retry{expected}"
    first = await writer.append(write(name, expected=expected))
    await writer.append(write(name, "later"))
    before = await stored(gateway)
    assert await writer.append(write(name, expected=expected)) == Position(first.sequence, True)
    assert await stored(gateway) == before
    assert writer.appended == 2


@pytest.mark.parametrize("expected", [None, 0])
@pytest.mark.parametrize("count", [1, 2, 300])
async def test_the_retry_of_a_batch_whose_ack_was_lost_finds_all_of_it(
    writer: LogWriter, gateway: Asker, expected: int | None, count: int
) -> None:
    appends = [write(f"lost{expected}{count}-{number}", expected=expected) for number in range(count)]
    first = await writer.append_all(appends)
    before = await stored(gateway)
    again = [Position(position.sequence, True) for position in first]
    assert await writer.append_all(appends) == again
    assert await writer.append_each(appends) == again
    assert await stored(gateway) == before


async def test_new_writes_beside_a_retry_are_stored_but_an_atomic_batch_that_mixes_them_is_not(
    writer: LogWriter, gateway: Asker
) -> None:
    old = await writer.append(write("old"))
    outcomes = await writer.append_each([write("old"), write("new")])
    assert outcomes[0] == Position(old.sequence, True)
    assert isinstance(outcomes[1], Position)
    assert not outcomes[1].duplicate
    before = await stored(gateway)
    with pytest.raises(Conflict, match="id"):
        await writer.append_all([write("old"), write("newer")])
    assert await stored(gateway) == before


async def test_one_id_twice_in_a_group_is_stored_once(writer: LogWriter) -> None:
    outcomes = await writer.append_each([write("twin"), write("twin")])
    assert sorted(outcome.duplicate for outcome in outcomes if isinstance(outcome, Position)) == [False, True]


async def test_a_rollup_erases_what_its_subject_held_before(writer: LogWriter, gateway: Asker) -> None:
    await writer.append_each([write("secret", str(number)) for number in range(5)])
    before = await stored(gateway)
    outcomes = await writer.append_each(
        [write("secret", "5"), write("secret", "forget", rollup=True), write("beside-secret"), write("secret", "6")]
    )
    assert all(isinstance(outcome, Position) for outcome in outcomes)
    assert await stored(gateway) == before - 5 + 3


def test_few_messages_are_stored_singly_where_that_is_sooner_and_many_never() -> None:
    fast, slow = Pace(), Pace()
    assert fast.is_sooner_singly(1)
    assert not fast.is_sooner_singly(2)  # nothing is known yet
    for pace, one_s in ((fast, 0.0003), (slow, 0.005)):
        pace.took_singly(1, one_s)
        pace.took_as_batch(2, 0.0035)
    assert fast.is_sooner_singly(8)
    assert not fast.is_sooner_singly(16)
    assert not slow.is_sooner_singly(2)


def test_what_a_batch_takes_is_learned_anew_where_single_messages_are_the_rule() -> None:
    pace = Pace()
    pace.took_singly(1, 0.0003)
    pace.took_as_batch(2, 0.0035)
    chosen = [pace.is_sooner_singly(2) for _ in range(LEARN_EVERY)]
    assert chosen.count(False) == 1
    for _ in range(50):
        pace.took_as_batch(2, 0.0004)
    assert not pace.is_sooner_singly(2)


# ── ends ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def until_sent(gateway: Asker) -> None:
    """Let the writer go on to where it waits for the server, which is frozen."""
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(gateway.inbox) > 0


async def test_a_writer_that_stops_fails_those_who_wait_and_those_who_come(
    own_mesh_server: NatsServer, open_asker: OpenAsker
) -> None:
    gateway = await open_asker("gateway", own_mesh_server)
    writer = LogWriter(gateway.link, gateway.inbox)
    run = asyncio.ensure_future(writer.run())
    own_mesh_server.pause()
    under_way = asyncio.ensure_future(writer.append(write("under-way")))
    await until_sent(gateway)
    waiting = asyncio.ensure_future(writer.append(write("waiting")))
    await asyncio.sleep(0)
    run.cancel()
    async with asyncio.timeout(5):
        for request in (under_way, waiting, writer.append(write("late"))):
            with pytest.raises(Unavailable, match="stopped"):
                await request
    own_mesh_server.resume()
    async with asyncio.timeout(5):
        again = asyncio.ensure_future(writer.run())
        await asyncio.sleep(0)
        await writer.append(write("after"))
    again.cancel()


async def test_a_killed_server_is_a_typed_error_and_the_writer_goes_on_when_it_is_back(
    own_mesh_server: NatsServer, open_asker: OpenAsker
) -> None:
    gateway = await open_asker("gateway", own_mesh_server)
    async with running(gateway) as writer:
        await writer.append(write("before"))
        own_mesh_server.pause()
        gone = asyncio.ensure_future(lost(gateway.link))
        under_way = asyncio.ensure_future(writer.append_each([write(f"doomed{number}") for number in range(10)]))
        await until_sent(gateway)
        await own_mesh_server.kill()
        await gone
        async with asyncio.timeout(5):
            assert {type(outcome) for outcome in await under_way} == {Unavailable}
        patient = asyncio.ensure_future(persist(writer, [write(f"doomed{number}") for number in range(10)]))
        await own_mesh_server.start()
        async with asyncio.timeout(20):
            positions = await patient
        assert len({position.sequence for position in positions}) == 10
        assert await stored(gateway) == 11


async def persist(writer: LogWriter, appends: list[Append]) -> list[Position]:
    """Append as a client does: under the same ids until it has worked."""
    while True:
        with contextlib.suppress(MnemeshError):
            return await writer.append_all(appends)
