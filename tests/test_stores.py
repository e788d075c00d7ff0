"""What every store must do, on every backend, each on the real thing.

Records go to all stores of a shard, as they do in one, and answers are compared with those of a model, or of the log
applied in another way.
"""

from __future__ import annotations

import gc
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from backends import IN_MEMORY, Backend, apply
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from test_merge import FUTURE, carried, forget, interleaved, put, records, site_logs
from test_sqlite_store import ENTITIES, Model, shown

from memory_shards.merger import Merger
from memory_shards.stores import VectorQuery, WentBack, milvus_client, neo4j_client, redis_client
from memory_shards.stores.by_url import Stores
from memory_shards.stores.urls import EMBEDDED
from mnemesh.clock import wall_ms
from mnemesh.errors import BadRequest, NotFound
from mnemesh.event import Event, Record
from mnemesh.ids import partition_of

ON_REAL_SERVERS = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def log_of(*events: Event) -> list[Record]:
    """The events as one log, each in its partition."""
    return placed(records(list(events)))


def placed(log: list[Record]) -> list[Record]:
    return [record._replace(partition=partition_of(record.event.tenant, record.event.entity_id)) for record in log]


def edge(target: str, relation: str = "near") -> dict[str, Any]:
    return {"relation": relation, "target_id": target}


@st.composite
def logs(draw: st.DrawFn) -> list[Record]:
    return placed(records(draw(interleaved(draw(site_logs(ENTITIES))))))


async def got(stores: Stores, entity_id: str = "pump", **times: int) -> dict[str, Any] | None:
    """What a reader is shown, from whichever stores have it."""
    document = await stores.documents.get("acme", entity_id, **times)
    seen = shown(document)
    if seen is not None and seen["edges"] is None:
        seen["edges"] = (await stores.edges.edges_of("acme", entity_id))[0]
    return seen


@ON_REAL_SERVERS
@given(st.data(), logs())
async def test_the_stores_show_what_a_model_shows(
    backend: Backend, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, log: list[Record]
) -> None:
    model = Model(log)
    async with backend.elsewhere(tmp_path_factory.mktemp("stores")).opened() as stores:
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(log) - 1)), max_size=3)))
        for start, end in zip([0, *cuts], [*cuts, len(log)], strict=True):
            if some := log[start:end]:
                await apply(stores, some)
        for entity_id in ENTITIES:
            now = wall_ms()
            assert await got(stores, entity_id) == model.get(entity_id, now, now)
            assert await got(stores, entity_id, valid_at_ms=now) == model.get(entity_id, now, now)
            as_of, valid_at = data.draw(st.integers(0, 200)), data.draw(st.integers(0, 200))
            assert await got(stores, entity_id, as_of_ms=as_of, valid_at_ms=valid_at) == model.get(
                entity_id, as_of, valid_at
            )
            told = [event.sequence for event in await stores.documents.timeline("acme", entity_id, 0, 1000)]
            assert told == [record.sequence for record, _ in model.left(entity_id)]


async def digests(stores: Stores) -> list[str]:
    return [(await facet.counted(digest=True)).digest for facet in stores.facets]


@ON_REAL_SERVERS
@given(st.data(), logs())
async def test_any_split_into_batches_and_any_replay_come_to_the_same(
    backend: Backend, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, log: list[Record]
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(log) - 1)), max_size=5)))
    async with backend.elsewhere(tmp_path_factory.mktemp("whole")).opened() as whole:
        if log:
            await apply(whole, log)
        async with backend.elsewhere(tmp_path_factory.mktemp("split")).opened() as split:
            for end in [*cuts, len(log)]:
                if log[:end]:
                    await apply(split, log[:end])  # from the beginning, each time
            assert await digests(split) == await digests(whole)
            for entity_id in ENTITIES:
                assert await got(split, entity_id) == await got(whole, entity_id)


async def test_what_a_batch_read_is_not_left_to_the_garbage_collector(backend: Backend) -> None:
    """A batch whose merger kept a method of it was; collecting it took a fifth of the time that applying took."""
    async with backend.opened() as stores:
        gc.collect()
        gc.disable()
        try:
            await apply(stores, log_of(put(ms=1, attributes={"n": 1}, edges=[edge("b")]), forget(ms=2)))
            assert not [each for each in gc.get_objects() if isinstance(each, Merger)]
        finally:
            gc.enable()


