"""Every operation through the SDK, on a real nats-server with a gateway, a router and two shards in this process."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from conftest import SITE, open_raw
from mesh import STRONG, Mesh, ask_raw, body_of, code_of

from cli.provision import even_shards
from mnemesh import Consistency, Memory, messages, subjects, wire
from mnemesh.asker import Asker
from mnemesh.clock import to_ms, wall_ms
from mnemesh.errors import BadRequest, Conflict, NotFound, Stale, TooLarge, Unavailable
from mnemesh.ids import partition_of, partition_of_tokens, to_token

pytestmark = pytest.mark.asyncio(loop_scope="module")

Edges = Sequence[Mapping[str, Any]]


def edge(target_id: str, relation: str = "to", **properties: Any) -> dict[str, Any]:
    return {"relation": relation, "target_id": target_id} | ({"properties": properties} if properties else {})


def base64_of(numbers: Sequence[float]) -> str:
    return base64.b64encode(np.asarray(numbers, "<f4").tobytes()).decode()


def shard_of(tenant: str, entity_id: str) -> str:
    partition = partition_of(tenant, entity_id)
    return next(shard.name for shard in even_shards(2) if partition in shard.partitions)


def names_on(tenant: str, shard: str, count: int, prefix: str = "n") -> list[str]:
    """Ids that belong to a shard."""
    found = (f"{prefix}{number}" for number in range(100_000) if shard_of(tenant, f"{prefix}{number}") == shard)
    return [next(found) for _ in range(count)]


def ids(found: messages.Hits) -> list[str]:
    return [hit.entity_id for hit in found.hits]


def depths(walk: messages.Traversal) -> dict[str, int]:
    return {node.entity_id: node.depth for node in walk.nodes}


# ── set_context and get_context ─────────────────────────────────────────────────────────────────────────────────


async def test_what_was_set_is_read(own: Memory) -> None:
    attributes = {"kv": 20.5, "name": "Süd", "on": True, "tags": ["a", 1], "deep": {"a": {"b": None}}, "n": 2**64 - 1}
    written = await own.set_context(
        "bus:7", type="bus", attributes=attributes, edges=[edge("bus:8", length_km=1.5)], text="the southern bus"
    )
    context = await own.get_context("bus:7", consistency=STRONG)
    assert context.entity_id == written.entity_id == "bus:7"
    assert context.type == "bus"
    assert context.attributes == attributes
    assert context.edges == [edge("bus:8", length_km=1.5)]
    assert context.text == "the southern bus"
    assert context.spaces == []
    assert context.version == written.version
    assert context.watermark[SITE] >= written.token[SITE]


async def test_attributes_merge_and_null_removes(own: Memory) -> None:
    await own.set_context("e", type="a", attributes={"kept": 1, "changed": 1, "removed": 1}, text="first")
    await own.set_context("e", attributes={"changed": 2, "removed": None, "never there": None})
    context = await own.get_context("e", consistency=STRONG)
    assert context.attributes == {"kept": 1, "changed": 2}
    assert (context.type, context.text) == ("a", "first")


async def test_an_empty_text_removes_it_and_a_type_can_change(own: Memory) -> None:
    await own.set_context("e", type="a", text="gone soon")
    await own.set_context("e", type="b", text="")
    context = await own.get_context("e", consistency=STRONG)
    assert (context.type, context.text) == ("b", None)


async def test_edges_are_added_replaced_and_removed(own: Memory) -> None:
    await own.set_context("e", edges=[edge("x", weight=1), edge("y"), edge("x", "other")])
    await own.set_context("e", edges=[edge("x", weight=2)], remove_edges=[edge("y"), edge("never there")])
    context = await own.get_context("e", consistency=STRONG)
    assert context.edges == [edge("x", "other"), edge("x", weight=2)]


async def test_an_entity_that_nobody_wrote_is_not_found_by_its_name(own: Memory) -> None:
    with pytest.raises(NotFound, match="'bus:404'"):
        await own.get_context("bus:404")


async def test_what_no_longer_or_not_yet_holds_is_seen_only_at_its_time(own: Memory) -> None:
    now = datetime.now(UTC)
    day = timedelta(days=1)
    await own.set_context("e", attributes={"always": 1}, valid_from=now - 10 * day)
    await own.set_context("e", attributes={"past": 1}, valid_from=now - 3 * day, valid_to=now - day)
    await own.set_context("e", attributes={"future": 1}, valid_from=now + day)

    async def seen_at(moment: datetime | None) -> set[str]:
        return set((await own.get_context("e", valid_at=moment, consistency=STRONG)).attributes)

    assert await seen_at(None) == {"always"}
    assert await seen_at(now - 2 * day) == {"always", "past"}
    assert await seen_at(now - 1 * day) == {"always"}  # valid_to is exclusive
    assert await seen_at(now + 2 * day) == {"always", "future"}
    with pytest.raises(NotFound):
        await seen_at(now - 11 * day)


async def test_as_of_shows_what_was_known_then(own: Memory) -> None:
    for value in (1, 2):
        await own.set_context("e", attributes={"value": value}, edges=[edge(f"x{value}")])
        await own.get_context("e", consistency=STRONG)
        while wall_ms() <= to_ms((await own.timeline("e")).events[-1].recorded_at):
            pass  # two events of one millisecond cannot be told apart by time
    first, second = (await own.timeline("e", consistency=STRONG)).events
    context = await own.get_context("e", as_of=first.recorded_at)
    assert (context.attributes, context.edges, context.version) == ({"value": 1}, [edge("x1")], first.sequence)
    context = await own.get_context("e", as_of=second.recorded_at)
    assert context.attributes == {"value": 2}
    assert context.edges == [edge("x1"), edge("x2")]
    with pytest.raises(NotFound):
        await own.get_context("e", as_of=first.recorded_at - timedelta(milliseconds=1))


async def test_a_validity_that_ends_before_it_begins_is_refused(own: Memory) -> None:
    now = datetime.now(UTC)
    with pytest.raises(BadRequest, match="valid_from must be before valid_to"):
        await own.set_context("e", valid_from=now, valid_to=now)


# ── compare-and-set and idempotency ─────────────────────────────────────────────────────────────────────────────


async def test_compare_and_set(own: Memory) -> None:
    first = await own.set_context("e", attributes={"n": 1}, expected_version=0)
    second = await own.set_context("e", attributes={"n": 2}, expected_version=first.version)
    assert second.version > first.version
    for outdated in (0, first.version):
        with pytest.raises(Conflict, match=f"'e' is not at version {outdated}") as caught:
            await own.set_context("e", attributes={"n": 3}, expected_version=outdated)
        assert "JetStream" not in str(caught.value)
    assert (await own.get_context("e", consistency=STRONG)).attributes == {"n": 2}


async def test_compare_and_set_takes_the_version_that_a_read_returned(own: Memory) -> None:
    await own.set_context("e", attributes={"n": 1})
    await own.set_context("other", attributes={"n": 1})
    context = await own.get_context("e", consistency=STRONG)
    await own.set_context("e", attributes={"n": 2}, expected_version=context.version)


async def test_of_many_that_compare_with_the_same_version_one_wins(own: Memory) -> None:
    first = await own.set_context("e")
    outcomes = await asyncio.gather(
        *(own.set_context("e", attributes={"by": n}, expected_version=first.version) for n in range(20)),
        return_exceptions=True,
    )
    (winner,) = (n for n, outcome in enumerate(outcomes) if not isinstance(outcome, BaseException))
    assert all(isinstance(outcome, Conflict) for n, outcome in enumerate(outcomes) if n != winner)
    assert (await own.get_context("e", consistency=STRONG)).attributes == {"by": winner}


async def test_compare_and_set_of_every_write(own: Memory) -> None:
    for write in (
        lambda: own.set_context("e", expected_version=5),
        lambda: own.upsert_embedding("e", [1.0, 0.0], space="s", expected_version=5),
        lambda: own.forget("e", expected_version=5),
        lambda: own.ingest([{"entity_id": "f"}, {"entity_id": "e", "expected_version": 5}], atomic=True),
    ):
        with pytest.raises(Conflict, match="'e' is not at version 5"):
            await write()
    for name in ("e", "f"):
        with pytest.raises(NotFound):
            await own.get_context(name, consistency=STRONG)


async def test_a_write_under_one_message_id_happens_once(own: Memory) -> None:
    first = await own.set_context("e", attributes={"n": 1}, message_id="m1")
    await own.set_context("e", attributes={"n": 2})
    again = await own.set_context("e", attributes={"n": 1}, message_id="m1")
    assert (again.version, again.token, again.duplicate) == (first.version, first.token, True)
    assert (await own.get_context("e", consistency=STRONG)).attributes == {"n": 2}


async def test_the_repeat_of_a_compare_and_set_that_succeeded_succeeds(own: Memory) -> None:
    first = await own.set_context("e", expected_version=0, message_id="m1")
    again = await own.set_context("e", expected_version=0, message_id="m1")
    assert (again.version, again.duplicate) == (first.version, True)


async def test_a_message_id_is_the_callers_own(mesh: Mesh, own: Memory) -> None:
    async with (
        mesh.connect("acme.alice") as alice,
        mesh.connect("acme.bob") as bob,
        mesh.connect("zeta.carol") as carol,
    ):
        for memory in (alice, bob, carol):
            assert not (await memory.set_context("shared id", message_id="the same")).duplicate


# ── vectors ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "given", [base64_of([3, 4]), [3, 4], np.asarray([3, 4], np.float32), np.asarray([3, 4], np.float16)]
)
async def test_a_state_vector_lands_in_its_space_however_it_is_spelled(own: Memory, given: Any) -> None:
    await own.set_context("e", attributes={"state_vector": given, "plain": 1})
    context = await own.get_context("e", include_vectors=True, consistency=STRONG)
    assert context.attributes == {"plain": 1}
    assert context.spaces == ["state_vector"]
    assert context.vectors is not None
    np.testing.assert_allclose(context.vectors["state_vector"], [3, 4], rtol=2e-3)
    assert ids(await own.search_embedding([3, 4], space="state_vector", consistency=STRONG)) == ["e"]


async def test_a_state_vector_of_null_removes_it(own: Memory) -> None:
    await own.set_context("e", attributes={"state_vector": [3, 4]})
    await own.set_context("e", attributes={"state_vector": None})
    assert (await own.get_context("e", consistency=STRONG)).spaces == []
    assert ids(await own.search_embedding([3, 4], space="state_vector", consistency=STRONG)) == []


async def test_a_state_vector_that_is_none_is_refused(own: Memory) -> None:
    with pytest.raises(BadRequest, match=r"attributes\.state_vector"):
        await own.set_context("e", attributes={"state_vector": {"x": 1}})


async def test_vectors_of_several_spaces_are_added_and_removed(own: Memory) -> None:
    await own.set_context("e", vectors={"a": [1, 0], "b": base64_of([0, 1, 0])})
    assert (await own.get_context("e", consistency=STRONG)).spaces == ["a", "b"]
    await own.set_context("e", remove_vectors=["a"])
    context = await own.get_context("e", include_vectors=True, consistency=STRONG)
    assert context.spaces == ["b"]
    assert list(context.vectors or {}) == ["b"]
    assert ids(await own.search_embedding([1, 0], space="a", consistency=STRONG)) == []


async def test_the_first_vector_settles_its_space(own: Memory) -> None:
    await own.upsert_embedding("e", [1, 0], space="s", metric="l2", index="flat", model="m1")
    await own.upsert_embedding("f", [1, 0], space="s")
    for wanted, vector, settled, asked in (
        ({}, [1, 0, 0], "2 dimensions", "has 3"),
        ({"metric": "ip"}, [1, 0], "metric 'l2'", "not 'ip'"),
        ({"index": "hnsw"}, [1, 0], "index 'flat'", "not 'hnsw'"),
        ({"model": "m2"}, [1, 0], "model 'm1'", "not 'm2'"),
    ):
        with pytest.raises(BadRequest, match=settled) as caught:
            await own.upsert_embedding("g", vector, space="s", **wanted)  # type: ignore[arg-type]
        assert "'s'" in str(caught.value)
        assert asked in str(caught.value)
    with pytest.raises(BadRequest, match="2 dimensions"):
        await own.set_context("g", vectors={"s": [1]})
    with pytest.raises(NotFound):
        await own.get_context("g", consistency=STRONG)


async def test_many_that_settle_one_space_at_once_agree(own: Memory) -> None:
    outcomes = await asyncio.gather(
        *(own.upsert_embedding(f"e{n}", [1.0] * (2 + n % 2), space="race") for n in range(20)), return_exceptions=True
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert len(refused) == 10
    assert all(isinstance(outcome, BadRequest) for outcome in refused)


async def test_a_vector_that_no_index_can_hold_is_refused_and_not_dropped_later(own: Memory) -> None:
    """Spaces without normalisation keep fp16. What the gateway acknowledged must be found."""
    with pytest.raises(BadRequest, match="65504"):
        await own.upsert_embedding("e", [1e6, 0], space="s", metric="l2")
    await own.upsert_embedding("e", [1e6, 0], space="normalised")
    assert ids(await own.search_embedding([1, 0], space="normalised", consistency=STRONG)) == ["e"]


# ── search_embedding ────────────────────────────────────────────────────────────────────────────────────────────


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def library(mesh: Mesh) -> AsyncIterator[Memory]:
    """100 vectors on a half circle over both shards; `v0` points along x, `v99` almost against it."""
    async with mesh.connect(f"{mesh.tenant()}.ann") as memory:
        angles = np.linspace(0, np.pi * 0.99, 100)
        written = await memory.ingest(
            [
                {
                    "entity_id": f"v{n}",
                    "type": ("even", "odd")[n % 2],
                    "attributes": {"n": n, "third": n % 3 == 0, "name": f"name {n:02}"},
                    "vectors": {"half": [float(np.cos(angle)), float(np.sin(angle))]},
                }
                for n, angle in enumerate(angles)
            ]
        )
        assert written.refused == 0
        await memory.search_embedding([1, 0], space="half", consistency=STRONG)
        yield memory


async def test_the_k_nearest_of_all_shards_best_first(library: Memory) -> None:
    found = await library.search_embedding([1, 0], space="half", k=7)
    assert ids(found) == [f"v{n}" for n in range(7)]
    assert {shard_of(library.tenant, name) for name in ids(found)} == {"s0", "s1"}
    assert found.hits[0].score == pytest.approx(1.0, abs=1e-3)
    assert [hit.score for hit in found.hits] == sorted((hit.score for hit in found.hits), reverse=True)
    assert found.coverage is not None
    assert found.coverage.complete
    assert found.watermark[SITE] > 0
    assert len((await library.search_embedding([1, 0], space="half", k=1000)).hits) == 100


async def test_search_filters_by_type_and_attributes(library: Memory) -> None:
    async def found(**wanted: Any) -> list[str]:
        return ids(await library.search_embedding([1, 0], space="half", k=5, **wanted))

    assert await found(type="odd") == ["v1", "v3", "v5", "v7", "v9"]
    assert await found(type="neither") == []
    assert await found(filter={"n": 42}) == ["v42"]
    assert await found(filter={"n": {"gte": 10, "lt": 13}}) == ["v10", "v11", "v12"]
    assert await found(filter={"third": True, "n": {"gt": 3}}, type="even") == ["v6", "v12", "v18", "v24", "v30"]
    assert await found(filter={"n": {"in": [98, 3, 55]}}) == ["v3", "v55", "v98"]
    assert await found(filter={"name": {"lt": "name 02"}}) == ["v0", "v1"]
    assert await found(filter={"third": {"ne": True}}) == ["v1", "v2", "v4", "v5", "v7"]
    assert await found(filter={"absent": {"exists": False}}) == [f"v{n}" for n in range(5)]
    assert await found(filter={"absent": {"exists": True}}) == []


async def test_search_returns_the_fields_and_vectors_that_are_asked_for(library: Memory) -> None:
    (plain,) = (await library.search_embedding([1, 0], space="half", k=1)).hits
    assert plain.attributes is None
    assert plain.vector is None
    (full,) = (
        await library.search_embedding([1, 0], space="half", k=1, output_fields=["n", "absent"], include_vectors=True)
    ).hits
    assert full.attributes == {"n": 0}
    assert full.vector is not None
    np.testing.assert_allclose(full.vector, [1, 0], atol=1e-3)


@pytest.mark.parametrize(
    ("metric", "order"),
    [("cosine", ["far", "near", "aside"]), ("ip", ["far", "near", "aside"]), ("l2", ["near", "aside", "far"])],
)
async def test_each_metric_has_its_own_order(own: Memory, metric: messages.Metric, order: list[str]) -> None:
    vectors = {"near": [1.0, 0.2], "far": [9.0, 0.0], "aside": [0.0, 1.0]}
    for name, vector in vectors.items():
        await own.upsert_embedding(name, vector, space="s", metric=metric)
    found = await own.search_embedding([1, 0], space="s", consistency=STRONG)
    assert ids(found) == order
    expected = {
        "cosine": lambda v: v[0] / np.hypot(*v),
        "ip": lambda v: v[0],
        "l2": lambda v: -((1 - v[0]) ** 2 + v[1] ** 2),
    }[metric]
    for hit in found.hits:
        assert hit.score == pytest.approx(expected(vectors[hit.entity_id]), abs=1e-2)


async def test_an_unknown_space_is_not_found_by_its_name(own: Memory) -> None:
    with pytest.raises(NotFound, match="'nowhere'"):
        await own.search_embedding([1, 0], space="nowhere")


@pytest.mark.parametrize("shard", ["s0", "s1"])
async def test_a_query_of_the_wrong_dimension_is_a_bad_request_whichever_shard_has_the_space(
    own: Memory, shard: str
) -> None:
    """One shard knows the space and refuses, the other does not know it: that is no partial answer."""
    (name,) = names_on(own.tenant, shard, 1)
    await own.upsert_embedding(name, [1, 0], space="s")
    with pytest.raises(BadRequest, match=r"3 dimensions.*'s' has 2"):
        await own.search_embedding([1, 0, 0], space="s", consistency=STRONG)
    with pytest.raises(BadRequest, match="'like'"):
        await own.search_embedding([1, 0], space="s", filter={"name": {"like": "x"}}, consistency=STRONG)
    found = await own.search_embedding([1, 0], space="s", consistency=STRONG)
    assert ids(found) == [name]
    assert found.coverage is not None
    assert found.coverage.complete


async def test_equal_scores_come_in_the_order_of_their_ids(own: Memory) -> None:
    names = [f"e{n:02}" for n in range(20)]
    await own.ingest([{"entity_id": name, "vectors": {"s": [1, 0]}} for name in reversed(names)])
    assert ids(await own.search_embedding([1, 0], space="s", k=20, consistency=STRONG)) == names


# ── search_text ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_texts_are_found_by_their_words_over_all_shards(own: Memory) -> None:
    texts = {
        "a": "the transformer in the south overheated",
        "b": "a transformer",
        "c": "maintenance of the northern line",
        "d": "Überspannung am Transformer südlich",
    }
    for name, text in texts.items():
        await own.set_context(name, text=text, type="long" if len(text) > 20 else "short")

    async def found(query: str, **wanted: Any) -> list[str]:
        return ids(await own.search_text(query, consistency=STRONG, **wanted))

    assert set(await found("transformer")) == {"a", "b", "d"}
    assert set(await found("TRANSFORMER", type="long")) == {"a", "d"}
    assert await found("überspannung") == ["d"]
    assert len(await found("transformer", k=2)) == 2
    assert await found("nothing like it") == []
    assert await found('"*^():-') == []
    await own.set_context("a", text="all is well")
    assert set(await found("transformer")) == {"b", "d"}
    assert await found("well") == ["a"]
    await own.set_context("b", text="")
    assert await found("transformer") == ["d"]


# ── traverse ────────────────────────────────────────────────────────────────────────────────────────────────────


async def graph(memory: Memory, edges: Mapping[str, Edges]) -> None:
    """Write entities with their edges, and wait until every shard has them."""
    written = await memory.ingest([{"entity_id": name, "edges": list(some)} for name, some in edges.items()])
    assert written.refused == 0
    await memory.traverse("nobody", direction="both", consistency=STRONG)


async def test_a_walk_goes_out_in_or_both_ways_along_the_relations_asked_for(own: Memory) -> None:
    await graph(own, {"a": [edge("b"), edge("c", "other")], "b": [edge("d")], "x": [edge("a")], "d": []})

    async def reached(**how: Any) -> dict[str, int]:
        return depths(await own.traverse("a", **how))

    assert await reached() == {"a": 0, "b": 1, "c": 1}
    assert await reached(depth=2) == {"a": 0, "b": 1, "c": 1, "d": 2}
    assert await reached(depth=64) == {"a": 0, "b": 1, "c": 1, "d": 2}
    assert await reached(relations=["to"], depth=2) == {"a": 0, "b": 1, "d": 2}
    assert await reached(relations=["to", "other"]) == {"a": 0, "b": 1, "c": 1}
    assert await reached(relations=["none"]) == {"a": 0}
    assert await reached(direction="in") == {"a": 0, "x": 1}
    assert await reached(direction="both", depth=2) == {"a": 0, "b": 1, "c": 1, "x": 1, "d": 2}
    assert depths(await own.traverse("d", direction="in", depth=3)) == {"d": 0, "b": 1, "a": 2, "x": 3}


async def test_a_walk_says_how_each_node_was_reached(own: Memory) -> None:
    await graph(own, {"a": [edge("b", "r1")], "b": [edge("c", "r2")]})
    walk = await own.traverse("a", depth=2)
    told = [(node.entity_id, node.depth, node.via, node.relation) for node in walk.nodes]
    assert told == [("a", 0, None, None), ("b", 1, "a", "r1"), ("c", 2, "b", "r2")]
    assert not walk.truncated
    assert walk.coverage.complete
    assert walk.watermark[SITE] > 0


async def test_cycles_self_loops_and_several_starts_reach_each_node_once(own: Memory) -> None:
    await graph(own, {"a": [edge("b"), edge("a")], "b": [edge("c")], "c": [edge("a"), edge("c")], "z": [edge("c")]})
    for direction in ("out", "in", "both"):
        walk = await own.traverse("a", direction=direction, depth=10)  # type: ignore[arg-type]
        assert len(walk.nodes) == len(depths(walk))
        assert {"a", "b", "c"} <= depths(walk).keys()
    assert depths(await own.traverse(["a", "z", "a"], depth=5)) == {"a": 0, "z": 0, "b": 1, "c": 1}
    assert depths(await own.traverse(["a"] * 5, depth=5, limit=3)) == {"a": 0, "b": 1, "c": 2}
    assert not (await own.traverse(["a"] * 5, depth=5, limit=3)).truncated


async def test_an_unknown_start_is_a_walk_that_leads_nowhere(own: Memory) -> None:
    walk = await own.traverse("nobody", direction="both", depth=3)
    assert depths(walk) == {"nobody": 0}
    assert not walk.truncated


async def test_a_limit_keeps_the_nearest_and_says_that_it_cut(own: Memory) -> None:
    await graph(own, {"a": [edge(f"b{n}") for n in range(5)], "b0": [edge("c")]})
    assert depths(await own.traverse("a", depth=2, limit=6)) == {"a": 0} | {f"b{n}": 1 for n in range(5)}
    for limit, truncated in ((1, True), (3, True), (6, True), (7, False), (1000, False)):
        walk = await own.traverse("a", depth=2, limit=limit)
        assert (len(walk.nodes), walk.truncated) == (min(limit, 7), truncated)
    assert (await own.traverse(["x", "y"], limit=1)).truncated


async def test_a_removed_edge_and_one_that_no_longer_holds_are_not_walked(own: Memory) -> None:
    now = datetime.now(UTC)
    await graph(own, {"a": [edge("b"), edge("c")]})
    await own.set_context("a", remove_edges=[edge("b")])
    await own.set_context("a", edges=[edge("d")], valid_to=now - timedelta(days=1), valid_from=now - timedelta(days=2))
    assert depths(await own.traverse("a", consistency=STRONG)) == {"a": 0, "c": 1}
    assert depths(await own.traverse("b", direction="in")) == {"b": 0}
    assert depths(await own.traverse("d", direction="in")) == {"d": 0}


async def test_a_walk_over_thousands_of_nodes_is_the_same_as_one_over_a_dictionary(own: Memory) -> None:
    """A random graph over both shards; frontiers wider than one request to a shard."""
    random = np.random.default_rng(7)
    count = 6000
    out = {f"n{n}": sorted({f"n{t}" for t in random.integers(0, count, 3)}) for n in range(count)}
    names = list(out)
    for start in range(0, count, 1000):
        some = names[start : start + 1000]
        written = await own.ingest([{"entity_id": n, "edges": [edge(t) for t in out[n]]} for n in some], atomic=True)
        assert written.accepted == 1000
    expected = {"n0": 0}
    frontier = ["n0"]
    for depth in range(1, 21):
        frontier = list(dict.fromkeys(t for n in frontier for t in out[n] if t not in expected))
        expected |= dict.fromkeys(frontier, depth)
    walk = await own.traverse("n0", depth=20, limit=100_000, consistency=STRONG)
    assert depths(walk) == expected
    assert not walk.truncated
    assert [node.depth for node in walk.nodes] == sorted(node.depth for node in walk.nodes)
    for node in walk.nodes[1:]:
        assert node.via is not None
        assert node.entity_id in out[node.via]
        assert expected[node.via] == node.depth - 1
    limited = await own.traverse("n0", depth=20, limit=2500)
    assert limited.nodes == walk.nodes[:2500]
    assert limited.truncated


# ── timelines ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_timeline_of_an_entity_is_its_events_in_log_order(own: Memory) -> None:
    day = datetime(2020, 1, 1, tzinfo=UTC)
    first = await own.set_context("e", type="t", attributes={"n": 1}, valid_from=day, valid_to=day + timedelta(days=1))
    await own.set_context("other")
    second = await own.upsert_embedding("e", [1, 0], space="s", message_id="named")
    page = await own.timeline("e", consistency=STRONG)
    assert [event.sequence for event in page.events] == [first.version, second.version]
    assert page.next_after is None
    assert page.watermark[SITE] >= second.version
    event, last = page.events
    assert (event.op, event.entity_id, event.agent) == ("put", "e", "ann")
    assert (event.valid_from, event.valid_to) == (day, day + timedelta(days=1))
    assert event.body == {"type": "t", "attributes": {"n": 1}}
    assert abs(event.recorded_at - datetime.now(UTC)) < timedelta(minutes=1)
    assert last.event_id == f"{own.tenant}.ann.named"
    assert last.body["vectors"] == {"s": {"dimension": 2}}


async def test_an_unknown_entity_has_an_empty_timeline(own: Memory) -> None:
    page = await own.timeline("nobody", consistency=STRONG)
    assert page.events == []
    assert page.next_after is None


async def test_the_timeline_of_an_entity_resumes(own: Memory) -> None:
    versions = [(await own.set_context("e", attributes={"n": n})).version for n in range(10)]
    await own.get_context("e", consistency=STRONG)
    for limit in (1, 3, 5, 10, 11):
        seen: list[int] = []
        after: int | None = 0
        while after is not None:
            page = await own.timeline("e", after=after, limit=limit)
            assert len(page.events) <= limit
            seen += [event.sequence for event in page.events]
            after = page.next_after
        assert seen == versions


@pytest.mark.parametrize("limit", [1, 3, 7, 1000])
async def test_a_range_over_shards_resumes_in_log_order(own: Memory, limit: int) -> None:
    """Long runs of one shard beside the other's: a page that one shard cuts must not be overtaken by the other."""
    runs = [("s0", 9), ("s1", 2), ("s0", 1), ("s1", 12), ("s0", 3)]
    versions = []
    for number, (shard, count) in enumerate(runs):
        for name in names_on(own.tenant, shard, count, f"run{number}."):
            versions.append((await own.set_context(name)).version)
    await own.timeline(limit=1, consistency=STRONG)
    seen: list[int] = []
    after: int | None = 0
    while after is not None:
        page = await own.timeline(after=after, limit=limit)
        assert len(page.events) <= limit
        assert page.coverage is not None
        assert page.coverage.complete
        seen += [event.sequence for event in page.events]
        after = page.next_after
    assert seen == versions


