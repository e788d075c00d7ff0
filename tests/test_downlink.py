"""What a device wants of its hub's memory comes to it, whole and once; what it lacks it never calls nothing."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sites import TENANT, HubSite, alice_at, current, device, since, status_of
from test_erasure import logged, until_logged

from bench.cable import Cable
from cli.edge_node import EdgeNode
from cli.operator import asking
from edge import downlink
from edge.downlink import Downlink
from mnemesh import Memory, messages, subjects
from mnemesh.connection import Link
from mnemesh.errors import NotFound, Timeout, Unavailable
from mnemesh.follower import StreamShrank
from mnemesh.ids import to_token
from mnemesh.inbox import Inbox
from mnemesh.jetstream import Stored, api
from mnemesh.messages import Interest, Want
from mnemesh.origin import Mark
from router.inventory import Inventory
from services import feed
from services.feed import Feed
from services.log_tail import MOST_READ, LogTail
from services.roster import Key

LONG_MS = 30_000


def wants(*wanted: dict[str, Any], **limits: int) -> Interest:
    return Interest(wants=[Want(tenant=TENANT, **want) for want in wanted], **limits)


async def held(memory: Memory, node: EdgeNode, entity_ids: list[str]) -> list[str]:
    """Which of these the device holds itself: its hub is out of reach."""
    found = []
    for entity_id in entity_ids:
        with contextlib.suppress(Unavailable):
            await memory.get_context(entity_id, budget_ms=3000)
            found.append(entity_id)
    return found


async def messages_of_hub(node: EdgeNode) -> dict[str, int]:
    """How many messages the device's log has of each subject of the hub, by the last token: the entity's, or `mark`."""
    operator = await Link.open(node.server.credentials.load("operator").link_options())
    inbox = Inbox(operator)
    await inbox.open()
    kept = await api(inbox, f"STREAM.INFO.{subjects.log_stream('sub7')}", {"subjects_filter": ">"})
    await operator.close()
    counts = kept["state"]["subjects"]
    return {subject.rpartition(".")[2]: count for subject, count in counts.items() if ".log.hub." in subject}


async def test_what_is_wanted_by_type_is_there_with_the_hub_out_of_reach(tmp_path: Path) -> None:
    hub = HubSite(tmp_path / "hub")
    async with contextlib.AsyncExitStack() as stack:
        async with hub.up(), alice_at(hub.server) as there:
            await there.set_context("w:1", type="weather", attributes={"t": 1}, text="rain", vectors={"v": [1.0, 0.0]})
            await there.set_context("x:1", type="other", attributes={"t": 1})
            node = await stack.enter_async_context(device(hub, tmp_path / "d", interest=wants({"types": ["weather"]})))
            here = await stack.enter_async_context(alice_at(node.server))
            await current(node)
            written = await there.set_context("w:2", type="weather", attributes={"t": 2})
            later = await there.set_context("w:1", attributes={"t": 3})
            assert (await here.get_context("w:2", consistency=since(written), budget_ms=LONG_MS)).attributes == {"t": 2}
            found = await here.get_context("w:1", consistency=since(later), budget_ms=LONG_MS)
            assert (found.attributes, found.text, found.complete) == ({"t": 3}, "rain", True)
            assert (await here.get_context("x:1")).attributes == {"t": 1}  # of the hub
        while (await status_of(node)).linked:
            pass
        assert (await here.get_context("w:1")).attributes == {"t": 3}
        hits = await here.search_embedding([1.0, 0.0], space="v")
        assert [hit.entity_id for hit in hits.hits] == ["w:1"]
        with pytest.raises(Unavailable, match="not held here"):
            await here.get_context("x:1")
        with pytest.raises(Unavailable, match="not held here"):
            await here.get_context("nobody")


async def test_a_neighbourhood_grows_with_its_edges_and_brings_the_history_of_whoever_joins(
    hub: HubSite, tmp_path: Path
) -> None:
    async with alice_at(hub.server) as there:
        for n in range(3):
            await there.set_context("far", attributes={"n": n})
        await there.set_context("near", attributes={"n": 1})
        await there.set_context("sub:7", type="substation", edges=[{"relation": "feeds", "target_id": "near"}])
        interest = wants({"entities": ["sub:7"], "hops": 2})
        async with device(hub, tmp_path / "d", interest=interest) as node, alice_at(node.server) as here:
            await current(node)
            assert len((await here.timeline("near")).events) == 1
            written = await there.set_context("near", edges=[{"relation": "feeds", "target_id": "far"}])
            await here.get_context("near", consistency=since(written), budget_ms=LONG_MS)
            written = await there.set_context("far", attributes={"n": 3})
            found = await here.get_context("far", consistency=since(written), budget_ms=LONG_MS)
            assert found.attributes == {"n": 3}
            assert [event.body["attributes"]["n"] for event in (await here.timeline("far")).events] == [0, 1, 2, 3]
            walked = await here.traverse("sub:7", depth=2)
            assert [node.entity_id for node in walked.nodes] == ["sub:7", "near", "far"]


async def test_a_neighbourhood_is_the_hubs_alone_whatever_other_devices_are_out_of_reach(
    hub: HubSite, tmp_path: Path
) -> None:
    cable = Cable(hub.options.leaf_port)
    async with (
        cable.laid() as port,
        device(hub, tmp_path / "a", name="a", line=f"nats://127.0.0.1:{port}") as one,
        alice_at(hub.server) as there,
    ):
        while not (await status_of(one)).linked:
            pass
        await there.set_context("sub:7", edges=[{"relation": "feeds", "target_id": "near"}])
        written = await there.set_context("near", attributes={"n": 1})
        while not (await there.traverse("sub:7")).coverage.sites:
            pass
        cable.cut()
        while (await there.traverse("sub:7")).coverage.complete:
            pass
        interest = wants({"entities": ["sub:7"], "hops": 1})
        async with device(hub, tmp_path / "b", name="b", interest=interest) as node, alice_at(node.server) as here:
            async with asyncio.timeout(30):
                await current(node)
            walked = await here.traverse("sub:7", scope="here", consistency=since(written), budget_ms=LONG_MS)
            assert [found.entity_id for found in walked.nodes] == ["sub:7", "near"]


async def test_what_a_device_wrote_itself_comes_back_neither_twice_nor_at_all(hub: HubSite, tmp_path: Path) -> None:
    async with (
        device(hub, tmp_path / "d", interest=wants({})) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        for n in range(5):
            written = await here.set_context("t:1", attributes={"here": n})
        await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        written = await there.set_context("t:1", attributes={"there": 1})
        found = await here.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        assert found.attributes == {"here": 4, "there": 1}
        assert len((await here.timeline("t:1", consistency=since(written), budget_ms=LONG_MS)).events) == 6
        assert len((await there.timeline("t:1")).events) == 6


async def test_what_was_forgotten_stays_held_when_the_feed_opens_anew(tmp_path: Path) -> None:
    hub = HubSite(tmp_path / "hub")
    async with contextlib.AsyncExitStack() as stack:
        async with hub.up(), alice_at(hub.server) as there:
            await there.set_context("w:1", type="weather", attributes={"t": 1})
            await there.set_context("w:2", type="weather", attributes={"t": 1})
            interest = wants({"types": ["weather"]})
            async with device(hub, tmp_path / "d", interest=interest) as node:
                await current(node)
                await there.forget("w:1")
                await current(node)
            node = await stack.enter_async_context(device(hub, tmp_path / "d", interest=interest))
            here = await stack.enter_async_context(alice_at(node.server))
            written = await there.set_context("w:2", attributes={"t": 2})
            await here.get_context("w:2", consistency=since(written), budget_ms=LONG_MS)
        while (await status_of(node)).linked:
            pass
        with pytest.raises(NotFound):
            await here.get_context("w:1")


async def test_two_devices_hear_of_each_other_by_way_of_the_hub(hub: HubSite, tmp_path: Path) -> None:
    async with (
        device(hub, tmp_path / "a", name="a", interest=wants({})) as one,
        device(hub, tmp_path / "b", name="b", interest=wants({})) as other,
        alice_at(one.server) as at_one,
        alice_at(other.server) as at_other,
    ):
        written = await at_one.set_context("t:1", attributes={"n": 1}, vectors={"v": [1.0, 2.0]})
        found = await at_other.get_context("t:1", consistency=since(written), budget_ms=LONG_MS, include_vectors=True)
        assert found.attributes == {"n": 1}
        assert found.watermark["a"] >= written.token["a"]
        assert np.allclose((found.vectors or {})["v"], [1.0, 2.0], atol=1e-2)
        written = await at_other.set_context("t:1", attributes={"n": 2})
        found = await at_one.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        assert found.attributes == {"n": 2}  # its clock never falls behind what it has heard


@pytest.mark.parametrize("limits", [{"most_entities": 3}, {"most_bytes": 3 * 1400}])
async def test_what_does_not_fit_is_evicted_the_one_that_has_not_changed_for_longest_first(
    tmp_path: Path, limits: dict[str, int]
) -> None:
    hub = HubSite(tmp_path / "hub")
    filler = "x" * 1000
    names = [f"w:{n}" for n in range(6)]
    async with contextlib.AsyncExitStack() as stack:
        async with hub.up(), alice_at(hub.server) as there:
            for name in names[:4]:
                await there.set_context(name, type="weather", attributes={"filler": filler})
            node = await stack.enter_async_context(
                device(hub, tmp_path / "d", interest=wants({"entities": ["w:0"]}, {"types": ["weather"]}, **limits))
            )
            here = await stack.enter_async_context(alice_at(node.server))
            await current(node)
            for name in names[4:]:
                written = await there.set_context(name, type="weather", attributes={"filler": filler})
                await here.get_context(name, consistency=since(written), budget_ms=LONG_MS)
            while (await status_of(node)).downlinked < written.token["hub"]:
                pass
            await here.set_context("own", attributes={"filler": filler})
            operator = await Link.open(node.server.credentials.load("operator").link_options())
            inbox = Inbox(operator)
            await inbox.open()
        while (await status_of(node)).linked:
            pass
        assert await held(here, node, [*names, "own"]) == ["w:0", "w:4", "w:5", "own"]
        kept = await api(inbox, f"STREAM.INFO.{subjects.log_stream('sub7')}", {"subjects_filter": ">"})
        of_weather = [name for name in kept["state"]["subjects"] if ".holding." not in name and ".w=3A" in name]
        assert sorted(name[-1] for name in of_weather) == ["0", "4", "5"]
        await operator.close()


async def test_an_entity_that_only_this_device_wrote_is_answered_and_said_to_be_maybe_not_all(tmp_path: Path) -> None:
    hub = HubSite(tmp_path / "hub")
    async with contextlib.AsyncExitStack() as stack:
        async with hub.up(), alice_at(hub.server) as there:
            node = await stack.enter_async_context(device(hub, tmp_path / "d"))
            here = await stack.enter_async_context(alice_at(node.server))
            written = await here.set_context("t:1", attributes={"here": 1})
            await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
            await there.set_context("t:1", attributes={"there": 1})
            found = await here.get_context("t:1")
            assert (found.attributes, found.complete) == ({"here": 1, "there": 1}, True)
        while (await status_of(node)).linked:
            pass
        found = await here.get_context("t:1")
        assert (found.attributes, found.complete) == ({"here": 1}, False)


async def test_other_wants_let_go_of_what_was_held_and_bring_what_was_not(hub: HubSite, tmp_path: Path) -> None:
    async with alice_at(hub.server) as there:
        for n in range(3):
            await there.set_context("w:1", type="weather", attributes={"n": n})
            await there.set_context("p:1", type="price", attributes={"n": n})
        for kind, name, other in (("weather", "w:1", "p:1"), ("price", "p:1", "w:1"), ("weather", "w:1", "p:1")):
            cable = Cable(hub.options.leaf_port)
            async with (
                cable.laid() as port,
                device(hub, tmp_path / "d", interest=wants({"types": [kind]}), line=f"nats://127.0.0.1:{port}") as node,
                alice_at(node.server) as here,
            ):
                await current(node)
                assert len((await here.timeline(name)).events) == 3
                cable.cut()
                cable.drop()
                while (await status_of(node)).linked:
                    pass
                assert await held(here, node, [name, other]) == [name]


async def test_what_the_hub_forgets_a_device_forgets_that_held_it_or_wrote_it(hub: HubSite, tmp_path: Path) -> None:
    async with (
        device(hub, tmp_path / "d", interest=wants({"types": ["weather"]})) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        held = await there.set_context("w:1", type="weather", attributes={"n": 1}, vectors={"v": [1.0]})
        await here.get_context("w:1", consistency=since(held), budget_ms=LONG_MS)
        wrote = await here.set_context("own", attributes={"n": 1}, vectors={"v": [1.0]})
        await there.get_context("own", consistency=since(wrote), budget_ms=LONG_MS)
        for name in ("w:1", "own"):
            forgotten = await there.forget(name)
            with pytest.raises(NotFound):
                await here.get_context(name, consistency=since(forgotten), budget_ms=LONG_MS)
        assert (await here.search_embedding([1.0], space="v", consistency=since(forgotten))).hits == []


async def test_an_opening_whose_answer_is_lost_is_soon_tried_again(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Feed.open
    lost = [asyncio.Event()]

    async def open(feed: Feed) -> None:
        if lost:
            await lost.pop().wait()
        await opened(feed)

    monkeypatch.setattr(Feed, "open", open)
    async with device(hub, tmp_path / "d", interest=wants({})) as node, asyncio.timeout(30):
        await current(node)
    assert not lost


async def test_a_feed_whose_reading_of_the_log_failed_reads_on_from_there(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = LogTail.batches
    begun: list[int] = []

    async def once(self: LogTail, after: int, incarnation: str) -> AsyncGenerator[list[Stored], None]:
        begun.append(after)
        async with contextlib.aclosing(batches(self, after, incarnation)) as some:
            async for batch in some:
                yield batch
                if len(begun) == 1:
                    raise Unavailable("the server was killed")

    monkeypatch.setattr(LogTail, "batches", once)
    async with alice_at(hub.server) as there:
        first = await there.set_context("w:1", attributes={"n": 1})
        async with device(hub, tmp_path / "d", interest=wants({})) as node, asyncio.timeout(30):
            await current(node)
            written = await there.set_context("w:1", attributes={"n": 2})
            while (await status_of(node)).downlinked < written.token["hub"]:
                pass
            assert (await messages_of_hub(node))[to_token("w:1")] == 2
    assert begun[0] < first.token["hub"] <= begun[1]


async def test_a_history_is_sent_once_though_the_next_one_is_cut_off(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = Feed._history
    asked: list[Key] = []

    async def once(self: Feed, key: Key, upto: int) -> list[Stored]:
        asked.append(key)
        if len(asked) == 2:
            raise Timeout("the budget was spent")
        return await history(self, key, upto)

    monkeypatch.setattr(Feed, "_history", once)
    names = ["w:1", "w:2"]
    async with alice_at(hub.server) as there:
        await there.ingest([{"entity_id": name, "type": "other", "attributes": {"n": 1}} for name in names])
        async with device(hub, tmp_path / "d", interest=wants({"types": ["weather"]})) as node:
            await current(node)
            written = await there.ingest([{"entity_id": name, "type": "weather"} for name in names])
            while (await status_of(node)).downlinked < written.token["hub"]:
                pass
            counts = await messages_of_hub(node)
    assert [name for _, name in asked] == ["w:1", "w:2", "w:2"]
    assert [counts[to_token(name)] for name in names] == [2, 2]


async def test_where_many_entities_are_lacking_the_log_is_read_again_for_these_alone(
    hub: HubSite, tmp_path: Path
) -> None:
    names = [f"w:{number}" for number in range(50)]
    async with alice_at(hub.server) as there:
        await there.set_context("before", attributes={"n": 1})
        for n in range(3):
            await there.ingest([{"entity_id": name, "type": "weather", "attributes": {"n": n}} for name in names])
        async with device(hub, tmp_path / "d", interest=wants({"entities": ["before"]})) as node:
            await current(node)
        interest = wants({"entities": ["before"]}, {"types": ["weather"]})
        async with device(hub, tmp_path / "d", interest=interest) as node, alice_at(node.server) as here:
            await current(node)
            written = await there.set_context("w:0", attributes={"n": 3})
            await here.get_context("w:0", consistency=since(written), budget_ms=LONG_MS)
            for name in names:
                page = await here.timeline(name, consistency=since(written), budget_ms=LONG_MS)
                assert page.complete
                told = [event.body["attributes"]["n"] for event in page.events]
                assert told == ([0, 1, 2, 3] if name == "w:0" else [0, 1, 2])
            counts = await messages_of_hub(node)
            assert sorted(counts.values()) == [1, 1, *[3] * 49, 4]  # the mark, what was held before, and the others


async def test_what_was_begun_goes_on_though_the_hub_lost_the_feed(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each entity is written at both ends of the log, so that none is held when the feed is lost."""
    names = [f"w:{number}" for number in range(50)]
    filling = [{"entity_id": f"f:{number}", "type": "weather", "text": "x" * 2000} for number in range(2000)]
    lost: list[int] = []
    follow = Feed.next

    async def next(self: Feed, turn: int, most_bytes: int, wait_s: float) -> messages.FeedBatch:
        if turn == 4 and len(lost) < 2:
            lost.append(self.place)
            raise StreamShrank("the hub was restarted")
        return await follow(self, turn, most_bytes, wait_s)

    monkeypatch.setattr(Feed, "next", next)
    async with alice_at(hub.server) as there:
        ends = [[{"entity_id": name, "type": "weather", "attributes": {"n": n}} for name in names] for n in range(2)]
        await there.ingest(ends[0])
        for start in range(0, len(filling), 100):
            await there.ingest(filling[start : start + 100])
        written = await there.ingest(ends[1])
        async with device(hub, tmp_path / "d", interest=wants({"types": ["weather"]})) as node:
            await current(node)
            assert 0 < lost[0] < lost[1] < 2050
            counts = await messages_of_hub(node)
            assert [counts[to_token(name)] for name in names] == [2] * 50
            assert sum(counts.values()) <= 2101 + 2 * MOST_READ  # what was sent beyond the mark comes again
            async with alice_at(node.server) as here:
                for name in names:
                    assert (await here.timeline(name, consistency=since(written), budget_ms=LONG_MS)).complete


