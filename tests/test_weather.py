"""Bad weather between a device and its hub: a line that flaps, a kill, a full disk, a hub of a newer release."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import TypeVar

import pytest
from disk import disk, needs_root
from msgspec import Struct
from msgspec.structs import asdict, replace
from sites import TENANT, HubSite, alice_at, device, device_options, since, status_of
from test_edge_command import edge_up

from bench.cable import Cable
from cli import check_edge
from cli.doctor import diagnose
from cli.operator import asking
from cli.server import NatsServer
from cli.server_config import ServerOptions
from mnemesh import Consistency, Memory, messages, subjects
from mnemesh.actor import handles
from mnemesh.call import Call
from mnemesh.clock import COUNTER_BITS, wall_ms
from mnemesh.errors import MnemeshError, Timeout
from mnemesh.event import Event, decode_event
from mnemesh.ids import partition_of_tokens
from mnemesh.inbox import Inbox
from mnemesh.jetstream import history_of
from mnemesh.messages import Interest, Want
from services.hub import Hub

T = TypeVar("T")

LONG_MS = 60_000
EVERYTHING = Interest(wants=[Want(tenant=TENANT)])


async def numbers(memory: Memory, entity_id: str, consistency: Consistency) -> list[int]:
    told: list[int] = []
    after: int | None = 0
    while after is not None:
        page = await memory.timeline(entity_id, after=after, limit=1000, consistency=consistency, budget_ms=LONG_MS)
        told += [event.body["attributes"]["n"] for event in page.events]
        after = page.next_after
    return told


async def test_over_a_line_that_flaps_every_second_all_comes_once_both_ways(hub: HubSite, tmp_path: Path) -> None:
    cable = Cable(hub.options.leaf_port)
    async with (
        cable.laid() as port,
        device(hub, tmp_path / "d", line=f"nats://127.0.0.1:{port}", interest=EVERYTHING) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):

        async def flap() -> None:
            for _ in range(8):
                await asyncio.sleep(0.7)
                cable.cut()
                await asyncio.sleep(0.3)
                cable.heal()

        flapping = asyncio.ensure_future(flap())
        n = 0
        while not flapping.done():
            mine = await here.set_context("here", attributes={"n": n})
            theirs = await there.set_context("there", attributes={"n": n})
            n += 1
        everything = Consistency(level="session", token=mine.token | theirs.token)
        for memory in (here, there):
            await memory.get_context("here", consistency=everything, budget_ms=LONG_MS)
            for name in ("here", "there"):
                assert await numbers(memory, name, everything) == list(range(n))
        assert not (await status_of(node)).trouble


async def test_a_device_that_is_killed_while_it_takes_in_what_it_wants_has_all_of_it_once(
    hub: HubSite, tmp_path: Path
) -> None:
    names = [f"w:{number}" for number in range(3000)]
    interest = tmp_path / "interest.yaml"
    interest.write_text(f"wants: [{{tenant: {TENANT}}}]\n")
    await hub.enrol("sub7", tmp_path / "d")
    options = device_options("sub7", tmp_path / "d", f"nats://127.0.0.1:{hub.options.leaf_port}")
    async with alice_at(hub.server) as there:
        for n in range(2):
            written = await there.ingest([{"entity_id": name, "attributes": {"n": n}} for name in names])
        for life in range(4):
            async with edge_up(options, tmp_path / "up.log", "--interest", str(interest)) as process:
                if life < 3:
                    while await downlinked(options.server) <= life * 1500:
                        pass
                    process.kill()
                    continue
                async with alice_at(NatsServer(options.server)) as here:
                    await here.get_context("w:0", consistency=since(written), budget_ms=LONG_MS)
                    for name in names[:: len(names) // 50]:
                        assert await numbers(here, name, since(written)) == [0, 1]


async def downlinked(options: ServerOptions) -> int:
    """Up to where a device has its hub's log, as it says itself."""
    async with asking(options, "test") as asker:
        subject = subjects.edge_status(options.site)
        return (await asker.ask(subjects.EDGE_STATUS, subject, messages.Status())).downlinked