async def test_a_range_is_of_the_times_at_which_events_began_to_hold_and_of_a_type(own: Memory) -> None:
    day = [datetime(2020, 1, n, tzinfo=UTC) for n in range(1, 11)]
    for n in (5, 2, 8, 3):
        await own.set_context(f"e{n}", type=("even", "odd")[n % 2], valid_from=day[n])

    async def found(**wanted: Any) -> list[str]:
        return [event.entity_id for event in (await own.timeline(consistency=STRONG, **wanted)).events]

    assert await found() == ["e5", "e2", "e8", "e3"]
    assert await found(start=day[3], end=day[8]) == ["e5", "e3"]
    assert await found(start=day[3]) == ["e5", "e8", "e3"]
    assert await found(end=day[3]) == ["e2"]
    assert await found(type="even") == ["e2", "e8"]
    assert await found(type="odd", start=day[4]) == ["e5"]
    assert await found(type="none") == []
    with pytest.raises(BadRequest, match="not of both"):
        await own.timeline("e5", start=day[1])


async def test_a_reader_of_a_range_misses_and_repeats_nothing_while_writers_go_on(own: Memory) -> None:
    """The two shards are never at the same place of the log; a page ends where the slower one stands."""
    versions: list[int] = []
    done = asyncio.Event()

    async def write(writer: int) -> None:
        for n in range(150):
            versions.append((await own.set_context(f"w{writer}.{n}")).version)

    async def read() -> list[int]:
        seen: list[int] = []
        last = False
        while not last:
            last = done.is_set()
            page = await own.timeline(after=seen[-1] if seen else 0, limit=7, consistency=STRONG if last else None)
            seen += [event.sequence for event in page.events]
            last = last and page.next_after is None
        return seen

    async with asyncio.TaskGroup() as tasks:
        readers = [tasks.create_task(read()) for _ in range(3)]
        writers = [tasks.create_task(write(n)) for n in range(4)]
        await asyncio.wait(writers)
        done.set()
    for reader in readers:
        assert reader.result() == sorted(versions)