async def test_a_store_that_is_opened_again_goes_on_from_its_watermark(backend: Backend) -> None:
    log = log_of(*(put(ms=n, entity_id=f"e{n % 7}", attributes={"n": n}, edges=[edge(f"t{n}")]) for n in range(1, 41)))
    del log[25:30]  # they are of other shards
    async with backend.opened() as stores:
        await apply(stores, log[:25], 30)
    async with backend.opened() as stores:
        assert {projection.store.watermark for projection in stores.projections} == {30}
        await apply(stores, log)
        seen = await digests(stores)
    async with backend.opened() as stores:
        assert await digests(stores) == seen
        assert len((await got(stores, "e1") or {})["edges"]) == 5


async def test_a_store_of_another_log_begins_from_empty(backend: Backend) -> None:
    log = log_of(put(ms=1, attributes={"n": 1}, edges=[edge("valve")], text="hums", type="pump"))
    async with backend.opened() as stores:
        await apply(stores, log)
    async with backend.of_log("2").opened() as stores:
        assert {projection.store.watermark for projection in stores.projections} == {0}
        assert await got(stores) is None
        assert (await stores.edges.expand("acme", ["pump"], [], "out", 10)).edges == []
        assert (await stores.documents.list_entities("acme", "", 10, held=False, with_sites=False)) == []
        await apply(stores, log)
        assert await got(stores) is not None


async def test_two_shards_and_two_sites_share_a_server(backend: Backend, tmp_path: Path) -> None:
    log = log_of(put(ms=1, attributes={"n": 1}, edges=[edge("valve")]))
    other = backend.elsewhere(tmp_path / "other")
    async with backend.opened() as here, other.opened() as there:
        await apply(here, log)
        assert await got(there) is None
        assert (await there.edges.expand("acme", ["pump"], [], "out", 10)).edges == []
        await apply(there, log_of(put(ms=1, attributes={"n": 2})))
        assert (await got(here) or {})["attributes"] == {"n": 1}


@pytest.mark.parametrize("entity_id", ["a b", "{x}", "*", "naïve: ☃", "a:b", "x" * 2000, "\n", "'; DROP TABLE"])
async def test_ids_names_and_values_may_hold_any_text(backend: Backend, entity_id: str) -> None:
    attributes = {
        ":type": "not the type",
        "::": 1,
        "": "no name",
        "☃": {"deep": [1, 2.5, None, True, "\x00"]},
        "large": 2**63,
        "small": -(2**63),
        "float": 1e300,
        "half": 20.0,
        "off": False,
        "list": [],
    }
    about = [{"relation": f"r {entity_id}"[:100], "target_id": entity_id + "→", "properties": {"why": "☃", "n": [1]}}]
    log = log_of(put(ms=1, entity_id=entity_id, attributes=attributes, edges=about, text="☃ schön", type="ty:pe"))
    async with backend.opened() as stores:
        await apply(stores, log)
        found = await got(stores, entity_id) or {}
        assert found["attributes"] == attributes
        assert {name: type(value) for name, value in found["attributes"].items()} == {
            name: type(value) for name, value in attributes.items()
        }
        assert (found["edges"], found["text"], found["type"]) == (about, "☃ schön", "ty:pe")
        (listed,) = await stores.documents.list_entities("acme", "", 10, held=False, with_sites=True)
        assert (listed.entity_id, listed.type, listed.sites) == (entity_id, "ty:pe", ["hub"])
        walk = await stores.edges.expand("acme", [entity_id + "→"], [], "in", 10)
        assert [to for _, _, to in walk.edges] == [entity_id]


async def test_tenants_do_not_see_each_other(backend: Backend) -> None:
    mine = put(ms=1, attributes={"n": 1}, edges=[edge("valve")], text="hums")
    async with backend.opened() as stores:
        await apply(stores, log_of(mine))
        assert await stores.documents.get("zeta", "pump") is None
        assert await stores.documents.timeline("zeta", "pump", 0, 10) == []
        assert await stores.documents.list_entities("zeta", "", 10, held=False, with_sites=False) == []
        for direction, start in (("out", "pump"), ("in", "valve"), ("both", "pump")):
            assert (await stores.edges.expand("zeta", [start], [], direction, 10)).edges == []
        assert (await stores.edges.edges_of("zeta", "pump"))[0] == []
        assert (await stores.texts.search_text("zeta", "hums", 10, None))[0] == []


