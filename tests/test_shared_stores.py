"""Stores on servers, while batches are applied and while partitions change hands: readers see whole batches, and
afterwards each store shows what the log says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from backends import Backend, apply
from test_merge import forget, put
from test_stores import edge, got, log_of

from memory_shards.stores.by_url import Stores
from memory_shards.stores.urls import EMBEDDED
from mnemesh.clock import wall_ms
from mnemesh.event import Record
from mnemesh.ids import PARTITIONS

LOW, HIGH = frozenset(range(PARTITIONS // 2)), frozenset(range(PARTITIONS // 2, PARTITIONS))
EVERYTHING = LOW | HIGH
ON_SERVERS = pytest.mark.parametrize("backend", ["redis", "redis-cluster"], indirect=True)

# ── torn reads ──────────────────────────────────────────────────────────────────────────────────────────────

BATCHES = 40
IN_A_BATCH = 10


def batch(number: int) -> list[Any]:
    """Puts of one batch: after it every part of the entity, and of others, says its number and no other."""
    events = [
        put(
            ms=100 * number + n,
            attributes={f"part{n}": number, f"only{n}_{number}": 1, f"only{n}_{number - 1}": None},
            edges=[edge(f"target{number}", f"r{n}")],
            remove_edges=[edge(f"target{number - 1}", f"r{n}")],
        )
        for n in range(IN_A_BATCH)
    ]
    others = [put(ms=100 * number + n, entity_id=f"e{n}", attributes={"n": number}) for n in range(IN_A_BATCH)]
    return [*events, *others]


async def read_while_applied(stores: Stores, look: Callable[[], Any]) -> int:
    """Apply batch after batch, and `look` meanwhile, again and again; how often."""
    log = log_of(*(event for number in range(1, BATCHES + 1) for event in batch(number)))
    size = 2 * IN_A_BATCH
    await apply(stores, log[:size])
    looks = 0

    async def write() -> None:
        for start in range(size, len(log), size):
            await apply(stores, log[start : start + size])

    async with asyncio.TaskGroup() as group:
        writing = group.create_task(write())
        while not writing.done():
            await look()
            looks += 1
    return looks


@ON_SERVERS
async def test_a_reader_of_an_entity_sees_all_of_a_batch_or_nothing(backend: Backend) -> None:
    async with backend.opened() as stores:
        seen: set[int] = set()

        async def look() -> None:
            for times in ({}, {"valid_at_ms": wall_ms()}):
                document = await stores.documents.get("acme", "pump", **times)
                assert document is not None
                (number,) = {document.attributes[f"part{n}"] for n in range(IN_A_BATCH)}
                parts = {f"part{n}": number for n in range(IN_A_BATCH)}
                assert document.attributes == parts | {f"only{n}_{number}": 1 for n in range(IN_A_BATCH)}
                assert document.version == (2 * number - 1) * IN_A_BATCH
                seen.add(number)
            events = await stores.documents.timeline("acme", "pump", 0, 1000)
            assert len(events) % IN_A_BATCH == 0

        await read_while_applied(stores, look)
        assert len(seen) > 2


@ON_SERVERS
async def test_a_page_of_the_timeline_has_no_holes_up_to_where_the_store_stood(backend: Backend) -> None:
    """Beyond that it may: nodes of a cluster apply a batch one after the other. The router leaves that out."""
    async with backend.opened() as stores:
        seen: set[int] = set()

        async def look() -> None:
            stood = stores.documents.projection.watermark.value
            events = await stores.documents.timeline_range("acme", None, None, None, 0, 10_000)
            assert [event.sequence for event in events][:stood] == list(range(1, stood + 1))
            seen.add(stood)

        await read_while_applied(stores, look)
        assert len(seen) > 2


@pytest.mark.parametrize("backend", ["neo4j"], indirect=True)
async def test_a_reader_of_the_graph_sees_all_of_a_batch_or_nothing(backend: Backend) -> None:
    """As it comes; `test_neo4j_store` reads in the middle of a commit."""
    async with backend.opened() as stores:
        seen: set[str] = set()

        async def look() -> None:
            edges, _ = await stores.edges.edges_of("acme", "pump")
            assert len(edges) == IN_A_BATCH
            assert len({each["target_id"] for each in edges}) == 1
            for walk in (
                await stores.edges.expand("acme", ["pump"], [], "out", 99),
                await stores.edges.expand("acme", ["pump"], [], "out", 99, ahead=1),
            ):
                assert len(walk.edges) == IN_A_BATCH
                (target,) = {target for _, _, target in walk.edges}
                seen.add(target)

        await read_while_applied(stores, look)
        assert len(seen) > 2


# ── partitions that change hands ────────────────────────────────────────────────────────────────────────────

MAPS: Sequence[Mapping[str, frozenset[int]]] = (
    {"s0": LOW, "s1": HIGH},
    {"s0": EVERYTHING},
    {"s0": LOW, "s1": HIGH},
)
NAMES = [f"e{n}" for n in range(20)]


@asynccontextmanager
async def shards_of(backend: Backend, shards: Mapping[str, frozenset[int]]) -> AsyncIterator[dict[str, Stores]]:
    async with AsyncExitStack() as stack:
        opened = {}
        for name, partitions in shards.items():
            folder = backend.origin.folder / f"{name}-of-{len(shards)}"
            origin = replace(backend.origin, shard=name, partitions=partitions, folder=folder)
            opened[name] = await stack.enter_async_context(Backend(backend.urls, origin).opened())
        yield opened


async def go_on(stores: Stores, partitions: frozenset[int], log: Sequence[Record]) -> None:
    """Apply what each store does not have yet, as far as it says itself."""
    for projection in stores.projections:
        after = projection.store.watermark
        records = [each for each in log if each.sequence > after and each.partition in partitions]
        given = (records, log[-1].sequence) if projection in stores.embedded else (records, log[-1].sequence, after)
        await projection.on_worker(projection.store.apply, *given)
        projection.watermark.advance(projection.store.watermark)


def chapter(number: int) -> list[Any]:
    """What happens while one map holds: every entity changes, and some edges; some are forgotten, some come back."""
    ms = 1000 * number
    puts = [
        put(
            ms=ms + n,
            entity_id=name,
            attributes={"n": number, f"of{number}": n},
            edges=[edge(NAMES[(7 * n + number) % len(NAMES)]), edge(f"leaf{number}.{n}", "has")],
            remove_edges=[edge(NAMES[(7 * n + number - 1) % len(NAMES)])],
        )
        for n, name in enumerate(NAMES)
    ]
    forgets = [forget(ms=ms + 100 + n, entity_id=NAMES[n]) for n in range(number, len(NAMES), 5)]
    return [*puts, *forgets, put(ms=ms + 200, entity_id=NAMES[number], attributes={"back": number})]


@pytest.mark.parametrize("backend", ["redis-neo4j"], indirect=True)
async def test_shards_become_one_and_two_again_and_each_shows_what_the_log_says(
    backend: Backend, tmp_path: Path
) -> None:
    log: list[Record] = []
    events: list[Any] = []
    for number, shards in enumerate(MAPS):
        events += chapter(number)
        log = log_of(*events)
        async with (
            shards_of(backend, shards) as opened,
            Backend.of(EMBEDDED, tmp_path / f"model{number}").opened() as model,
        ):
            await apply(model, log)
            for name, partitions in shards.items():
                await go_on(opened[name], partitions, log)
            await check_alike(opened, shards, model, log)


async def check_alike(
    opened: Mapping[str, Stores], shards: Mapping[str, frozenset[int]], model: Stores, log: Sequence[Record]
) -> None:
    """Whatever is asked, these shards together answer what the model does."""
    held = 0
    for name, stores in opened.items():
        held += (await stores.edges.counted(digest=False)).edges
        mine = {record.event.entity_id for record in log if record.partition in shards[name]}
        for entity_id in mine:
            assert await got(stores, entity_id) == await got(model, entity_id)
            expected = await model.documents.timeline("acme", entity_id, 0, 1000)
            assert await stores.documents.timeline("acme", entity_id, 0, 1000) == expected
        listed = await stores.documents.list_entities("acme", "", 1000, held=False, with_sites=False)
        everybody = await model.documents.list_entities("acme", "", 1000, held=False, with_sites=False)
        assert [each.entity_id for each in listed] == [each.entity_id for each in everybody if each.entity_id in mine]
    assert held == (await model.edges.counted(digest=False)).edges
    targets = [*NAMES, *(f"leaf{number}.{n}" for number in range(len(MAPS)) for n in range(len(NAMES)))]
    walked = [await stores.edges.expand("acme", targets, [], "in", 10_000) for stores in opened.values()]
    expected_walk = await model.edges.expand("acme", targets, [], "in", 10_000)
    assert sorted(each for walk in walked for each in walk.edges) == expected_walk.edges
