"""Clocks lie: what is stamped far ahead is put aside and told; a device in 1970 still writes after what it knows."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace
from sites import TENANT, HubSite, alice_at, current, device, since, status_of
from test_hostile_device import send

from bench.cable import Cable
from cli import check_edge
from cli.check_edge import devices
from cli.edge import restamp
from cli.edge_node import EdgeNode
from cli.operator import asking
from cli.server_config import ServerOptions
from edge import uplink
from edge.aside import MARGIN_MS
from edge.restamping import Restamping
from mnemesh import Consistency, messages, subjects
from mnemesh.atomic_batch import ROLLUP
from mnemesh.clock import COUNTER_BITS, MOST_AHEAD_MS, HybridClock, is_too_far_ahead, stamp_ms, wall_ms
from mnemesh.connection import Link
from mnemesh.errors import NotFound
from mnemesh.event import Event, decode_event
from mnemesh.ids import partition_of_tokens
from mnemesh.inbox import Inbox
from mnemesh.jetstream import api, history_of, last_of
from mnemesh.messages import Interest, Want
from mnemesh.origin import FORGETS, Mark, decode_mark
from services.gateway import Gateway

LONG_MS = 30_000
TEN_YEARS_MS = 10 * 365 * 24 * 3600 * 1000
EVERYTHING = Interest(wants=[Want(tenant=TENANT)])


async def write_ahead(node: EdgeNode, entity_id: str, op: str, by_ms: int = TEN_YEARS_MS, **body: object) -> None:
    """What the device's gateway would append if its clock were that much ahead."""
    link = await Link.open(node.server.credentials.load("gateway").link_options())
    inbox = Inbox(link)
    await inbox.open()
    site = node.options.server.site
    hlc = (wall_ms() + by_ms) << COUNTER_BITS
    event = Event(
        id=f"ahead-{entity_id}",
        tenant=TENANT,
        entity_id=entity_id,
        op=op,  # type: ignore[arg-type]
        agent="x",
        site=site,
        hlc=hlc,
        body=dict(body),
    )
    subject = subjects.log_event(site, TENANT, partition_of_tokens(TENANT, entity_id), entity_id)
    headers = {FORGETS: "1", ROLLUP: "sub"} if op == "forget" else None
    await inbox.request(subject, event.encode(), budget_s=5.0, headers=headers)
    await link.close()


async def test_what_is_stamped_far_ahead_is_put_aside_and_told_and_spoils_no_other_clock(
    hub: HubSite, tmp_path: Path
) -> None:
    async with (
        device(hub, tmp_path / "a", name="a", interest=EVERYTHING) as wrong,
        device(hub, tmp_path / "b", name="b", interest=EVERYTHING) as right,
        alice_at(wrong.server) as at_wrong,
        alice_at(right.server) as at_right,
        alice_at(hub.server) as there,
    ):
        await at_wrong.set_context("t1", attributes={"n": 1})
        written = await at_wrong.set_context("t2", attributes={"n": 1})
        await at_right.get_context("t2", consistency=since(written), budget_ms=LONG_MS)
        await write_ahead(wrong, "t1", "put", attributes={"n": 2})
        await write_ahead(wrong, "t2", "forget")
        written = await there.set_context("t3", attributes={"n": 1})
        while (seen := await seen_of(hub, "a")).quarantined < 2:
            pass
        for memory in (there, at_right):
            for name in ("t1", "t2"):
                assert (await memory.get_context(name)).attributes == {"n": 1}
        assert len((await there.timeline("t2")).events) == 1  # also in the log: its forget erased nothing
        written = await at_right.set_context("t1", attributes={"n": 3})
        found = await there.get_context("t1", consistency=since(written), budget_ms=LONG_MS)
        assert found.attributes == {"n": 3}
        assert (await seen_of(hub, "b")).quarantined == 0
        async with asking(hub.options, "test") as asker:
            told = [finding.what async for finding in devices(asker, hub.options) if finding.verdict == "wrong"]
        assert [what for what in told if "2 events of a are put aside" in what]
        assert seen.site == "a"