async def test_entities_are_listed_by_id_in_pages_of_types(backend: Backend) -> None:
    names = [f"e{n:03}" for n in range(120)]
    events = [put(ms=n, entity_id=name, type="even" if n % 2 == 0 else "odd") for n, name in enumerate(names, 1)]
    async with backend.opened() as stores:
        await apply(stores, log_of(*events, forget(ms=500, entity_id="e010")))
        names.remove("e010")
        for types, wanted in (([], names), (["odd"], [name for name in names if int(name[1:]) % 2 == 0])):
            found: list[str] = []
            while True:
                after = found[-1] if found else ""
                page = await stores.documents.list_entities(
                    "acme", after, 17, types=types, held=False, with_sites=False
                )
                found += [each.entity_id for each in page]
                if len(page) < 17:
                    break
            assert found == wanted


async def test_a_timeline_is_read_in_pages(backend: Backend) -> None:
    events = [
        put(ms=n, entity_id=f"e{n % 3}", valid_from=1000 - n, attributes={"n": n}, type=f"t{n % 3}")
        for n in range(1, 61)
    ]
    async with backend.opened() as stores:
        await apply(stores, log_of(*events))
        documents = stores.documents
        pages = [await documents.timeline("acme", "e1", 0, 5), await documents.timeline("acme", "e1", 13, 5)]
        assert [[event.sequence for event in page] for page in pages] == [[1, 4, 7, 10, 13], [16, 19, 22, 25, 28]]
        assert (pages[0][0].body["attributes"], pages[0][0].agent) == ({"n": 1}, "ann")
        ranges = {
            (None, None, None, 0, 4): [1, 2, 3, 4],
            (None, None, None, 57, 9): [58, 59, 60],
            (None, None, "t1", 2, 3): [4, 7, 10],
            (950, 960, None, 0, 100): list(range(41, 51)),
            (950, None, "t2", 10, 3): [11, 14, 17],
            (None, 950, None, 55, 2): [56, 57],
        }
        for asked, wanted in ranges.items():
            assert [event.sequence for event in await documents.timeline_range("acme", *asked)] == wanted


async def test_what_a_forget_erased_and_what_is_left_is_told(backend: Backend) -> None:
    log = log_of(
        put(ms=1, attributes={"n": 1}, text="hums", type="pump", edges=[edge("valve")]),
        put(ms=2, attributes={"m": 2}),
        put("edge-1", ms=30, attributes={"later": 3}),
        forget(ms=20),
        put("edge-2", ms=15, attributes={"late": 4}),
    )
    async with backend.opened() as stores:
        await apply(stores, log[:2])
        await apply(stores, log)
        assert (await got(stores) or {})["attributes"] == {"later": 3}
        assert (await got(stores) or {})["edges"] == []
        assert [event.sequence for event in await stores.documents.timeline("acme", "pump", 0, 10)] == [3, 4]
        erased, has, left = await stores.documents.erased("acme", "pump", [1, 2, 3, 4, 5])
        assert (erased, has) == ([0, 0, 0, 2, 0], [3, 4])
        assert {(each.site, each.first, each.count) for each in left} == {("edge-1", 3, 1), ("hub", 4, 1)}
        assert await stores.documents.forgotten([1, 2, 3, 4, 5]) == [4, 5]
        assert (await stores.texts.search_text("acme", "hums", 10, None))[0] == []
        (told,) = await stores.documents.describe("acme", ["pump"])
        assert told.sites == ["hub", "edge-1", "edge-2"]