async def test_a_page_never_goes_beyond_the_shard_that_is_behind(mesh: Mesh, own: Memory) -> None:
    """A shard that has not read the log's end yet may still have events before those of the other."""
    (slow,), (fast,) = names_on(own.tenant, "s0", 1), names_on(own.tenant, "s1", 1)
    before = await own.set_context(slow)
    await own.timeline(consistency=STRONG)
    async with mesh.shard("s0").paused():
        hidden = await own.set_context(slow)
        shown = await own.set_context(fast)
        await own.get_context(fast, consistency=Consistency(level="session", token=shown.token))
        page = await own.timeline(limit=2)
        assert [event.sequence for event in page.events] == [before.version]
        assert page.next_after is None
        assert page.watermark[SITE] < hidden.version
    page = await own.timeline(after=before.version, limit=2, consistency=STRONG)
    assert [event.sequence for event in page.events] == [hidden.version, shown.version]


# ── forget ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def log_of(mesh: Mesh, tenant: str, entity_id: str) -> list[dict[str, Any]]:
    """What the stream itself holds of an entity, told by the server."""
    token = to_token(entity_id)
    subject = subjects.log_event(SITE, tenant, partition_of_tokens(tenant, token), token)
    stream = subjects.log_stream(SITE)
    raw = await open_raw(mesh.server, "operator")
    try:
        found: list[dict[str, Any]] = []
        sequence = 1
        while True:
            query = json.dumps({"seq": sequence, "next_by_subj": subject}).encode()
            reply = json.loads((await raw.client.request(f"$JS.API.STREAM.MSG.GET.{stream}", query)).data)
            if "error" in reply:
                return found
            found.append(wire.decode(base64.b64decode(reply["message"]["data"])))
            sequence = reply["message"]["seq"] + 1
    finally:
        await raw.client.close()