async def seen_of(hub: HubSite, site: str) -> messages.DeviceSeen:
    while True:
        async with asking(hub.options, "test") as asker:
            told = await asker.ask(subjects.DEVICES, subjects.devices(), messages.AskDevices(quarantined=True))
        for seen in told.devices:
            if seen.site == site:
                return seen


async def test_a_hub_hears_the_stamp_of_a_write_that_came_with_one_far_ahead(hub: HubSite, tmp_path: Path) -> None:
    """Else what it writes of the entity in the next 30 s is stamped before what it has seen, and lost."""
    cable = Cable(hub.options.leaf_port)
    async with (
        cable.laid() as port,
        device(hub, tmp_path / "d", interest=EVERYTHING, line=f"nats://127.0.0.1:{port}") as node,
        alice_at(hub.server) as there,
    ):
        while not (await status_of(node)).linked:
            pass
        cable.cut()
        await write_ahead(node, "t1", "put", by_ms=30_000, attributes={"n": 1})
        await write_ahead(node, "t2", "put", attributes={"n": 1})
        cable.heal()
        while (await seen_of(hub, "sub7")).quarantined < 1:
            pass
        async with asyncio.timeout(10):  # its gateway hears of the mark a moment after its shard
            while (await there.get_context("t1")).attributes != {"n": 2}:
                await there.set_context("t1", attributes={"n": 2})


async def mark_at(hub: HubSite) -> Mark:
    async with asking(hub.options, "test") as asker:
        stored = await last_of(asker.inbox, subjects.log_stream("hub"), subjects.log_mark("sub7"))
    return decode_mark(stored.message.data)