async def test_a_node_of_ten_thousand_edges_is_walked_both_ways_and_cut_at_the_limit(backend: Backend) -> None:
    targets = [f"t{n:05}" for n in range(10_000)]
    events = [put(ms=n, edges=[edge(t) for t in targets[n * 500 : n * 500 + 500]]) for n in range(20)]
    async with backend.opened() as stores:
        await apply(stores, log_of(*events, put(ms=50, entity_id="other", edges=[edge("t00007")])))
        walk = await stores.edges.expand("acme", ["pump"], [], "out", 100_000)
        assert (walk.edges, walk.truncated) == ([("pump", "near", target) for target in targets], False)
        walk = await stores.edges.expand("acme", ["pump"], [], "out", 100)
        assert (len(walk.edges), walk.truncated) == (100, True)
        walk = await stores.edges.expand("acme", ["t00007"], ["near"], "in", 100)
        assert walk.edges == [("t00007", "near", "other"), ("t00007", "near", "pump")]
        assert len((await stores.edges.edges_of("acme", "pump"))[0]) == 10_000
        assert (await stores.edges.counted(digest=False)).edges == 10_001


async def test_a_walk_takes_the_relations_asked_for_and_no_edge_twice(backend: Backend) -> None:
    async with backend.opened() as stores:
        about = [edge("valve"), edge("pump"), edge("tank", "feeds")]
        await apply(stores, log_of(put(ms=1, edges=about), put(ms=2, entity_id="valve", edges=[edge("pump")])))
        out = await stores.edges.expand("acme", ["pump", "pump"], ["near"], "out", 100)
        assert out.edges == [("pump", "near", "pump"), ("pump", "near", "valve")]
        both = await stores.edges.expand("acme", ["pump"], [], "both", 100)
        assert both.edges == [
            ("pump", "feeds", "tank"),
            ("pump", "near", "pump"),
            ("pump", "near", "valve"),
        ]
        ahead = await stores.edges.expand("acme", ["valve"], [], "out", 100, ahead=1)
        assert (set(ahead.edges), set(ahead.ahead)) == (
            {("valve", "near", "pump"), *out.edges, both.edges[0]},
            {"pump"},
        )


async def test_removed_edges_stay_away_and_may_come_back(backend: Backend) -> None:
    async with backend.opened() as stores:
        log = log_of(
            put(ms=10, edges=[edge("valve") | {"properties": {"n": 1}}]),
            put(ms=20, remove_edges=[edge("valve")]),
            put("edge-1", ms=15, edges=[edge("valve") | {"properties": {"n": 2}}]),
            put(ms=30, edges=[edge("valve") | {"properties": {"n": 3}}]),
        )
        await apply(stores, log[:1])
        assert (await got(stores) or {})["edges"] == [edge("valve") | {"properties": {"n": 1}}]
        await apply(stores, log[:3])
        assert (await got(stores) or {})["edges"] == []
        assert (await stores.edges.expand("acme", ["valve"], [], "in", 9)).edges == []
        await apply(stores, log)
        assert (await got(stores) or {})["edges"] == [edge("valve") | {"properties": {"n": 3}}]


async def test_what_is_planned_or_over_is_neither_shown_nor_walked(backend: Backend) -> None:
    async with backend.opened() as stores:
        log = log_of(
            put(ms=1, attributes={"n": 1}, edges=[edge("now")]),
            put(ms=2, attributes={"n": 2}, edges=[edge("later")], valid_from=FUTURE),
            put(ms=3, attributes={"n": 3}, edges=[edge("once")], valid_to=1000),
            put(ms=4, entity_id="brief", attributes={"n": 4}, valid_to=1000),
        )
        await apply(stores, log[:1])
        await apply(stores, log)
        assert (await got(stores) or {})["attributes"] == {"n": 1}
        assert (await got(stores) or {})["edges"] == [edge("now")]
        assert (await stores.edges.expand("acme", ["pump"], [], "out", 9)).edges == [("pump", "near", "now")]
        ahead = await stores.edges.expand("acme", ["pump"], [], "out", 9, ahead=1)
        assert (ahead.edges, ahead.truncated) == ([("pump", "near", "now")], False)
        assert (await stores.edges.expand("acme", ["later", "once"], [], "in", 9)).edges == []
        assert await got(stores, "brief") is None
        assert (await got(stores, "brief", valid_at_ms=500) or {})["attributes"] == {"n": 4}
        assert (await got(stores, valid_at_ms=500) or {})["edges"] == [edge("now"), edge("once")]