async def test_forget_erases_an_entity_from_every_store_and_from_the_log(mesh: Mesh, own: Memory) -> None:
    await own.set_context("e", type="t", attributes={"secret": 1}, edges=[edge("x")], text="unforgettable")
    await own.upsert_embedding("e", [1, 0], space="s")
    await own.upsert_embedding("other", [1, 0], space="s")
    await own.set_context("x", edges=[edge("e")], text="unforgettable too")
    await own.get_context("e", consistency=STRONG)
    assert len(await log_of(mesh, own.tenant, "e")) == 2

    forgotten = await own.forget("e")
    with pytest.raises(NotFound):
        await own.get_context("e", consistency=STRONG)
    with pytest.raises(NotFound):
        await own.get_context("e", include_vectors=True, consistency=STRONG)
    assert ids(await own.search_embedding([1, 0], space="s", consistency=STRONG)) == ["other"]
    assert ids(await own.search_text("unforgettable", consistency=STRONG)) == ["x"]
    assert depths(await own.traverse("e", direction="out")) == {"e": 0}
    assert depths(await own.traverse("x", direction="in")) == {"x": 0}
    assert depths(await own.traverse("x", direction="out")) == {"x": 0, "e": 1}  # x's own memory
    (tombstone,) = (await own.timeline("e", consistency=STRONG)).events
    assert (tombstone.op, tombstone.sequence, tombstone.body) == ("forget", forgotten.version, {})
    assert [event.entity_id for event in (await own.timeline()).events].count("e") == 1
    (left,) = await log_of(mesh, own.tenant, "e")
    assert (left["op"], left["body"]) == ("forget", {})