async def test_what_came_in_part_is_released_once_it_is_not_wanted(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Downlink._keep
    kept: list[messages.FeedBatch] = []
    has_some = asyncio.Event()

    async def part(self: Downlink, batch: messages.FeedBatch) -> None:
        await keep(self, batch)
        if batch.items:  # the log may be slow to read
            kept.append(batch)
        if len(kept) == 2:
            has_some.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(downlink, "NextFeed", partial(messages.NextFeed, most_bytes=1024))
    async with alice_at(hub.server) as there:
        await there.ingest([{"entity_id": "long", "type": "weather", "text": f"{n} " * 900} for n in range(9)])
        with monkeypatch.context() as patched:
            patched.setattr(Downlink, "_keep", part)
            async with device(hub, tmp_path / "d", interest=wants({"types": ["weather"]})) as node:
                await has_some.wait()
                assert (await messages_of_hub(node))[to_token("long")] == 2
        async with device(hub, tmp_path / "d", interest=wants({"types": ["other"]})) as node:
            await current(node)
            assert to_token("long") not in await messages_of_hub(node)


async def test_what_was_released_is_purged_though_the_device_was_interrupted_before(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    purge = Downlink._purge
    interrupted: list[tuple[str, str]] = []

    async def once(self: Downlink, released: Mapping[tuple[str, str], int]) -> None:
        if released and not interrupted:
            interrupted.extend(released)
            raise Timeout("the server was killed")
        await purge(self, released)

    monkeypatch.setattr(Downlink, "_purge", once)
    async with alice_at(hub.server) as there:
        await there.set_context("w:1", type="weather", attributes={"n": 1})
        async with device(hub, tmp_path / "d", interest=wants({"types": ["weather"]})) as node:
            await current(node)
            assert to_token("w:1") in await messages_of_hub(node)
        async with device(hub, tmp_path / "d", interest=wants({"types": ["other"]})) as node:
            await current(node)
            assert to_token("w:1") not in await messages_of_hub(node)
    assert interrupted == [(TENANT, "w:1")]


@pytest.mark.parametrize("interrupted", [False, True])
async def test_what_was_released_is_purged_though_an_agent_writes_to_it_before(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    purge = Downlink._purge
    wrote: list[tuple[str, str]] = []

    async def late(self: Downlink, released: Mapping[tuple[str, str], int]) -> None:
        if released and not wrote:
            wrote.extend(released)
            async with alice_at(node.server) as here:
                await here.set_context("w:1", attributes={"m": 1})
            if interrupted:
                raise Timeout("the server was killed")
        await purge(self, released)

    monkeypatch.setattr(Downlink, "_purge", late)
    async with alice_at(hub.server) as there:
        await there.set_context("w:1", type="weather", attributes={"n": 1})
        async with device(hub, tmp_path / "d", interest=wants({"types": ["weather"]})) as node:
            await current(node)
        async with device(hub, tmp_path / "d", interest=wants({"types": ["other"]})) as node:
            await current(node)
            assert wrote == [(TENANT, "w:1")]
            assert await logged(node.options.server, to_token("w:1")) == ["put sub7"]


async def test_what_is_purged_is_asked_about_at_once_and_not_again_when_the_line_comes_back(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []
    purged: list[str] = []
    describe, follow = Inventory.describe, Downlink._next
    broken, back = asyncio.Event(), asyncio.Event()

    async def noted(
        self: Inventory, tenant: str, entity_ids: Sequence[str], *, upto: int
    ) -> dict[str, messages.Description]:
        if self._name == "edge":
            asked.append(entity_ids)
        return await describe(self, tenant, entity_ids, upto=upto)

    async def counted(inbox: Inbox, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        purged.append(body["filter"])
        return await api(inbox, verb, body)

    async def next(self: Downlink) -> messages.FeedBatch:
        if broken.is_set():
            back.set()
        elif purged:
            broken.set()
            raise Timeout("the line broke")
        return await follow(self)

    monkeypatch.setattr(Inventory, "describe", noted)
    monkeypatch.setattr(downlink, "api", counted)
    monkeypatch.setattr(Downlink, "_next", next)
    async with alice_at(hub.server) as there:
        await there.ingest([{"entity_id": f"w:{n}", "type": "weather"} for n in range(9)])
        async with device(hub, tmp_path / "d", interest=wants({"types": ["weather"]})) as node:
            await current(node)
        async with device(hub, tmp_path / "d", interest=wants({"types": ["other"]})):
            await back.wait()
    assert (len(asked), len(purged)) == (1, 9)


async def test_a_feed_that_released_much_ends_and_the_next_one_knows_what_of_it_the_device_kept(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Feed] = []
    open_feed = Feed.open

    async def noted(self: Feed) -> None:
        await open_feed(self)
        opened.append(self)

    monkeypatch.setattr(Feed, "open", noted)
    monkeypatch.setattr(feed, "MOST_LET_GO", 2)
    interest = wants({"types": ["weather"]}, most_entities=1)
    shut = "version: 1\notherwise: nothing\n"
    async with (
        device(hub, tmp_path / "d", interest=interest, policy=shut) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        for n in range(9):
            written = await there.set_context(f"w:{n}", type="weather", attributes={"n": n})
            while (await status_of(node)).downlinked < written.token["hub"]:
                pass
            if not n:
                await here.set_context("w:0", attributes={"m": 1})
        assert await logged(node.options.server, to_token("w:0")) == ["put hub", "put sub7"]
        assert await logged(node.options.server, to_token("w:7")) == []
        # What was kept, what an opening released, and three more.
        assert max(len(each._let_go) for each in opened) <= 5
        await there.forget("w:0")
        await until_logged(node.options.server, to_token("w:0"), ["forget hub"])


async def test_a_long_history_comes_in_parts_and_is_held_when_it_is_whole(hub: HubSite, tmp_path: Path) -> None:
    async with alice_at(hub.server) as there:
        documents = [{"entity_id": "long", "type": "weather", "attributes": {"n": n}} for n in range(2500)]
        await there.ingest(documents)
        await there.set_context("before", attributes={"n": 1})
        async with device(hub, tmp_path / "d", interest=wants({"entities": ["before"]})) as node:
            await current(node)
        interest = wants({"entities": ["before"]}, {"types": ["weather"]})
        async with device(hub, tmp_path / "d", interest=interest) as node, alice_at(node.server) as here:
            await current(node)
            while not (await here.timeline("long", limit=1)).complete:
                pass
            count, after = 0, 0
            while True:
                page = await here.timeline("long", after=after, limit=1000)
                count += len(page.events)
                if page.next_after is None:
                    break
                after = page.next_after
            assert count == 2500


async def test_a_hub_that_was_restored_from_a_backup_is_heard_though_it_gives_sequences_again(tmp_path: Path) -> None:
    hub = HubSite(tmp_path / "hub")
    async with contextlib.AsyncExitStack() as stack:
        async with hub.up(), alice_at(hub.server) as there:
            node = await stack.enter_async_context(device(hub, tmp_path / "d", interest=wants({})))
            here = await stack.enter_async_context(alice_at(node.server))
            await there.set_context("t:1", attributes={"n": 0}, vectors={"v": [1.0, 0.0]})
            await current(node)
        shutil.copytree(tmp_path / "hub", tmp_path / "backup")
        async with hub.up(), alice_at(hub.server) as there:
            for n in range(1, 20):
                written = await there.set_context("t:1", attributes={"n": n})
            while (await status_of(node)).downlinked < written.token["hub"]:
                pass
        shutil.rmtree(tmp_path / "hub")
        shutil.copytree(tmp_path / "backup", tmp_path / "hub")
        async with hub.up(), alice_at(hub.server) as there:
            for n in range(100, 140):
                await there.set_context("t:1", attributes={"n": n}, vectors={"v": [0.0, 1.0]})
            while (await here.get_context("t:1")).attributes["n"] != 139:
                pass
            kept = [event.body["attributes"]["n"] for event in (await here.timeline("t:1", limit=1000)).events]
            assert kept == [*range(20), *range(100, 140)]  # what the hub lost, the device still has
            found = await here.get_context("t:1", include_vectors=True)
            assert np.allclose((found.vectors or {})["v"], [0.0, 1.0], atol=1e-2)


async def test_a_device_that_was_cut_off_within_the_first_messages_of_the_log_goes_on(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Downlink._keep
    kept: list[messages.FeedBatch] = []

    async def once(self: Downlink, batch: messages.FeedBatch) -> None:
        await keep(self, batch)
        kept.append(batch)
        if len(kept) == 1:
            raise Timeout("the line broke")

    monkeypatch.setattr(Downlink, "_keep", once)
    monkeypatch.setattr(downlink, "NextFeed", partial(messages.NextFeed, most_bytes=1024))
    async with alice_at(hub.server) as there:
        await there.ingest([{"entity_id": f"e{n}", "type": "weather", "text": "x" * 2_000} for n in range(9)])
        async with device(hub, tmp_path / "d", interest=wants({"types": ["weather"]})) as node:
            await current(node)
            assert (kept[0].place, len(kept) > 1) == (0, True)


async def test_a_feed_goes_on_where_it_was_whatever_interrupted_it(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More entities than are fetched one by one are read from the log's beginning: not again each time."""
    documents = [
        {"entity_id": f"w:{n}", "type": "weather", "attributes": {"n": n}, "text": "x" * 2000} for n in range(1500)
    ]
    opened: list[str] = []
    open_feed = Downlink._open

    async def noted(self: Downlink, mark: Mark) -> str:
        opened.append("opened")
        return await open_feed(self, mark)

    monkeypatch.setattr(Downlink, "_open", noted)
    cable = Cable(hub.options.leaf_port)
    async with alice_at(hub.server) as there, cable.laid() as port:
        for start in range(0, len(documents), 100):
            written = await there.ingest(documents[start : start + 100])
        line = f"nats://127.0.0.1:{port}"
        interest = wants({"types": ["weather"]})
        async with device(hub, tmp_path / "d", line=line, interest=interest) as node:
            while not (await status_of(node)).downlinked:
                pass
            cable.cut()
            cable.heal()
        async with device(hub, tmp_path / "d", line=line, interest=interest) as node, alice_at(node.server) as here:
            await current(node)
            await here.get_context("w:0", consistency=since(written), budget_ms=LONG_MS)
            cable.cut()
            for n in range(0, 1500, 50):
                assert [event.body["attributes"]["n"] for event in (await here.timeline(f"w:{n}")).events] == [n]
            async with asking(node.options.server, "test") as asker:
                of_hub = subjects.log_event("hub", TENANT, "*", "*")
                log = subjects.log_stream("sub7")
                stored = await api(asker.inbox, f"STREAM.INFO.{log}", {"subjects_filter": of_hub})
        assert opened == ["opened"]
        assert sum(stored["state"]["subjects"].values()) == 1500
        async with device(hub, tmp_path / "d", line=line, interest=wants({"types": ["other"]})) as node:
            cable.heal()
            await current(node)
        assert opened == ["opened", "opened"]


async def test_entities_with_long_ids_come_and_are_known_again(hub: HubSite, tmp_path: Path) -> None:
    """Of those the requests and replies between hub and device hold fewer."""
    names = [f"{number:03}{'x' * 16_000}" for number in range(600)]
    wants = Interest(wants=[Want(tenant=TENANT)])
    async with alice_at(hub.server) as there:
        for start in range(0, len(names), 50):
            await there.ingest([{"entity_id": name} for name in names[start : start + 50]])
        async with device(hub, tmp_path / "d", interest=wants) as node, alice_at(node.server) as here:
            await current(node)
            for name in (names[0], names[-1]):
                assert (await here.get_context(name)).complete
            written = await there.ingest([{"entity_id": f"{name}y"} for name in names[:300]])
            while (await status_of(node)).downlinked < written.token["hub"]:
                pass
        async with device(hub, tmp_path / "d", interest=wants) as node, alice_at(node.server) as here:
            await current(node)
            assert (await here.get_context(f"{names[299]}y")).complete