@pytest.mark.parametrize("direction", ["out", "in", "both"])
async def test_edges_that_ended_take_no_room_from_those_that_hold(backend: Backend, direction: Any) -> None:
    ended = [put(ms=n, edges=[edge(f"a{n:02}")], valid_to=1000) for n in range(1, 51)]
    inward = [put(ms=n, entity_id=f"b{n:02}", edges=[edge("hub")], valid_to=1000) for n in range(1, 31)]
    hold = [put(ms=60, edges=[edge("z1"), edge("z2")]), put(ms=61, entity_id="z", edges=[edge("hub")])]
    async with backend.opened() as stores:
        await apply(stores, log_of(*ended, *inward, *hold))
        walk = await stores.edges.expand("acme", ["pump", "hub"], [], direction, 10)
        out = [("pump", "near", "z1"), ("pump", "near", "z2")] if direction != "in" else []
        back = [("hub", "near", "z")] if direction != "out" else []
        assert (walk.edges, walk.truncated) == ([*back, *out], False)


async def test_an_edge_that_leads_nowhere_is_skipped_and_stops_nobody(backend: Backend) -> None:
    async with backend.opened() as stores:
        log = log_of(
            put(ms=1, remove_edges=[edge("")]), put(ms=2, edges=[edge("x" * 20_000)]), put(ms=3, edges=[edge("v")])
        )
        await apply(stores, log)
        assert (await got(stores) or {})["edges"] == [edge("v")]
        assert stores.documents.rejected == 2


async def test_a_server_that_went_back_is_not_applied_to(backend: Backend) -> None:
    log = log_of(*(put(ms=n, attributes={"n": n}, edges=[edge(f"t{n}")]) for n in range(1, 11)))
    async with backend.opened() as stores:
        await apply(stores, log[:5])
        for outside in stores.outside:
            with pytest.raises(WentBack):
                await outside.on_worker(outside.store.apply, log[8:], 10, 8)
            assert await outside.on_worker(outside.store.look) == 5
            await outside.on_worker(outside.store.apply, log[2:8], 8, 5)
            await outside.on_worker(outside.store.apply, log, 10, 8)
            await outside.on_worker(outside.store.apply, log[:3], 3, 0)  # by somebody who was held up
            assert await outside.on_worker(outside.store.look) == 10
        for embedded in stores.embedded:
            await embedded.on_worker(embedded.store.apply, log, 10)
        seen = await got(stores) or {}
        assert (seen["attributes"], len(seen["edges"])) == ({"n": 10}, 10)
        assert len(await stores.documents.timeline("acme", "pump", 0, 99)) == 10


async def test_what_is_put_aside_has_no_effect_until_it_is_stamped_anew(backend: Backend) -> None:
    ahead = put("edge-1", ms=FUTURE, id="same", attributes={"n": 9})
    aside = placed([carried(1, ahead, 1)._replace(quarantined=True)])
    again = placed([carried(2, put("edge-1", ms=5, id="same", attributes={"n": 9}), 2)])
    async with backend.opened() as stores:
        await apply(stores, aside)
        assert (dict(stores.documents.quarantined), await got(stores)) == ({"edge-1": 1}, None)
        assert (await stores.documents.erased("acme", "pump", [1]))[1] == [1]
    async with backend.opened() as stores:
        assert stores.documents.quarantined["edge-1"] == 1
        await apply(stores, again)
        assert stores.documents.quarantined["edge-1"] == 0
        assert (await got(stores) or {})["attributes"] == {"n": 9}


async def test_an_event_that_breaks_a_rule_is_skipped_and_counted(backend: Backend) -> None:
    async with backend.opened() as stores:
        await apply(stores, log_of(put(ms=1, attributes=[1]), put(ms=2, attributes={"n": 2}, edges=[edge("valve")])))
        assert stores.documents.rejected == 1
        assert (await got(stores) or {})["attributes"] == {"n": 2}


async def test_suspects_are_told(backend: Backend) -> None:
    one, other = (replace(put(site, ms=10, attributes={"n": site}), saw=0) for site in ("edge-1", "edge-2"))
    log = placed([carried(1, one, 1), carried(2, other, 1)])
    async with backend.opened() as stores:
        await apply(stores, log)
        (found,) = await stores.documents.suspects("acme", "pump")
        assert (found.name, found.value, found.site) == ("n", "edge-1", "edge-1")