async def test_a_write_after_a_forget_begins_anew(mesh: Mesh, own: Memory) -> None:
    await own.set_context("e", type="t", attributes={"old": 1}, edges=[edge("x")], text="old")
    forgotten = await own.forget("e")
    await own.set_context("e", attributes={"new": 1}, expected_version=forgotten.version)
    context = await own.get_context("e", consistency=STRONG)
    assert (context.type, context.attributes, context.edges, context.text) == (None, {"new": 1}, [], None)
    assert [event["op"] for event in await log_of(mesh, own.tenant, "e")] == ["forget", "put"]


async def test_what_was_forgotten_does_not_exist_for_a_compare_and_set(own: Memory) -> None:
    """0 means "must not exist"; the tombstone that is left of an entity is nobody's memory."""
    for name in ("e", "f", "g", "h"):
        await own.set_context(name)
        await own.forget(name)
    await own.set_context("e", attributes={"new": 1}, expected_version=0, message_id="m")
    assert (await own.set_context("e", attributes={"new": 1}, expected_version=0, message_id="m")).duplicate
    with pytest.raises(Conflict):
        await own.set_context("e", expected_version=0)
    documents = [{"entity_id": name, "expected_version": 0} for name in ("e", "f")]
    written = await own.ingest(documents)
    assert [error.code for error in written.errors.values()] == ["conflict"]
    with pytest.raises(Conflict, match="'e' is not at version 0"):
        await own.ingest([{"entity_id": name, "expected_version": 0} for name in ("g", "e")], atomic=True)
    await own.ingest([{"entity_id": name, "expected_version": 0} for name in ("g", "h")], atomic=True)
    for name in ("e", "f", "g", "h"):
        assert await own.get_context(name, consistency=STRONG)


