"""A forget reaches every site: gone from stores and logs, with receipts, and whoever is away is known as pending."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from sites import TENANT, HubSite, alice_at, current, device, since, status_of
from test_hostile_device import event, send

from bench.cable import Cable
from cli.edge_node import EdgeNode
from cli.main import main
from cli.operator import asking
from cli.server_config import ServerOptions
from mnemesh import Memory, kv, subjects
from mnemesh.atomic_batch import Outgoing, publish_all
from mnemesh.clock import COUNTER_BITS, wall_ms
from mnemesh.errors import Conflict, MnemeshError, NotFound, Unavailable
from mnemesh.event import Event, decode_event
from mnemesh.ids import partition_of, to_token
from mnemesh.jetstream import counts_of, history_of, last_of, stream_state
from mnemesh.messages import AskErasures, Erasure, Interest, Want
from mnemesh.origin import decode_mark
from services import erasure
from services.debts import Debts

LONG_MS = 30_000
EVERYTHING = Interest(wants=[Want(tenant=TENANT)])


async def logged(options: ServerOptions, entity: str) -> list[str]:
    """What a site's log has of an entity: op and site of each event."""
    async with asking(options, "test") as asker:
        subject = subjects.log_event("*", TENANT, "*", entity)
        found = await history_of(asker.inbox, subjects.log_stream(options.site), subject, upto=1 << 40)
    events = [decode_event(stored.message.data) for stored in found]
    return [f"{event.op} {event.site}" for event in events]


async def until_logged(options: ServerOptions, entity: str, wanted: list[str]) -> None:
    while await logged(options, entity) != wanted:
        pass


async def erasure_of(hub: HubSite, entity: str, *, receipts: int, nothing: int = 0) -> Erasure:
    """The erasure of an entity, once so many sites have confirmed."""
    while True:
        async with asking(hub.options, "test") as asker:
            asked = AskErasures(tenant=TENANT, entity_id=entity)
            told = (await asker.ask(subjects.ERASURES, subjects.erasures(), asked)).erasures
        if told and (len(told[0].receipts), len(told[0].nothing)) == (receipts, nothing):
            return told[0]


async def test_a_forget_at_the_hub_erases_what_every_site_wrote_in_every_log(hub: HubSite, tmp_path: Path) -> None:
    async with (
        device(hub, tmp_path / "a", name="a", interest=EVERYTHING) as one,
        device(hub, tmp_path / "b", name="b", interest=EVERYTHING) as other,
        device(hub, tmp_path / "c", name="c") as third,
        alice_at(one.server) as at_one,
        alice_at(other.server) as at_other,
        alice_at(hub.server) as there,
    ):
        written = await at_one.set_context("e1", attributes={"n": 1}, text="secret", vectors={"v": [1.0]})
        await at_other.get_context("e1", consistency=since(written), budget_ms=LONG_MS)
        written = await at_other.set_context("e1", attributes={"m": 2})
        await there.get_context("e1", consistency=since(written), budget_ms=LONG_MS)
        written = await there.set_context("e1", attributes={"o": 3})
        for node in (one, other):
            while (await status_of(node)).downlinked < written.token["hub"]:
                pass
        forgotten = await there.forget("e1")
        for memory in (at_one, at_other):
            with pytest.raises(NotFound):
                await memory.get_context("e1", consistency=since(forgotten), budget_ms=LONG_MS)
        for site in (hub.options, one.options.server, other.options.server):
            await until_logged(site, "e1", ["forget hub"])
        erasure = await erasure_of(hub, "e1", receipts=3, nothing=1)
        assert [(receipt.site, receipt.events) for receipt in erasure.receipts] == [("a", 3), ("b", 3), ("hub", 3)]
        assert (erasure.nothing, erasure.pending) == (["c"], [])
        assert third.options.server.site == "c"
        written = await there.set_context("e1", attributes={"again": 1})
        found = await at_one.get_context("e1", consistency=since(written), budget_ms=LONG_MS)
        assert found.attributes == {"again": 1}