async def test_what_is_forgotten_whole_counts_no_more(backend: Backend) -> None:
    async with backend.opened() as stores:
        await apply(stores, log_of(put(ms=1, edges=[edge("valve")]), put(ms=2, entity_id="valve")))
        assert (await stores.documents.counted(digest=False)).things == 2
        await apply(stores, log_of(put(ms=1), put(ms=2, entity_id="valve"), forget(ms=9)))
        assert (await stores.documents.counted(digest=False)).things == 1
        assert (await stores.edges.counted(digest=False)).edges == 0


# ── vectors ─────────────────────────────────────────────────────────────────────────────────────────────────

EACH_OF_VECTORS = pytest.mark.parametrize("backend", [*IN_MEMORY, "milvus-lite", "milvus"], indirect=True)


async def found(
    stores: Stores, vector: np.ndarray[Any, Any], k: int = 5, space: str = "s", **query: Any
) -> list[tuple[str, float]]:
    asked = VectorQuery(tenant="acme", space=space, vector=vector, k=k, **query)
    return [(hit.entity_id, hit.score) for hit in (await stores.vectors.search(asked)).hits]


METRICS = ("cosine", "ip", "l2")
ON_A_MILVUS_SERVER = {1: ("l2",), 384: ("cosine",)}
"""It takes seconds to make a collection: the rest is for Milvus Lite, which has the same driver."""


@pytest.mark.parametrize(
    ("backend", "dimension"),
    [
        *((kind, d) for kind in (*IN_MEMORY, "milvus-lite") for d in (1, 2, 3, 7, 64, 384, 1536, 4096)),
        *(("milvus", d) for d in ON_A_MILVUS_SERVER),
    ],
    indirect=["backend"],
)
async def test_vectors_of_any_dimension_are_found_as_brute_force_finds_them(backend: Backend, dimension: int) -> None:
    random = np.random.default_rng(dimension)
    vectors = random.standard_normal((40, dimension)).astype(np.float32)
    metrics = METRICS
    if backend.urls.vectors.startswith("milvus://"):
        metrics = ON_A_MILVUS_SERVER[dimension]
    spaces = {metric: {"metric": metric} for metric in metrics}
    events = [
        put(ms=n, entity_id=f"e{n}", vectors=dict.fromkeys(metrics, vector), spaces=spaces)
        for n, vector in enumerate(vectors, 1)
    ]
    query = random.standard_normal(dimension).astype(np.float32)
    kept = vectors.astype(np.float64)
    by_metric = {
        "cosine": (kept @ query) / np.linalg.norm(kept, axis=1) / np.linalg.norm(query),
        "ip": kept @ query,
        "l2": -np.square(kept - query).sum(axis=1),
    }
    async with backend.opened() as stores:
        await apply(stores, log_of(*events))
        for metric in metrics:
            scores = by_metric[metric]
            hits = await found(stores, query, k=10, space=metric)
            near = 0.02 * max(1, abs(scores).max()) ** 0.5
            assert [score for _, score in hits] == pytest.approx(sorted(scores, reverse=True)[:10], rel=0.02, abs=near)
            for entity_id, score in hits:
                assert score == pytest.approx(scores[int(entity_id[1:]) - 1], rel=0.02, abs=near)
        held, _ = await stores.vectors.vectors_of("acme", "e7")
        for vector in held.values():
            assert vector == pytest.approx(vectors[6], rel=0.01, abs=0.01)
        assert sorted(held) == sorted(metrics)