async def test_forgetting_what_never_was_and_twice_is_harmless(own: Memory) -> None:
    await own.forget("nobody")
    first = await own.forget("nobody", message_id="m")
    again = await own.forget("nobody", message_id="m")
    assert (again.version, again.duplicate) == (first.version, True)
    with pytest.raises(NotFound):
        await own.get_context("nobody", consistency=STRONG)


# ── ingest ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_each_document_of_an_ingest_is_accepted_or_refused_on_its_own(own: Memory) -> None:
    taken = await own.set_context("taken")
    documents: list[Any] = [
        {"entity_id": "good", "attributes": {"n": 1}},
        {"entity_id": "", "attributes": {}},
        {"entity_id": "unknown field", "atributes": {}},
        5,
        {"entity_id": "bad vector", "vectors": {"s": "!!!"}},
        {"entity_id": "taken", "expected_version": 0},
        messages.Entity(entity_id="a struct", text="hello"),
        {"entity_id": "good", "attributes": {"n": 2}},
        {"entity_id": "bytes", "attributes": {"b": b"raw"}},
        {"attributes": {}},
        {"entity_id": "taken", "expected_version": taken.version, "attributes": {"n": 3}},
    ]
    written = await own.ingest(documents)
    assert {index: (error.entity_id, error.code) for index, error in written.errors.items()} == {
        "1": ("", "bad_request"),
        "2": ("unknown field", "bad_request"),
        "3": ("", "bad_request"),
        "4": ("bad vector", "bad_request"),
        "5": ("taken", "conflict"),
        "8": ("bytes", "bad_request"),
        "9": ("", "bad_request"),
    }
    assert "atributes" in written.errors["2"].message
    assert "vectors" in written.errors["4"].message
    assert "'taken' is not at version 0" in written.errors["5"].message
    assert (written.accepted, written.refused) == (4, 7)
    accepted = [version for version in written.versions if version is not None]
    assert [index for index, version in enumerate(written.versions) if version is None] == [1, 2, 3, 4, 5, 8, 9]
    assert len(set(accepted)) == 4
    assert written.token == {SITE: max(accepted)}
    assert (await own.get_context("good", consistency=STRONG)).attributes == {"n": 2}
    assert (await own.get_context("a struct", consistency=STRONG)).text == "hello"
    assert (await own.get_context("taken", consistency=STRONG)).attributes == {"n": 3}


async def test_an_atomic_ingest_is_all_or_nothing(own: Memory) -> None:
    with pytest.raises(BadRequest, match=r"entity 1.*atributes"):
        await own.ingest([{"entity_id": "a"}, {"entity_id": "b", "atributes": {}}], atomic=True)
    await own.set_context("taken")
    with pytest.raises(Conflict, match="'taken' is not at version 0"):
        await own.ingest([{"entity_id": "a"}, {"entity_id": "taken", "expected_version": 0}], atomic=True)
    with pytest.raises(NotFound):
        await own.get_context("a", consistency=STRONG)
    written = await own.ingest([{"entity_id": name} for name in "abc"], atomic=True)
    first, second, third = (version or 0 for version in written.versions)
    assert (second, third) == (first + 1, first + 2)
    assert written.accepted == 3
    for name in "abc":
        await own.get_context(name, consistency=STRONG)


async def test_an_ingest_of_too_many_or_of_none_is_refused(own: Memory) -> None:
    with pytest.raises(TooLarge, match=r"at most 1000 entities.*1001"):
        await own.ingest([{"entity_id": str(n)} for n in range(1001)], atomic=True)
    with pytest.raises(TooLarge, match=r"at most 10000 entities.*10001"):
        await own.ingest([{"entity_id": str(n)} for n in range(10_001)])
    with pytest.raises(TooLarge, match="8388608 bytes"):
        await own.ingest([{"entity_id": str(n), "text": "x" * 100_000} for n in range(90)])
    with pytest.raises(BadRequest, match="at least one"):
        await own.ingest([])


@pytest.mark.parametrize("atomic", [False, True])
async def test_the_repeat_of_an_ingest_writes_nothing_twice(mesh: Mesh, own: Memory, atomic: bool) -> None:
    documents = [{"entity_id": f"e{n}", "attributes": {"n": n}} for n in range(50)]
    first = await own.ingest(documents, atomic=atomic, message_id="m")
    again = await own.ingest(documents, atomic=atomic, message_id="m")
    assert again.versions == first.versions
    assert again.accepted == 50
    assert len(await log_of(mesh, own.tenant, "e7")) == 1


