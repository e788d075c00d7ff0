"""Views on a whole mesh: the vectors of a space are what the texts of the entities are now, whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio
from mesh import SHARDS, STRONG, Mesh

from cli.view import put_view
from mnemesh import Memory, kv, messages, subjects
from mnemesh.asker import Asker
from mnemesh.embedding import embedder
from mnemesh.errors import BadRequest, Conflict
from mnemesh.event import decode_event
from mnemesh.hashing_embedder import HashingEmbedder
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


async def test_an_attribute_that_is_written_is_found_by_its_text(
    mesh: Mesh, own: Memory, operator: Asker, views: Views
) -> None:
    assert not views.is_at_work, "where there is no view, no lease is renewed"
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
    await mesh.stop("views")
    await own.set_context("n3", attributes={"title": "while away"})
    link = await mesh.link("views")
    asker = await Asker(link).open()
    old = msgspec.structs.replace(place, sequence=0, filled=False)
    await kv.put(asker.inbox, subjects.VIEW_PLACES.name, view.name, msgspec.json.encode(old))
    await link.close()
    await mesh.start("views")
    await settled(mesh, operator, view)
    assert upkeep_of(mesh, view).embedded == 1
    assert is_of(await vector_of(own, "n3"), "title: while away")
    assert len(await derived_in(operator, mesh, own.tenant)) == 21


async def test_of_two_replicas_one_works_and_the_other_takes_over(mesh: Mesh, own: Memory, operator: Asker) -> None:
    view = await set_view(operator, own.tenant)
    await mesh.start("views2")
    one, two = mesh.actors["views"], mesh.actors["views2"]
    assert isinstance(one, Views)
    assert isinstance(two, Views)
    try:
        assert (one.is_at_work, two.is_at_work) == (True, False)
        assert two.gauges() == []
        await own.set_context("n", type="note", attributes={"title": "one"})
        await settled(mesh, operator, view)
        async with mesh.without("views"):
            await until(lambda: two.is_at_work)
            await own.set_context("n", attributes={"title": "two"})
            await settled(mesh, operator, view)
            assert is_of(await vector_of(own, "n"), "title: two")
            assert two.upkeeps[view.name].embedded == 1
    finally:
        await mesh.stop("views2")
    await settled(mesh, operator, view)


async def test_two_that_both_believe_to_have_the_lease_leave_the_newest_text(
    mesh: Mesh, own: Memory, operator: Asker
) -> None:
    view = await set_view(operator, own.tenant)
    await mesh.start("views2")
    other = mesh.actors["views2"]
    assert isinstance(other, Views)
    leading = asyncio.ensure_future(other._lead())
    try:
        await until(lambda: view.name in other.upkeeps)
        for number in range(100):
            await own.set_context(f"n{number % 5}", type="note", attributes={"title": f"text {number}"})
        await settled(mesh, operator, view)
        head = (await stream_state(operator.inbox, subjects.log_stream(mesh.site))).last_sequence

        def has_all() -> bool:
            place = other.upkeeps[view.name]._current()
            return place is not None and place.filled and place.sequence >= head

        await until(has_all)
        await settled(mesh, operator, view)
        for number in range(95, 100):
            assert is_of(await vector_of(own, f"n{number % 5}"), f"title: text {number}")
        assert other.upkeeps[view.name].embedded + upkeep_of(mesh, view).embedded >= 5
    finally:
        leading.cancel()
        await asyncio.wait([leading])
        other.upkeeps = {}
        await mesh.stop("views2")


async def test_a_vector_of_an_older_version_is_refused(mesh: Mesh, own: Memory, operator: Asker) -> None:
    old = await own.set_context("n", type="note", attributes={"title": "old"})
    await own.set_context("n", attributes={"title": "new"})
    link = await mesh.link("views")
    try:
        asker = await Asker(link).open()
        wanted = messages.Derive(
            entity_id="n",
            space="late",
            vector=embedder(EMBEDDER).embed(["old"])[0],
            model=EMBEDDER,
            derived=messages.Derivation(definition="d", attributes=["title"], sites=["hub"]),
            expected_version=old.version,
        )
        with pytest.raises(Conflict, match="is not at version"):
            await asker.ask(subjects.DERIVE, subjects.derive(own.tenant, "late"), wanted)
        wanted = msgspec.structs.replace(wanted, expected_version=old.version + 1)
        subject = subjects.derive(own.tenant, "late")
        first, again = [await asker.ask(subjects.DERIVE, subject, wanted, message_id="m") for _ in range(2)]
        assert (again.version, again.duplicate) == (first.version, True)
    finally:
        await link.close()


async def test_lag_grows_while_nothing_can_be_read_and_falls_to_nothing(
    mesh: Mesh, own: Memory, operator: Asker
) -> None:
    view = await set_view(operator, own.tenant)
    await settled(mesh, operator, view)
    async with mesh.without(*SHARDS):
        await own.set_context("n", type="note", attributes={"title": "one"})
        await own.set_context("n", attributes={"kv": 1})

        def is_behind() -> bool:
            behind = lag(mesh, view)
            return behind is not None and behind[0] >= 2 and behind[1] > 0.05

        await until(is_behind)
    await settled(mesh, operator, view)
    await until(lambda: lag(mesh, view) == (0, 0))
    assert is_of(await vector_of(own, "n"), "title: one")


async def test_an_embedder_that_fails_holds_up_its_own_view_alone(
    mesh: Mesh, own: Memory, operator: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = HashingEmbedder.embed

    def broken(self: HashingEmbedder, texts: list[str]) -> Any:
        if self.dimension == 32:
            raise RuntimeError("no model")
        return made(self, texts)

    monkeypatch.setattr(HashingEmbedder, "embed", broken)
    sick = await set_view(operator, own.tenant, f"sick-{own.tenant}", embedder="hashing:32", space="sick")
    well = await set_view(operator, own.tenant)
    await own.set_context("n", type="note", attributes={"title": "one"})
    await settled(mesh, operator, well)
    assert is_of(await vector_of(own, "n"), "title: one")
    await until(lambda: "no model" in upkeep_of(mesh, sick)._trouble)
    monkeypatch.undo()
    await settled(mesh, operator, sick)
    assert await vector_of(own, "n", "sick") is not None
    assert upkeep_of(mesh, sick)._trouble == ""


async def test_a_view_that_cannot_be_is_refused(mesh: Mesh, own: Memory, operator: Asker) -> None:
    await set_view(operator, own.tenant)
    with pytest.raises(BadRequest, match=f"space 'notes' is that of view 'v-{own.tenant}'"):
        await set_view(operator, own.tenant, "another")
    with pytest.raises(BadRequest, match="there is no tenant 'nobody'"):
        await set_view(operator, "nobody")
    await own.upsert_embedding("n", [1.0, 0.0], space="taken")
    with pytest.raises(BadRequest, match="space 'taken' has vectors of 2 dimensions, made by no embedder"):
        await set_view(operator, own.tenant, "another", space="taken")
