"""What is Milvus's own: filters that it evaluates, places that follow behind, what it loses when it is killed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends import Backend, apply, endless
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_merge import put
from test_stores import found, log_of

from memory_shards.outside import OutsideProjection
from memory_shards.stores import VectorQuery, WentBack, milvus_client
from memory_shards.stores.by_url import Stores
from memory_shards.stores.milvus_client import PLACES, Target, collection_of
from memory_shards.stores.milvus_reader import MilvusVectors
from memory_shards.stores.milvus_store import MilvusStore
from memory_shards.stores.urls import EMBEDDED
from mnemesh.errors import Unavailable
from mnemesh.event import Record

LITE = pytest.mark.parametrize("backend", ["milvus-lite"], indirect=True)
BOTH = pytest.mark.parametrize("backend", ["milvus-lite", "milvus"], indirect=True)
EAST = np.array([1, 0], np.float32)


def milvus(stores: Stores) -> MilvusStore:
    assert isinstance(stores.vectors, MilvusVectors)
    store = stores.vectors.store
    assert isinstance(store, MilvusStore)
    return store


VALUES: list[Any] = [
    *(True, False, 0, 1, -1, 2, 1.0, 0.5, -0.0, 1e300, math.inf, -math.inf, math.nan),
    *((1 << 53) + 1, 1 << 53, (1 << 63) - 1, -(1 << 63)),
    *("", "a", "b", "ä", "日本", "it's", 'say "x"', "back\\slash", "a\nb", "tab\t", "\0", "%", "true", "1", "😀"),
    *([], ["a"], ["a", 1], [True], [1], [0.5], ["a", 0.5], [[1]], {"a": 1}, {}, "x" * 70_000, ["y" * 40_000]),
]
NAMES = ["n", "ä b", 'q"q', "it's", "back\\", "a.b", "a[0]", "line\nfeed", "$x", "and"]
ASKABLE = [
    value for value in VALUES if isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))
]
CONDITIONS = st.one_of(
    st.sampled_from(ASKABLE).map(lambda value: {"eq": value}),
    st.sampled_from(ASKABLE).map(lambda value: {"ne": value}),
    st.tuples(
        st.sampled_from(["lt", "lte", "gt", "gte"]),
        st.sampled_from([value for value in ASKABLE if not isinstance(value, bool)]),
    ).map(lambda pair: {pair[0]: pair[1]}),
    st.lists(st.sampled_from(ASKABLE), max_size=4).map(lambda values: {"in": values}),
    st.booleans().map(lambda there: {"exists": there}),
)


@BOTH
async def test_a_filter_lets_pass_what_it_does_in_memory(backend: Backend, tmp_path: Path) -> None:
    """Whatever an attribute is called and is: on the same log, against the embedded store."""
    events = [
        put(
            ms=n,
            entity_id=f"e{n}",
            type=["pump", "valve", None, "ü'\""][n % 4],
            attributes={NAMES[n % len(NAMES)]: value, "n": value, "even": n % 2 == 0},
            vectors={"s": EAST},
            spaces={"s": {"index": "flat"}},
        )
        for n, value in enumerate(VALUES, 1)
    ]
    log = log_of(*events)
    async with backend.opened() as stores, Backend.of(EMBEDDED, tmp_path / "embedded").opened() as embedded:
        for each in (stores, embedded):
            await apply(each, log)

        async def passing(which: Stores, asked: dict[str, Any], kind: str | None) -> set[str]:
            return {name for name, _ in await found(which, EAST, k=200, filter=asked, type=kind)}

        filters = filters_to_try()
        for asked, kind in filters:
            assert await passing(stores, asked, kind) == await passing(embedded, asked, kind), (asked, kind)


def filters_to_try() -> Sequence[tuple[dict[str, Any], str | None]]:
    drawn: list[tuple[dict[str, Any], str | None]] = []

    @settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        st.dictionaries(st.sampled_from(["n", "n", *NAMES]), CONDITIONS, min_size=1, max_size=2),
        st.sampled_from([None, None, None, "pump", "ü'\""]),
    )
    def draw(asked: dict[str, Any], kind: str | None) -> None:
        drawn.append((asked, kind))

    draw()
    return drawn


async def everything(stores: Stores) -> set[str]:
    return {name for name, _ in await found(stores, EAST, k=200)}


def drop(store: MilvusStore, collection: str) -> None:
    """As somebody would by hand, but not while it is flushed: Milvus Lite leaves half of it then."""
    if store._flushing is not None:
        store._flushing.result()
    with milvus_client.connected(store.target) as client:
        client.drop_collection(collection)


def some_vectors(count: int) -> Sequence[Record]:
    return log_of(*(put(ms=n, entity_id=f"e{n}", vectors={"s": EAST * n}) for n in range(1, count + 1)))


@LITE
async def test_an_index_that_lost_everything_is_filled_from_the_file(backend: Backend) -> None:
    async with backend.opened() as stores:
        await apply(stores, some_vectors(9))
        assert len(await everything(stores)) == 9
        store, projection = milvus(stores), stores.vectors.projection
        assert isinstance(projection, OutsideProjection)
        for name in [PLACES, collection_of(store.shard, "acme", "s")]:
            drop(store, name)
        with suppress(*store.outages):  # a flush that was under way has nothing to flush any more
            await projection.on_worker(store.look)
        assert await projection.on_worker(store.look) is None
        with pytest.raises(Unavailable):
            await everything(stores)
        await projection.begin(endless)
        assert projection.watermark.value == 9
        assert await everything(stores) == {f"e{n}" for n in range(1, 10)}


@LITE
async def test_whoever_applies_next_goes_on_from_what_was_flushed(backend: Backend) -> None:
    log = some_vectors(9)
    async with backend.opened() as stores:
        store, projection = milvus(stores), stores.vectors.projection
        await apply(stores, log[:4])
        await apply(stores, log)
        assert store.place.written == 9 > store.place.flushed
        await projection.on_worker(lambda: store.begin(afresh=False))
        at = await projection.on_worker(store.look)
        assert at in (0, 4)
        await projection.on_worker(store.apply, log[at:], 9, at)
        assert await everything(stores) == {f"e{n}" for n in range(1, 10)}
    async with backend.opened() as stores:  # it was flushed as it was closed
        assert milvus(stores).place._replace(visible_from=0) == (9, 0, 9)


@LITE
async def test_an_index_that_went_back_is_not_applied_to_and_one_that_another_moved_on_is_left(
    backend: Backend,
) -> None:
    log = some_vectors(9)
    async with backend.opened() as stores:
        store, projection = milvus(stores), stores.vectors.projection
        await apply(stores, log[:5])
        assert isinstance(projection, OutsideProjection)
        for embedded in stores.beside:
            await embedded.on_worker(embedded.store.apply, log, 9)
            embedded.watermark.advance(9)
        with pytest.raises(WentBack):
            await projection.on_worker(store.apply, log[7:], 9, 7)
        await projection.on_worker(store.apply, log[5:], 9, 5)
        await projection.on_worker(store.apply, log[:6], 6, 5)  # by one that was held up
        assert await projection.on_worker(store.look) == 9


def test_a_url_leads_to_a_file_or_a_server(tmp_path: Path) -> None:
    assert Target.of("milvus:", tmp_path) == (str(tmp_path / "milvus.db"), "", "", True)
    assert Target.of("milvus://host:1953/db", tmp_path) == ("http://host:1953", "", "db", False)
    assert Target.of("milvus+s://ann:p%40ss@host", tmp_path) == ("https://host", "ann:p@ss", "", False)


@LITE
async def test_what_is_removed_while_it_is_searched_is_left_out(backend: Backend) -> None:
    log = log_of(
        *(put(ms=n, entity_id=f"e{n}", vectors={"s": EAST}) for n in range(1, 41)),
        *(put(ms=100 + n, entity_id=f"e{n}", remove_vectors=["s"]) for n in range(1, 41)),
    )
    async with backend.opened() as stores:
        await apply(stores, log[:40])
        (file,) = stores.beside
        everywhere = VectorQuery(tenant="acme", space="s", vector=EAST, k=40, include_vectors=True)

        async def remove() -> None:
            for record in log[40:]:
                await file.on_worker(file.store.apply, [record], record.sequence)
                file.watermark.advance(record.sequence)

        removing = asyncio.ensure_future(remove())
        while not removing.done():
            for hit in (await stores.vectors.search(everywhere)).hits:
                assert hit.vector is not None
        await removing
        projection = stores.vectors.projection
        await projection.on_worker(milvus(stores).apply, log[40:], log[-1].sequence, 40)
        assert await everything(stores) == set()


@LITE
async def test_a_collection_that_somebody_dropped_is_filled_again(backend: Backend) -> None:
    log = some_vectors(9)
    async with backend.opened() as stores:
        await apply(stores, log[:8])
        store, projection = milvus(stores), stores.vectors.projection
        assert isinstance(projection, OutsideProjection)
        drop(store, collection_of(store.shard, "acme", "s"))
        with pytest.raises(Unavailable):
            await everything(stores)
        (file,) = stores.beside
        await file.on_worker(file.store.apply, log, 9)
        file.watermark.advance(9)
        with pytest.raises(store.outages):
            await projection.on_worker(store.apply, log[8:], 9, 8)
        assert await projection.on_worker(store.look) is None
        await projection.begin(endless)
        assert await everything(stores) == {f"e{n}" for n in range(1, 10)}
        drop(store, collection_of(store.shard, "acme", "s"))
    async with backend.opened() as stores:  # which finds it as it begins
        assert await everything(stores) == {f"e{n}" for n in range(1, 10)}