async def test_the_repeat_of_an_ingest_that_was_taken_in_part_completes_it(own: Memory) -> None:
    documents = [{"entity_id": f"e{n}"} for n in range(20)]
    first = await own.ingest(documents[:10], message_id="m")
    again = await own.ingest(documents, message_id="m")
    assert again.versions[:10] == first.versions
    assert again.accepted == 20
    with pytest.raises(Conflict):
        await own.ingest([*documents, {"entity_id": "new"}], message_id="m", atomic=True)


# ── consistency ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_session_reads_its_own_writes_on_every_shard(own: Memory) -> None:
    token: dict[str, int] = {}
    for n in range(20):
        written = await own.set_context(f"e{n}", text="session", vectors={"s": [1, 0]}, edges=[edge("hub")])
        token = written.token
        session = Consistency(level="session", token=token)
        assert (await own.get_context(f"e{n}", consistency=session)).version == written.version
        assert len((await own.search_text("session", k=50, consistency=session)).hits) == n + 1
        assert len((await own.search_embedding([1, 0], space="s", k=50, consistency=session)).hits) == n + 1
        walk = await own.traverse("hub", direction="in", consistency=session)
        assert len(walk.nodes) == n + 2
        assert walk.watermark[SITE] >= token[SITE]
        assert len((await own.timeline(consistency=session)).events) == n + 1


async def test_a_strong_read_sees_what_others_wrote(mesh: Mesh) -> None:
    async with mesh.connect("acme.alice") as alice, mesh.connect("acme.bob") as bob:
        for n in range(20):
            written = await alice.set_context("shared", attributes={"n": n})
            context = await bob.get_context("shared", consistency=STRONG)
            assert context.attributes == {"n": n}
            assert context.watermark[SITE] >= written.version


ALL_READS = ("get_context", "timeline", "timeline_range", "search_embedding", "search_text", "traverse")


async def read(memory: Memory, name: str, **how: Any) -> Any:
    match name:
        case "get_context":
            return await memory.get_context("e", **how)
        case "timeline":
            return await memory.timeline("e", **how)
        case "timeline_range":
            return await memory.timeline(**how)
        case "search_embedding":
            return await memory.search_embedding([1, 0], space="s", **how)
        case "search_text":
            return await memory.search_text("word", **how)
        case "traverse":
            return await memory.traverse("e", direction="both", **how)


async def test_a_token_from_the_future_is_stale_when_the_budget_ends(own: Memory) -> None:
    await own.set_context("e", vectors={"s": [1, 0]}, text="word")
    await own.search_embedding([1, 0], space="s", consistency=STRONG)
    future = Consistency(level="session", token={SITE: 2**40})

    async def is_stale(name: str) -> None:
        with pytest.raises(Stale, match="did not catch up"):
            await read(own, name, consistency=future, budget_ms=300)

    await asyncio.gather(*(is_stale(name) for name in ALL_READS))


async def test_a_replica_that_cannot_catch_up_is_stale_for_all_but_eventual_reads(mesh: Mesh, own: Memory) -> None:
    await own.set_context("e", vectors={"s": [1, 0]}, text="word")
    for name in ALL_READS:
        await read(own, name, consistency=STRONG)
    async with mesh.shard("s0").paused(), mesh.shard("s1").paused():
        token = (await own.set_context("e", attributes={"n": 1})).token

        for name in ALL_READS:
            assert await read(own, name)
            assert await read(own, name, consistency=Consistency(level="bounded", max_lag_ms=60_000))

        async def stale(name: str) -> None:
            for demand in (
                STRONG,
                Consistency(level="session", token=token),
                Consistency(level="bounded", max_lag_ms=1),
            ):
                with pytest.raises(Stale):
                    await read(own, name, consistency=demand, budget_ms=300)

        await asyncio.gather(*(stale(name) for name in ALL_READS))
        waiting = asyncio.ensure_future(own.get_context("e", consistency=STRONG))
    assert (await waiting).attributes == {"n": 1}


async def test_a_bound_without_a_number_is_a_bad_request(own: Memory) -> None:
    for name in ALL_READS:
        with pytest.raises(BadRequest, match="max_lag_ms"):
            await read(own, name, consistency=Consistency(level="bounded"))


async def test_one_shard_that_is_behind_is_named_by_the_coverage(mesh: Mesh, own: Memory) -> None:
    (ahead,) = names_on(own.tenant, "s1", 1)
    await own.set_context(ahead, text="word")
    async with mesh.shard("s0").paused():
        written = await own.set_context(ahead, text="word two")
        session = Consistency(level="session", token=written.token)
        found = await own.search_text("word", consistency=session, budget_ms=500)
    assert ids(found) == [ahead]
    assert found.coverage is not None
    assert [(missing.shard, missing.partitions, missing.code) for missing in found.coverage.missing] == [
        ("s0", 32, "stale")
    ]


# ── JSON by hand ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_operator_can_do_everything_in_json(mesh: Mesh) -> None:
    tenant = mesh.tenant()
    raw = await open_raw(mesh.server, f"{tenant}.ann")

    async def ask(subject: str, **request: Any) -> dict[str, Any]:
        reply = await ask_raw(raw.client, subject, json.dumps(request).encode() if request else b"{}")
        assert reply.data[:1] == b"{"
        assert code_of(reply) is None, reply.data
        return body_of(reply)

    strong = {"level": "strong"}
    me = tenant, "ann"
    written = await ask(
        subjects.set_context(*me),
        entity_id="e",
        attributes={"n": 1},
        vectors={"s": [0.5, 0.25]},
        edges=[edge("f")],
        text="by hand",
        valid_from="2020-01-01T00:00:00Z",
    )
    assert written["token"] == {SITE: written["version"]}
    context = await ask(subjects.get_context(*me, "e"), include_vectors=True, consistency=strong)
    assert context["attributes"] == {"n": 1}
    assert context["vectors"]["s"] == pytest.approx([0.5, 0.25], abs=1e-3)
    await ask(subjects.upsert_embedding(*me), entity_id="f", space="s", vector=base64_of([0.25, 0.5]))
    found = await ask(
        subjects.search_embedding(*me),
        vector=[0.5, 0.25],
        space="s",
        include_vectors=True,
        output_fields=["n"],
        consistency=strong,
    )
    assert [hit["entity_id"] for hit in found["hits"]] == ["e", "f"]
    assert found["hits"][0]["attributes"] == {"n": 1}
    assert found["coverage"] == {"answered": 64, "total": 64}
    assert [hit["entity_id"] for hit in (await ask(subjects.search_text(*me), query="hand"))["hits"]] == ["e"]
    walk = await ask(subjects.traverse(*me), start="e")
    assert [node["entity_id"] for node in walk["nodes"]] == ["e", "f"]
    (event,) = (await ask(subjects.timeline(*me, "e")))["events"]
    assert datetime.fromisoformat(event["valid_from"]) == datetime(2020, 1, 1, tzinfo=UTC)
    assert len((await ask(subjects.timeline_range(*me), limit=10))["events"]) == 2
    ingested = await ask(subjects.ingest(*me), entities=[{"entity_id": "g"}, {"entity_id": ""}])
    assert (ingested["accepted"], ingested["refused"]) == (1, 1)
    await ask(subjects.forget(*me), entity_id="e")
    reply = await ask_raw(raw.client, subjects.get_context(*me, "e"), json.dumps({"consistency": strong}).encode())
    assert reply.data[:1] == b"{"
    assert code_of(reply) == "not_found"
    reply = await ask_raw(raw.client, subjects.set_context(*me), b'{"entity_id": 5}')
    assert (code_of(reply), reply.data[:1]) == ("bad_request", b"{")
    assert "entity_id" in body_of(reply)["message"]
    await raw.client.close()