async def test_a_clock_that_is_set_while_the_line_is_up_spoils_no_mark(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device takes the hub's clock to be what it was by its own, and its own has just been set an hour ahead."""
    hour_ms = 3_600_000
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        written = await here.set_context("t1", attributes={"n": 1})
        await there.get_context("t1", consistency=since(written), budget_ms=LONG_MS)
        monkeypatch.setattr(uplink, "wall_ms", lambda: wall_ms() + hour_ms)
        await write_ahead(node, "t1", "put", by_ms=hour_ms, attributes={"n": 2})
        while not (await status_of(node)).put_aside:
            pass
        monkeypatch.undo()
        assert (await there.get_context("t1")).attributes == {"n": 1}
        mark = await mark_at(hub)
        assert not is_too_far_ahead(mark.hlc, wall_ms())


async def test_a_mark_whose_stamp_is_ahead_is_followed_by_one_whose_stamp_is_not(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        written = await here.set_context("t1", attributes={"n": 1})
        await there.get_context("t1", consistency=since(written), budget_ms=LONG_MS)
        ahead = replace(await mark_at(hub), hlc=(wall_ms() + TEN_YEARS_MS) << COUNTER_BITS)
        await send(node, first=ahead.sequence + 1, incarnation=ahead.incarnation, last=ahead.last, hlc=ahead.hlc)
        written = await here.set_context("t1", attributes={"n": 2})
        await there.get_context("t1", consistency=since(written), budget_ms=LONG_MS)
        assert 0 < stamp_ms((await mark_at(hub)).hlc) < wall_ms() + MOST_AHEAD_MS


async def test_a_device_that_boots_in_1970_still_writes_after_what_it_knows(hub: HubSite, tmp_path: Path) -> None:
    async with (
        device(hub, tmp_path / "d", interest=EVERYTHING) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        written = await there.set_context("t1", attributes={"n": 1})
        while (await status_of(node)).downlinked < written.token["hub"]:
            pass
        assert (await here.get_context("t1", consistency=since(written))).complete
        link = await Link.open(node.server.credentials.load("gateway").link_options())
        clock = HybridClock(physical_ms=lambda: 0)
        gateway = Gateway(link, site="sub7", kind="device", clock=clock)
        await gateway.asker.open()
        await gateway.prepare()
        assert clock.now() >> COUNTER_BITS >= wall_ms() - 60_000
        await link.close()


async def test_a_write_that_did_not_know_of_the_other_leaves_a_suspect(hub: HubSite, tmp_path: Path) -> None:
    cable = Cable(hub.options.leaf_port)
    async with (
        cable.laid() as port,
        device(hub, tmp_path / "d", interest=EVERYTHING, line=f"nats://127.0.0.1:{port}") as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        written = await there.set_context("t1", attributes={"n": 0})
        while (await status_of(node)).downlinked < written.token["hub"]:
            pass
        cable.cut()
        first = await here.set_context("t1", attributes={"n": 1})
        second = await there.set_context("t1", attributes={"n": 2})
        cable.heal()
        both = Consistency(level="session", token=first.token | second.token)
        for memory in (there, here):
            found = await memory.get_context("t1", consistency=both, budget_ms=LONG_MS, include_suspects=True)
            assert found.attributes == {"n": 2}
            assert found.suspects is not None
            told = [(suspect.part, suspect.name, suspect.value, suspect.site) for suspect in found.suspects]
            assert told == [("attribute", "n", 1, "sub7")]
        written = await there.set_context("t1", attributes={"n": 9})
        found = await there.get_context("t1", consistency=since(written), include_suspects=True)
        assert found.suspects == []


async def test_what_was_stamped_ahead_takes_effect_once_it_is_stamped_anew(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        before = await here.set_context("before", attributes={"n": 1})
        await here.set_context("gone", attributes={"n": 1})
        await write_ahead(node, "ahead", "put", attributes={"n": 1})
        await write_ahead(node, "gone", "forget")
        await write_ahead(node, "ahead", "put", attributes={"n": 2, "m": 1})
        await there.get_context("before", consistency=since(before), budget_ms=LONG_MS)
        while (await status_of(node)).put_aside < 3:
            pass
        assert "put aside 3 events" in (await wrong_at(node.options.server))[0]
    options = node.options.server
    assert await restamp(options) == 3
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        written = await here.set_context("after", attributes={"n": 1})
        for memory in (here, there):
            await memory.get_context("after", consistency=since(written), budget_ms=LONG_MS)
            assert (await memory.get_context("ahead")).attributes == {"n": 2, "m": 1}
            with pytest.raises(NotFound):
                await memory.get_context("gone")
            timeline = await memory.timeline("ahead")
            assert [event.op for event in timeline.events] == ["put", "put"]
        assert ((await status_of(node)).put_aside, (await seen_of(hub, "sub7")).quarantined) == (0, 0)
    assert await restamp(options) == 0


async def test_what_is_to_be_stamped_anew_is_not_lost_where_the_last_of_it_is_gone_meanwhile(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead_in = Restamping._ahead

    async def last_goes(self: Restamping) -> tuple[dict[int, str], set[str]]:
        ahead, again = await ahead_in(self)
        await api(self._eraser.inbox, f"STREAM.MSG.DELETE.{subjects.log_stream('sub7')}", {"seq": max(ahead)})
        return ahead, again

    async with device(hub, tmp_path / "d") as node:
        for name in ("t1", "t2"):
            await write_ahead(node, name, "put", attributes={"n": 1})
    with monkeypatch.context() as patched:
        patched.setattr(Restamping, "_ahead", last_goes)
        assert await restamp(node.options.server) == 2
    assert await restamp(node.options.server) == 0
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here:
        assert (await here.get_context("t1")).attributes == {"n": 1}
        with pytest.raises(NotFound):
            await here.get_context("t2")


async def test_a_forget_that_was_stamped_anew_reaches_also_a_device_that_wants_nothing(
    hub: HubSite, tmp_path: Path
) -> None:
    async with (
        device(hub, tmp_path / "b", name="b", interest=Interest(wants=[Want(tenant="other")])) as node,
        alice_at(node.server) as at_b,
        alice_at(hub.server) as there,
    ):
        written = await at_b.set_context("t1", attributes={"n": 1})
        await there.get_context("t1", consistency=since(written), budget_ms=LONG_MS)
        await current(node)
        async with device(hub, tmp_path / "d") as wrong:
            await write_ahead(wrong, "t1", "forget")
            while (await seen_of(hub, "sub7")).quarantined < 1:
                pass
        assert await restamp(wrong.options.server) == 1
        async with device(hub, tmp_path / "d"):
            while [event.op for event in (await at_b.timeline("t1")).events] != ["forget"]:
                pass
            with pytest.raises(NotFound):
                await at_b.get_context("t1")


async def wrong_at(options: ServerOptions) -> list[str]:
    """What doctor finds wrong between a device and its hub."""
    async with asking(options, "test") as asker:
        return [finding.what async for finding in check_edge.hub(asker, options) if finding.verdict == "wrong"]


async def test_what_was_stamped_anew_stays_in_the_log_when_what_was_forgotten_comes_late(
    hub: HubSite, tmp_path: Path
) -> None:
    line = Cable(hub.options.leaf_port)
    async with alice_at(hub.server) as there, line.laid() as port:
        async with device(hub, tmp_path / "late", name="late", line=f"nats://127.0.0.1:{port}") as late:
            async with device(hub, tmp_path / "d") as node:
                await write_ahead(node, "t1", "put", attributes={"n": 1})
                while (await seen_of(hub, "sub7")).quarantined < 1:
                    pass
            line.cut()
            async with alice_at(late.server) as memory:
                await memory.set_context("t1", attributes={"n": 2})
            await there.forget("t1")
            options = node.options.server
            await restamp(options)
            async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here:
                written = await here.set_context("after", attributes={"n": 1})
                await there.get_context("after", consistency=since(written), budget_ms=LONG_MS)
                line.heal()
                while (await seen_of(hub, "late")).uplinked < 1:
                    pass
                while await stamps_at(hub, "late", "t1"):  # erased
                    pass
                await there.forget("after")
                while await stamps_at(hub, "sub7", "after"):  # so the eraser has done with what was before
                    pass
        *_, anew = await stamps_at(hub, "sub7", "t1")
        assert not is_too_far_ahead(anew, wall_ms())


async def stamps_at(hub: HubSite, origin: str, entity_id: str) -> list[int]:
    """The stamps of what the hub's log has of an entity from one site."""
    async with asking(hub.options, "test") as asker:
        subject = subjects.log_event(origin, TENANT, "*", entity_id)
        found = await history_of(asker.inbox, subjects.log_stream("hub"), subject, upto=1 << 40)
    return [decode_event(stored.message.data).hlc for stored in found]


async def test_what_was_put_aside_is_stamped_anew_also_when_the_clock_has_caught_up_with_its_stamp(
    hub: HubSite, tmp_path: Path
) -> None:
    async with device(hub, tmp_path / "d") as node:
        await write_ahead(node, "t1", "put", by_ms=MOST_AHEAD_MS - MARGIN_MS + 1_000, attributes={"n": 1})
        while not (await seen_of(hub, "sub7")).quarantined:
            pass
        caught_up = wall_ms() + 1_000
    await asyncio.sleep(max(0, caught_up + 1 - wall_ms()) / 1000)
    async with device(hub, tmp_path / "d") as node:
        while not (await status_of(node)).put_aside:
            pass
    assert await restamp(node.options.server) == 1
    async with device(hub, tmp_path / "d") as node, alice_at(hub.server) as there:
        while (await seen_of(hub, "sub7")).quarantined:
            pass
        assert (await there.get_context("t1")).attributes == {"n": 1}
        assert not (await status_of(node)).put_aside