@EACH_OF_VECTORS
async def test_a_search_takes_what_passes_its_filter_and_nothing_that_is_gone(backend: Backend) -> None:
    east = np.array([1, 0], np.float32)
    log = log_of(
        put(ms=1, entity_id="a", type="pump", attributes={"n": 1, "tags": ["x", "y"]}, vectors={"s": east}),
        put(ms=2, entity_id="b", type="valve", attributes={"n": 2}, vectors={"s": east * 2}),
        put(ms=3, entity_id="c", type="pump", attributes={"n": 3}),
        put(ms=4, entity_id="c", vectors={"s": np.array([0, 1], np.float32)}),
        put(ms=5, entity_id="d", type="pump", attributes={"n": 4}, vectors={"s": -east}),
        put(ms=6, entity_id="e", type="pump", vectors={"s": east}),
        put(ms=7, entity_id="f", type="pump", vectors={"s": east}),
        forget(ms=8, entity_id="e"),
        put(ms=9, entity_id="f", remove_vectors=["s"]),
        put(ms=10, entity_id="b", attributes={"n": 5}),
    )
    async with backend.opened() as stores:
        await apply(stores, log[:7])
        await apply(stores, log)
    async with backend.opened() as stores:
        await apply(stores, log)
        everything = {name for name, _ in await found(stores, east, k=99)}
        assert everything == {"a", "b", "c", "d"}
        filters: list[tuple[dict[str, Any], set[str]]] = [
            ({"type": "pump"}, {"a", "c", "d"}),
            ({"filter": {"n": {"gte": 3}}}, {"b", "c", "d"}),
            ({"filter": {"n": {"in": [1, 4]}}, "type": "pump"}, {"a", "d"}),
            ({"filter": {"tags": "y"}}, {"a"}),
            ({"filter": {"tags": {"exists": False}}}, {"b", "c", "d"}),
            ({"filter": {"n": 99}}, set()),
        ]
        for query, wanted in filters:
            assert {name for name, _ in await found(stores, east, k=99, **query)} == wanted
        with pytest.raises(NotFound):
            await stores.vectors.search(VectorQuery(tenant="zeta", space="s", vector=east))
        with pytest.raises(BadRequest, match="3 dimensions"):
            await stores.vectors.search(VectorQuery(tenant="acme", space="s", vector=np.ones(3, np.float32)))
        assert (await stores.vectors.counted(digest=False)).things == 4


@EACH_OF_VECTORS
async def test_a_vector_of_another_dimension_is_left_out_and_the_rest_of_its_event_counts(backend: Backend) -> None:
    log = log_of(
        put(ms=1, vectors={"s": np.ones(2, np.float32)}),
        put(
            ms=2,
            entity_id="odd",
            attributes={"n": 1},
            vectors={"s": np.ones(3, np.float32), "t": np.ones(3, np.float32)},
        ),
    )
    async with backend.opened() as stores:
        await apply(stores, log)
        assert [name for name, _ in await found(stores, np.ones(2, np.float32))] == ["pump"]
        assert list((await stores.vectors.vectors_of("acme", "odd"))[0]) == ["t"]
        assert (await got(stores, "odd") or {})["attributes"] == {"n": 1}


@ON_REAL_SERVERS
@given(st.data(), logs())
async def test_digests_are_the_same_whatever_keeps_it(
    backend: Backend, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, log: list[Record]
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(log) - 1)), max_size=3)))
    embedded = Backend.of(EMBEDDED, tmp_path_factory.mktemp("embedded"))
    async with backend.elsewhere(tmp_path_factory.mktemp("stores")).opened() as stores, embedded.opened() as other:
        for start, end in zip([0, *cuts], [*cuts, len(log)], strict=True):
            if some := log[start:end]:
                await apply(stores, some)
        if log:
            await apply(other, log)
        assert await by_part(stores) == await by_part(other)


async def by_part(stores: Stores) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for facet in stores.facets:
        for part, digests in (await facet.counted(digest=True)).digests.items():
            parts[part] = digests.by_partition()
    return parts


@pytest.mark.parametrize(
    ("backend", "module", "says"),
    [
        ("redis", redis_client, r"attributes redis://\S+: Redis [\d.]+ is too old: it must be 99.0 or later"),
        ("neo4j", neo4j_client, r"edges bolt://\S+: Neo4j [\d.]+ is too old: it must be 99.0 or later"),
        ("milvus", milvus_client, r"vectors milvus://\S+: Milvus v?[\d.]+\S* is too old: it must be 99.0 or later"),
    ],
    indirect=["backend"],
)
async def test_a_server_of_an_older_version_is_refused_with_the_setting(
    backend: Backend, module: ModuleType, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OLDEST", (99, 0))
    with pytest.raises(BadRequest, match=says):
        async with backend.opened():
            pass