# ── coverage ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_without_a_shard_the_others_answer_and_the_coverage_names_it(mesh: Mesh, own: Memory) -> None:
    (here,), (gone,) = names_on(own.tenant, "s0", 1), names_on(own.tenant, "s1", 1)
    for name in (here, gone):
        await own.set_context(name, text="word", vectors={"s": [1, 0]}, edges=[edge("hub")])
    await own.search_embedding([1, 0], space="s", consistency=STRONG)
    async with mesh.without("s1"):
        replies: list[tuple[list[str], messages.Coverage | None]] = []
        for hits in (await own.search_text("word"), await own.search_embedding([1, 0], space="s")):
            replies.append((ids(hits), hits.coverage))
        page = await own.timeline()
        replies.append(([event.entity_id for event in page.events], page.coverage))
        walk = await own.traverse("hub", direction="in")
        replies.append(([node.entity_id for node in walk.nodes if node.depth], walk.coverage))
        for found, coverage in replies:
            assert found == [here]
            assert coverage is not None
            assert not coverage.complete
            assert (coverage.answered, coverage.total) == (32, 64)
            assert [(missing.shard, missing.code) for missing in coverage.missing] == [("s1", "unavailable")]
        assert (await own.get_context(here)).entity_id == here
        with pytest.raises(Unavailable):
            await own.get_context(gone, budget_ms=300)
        await own.set_context(gone, attributes={"written meanwhile": True})
    assert (await own.get_context(gone, consistency=STRONG)).attributes == {"written meanwhile": True}
    again = await own.search_text("word")
    assert again.coverage is not None
    assert again.coverage.complete


async def test_without_any_shard_or_without_the_router_it_is_unavailable(mesh: Mesh, own: Memory) -> None:
    await own.set_context("e", text="word", vectors={"s": [1, 0]})
    await own.search_embedding([1, 0], space="s", consistency=STRONG)
    async with mesh.without("s0", "s1"):
        for name in ALL_READS:
            with pytest.raises(Unavailable):
                await read(own, name, budget_ms=150)
    async with mesh.without("router"):
        for name in ("timeline_range", "search_embedding", "search_text", "traverse"):
            with pytest.raises(Unavailable, match="nobody serves"):
                await read(own, name, budget_ms=150)
        assert await own.get_context("e")
    async with mesh.without("gateway"):
        with pytest.raises(Unavailable, match="nobody serves"):
            await own.set_context("e", budget_ms=150)


# ── tenants and replicas ────────────────────────────────────────────────────────────────────────────────────────


async def test_tenants_see_nothing_of_each_other(mesh: Mesh) -> None:
    one, other = mesh.tenant(), mesh.tenant()
    async with mesh.connect(f"{one}.ann") as ann, mesh.connect(f"{other}.ann") as stranger:
        for name in ("e", "only mine"):
            await ann.set_context(name, attributes={"of": one}, edges=[edge(f"{name}.target")], text="mine")
            await ann.upsert_embedding(name, [1, 0], space="s")
        await stranger.set_context("e", attributes={"of": other}, edges=[edge("theirs")], text="theirs")
        await stranger.upsert_embedding("e", [1, 0, 0], space="s")  # a space of the same name, of another dimension

        assert (await stranger.get_context("e", consistency=STRONG)).attributes == {"of": other}
        with pytest.raises(NotFound):
            await stranger.get_context("only mine", consistency=STRONG)
        assert ids(await stranger.search_embedding([1, 0, 0], space="s", consistency=STRONG)) == ["e"]
        assert ids(await stranger.search_text("mine", consistency=STRONG)) == []
        assert depths(await stranger.traverse("e")) == {"e": 0, "theirs": 1}
        assert depths(await stranger.traverse("only mine", direction="both")) == {"only mine": 0}
        assert {event.entity_id for event in (await stranger.timeline()).events} == {"e"}
        await stranger.forget("e")
        await stranger.forget("only mine")
        assert (await ann.get_context("e", consistency=STRONG)).attributes == {"of": one}
        assert set(ids(await ann.search_embedding([1, 0], space="s", consistency=STRONG))) == {"e", "only mine"}


async def test_two_replicas_answer_alike(mesh: Mesh, own: Memory) -> None:
    random = np.random.default_rng(1)
    for n in range(60):
        await own.set_context(
            f"e{n % 40}",
            type="t",
            attributes={"n": n},
            edges=[edge(f"e{n * 7 % 40}")],
            text=f"word{n % 5} common",
            vectors={"s": random.normal(size=4).tolist()},
        )
    await own.forget("e3")
    await mesh.start("s0b", "s1b")
    try:
        operator = await Asker(await mesh.link("operator")).open()
        for shard in ("s0", "s1"):
            for name in (shard, f"{shard}b"):
                await mesh.shard(name).caught_up()
            payload = wire.encode(messages.Status(digest=True))
            replies = await operator.inbox.gather(subjects.shard_status(shard), payload, most=2, wait_s=10)
            one, other = (wire.decode_as(reply.data, messages.ShardStatus) for reply in replies)
            assert one.digest == other.digest
            assert (one.entities, one.edges, one.vectors) == (other.entities, other.edges, other.vectors)
        await operator.link.close()
        for ask in (
            lambda: own.get_context("e5", include_vectors=True),
            lambda: own.search_embedding([1, 2, 3, 4], space="s", k=20),
            lambda: own.search_text("word1 common", k=20),
            lambda: own.traverse("e1", depth=5),
            lambda: own.timeline(limit=1000),
        ):
            answers = {wire.encode(await ask()) for _ in range(12)}
            assert len(answers) == 1
    finally:
        await mesh.stop("s1b", "s0b")
