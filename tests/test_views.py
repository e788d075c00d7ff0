"""Views on a whole mesh: the vectors of a space are what the texts of the entities are now, whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from mesh import STRONG, Mesh

from cli.view import put_view
from mnemesh import Memory, kv, subjects
from mnemesh.asker import Asker
from mnemesh.embedding import embedder
from mnemesh.event import decode_event
from mnemesh.jetstream import history_of, stream_state
from services.view import View
from services.views import Views

pytestmark = pytest.mark.asyncio(loop_scope="module")

EMBEDDER = "hashing:64"
PATIENCE_S = 10.0


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def views(mesh: Mesh) -> Views:
    await mesh.start("views")
    actor = mesh.actors["views"]
    assert isinstance(actor, Views)
    return actor


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def operator(mesh: Mesh) -> AsyncIterator[Asker]:
    link = await mesh.link("operator")
    yield await Asker(link).open()
    await link.close()


async def until(holds: Callable[[], Any]) -> None:
    """Wait until something holds, which may be asked asynchronously."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        held = holds()
        if await held if asyncio.iscoroutine(held) else held:
            return
        assert time.monotonic() < deadline, "it does not come to hold"
        await asyncio.sleep(0.01)


async def set_view(operator: Asker, tenant: str, name: str = "", **fields: Any) -> View:
    given: dict[str, Any] = {"type": "note", "attributes": ["title"], "space": "notes", "embedder": EMBEDDER} | fields
    view = View(name=name or f"v-{tenant}", tenant=tenant, **given)
    await put_view(operator.inbox, view)
    return view


def upkeep_of(mesh: Mesh, view: View) -> Any:
    """Whoever is at work on it."""
    for actor in mesh.actors.values():
        if isinstance(actor, Views) and view.name in actor.upkeeps and actor.upkeeps[view.name].view == view:
            return actor.upkeeps[view.name]
    return None


def lag(mesh: Mesh, view: View) -> tuple[float, float] | None:
    upkeep = upkeep_of(mesh, view)
    if upkeep is None:
        return None
    gauges = {gauge.name: gauge.read() for gauge in upkeep.gauges()}
    return gauges["view_lag_events"], gauges["view_lag_seconds"]


async def settled(mesh: Mesh, operator: Asker, view: View) -> None:
    """Wait until the view has all that the log holds by now."""
    head = (await stream_state(operator.inbox, subjects.log_stream(mesh.site))).last_sequence

    def is_settled() -> bool:
        upkeep = upkeep_of(mesh, view)
        place = upkeep and upkeep._current()
        return bool(place and place.filled and place.sequence >= head)

    await until(is_settled)


async def vector_of(memory: Memory, entity_id: str, space: str = "notes") -> Any:
    context = await memory.get_context(entity_id, include_vectors=True, consistency=STRONG)
    return (context.vectors or {}).get(space)


def is_of(vector: Any, text: str) -> bool:
    return vector is not None and bool(np.allclose(vector, embedder(EMBEDDER).embed([text])[0], atol=2e-3))


async def derived_in(operator: Asker, mesh: Mesh, tenant: str) -> list[Any]:
    """The events of a tenant's views in the log."""
    log = subjects.log_stream(mesh.site)
    head = (await stream_state(operator.inbox, log)).last_sequence
    stored = await history_of(operator.inbox, log, subjects.log_event("*", tenant, "*", "*"), upto=head)
    events = [decode_event(each.message.data) for each in stored]
    return [event for event in events if event.agent.startswith("view:")]


async def test_an_attribute_that_is_written_is_found_by_its_text(mesh: Mesh, own: Memory, operator: Asker) -> None:
    view = await set_view(operator, own.tenant)
    await own.set_context("n1", type="note", attributes={"title": "a transformer is hot"})
    await own.set_context("n2", type="note", attributes={"title": "lunch at noon"})
    await settled(mesh, operator, view)
    (question,) = embedder(EMBEDDER).embed(["hot transformers"])
    hits = await own.search_embedding(question, space="notes", k=2, consistency=STRONG)
    assert [hit.entity_id for hit in hits.hits] == ["n1", "n2"]
    assert is_of(await vector_of(own, "n1"), "title: a transformer is hot")


async def test_an_unrelated_change_embeds_nothing_and_the_same_text_neither(
    mesh: Mesh, own: Memory, operator: Asker
) -> None:
    view = await set_view(operator, own.tenant)
    await own.set_context("n", type="note", attributes={"title": "one"})
    await own.set_context("other", type="bus", attributes={"title": "not a note"})
    await settled(mesh, operator, view)
    upkeep = upkeep_of(mesh, view)
    assert upkeep.embedded == 1
    await own.set_context("n", attributes={"kv": 20}, text="of no view")
    await own.set_context("n", attributes={"title": "one"})
    await settled(mesh, operator, view)
    assert upkeep.embedded == 1
    assert len(await derived_in(operator, mesh, own.tenant)) == 1
    assert await vector_of(own, "other") is None