async def test_a_forget_on_a_device_erases_what_the_hub_wrote_before_it(hub: HubSite, tmp_path: Path) -> None:
    async with (
        device(hub, tmp_path / "a", name="a", interest=EVERYTHING) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        written = await there.set_context("e1", attributes={"n": 1})
        await here.get_context("e1", consistency=since(written), budget_ms=LONG_MS)
        forgotten = await here.forget("e1")
        with pytest.raises(NotFound):
            await there.get_context("e1", consistency=since(forgotten), budget_ms=LONG_MS)
        for site in (hub.options, node.options.server):
            await until_logged(site, "e1", ["forget a"])
        await erasure_of(hub, "e1", receipts=2)


async def test_a_device_that_comes_back_after_long_erases_before_it_serves(tmp_path: Path) -> None:
    hub = HubSite(tmp_path / "hub")
    async with hub.up(), alice_at(hub.server) as there:
        async with device(hub, tmp_path / "a", name="a", interest=EVERYTHING) as node, alice_at(node.server) as here:
            written = await there.set_context("e1", attributes={"n": 1})
            await here.get_context("e1", consistency=since(written), budget_ms=LONG_MS)
        await there.forget("e1")
        assert [waiting.site for waiting in (await erasure_of(hub, "e1", receipts=1)).pending] == ["a"]
        async with (
            device(hub, tmp_path / "a", name="a", interest=EVERYTHING, erase_first_after_s=0.0) as node,
            alice_at(node.server) as here,
        ):
            with pytest.raises(NotFound):  # the first answer that it gives at all
                await first_answer(here)
            await erasure_of(hub, "e1", receipts=2)


async def test_what_a_rollup_left_as_the_server_was_killed_is_purged(hub: HubSite, tmp_path: Path) -> None:
    """The sites ledger had it: the forget is stored, and the server dies before it has taken out what came before."""
    stamp = (wall_ms() + 1000) << COUNTER_BITS
    forget = Event(id="f", tenant=TENANT, entity_id="e1", op="forget", agent="alice", site="a", hlc=stamp)
    subject = subjects.log_event("a", TENANT, partition_of(TENANT, "e1"), to_token("e1"))
    async with device(hub, tmp_path / "a", name="a") as node, alice_at(node.server) as here:
        for n in range(3):
            await here.set_context("e1", attributes={"n": n})
        async with asking(node.options.server, "test", role="gateway") as gateway:
            await publish_all(gateway.link, gateway.inbox, [Outgoing(subject, forget.encode(), {})], budget_s=5.0)
        await until_logged(node.options.server, "e1", ["forget a"])


async def test_what_a_forget_has_no_part_in_stays_in_the_log(hub: HubSite, tmp_path: Path) -> None:
    """Two events of a device, one stamped before the hub's forget and one after: the log is gone through one by one."""
    async with device(hub, tmp_path / "a") as node, alice_at(hub.server) as there:

        async def send_put(number: int, by_ms: int, log: str = "x") -> None:
            stamp = (wall_ms() + by_ms) << COUNTER_BITS
            await send(node, event("e1", id=str(number), hlc=stamp), first=number, incarnation=log)

        await send_put(1, -5_000)
        await send_put(2, 20_000)
        await there.set_context("e1", attributes={"n": 1})
        await there.forget("e1")
        await until_logged(hub.options, "e1", ["put sub7", "forget hub"])
        await send_put(3, -3_000, log="y")
        await until_logged(hub.options, "e1", ["put sub7", "forget hub"])
        await send_put(4, 21_000)
        await until_logged(hub.options, "e1", ["put sub7", "forget hub", "put sub7"])


async def test_of_a_devices_marks_the_last_one_is_left(hub: HubSite, tmp_path: Path) -> None:
    async with (
        device(hub, tmp_path / "a", name="a") as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
        asking(hub.options, "test") as asker,
    ):
        for n in range(5):
            written = await here.set_context("e1", attributes={"n": n})
            await there.get_context("e1", consistency=since(written), budget_ms=LONG_MS)
        log, mark = subjects.log_stream("hub"), subjects.log_mark("a")
        while decode_mark((await last_of(asker.inbox, log, mark)).message.data).sequence != written.token["a"]:
            pass
        assert await counts_of(asker.inbox, log, mark) == {mark: 1}


async def test_a_forget_reaches_a_device_that_let_go_of_the_entity_but_wrote_to_it_unseen(
    hub: HubSite, tmp_path: Path
) -> None:
    """What it wrote never leaves, so the hub cannot know by that; and what it was merged with is on the device, too."""
    shut = "version: 1\notherwise: nothing\n"
    other = Interest(wants=[Want(tenant=TENANT, entities=["other"])])
    async with alice_at(hub.server) as there:
        async with (
            device(hub, tmp_path / "a", name="a", policy=shut, interest=EVERYTHING) as node,
            alice_at(node.server) as here,
        ):
            written = await there.set_context("e1", attributes={"n": 1})
            while (await status_of(node)).downlinked < written.token["hub"]:
                pass
            await here.set_context("e1", attributes={"m": 2})
        async with device(hub, tmp_path / "a", name="a", interest=other) as node:
            await current(node)
            assert await logged(node.options.server, "e1") == ["put hub", "put a"]
        await there.forget("e1")
        async with device(hub, tmp_path / "a", name="a", interest=other) as node:
            await until_logged(node.options.server, "e1", ["forget hub"])


async def test_a_device_that_wrote_what_was_forgotten_meanwhile_hears_of_it(hub: HubSite, tmp_path: Path) -> None:
    cable = Cable(hub.options.leaf_port)
    async with (
        cable.laid() as port,
        device(hub, tmp_path / "a", name="a", line=f"nats://127.0.0.1:{port}") as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        cable.cut()
        await here.set_context("e1", attributes={"n": 1})
        await there.forget("e1")
        cable.heal()
        for site in (hub.options, node.options.server):
            await until_logged(site, "e1", ["forget hub"])
        with pytest.raises(NotFound):
            await here.get_context("e1")


async def test_a_debt_is_noted_before_what_tells_of_it_is_gone(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that is killed in between would never hear of it again."""
    had: list[list[str]] = []
    add_in = Debts.add

    async def adds(self: Debts, device: str, key: tuple[str, str]) -> None:
        had.append(await logged(hub.options, "e1"))
        await add_in(self, device, key)

    monkeypatch.setattr(Debts, "add", adds)
    async with device(hub, tmp_path / "a") as node, alice_at(hub.server) as there:
        await there.forget("e1")
        await send(node, event("e1"))
        await until_logged(hub.options, "e1", ["forget hub"])
    assert had[0] == ["forget hub", "put sub7"]


async def test_events_that_have_an_id_in_common_stay_in_the_log_where_stores_have_them(
    hub: HubSite, tmp_path: Path
) -> None:
    """An id is another write's once the log no longer remembers it. What no store has has the log gone through."""
    subject = subjects.log_event("hub", TENANT, partition_of(TENANT, "e1"), to_token("e1"))
    said: dict[str, Any] = {"tenant": TENANT, "entity_id": "e1", "op": "put", "agent": "alice", "site": "hub"}
    now = wall_ms()
    async with (
        device(hub, tmp_path / "a") as node,
        alice_at(hub.server) as there,
        asking(hub.options, "test", role="gateway") as gateway,
    ):
        await there.forget("e1")
        for number, body in enumerate(({}, {"attributes": [1]}, {}), 1):
            put = Event(id="boot", hlc=(now + 1000 * number) << COUNTER_BITS, body=body, **said)
            await publish_all(gateway.link, gateway.inbox, [Outgoing(subject, put.encode(), {})], budget_s=5.0)
        await send(node, event("e1"))
        await until_logged(hub.options, "e1", ["forget hub", "put hub", "put hub"])


async def test_a_version_that_was_erased_again_may_still_be_expected(hub: HubSite, tmp_path: Path) -> None:
    """What comes too late has no effect, but is the entity's version, and then goes from the log."""
    async with device(hub, tmp_path / "a") as node, alice_at(hub.server) as there:
        await there.forget("e1")
        written = await there.set_context("e1", attributes={"n": 1})
        await send(node, event("e1"))
        version = written.version
        while (read := await there.get_context("e1")).version == version:
            pass
        await until_logged(hub.options, "e1", ["forget hub", "put hub"])
        for outdated in (version - 1, read.version + 1_000):
            with pytest.raises(Conflict):
                await there.set_context("e1", attributes={"n": 0}, expected_version=outdated)
        again = await there.set_context("e1", attributes={"n": 2}, expected_version=read.version)
        with pytest.raises(Conflict):
            await there.set_context("e1", attributes={"n": 3}, expected_version=read.version)
        await there.ingest([{"entity_id": "e1", "expected_version": again.version}], atomic=True)


async def test_what_survived_a_forget_that_came_after_it_exists(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "a") as node, alice_at(hub.server) as there:
        forget = event("e1", op="forget", body={}, hlc=(wall_ms() - 5_000) << COUNTER_BITS)
        await there.set_context("e1", attributes={"n": 1})
        await send(node, forget)
        await until_logged(hub.options, "e1", ["put hub", "forget sub7"])
        with pytest.raises(Conflict):
            await there.set_context("e1", attributes={"n": 2}, expected_version=0)
        assert (await there.get_context("e1")).attributes == {"n": 1}


async def test_what_is_erased_of_a_log_that_was_restored_is_looked_at_anew(hub: HubSite) -> None:
    async with asking(hub.options, "test") as asker, asking(hub.options, "test", role="hub") as own:
        state = await stream_state(asker.inbox, subjects.log_stream("hub"))
        await kv.put(own.inbox, subjects.RECEIPTS.name, erasure.PLACE, f"{state.incarnation} 999".encode())
        assert await erasure.erased_upto(asker.inbox, state) == state.last_sequence
        remade = dataclasses.replace(state, incarnation="another")
        assert await erasure.erased_upto(asker.inbox, remade) == 0


async def test_a_device_with_a_long_name_confirms_what_it_erased(hub: HubSite, tmp_path: Path) -> None:
    name = "substation-" + "x" * 53
    async with device(hub, tmp_path / "a", name=name) as node, alice_at(node.server) as here:
        await here.forget("e1")
        await erasure_of(hub, "e1", receipts=2)


async def test_what_a_site_writes_itself_with_a_stamp_before_the_forget_is_erased_from_its_log(
    hub: HubSite, tmp_path: Path
) -> None:
    """Its gateway had not heard of the forget of a device whose clock is ahead; no store has the write."""
    subject = subjects.log_event("hub", TENANT, partition_of(TENANT, "e1"), to_token("e1"))
    stamp = (wall_ms() - 60_000) << COUNTER_BITS
    put = Event(id="p", tenant=TENANT, entity_id="e1", op="put", agent="alice", site="hub", hlc=stamp, body={})
    async with device(hub, tmp_path / "a", name="a") as node, alice_at(node.server) as here:
        await here.forget("e1")
        await until_logged(hub.options, "e1", ["forget a"])
        async with asking(hub.options, "test", role="gateway") as gateway:
            await publish_all(gateway.link, gateway.inbox, [Outgoing(subject, put.encode(), {})], budget_s=5.0)
        await until_logged(hub.options, "e1", ["forget a"])


async def first_answer(memory: Memory) -> None:
    while True:
        try:
            await memory.get_context("e1", budget_ms=100)
        except Unavailable:
            continue
        return


async def test_erasure_goes_on_where_it_was_after_a_restart(tmp_path: Path) -> None:
    hub = HubSite(tmp_path / "hub")
    async with contextlib.AsyncExitStack() as stack:
        async with hub.up(), alice_at(hub.server) as there:
            node: EdgeNode = await stack.enter_async_context(device(hub, tmp_path / "a", name="a", interest=EVERYTHING))
            here = await stack.enter_async_context(alice_at(node.server))
            written = await there.set_context("e1", attributes={"n": 1})
            await here.get_context("e1", consistency=since(written), budget_ms=LONG_MS)
        forgotten = await here.forget("e1")  # the hub is out of reach
        with contextlib.suppress(MnemeshError):
            await here.get_context("e1", consistency=since(forgotten))
        shutil.rmtree(tmp_path / "hub" / "shard")  # the hub's stores come back from the log
        async with hub.up(), alice_at(hub.server) as there:
            with pytest.raises(NotFound):
                await there.get_context("e1", consistency=since(forgotten), budget_ms=LONG_MS)
            await until_logged(hub.options, "e1", ["forget a"])
            await erasure_of(hub, "e1", receipts=2)


def test_the_status_of_erasures_needs_a_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["erasure", "status", "--data", str(tmp_path)]) == 1
    assert "is no site's data folder" in capsys.readouterr().err