@needs_root
async def test_a_device_whose_disk_is_full_loses_nothing_that_it_acknowledged(hub: HubSite, tmp_path: Path) -> None:
    cable = Cable(hub.options.leaf_port)
    with disk(tmp_path / "disk", megabytes=24) as resize:
        data = tmp_path / "disk" / "d"
        async with (
            cable.laid() as port,
            device(hub, data, line=f"nats://127.0.0.1:{port}") as node,
            alice_at(node.server) as here,
            alice_at(hub.server) as there,
        ):
            cable.cut()
            acknowledged = 0
            with contextlib.suppress(Timeout):
                while True:
                    blob = os.urandom(100_000).hex()
                    await here.set_context(f"e:{acknowledged}", attributes={"blob": blob}, budget_ms=1000)
                    acknowledged += 1
            wrong = [finding async for finding in diagnose(data) if finding.verdict == "wrong"]
            assert ["no space left on device" in finding.what for finding in wrong] == [True]
            resize(400)
            while True:
                with contextlib.suppress(MnemeshError):
                    last = await here.set_context("last", attributes={"n": 1}, budget_ms=1000)
                    break
            cable.heal()
            assert acknowledged
            await there.get_context("last", consistency=since(last), budget_ms=LONG_MS)
            for n in range(acknowledged):
                assert len((await there.timeline(f"e:{n}")).events) == 1


class NewerPosition(messages.Position, frozen=True, kw_only=True):
    novel: int = 0


class NewerBatch(messages.FeedBatch, frozen=True, kw_only=True):
    novel: int = 0


def newer(kind: type[T], message: Struct) -> T:
    return kind(**asdict(message), novel=1)


class NewerHub(Hub):
    """As a later release may answer: with fields that this one has never heard of."""

    @handles(subjects.UPLINK_POSITION)
    async def uplink_position(self, request: messages.AskPosition, call: Call) -> messages.Position:
        told = newer(NewerPosition, await super().uplink_position(request, call))
        return replace(told, contract="newer")

    @handles(subjects.NEXT_FEED)
    async def next_feed(self, request: messages.NextFeed, call: Call) -> messages.FeedBatch:
        return newer(NewerBatch, await super().next_feed(request, call))


async def test_a_hub_of_a_newer_release_is_understood_and_doctor_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sites.Hub", NewerHub)
    async with (
        HubSite(tmp_path / "hub").up() as hub,
        device(hub, tmp_path / "d", interest=EVERYTHING) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        mine = await here.set_context("t1", attributes={"n": 1})
        theirs = await there.set_context("t2", attributes={"n": 2})
        sequence = await append_newer(hub)
        assert (await there.get_context("t1", consistency=since(mine), budget_ms=LONG_MS)).attributes == {"n": 1}
        assert (await here.get_context("t2", consistency=since(theirs), budget_ms=LONG_MS)).attributes == {"n": 2}
        while (await status_of(node)).downlinked < sequence:
            pass
        told = await history(node.options.server, "t3")
        assert [event.extra for event in told] == [{"novel": {"a": 1}}]
        found = await here.get_context("t3")
        assert (found.attributes, found.complete) == ({"n": 3}, True)
        async with asking(node.options.server, "test") as asker:
            said = [finding.what async for finding in check_edge.hub(asker, node.options.server)]
        assert any("the hub runs contract newer" in what for what in said)


async def append_newer(hub: HubSite) -> int:
    """An event as a later release may write it; returns its place in the log."""
    link = await hub.link("gateway")
    inbox = Inbox(link)
    await inbox.open()
    body = {"attributes": {"n": 3}, "novel": 1}
    event = Event(
        id="x",
        tenant=TENANT,
        entity_id="t3",
        op="put",
        agent="alice",
        site="hub",
        hlc=wall_ms() << COUNTER_BITS,
        body=body,
        schema=2,
        extra={"novel": {"a": 1}},
    )
    subject = subjects.log_event("hub", TENANT, partition_of_tokens(TENANT, "t3"), "t3")
    stored = json.loads((await inbox.request(subject, event.encode(), budget_s=5.0)).data)
    await link.close()
    return int(stored["seq"])


async def history(options: ServerOptions, entity: str) -> list[Event]:
    async with asking(options, "test") as asker:
        subject = subjects.log_event("*", TENANT, "*", entity)
        found = await history_of(asker.inbox, subjects.log_stream(options.site), subject, upto=1 << 40)
    return [decode_event(stored.message.data) for stored in found]