async def test_a_vector_goes_with_its_text_its_type_or_its_entity(mesh: Mesh, own: Memory, operator: Asker) -> None:
    view = await set_view(operator, own.tenant)
    for entity_id in ("text", "type", "entity"):
        await own.set_context(entity_id, type="note", attributes={"title": entity_id})
    await settled(mesh, operator, view)
    assert all([is_of(await vector_of(own, each), f"title: {each}") for each in ("text", "type", "entity")])
    await own.set_context("text", attributes={"title": None})
    await own.set_context("type", type="letter")
    forgotten = await own.forget("entity")
    await settled(mesh, operator, view)
    assert await vector_of(own, "text") is None
    assert await vector_of(own, "type") is None
    found = await own.search_embedding([1.0] * 64, space="notes", consistency=STRONG)
    assert found.hits == []
    await own.set_context("type", type="note")
    await own.set_context("entity", type="note", attributes={"title": "again"})
    await settled(mesh, operator, view)
    assert is_of(await vector_of(own, "type"), "title: type")
    assert is_of(await vector_of(own, "entity"), "title: again")
    of_entity = [event for event in await derived_in(operator, mesh, own.tenant) if event.entity_id == "entity"]
    assert len(of_entity) == 1, f"what was made before {forgotten.version} is erased"


async def test_vectors_land_in_the_order_of_the_changes_and_the_newest_wins(
    mesh: Mesh, own: Memory, operator: Asker
) -> None:
    view = await set_view(operator, own.tenant)
    texts = [f"title: text {number}" for number in range(60)]
    for number in range(60):
        await asyncio.gather(
            *(own.set_context(each, type="note", attributes={"title": f"text {number}"}) for each in ("a", "b"))
        )
    await settled(mesh, operator, view)
    known = embedder(EMBEDDER).embed(texts)
    for each in ("a", "b"):
        assert is_of(await vector_of(own, each), texts[-1])
        events = [event for event in await derived_in(operator, mesh, own.tenant) if event.entity_id == each]
        order = [int(np.argmax(known @ event.body["vectors"]["notes"])) for event in events]
        assert order == sorted(order)
        assert order[-1] == 59


async def test_what_others_write_into_the_space_of_a_view_is_mended(mesh: Mesh, own: Memory, operator: Asker) -> None:
    view = await set_view(operator, own.tenant)
    await own.set_context("n", type="note", attributes={"title": "mine"})
    await settled(mesh, operator, view)
    await own.upsert_embedding("n", [1.0] + [0.0] * 63, space="notes")
    await settled(mesh, operator, view)
    assert is_of(await vector_of(own, "n"), "title: mine")
    await own.set_context("n", remove_vectors=["notes"])
    await settled(mesh, operator, view)
    assert is_of(await vector_of(own, "n"), "title: mine")


async def test_a_view_is_filled_from_what_is_there_and_anew_when_it_is_changed(
    mesh: Mesh, own: Memory, operator: Asker
) -> None:
    ids = [f"n{number}" for number in range(300)]
    await own.ingest([{"entity_id": each, "type": "note", "attributes": {"title": each, "body": "b"}} for each in ids])
    await own.ingest([{"entity_id": f"x{each}", "type": "other", "attributes": {"title": each}} for each in ids[:9]])
    view = await set_view(operator, own.tenant)
    await settled(mesh, operator, view)
    assert upkeep_of(mesh, view).embedded == 300
    assert is_of(await vector_of(own, "n299"), "title: n299")
    changed = await set_view(operator, own.tenant, attributes=["title", "body"], template="{body} {{{title}}}")
    await settled(mesh, operator, changed)
    assert upkeep_of(mesh, changed).embedded == 300
    assert is_of(await vector_of(own, "n7"), "b {n7}")


async def test_a_restart_goes_on_where_it_was_and_makes_nothing_again(mesh: Mesh, own: Memory, operator: Asker) -> None:
    view = await set_view(operator, own.tenant)
    for number in range(20):
        await own.set_context(f"n{number}", type="note", attributes={"title": f"text {number}"})
    await settled(mesh, operator, view)
    # As after a kill: the place that was kept is that from before all of it.
    place = upkeep_of(mesh, view)._current()
    (first, *_) = await derived_in(operator, mesh, own.tenant)
    await mesh.stop("views")
    await own.set_context("n3", attributes={"title": "while away"})
    link = await mesh.link("views")
    asker = await Asker(link).open()
    old = type(place)(
        definition=place.definition, incarnation=place.incarnation, sequence=0, filled=False, since_ms=place.since_ms
    )
    await kv.put(asker.inbox, subjects.VIEW_PLACES.name, view.name, __import__("msgspec").json.encode(old))
    await link.close()
    await mesh.start("views")
    await settled(mesh, operator, view)
    assert upkeep_of(mesh, view).embedded == 1
    assert is_of(await vector_of(own, "n3"), "title: while away")
    assert len(await derived_in(operator, mesh, own.tenant)) == 21
    assert first.id == (await derived_in(operator, mesh, own.tenant))[0].id
