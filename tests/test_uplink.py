"""What is born on a device goes to its hub once and in order, whatever happens to the line, the hub or the device."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
from pathlib import Path

import nats.errors
import pytest
from nacl.signing import SigningKey
from nats.aio.msg import Msg
from sites import TENANT, HubSite, alice_at, current, device, device_options, since, status_of, stolen
from test_hostile_device import event, send

from bench.cable import Cable
from cli import check_edge
from cli.devices import Devices, public_of, seed_of
from cli.edge import shut_out
from cli.edge_node import EdgeNode
from cli.operator import asking
from mnemesh import Consistency, Memory, subjects
from mnemesh.atomic_batch import Outgoing, publish_all
from mnemesh.connection import Link
from mnemesh.errors import BadRequest, MnemeshError, NotFound, Stale, Timeout
from mnemesh.ids import partition_of_tokens
from mnemesh.inbox import Inbox
from mnemesh.jetstream import Stored, WrongSequence, counts_of, history_of, last_of, stream_state
from mnemesh.messages import AskDevices, Interest, Want
from mnemesh.origin import BORN, decode_mark
from services.uplinks import Uplinks

LONG_MS = 30_000


async def counted(memory: Memory, entity_id: str) -> list[int]:
    """The `n` of every event of an entity, in the order of the log."""
    page = await memory.timeline(entity_id, limit=1000)
    return [event.body["attributes"]["n"] for event in page.events]


async def test_a_device_serves_and_restarts_without_a_hub_in_reach(tmp_path: Path) -> None:
    options = device_options("sub7", tmp_path, "nats://127.0.0.1:1")
    async with EdgeNode(options) as node, alice_at(node.server) as memory:
        written = await memory.set_context("t:1", attributes={"n": 1}, vectors={"v": [1.0, 0.0]}, text="a feeder")
        assert (await memory.get_context("t:1", consistency=since(written))).attributes == {"n": 1}
        assert (await memory.search_embedding([1.0, 0.0], space="v", consistency=since(written))).hits
        assert not (await status_of(node)).linked
    async with EdgeNode(options) as node, alice_at(node.server) as memory:
        assert (await memory.get_context("t:1", consistency=since(written))).text == "a feeder"


async def test_a_write_on_a_device_is_read_at_the_hub_with_its_token(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        written = await here.set_context(
            "t:1", type="transformer", attributes={"n": 1}, edges=[{"relation": "feeds", "target_id": "b:1"}], text="x"
        )
        found = await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        assert (found.type, found.attributes, found.text) == ("transformer", {"n": 1}, "x")
        assert found.watermark["sub7"] >= written.token["sub7"]
        assert [node.entity_id for node in (await there.traverse("t:1")).nodes] == ["t:1", "b:1"]


async def test_a_token_of_a_site_that_is_not_here_is_stale(hub: HubSite) -> None:
    async with alice_at(hub.server) as memory:
        written = await memory.set_context("t:1", attributes={"n": 1})
        elsewhere = Consistency(level="session", token=written.token | {"nowhere": 1})
        with pytest.raises(Stale):
            await memory.get_context("t:1", consistency=elsewhere, budget_ms=300)


async def test_a_version_counts_the_writes_of_every_site(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        written = await here.set_context("t:1", attributes={"n": 1})
        found = await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        with pytest.raises(MnemeshError, match="not at version 0"):
            await there.set_context("t:1", attributes={"n": 2}, expected_version=0)
        await there.set_context("t:1", attributes={"n": 2}, expected_version=found.version)


async def test_what_was_written_while_the_line_was_cut_comes_once_and_in_order(hub: HubSite, tmp_path: Path) -> None:
    cable = Cable(hub.options.leaf_port)
    async with (
        cable.laid() as port,
        device(hub, tmp_path / "d", line=f"nats://127.0.0.1:{port}") as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        written = await here.set_context("t:1", attributes={"n": 0})
        await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        for n in range(1, 400):
            if n % 100 == 50:
                cable.cut()  # with a batch on its way
            if n % 100 == 99:
                cable.heal()
            written = await here.set_context("t:1", attributes={"n": n})
        await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        assert await counted(there, "t:1") == list(range(400))


async def test_no_batch_is_more_than_a_slow_line_takes_in_a_second(hub: HubSite, tmp_path: Path) -> None:
    """Else it is not acknowledged in time, and keeps pings from the line until the hub drops it."""
    apart = device_options("sub7", tmp_path / "d", "nats://127.0.0.1:1")
    async with EdgeNode(apart) as node, alice_at(node.server) as here:
        for n in range(6):
            written = await here.set_context("t:1", attributes={"n": n}, text="x" * 20_000)
    async with device(hub, tmp_path / "d", uplink_bytes_per_s=50_000), alice_at(hub.server) as there:
        await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        assert await counted(there, "t:1") == list(range(6))
    operator = await Link.open(hub.server.credentials.load("operator").link_options())
    inbox = Inbox(operator)
    await inbox.open()
    fewest_batches, agreed = 3, 1
    fewest_marks = fewest_batches + agreed
    assert (await stream_state(inbox, subjects.log_stream("hub"))).last_sequence >= 6 + fewest_marks
    await operator.close()


async def test_a_hub_that_was_restored_from_a_backup_gets_what_it_lacks(tmp_path: Path) -> None:
    hub = HubSite(tmp_path / "hub")
    async with contextlib.AsyncExitStack() as stack:
        async with hub.up():
            node = await stack.enter_async_context(device(hub, tmp_path / "d"))
            here = await stack.enter_async_context(alice_at(node.server))
            async with alice_at(hub.server) as there:
                written = await here.set_context("t:1", attributes={"n": 0})
                await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        shutil.copytree(tmp_path / "hub", tmp_path / "backup")
        async with hub.up(), alice_at(hub.server) as there:
            written = await here.set_context("t:1", attributes={"n": 1})
            await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        shutil.rmtree(tmp_path / "hub")
        shutil.copytree(tmp_path / "backup", tmp_path / "hub")
        async with hub.up(), alice_at(hub.server) as there:
            await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
            assert await counted(there, "t:1") == [0, 1]


async def test_a_device_whose_log_was_lost_is_told_apart_and_goes_on(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        for n in range(3):
            written = await here.set_context("t:1", attributes={"n": n})
        await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
    shutil.rmtree(tmp_path / "d" / "jetstream")
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        await here.set_context("t:1", attributes={"n": 3})
        written = await here.set_context("t:2", attributes={"n": 0})
        while True:  # its token is below that of the log that was lost
            with contextlib.suppress(NotFound):
                await there.get_context("t:2", consistency=since(written))
                break
        assert await counted(there, "t:1") == [0, 1, 2, 3]


async def test_a_copy_of_a_devices_folder_is_told_so_and_sends_nothing(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        written = await here.set_context("t:1", attributes={"n": 0})
        await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
    shutil.copytree(tmp_path / "d", tmp_path / "copy")
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        written = await here.set_context("t:1", attributes={"n": 1})
        await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
    async with device(hub, tmp_path / "copy") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        await here.set_context("t:1", attributes={"n": 100})
        while "another device sends from a copy of its folder" not in (await status_of(node)).trouble:
            pass
        assert await counted(there, "t:1") == [0, 1]
        assert await counted(here, "t:1") == [0, 100]


async def test_a_folder_that_was_restored_is_told_so_though_what_stood_there_was_erased_since(
    hub: HubSite, tmp_path: Path
) -> None:
    """Else what it wrote since, up to where the hub was, would never be sent, and nobody told."""
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        written = await here.set_context("t:1", attributes={"n": 0})
        await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        shutil.copytree(tmp_path / "d", tmp_path / "backup")
        for number in range(1, 4):
            written = await here.set_context("t:1", attributes={"n": number})
        await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
    shutil.rmtree(tmp_path / "d")
    shutil.copytree(tmp_path / "backup", tmp_path / "d")
    options = device_options("sub7", tmp_path / "d", "nats://127.0.0.1:1")
    async with EdgeNode(options) as node, alice_at(node.server) as here:
        for name in ("t:2", "t:3", "t:4", "t:5"):
            await here.set_context(name, attributes={"n": 5})
        await here.forget("t:4")  # which is where the hub has another event
        async with asking(node.options.server, "test") as asker:
            while written.token["sub7"] in [stored.sequence for stored in await all_of(asker.inbox, "sub7")]:
                pass
    async with device(hub, tmp_path / "d") as node, alice_at(hub.server) as there:
        while "it was restored from an older one" not in (await status_of(node)).trouble:
            pass
        assert await counted(there, "t:1") == [0, 1, 2, 3]


async def all_of(inbox: Inbox, site: str) -> list[Stored]:
    """What a device wrote itself, of its own log."""
    return await history_of(inbox, subjects.log_stream(site), subjects.log_event(site, "*", "*", "*"), upto=1 << 40)


async def test_what_a_device_forgets_the_hub_forgets_of_it(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        await here.set_context("t:1", attributes={"secret": 1})
        written = await here.forget("t:1")
        with pytest.raises(NotFound):
            await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        operator = await Link.open(hub.server.credentials.load("operator").link_options())
        inbox = Inbox(operator)
        await inbox.open()
        events = subjects.log_event("*", TENANT, "*", "*")
        while [*(await counts_of(inbox, subjects.log_stream("hub"), events)).values()] != [1]:
            pass
        await operator.close()


async def test_a_stolen_key_speaks_and_hears_only_for_its_own_device(hub: HubSite, tmp_path: Path) -> None:
    await hub.enrol("sub7", tmp_path / "d")
    async with stolen(hub, tmp_path / "d") as thief, alice_at(hub.server) as there:
        heard: list[str] = []

        async def hear(message: Msg) -> None:
            heard.append(message.subject)

        await thief.subscribe(">", cb=hear)
        while True:  # until the leaf is there: what is its own, it may ask
            with contextlib.suppress(nats.errors.Error):
                asked = await thief.request(subjects.uplink_position("sub7"), b"{}", timeout=1.0)
                break
        assert b"hub" in asked.data
        operator = await Link.open(hub.server.credentials.load("operator").link_options())
        inbox = Inbox(operator)
        await inbox.open()
        streams = (subjects.log_stream("hub"), *(f"KV_{bucket.name}" for bucket in subjects.BUCKETS))
        before = [await stream_state(inbox, stream) for stream in streams]
        heard.clear()
        for subject in (
            subjects.uplink("other"),
            subjects.uplink("hub"),
            subjects.log_event("hub", TENANT, 7, "e"),
            subjects.log_event("sub7", TENANT, 7, "e"),
            subjects.log_mark("sub7"),
            subjects.set_context(TENANT, "alice"),
            subjects.forget(TENANT, "alice"),
            subjects.get_context(TENANT, "alice", "e"),
            subjects.search_embedding(TENANT, "alice"),
            subjects.shard_search("s0", TENANT, "alice"),
            subjects.uplink_position("other"),
            subjects.devices(),
            f"$KV.{subjects.TENANTS.name}.evil",
            f"$JS.API.STREAM.INFO.{subjects.log_stream('hub')}",
            f"$JS.hub.API.STREAM.PURGE.{subjects.log_stream('hub')}",
            "$SYS.REQ.SERVER.PING",
            "$SRV.PING",
        ):
            with pytest.raises(nats.errors.Error):
                await thief.request(subject, b"{}", timeout=0.2)
        assert [await stream_state(inbox, stream) for stream in streams] == before
        # Where a reply is wanted no permission looks at.
        replies = (
            *(f"$KV.{bucket.name}.{key}" for bucket in subjects.BUCKETS for key in ("sub7", "hub", "own", "s0")),
            subjects.log_mark("other"),
            subjects.set_context(TENANT, "alice"),
            f"$JS.API.STREAM.PURGE.{subjects.log_stream('hub')}",
        )
        for reply in replies:
            await thief.publish(subjects.uplink_position("sub7"), b"{}", reply=reply)
        await thief.request(subjects.uplink_position("sub7"), b"{}", timeout=5.0)
        assert [await stream_state(inbox, stream) for stream in streams] == before
        heard.clear()
        written = await there.set_context("t:1", attributes={"n": 1}, vectors={"v": [1.0]})
        await there.get_context("t:1", consistency=since(written))
        await there.search_embedding([1.0], space="v")
        await thief.flush()
        assert set(heard) <= {subjects.device_search("sub7", TENANT, "alice")}  # what its own device is asked
        await operator.close()


async def test_a_leaf_stores_nothing_by_the_reply_subject_of_what_it_may_say(hub: HubSite, tmp_path: Path) -> None:
    """nats-server 2.15 delivers what comes from a leaf under the subject that such a reply subject ends with."""
    await hub.enrol("sub7", tmp_path / "d")
    seed = seed_of(tmp_path / "d")
    reader, writer = await asyncio.open_connection("127.0.0.1", hub.options.leaf_port)
    nonce = json.loads((await reader.readline()).removeprefix(b"INFO "))["nonce"].encode()
    key = SigningKey(base64.b32decode(seed + "=" * (-len(seed) % 8))[2:34])
    signature = base64.urlsafe_b64encode(key.sign(nonce).signature).rstrip(b"=").decode()
    connect = {"nkey": public_of(seed), "sig": signature, "name": "x", "server_id": "N", "headers": True}
    inbox = f"{subjects.edge_inbox('sub7')}.1"
    writer.write(b"CONNECT " + json.dumps(connect).encode() + f"\r\nLS+ {inbox}\r\n".encode())
    victim = subjects.log_event("hub", TENANT, 5, "victim")
    said = [subjects.uplink("sub7"), subjects.uplink_position("sub7"), subjects.hub_get_context("sub7", TENANT, "x")]
    for subject in said:
        writer.write(f"LMSG {subject} $JS.ACK.a.b.c.d.e.f.g@{victim} 2\r\n{{}}\r\n".encode())
    writer.write(f"LMSG {said[1]} {inbox} 2\r\n{{}}\r\n".encode())
    while f"LMSG {inbox} ".encode() not in await reader.readline():
        pass  # so what came before was heard
    writer.close()
    async with asking(hub.options, "test") as operator:
        assert (await stream_state(operator.inbox, subjects.log_stream("hub"))).messages == 0


async def test_a_device_writes_only_for_the_tenants_that_it_was_enrolled_for(hub: HubSite, tmp_path: Path) -> None:
    await hub.enrol("sub7", tmp_path / "d", tenants=[TENANT, "zeta"])
    async with device(hub, tmp_path / "d") as node:
        told = await send(node, event(), event(tenant="zeta"), event(tenant="other"))
        assert [refused.sequence for refused in told.refused] == [3]


async def test_a_revoked_device_is_out_at_once(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        written = await here.set_context("t:1", attributes={"n": 1})
        await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        Devices(hub.options.data).revoke("sub7")
        await shut_out(hub.options)
        await here.set_context("t:2", attributes={"n": 1})
        while (await status_of(node)).linked:
            pass
        with pytest.raises(NotFound):
            await there.get_context("t:2")
        await hub.enrol("sub7", tmp_path / "d")
        await there.get_context("t:1")
        while not (await status_of(node)).linked:
            pass


async def test_a_restarted_hub_finds_the_device_where_it_was(tmp_path: Path) -> None:
    hub = HubSite(tmp_path / "hub")
    async with contextlib.AsyncExitStack() as stack:
        async with hub.up():
            node = await stack.enter_async_context(device(hub, tmp_path / "d"))
            here = await stack.enter_async_context(alice_at(node.server))
            for n in range(10):
                await here.set_context("t:1", attributes={"n": n})
        for n in range(10, 20):
            written = await here.set_context("t:1", attributes={"n": n})
        async with hub.up(), alice_at(hub.server) as there:
            await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
            assert await counted(there, "t:1") == list(range(20))
            link = await Link.open(hub.server.credentials.load("operator").link_options())
            inbox = Inbox(link)
            await inbox.open()
            events = await counts_of(inbox, subjects.log_stream("hub"), subjects.log_event("*", TENANT, "*", "*"))
            assert [*events.values()] == [20]
            await link.close()


def test_a_name_or_a_key_that_is_taken_is_refused(tmp_path: Path) -> None:
    devices = Devices(tmp_path / "hub")
    first, second = (public_of(seed_of(tmp_path / name)) for name in ("a", "b"))
    devices.enrol("sub7", first)
    assert devices.enrol("sub7", first).key == first
    for name, key in (("sub7", second), ("sub8", first)):
        with pytest.raises(MnemeshError, match=r"already: `mnemesh edge revoke sub7` first"):
            devices.enrol(name, key)
    for bad in ("", "U", "nonsense", first[:-1], first[:-1] + ("A" if first[-1] != "A" else "B"), seed_of(tmp_path)):
        with pytest.raises(MnemeshError):
            devices.enrol("sub9", bad)
    devices.revoke("sub7")
    assert devices.enrol("sub7", second).key == second


@pytest.mark.parametrize("policy", [None, "version: 1\nrules: [{type: meter, leaves: nothing}]\n"])
async def test_an_event_that_cannot_be_read_keeps_nothing_from_following_it(
    hub: HubSite, tmp_path: Path, policy: str | None
) -> None:
    async with (
        device(hub, tmp_path / "d", policy=policy) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        gateway = await Link.open(node.server.credentials.load("gateway").link_options())
        inbox = Inbox(gateway)
        await inbox.open()
        subject = subjects.log_event("sub7", TENANT, partition_of_tokens(TENANT, "t1"), "t1")
        stored = json.loads((await inbox.request(subject, b"nonsense", budget_s=5.0)).data)
        while (await status_of(node)).uplinked < stored["seq"]:
            pass
        await gateway.close()
        written = await here.set_context("t2", attributes={"n": 1})
        await there.get_context("t2", consistency=since(written), budget_ms=LONG_MS)
        async with asking(hub.options, "test") as operator:
            told = [finding.what async for finding in check_edge.devices(operator, hub.options)]
        refused = [what for what in told if "1 events of sub7 were refused" in what]
        assert len(refused) == (policy is None)  # else what may leave of it nobody can say


async def test_what_a_device_wrote_in_a_log_that_was_lost_comes_back_as_it_wants_it(
    hub: HubSite, tmp_path: Path
) -> None:
    wants = Interest(wants=[Want(tenant=TENANT)])
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        await here.set_context("gone", attributes={"n": 1})
        await here.forget("gone")
        await here.set_context("t1", attributes={"n": 1, "m": 1})
        written = await here.set_context("t1", attributes={"n": 2})
        await there.get_context("t1", consistency=since(written), budget_ms=LONG_MS)
    for lost in ("jetstream", "shard"):
        shutil.rmtree(tmp_path / "d" / lost)
    cable = Cable(hub.options.leaf_port)
    cable.cut()
    async with (
        cable.laid() as port,
        device(hub, tmp_path / "d", line=f"nats://127.0.0.1:{port}", interest=wants) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await here.set_context("gone", attributes={"n": 3})
        await here.set_context("t1", attributes={"n": 3, "o": 1})
        cable.heal()
        while "o" not in (await there.get_context("t1")).attributes:
            pass
        await current(node)
        cable.cut()
        for memory in (here, there):
            assert (await memory.get_context("t1")).attributes == {"n": 3, "m": 1, "o": 1}
            assert (await memory.get_context("gone")).attributes == {"n": 3}
            assert sorted(await counted(memory, "t1")) == [1, 2, 3]
        assert (await here.get_context("t1")).complete
        assert (await status_of(node)).uplinked == 2


@pytest.mark.parametrize("lost", ["event", "mark"])
async def test_an_event_that_came_alone_comes_once_though_the_line_broke_before_its_mark(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    withheld: list[Outgoing] = []
    publish = Uplinks._publish

    async def losing(self: Uplinks, messages: list[Outgoing]) -> int:
        if len(messages) == 1 and BORN in messages[0].headers and not withheld:
            withheld.extend(messages)
            if lost == "mark":
                await publish(self, messages)
            raise Timeout("the line broke")
        return await publish(self, messages)

    monkeypatch.setattr(Uplinks, "_publish", losing)
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        written = await here.set_context("t1", attributes={"n": 0})
        await there.get_context("t1", consistency=since(written), budget_ms=LONG_MS)
        while (await status_of(node)).uplinked < written.token["sub7"]:
            pass
        async with asking(hub.options, "test") as operator:
            (seen,) = (await operator.ask(subjects.DEVICES, subjects.devices(), AskDevices())).devices
            assert seen.uplinked == written.token["sub7"], "shards of other entities know it by its mark alone"
        async with asking(hub.options, "test", role="hub") as late:
            with pytest.raises(WrongSequence):  # what was on its way all the time comes now
                await publish_all(late.link, late.inbox, withheld, budget_s=5.0)
        written = await here.set_context("t1", attributes={"n": 1})
        await there.get_context("t1", consistency=since(written), budget_ms=LONG_MS)
        async with asking(hub.options, "test") as operator:
            subject = subjects.log_event("sub7", TENANT, "*", "t1")
            assert len(await history_of(operator.inbox, subjects.log_stream("hub"), subject, upto=1 << 40)) == 2


async def test_a_device_that_comes_back_sets_its_mark_anew_as_it_was(hub: HubSite, tmp_path: Path) -> None:
    async def mark() -> Stored:
        async with asking(hub.options, "test") as operator:
            return await last_of(operator.inbox, subjects.log_stream("hub"), subjects.log_mark("sub7"))

    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here:
        written = await here.set_context("t1", attributes={"n": 0})
        while (await status_of(node)).uplinked < written.token["sub7"]:
            pass
    before = await mark()
    async with device(hub, tmp_path / "d") as node:
        while (await status_of(node)).uplinked < written.token["sub7"]:
            pass
        again = await mark()
    assert again.sequence > before.sequence
    assert decode_mark(again.message.data) == decode_mark(before.message.data)
    assert decode_mark(again.message.data).hlc


async def test_a_vector_that_does_not_fit_its_space_at_the_hub_is_left_out_and_that_is_told(
    hub: HubSite, tmp_path: Path
) -> None:
    """Both began the space while they did not hear of each other."""
    options = device_options("sub7", tmp_path / "d", f"nats://127.0.0.1:{hub.options.leaf_port}")
    async with EdgeNode(options) as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        await here.set_context("t:1", attributes={"n": 1}, vectors={"v": [1.0, 0.0, 0.0], "w": [1.0]})
        written = await there.set_context("t:2", attributes={"n": 2}, vectors={"v": [1.0, 0.0]})
        await hub.enrol("sub7", tmp_path / "d")
        last = await here.set_context("t:3", attributes={"n": 3})
        found = await there.get_context("t:1", consistency=since(last), budget_ms=LONG_MS)
        assert (found.attributes, found.spaces) == ({"n": 1}, ["w"])
        hits = (await there.search_embedding([1.0, 0.0], space="v", scope="here", consistency=since(written))).hits
        assert [hit.entity_id for hit in hits] == ["t:2"]
        while not (status := await status_of(node)).refused:
            pass
        assert status.refused == 1
    async with EdgeNode(options) as node, asking(hub.options, "test") as asker:
        while not (await status_of(node)).linked:
            pass
        while not (seen := await asker.ask(subjects.DEVICES, subjects.devices(), AskDevices())).devices:
            pass
        assert ((await status_of(node)).refused, seen.devices[0].refused) == (1, 1)


async def test_a_space_that_a_device_began_has_its_dimension_at_the_hub(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        written = await here.upsert_embedding("t:1", [1.0, 0.0, 0.0], space="v", metric="l2", index="flat")
        await there.get_context("t:1", consistency=since(written), budget_ms=LONG_MS)
        with pytest.raises(BadRequest, match="space 'v' has 3 dimensions; this vector has 2"):
            await there.upsert_embedding("t:2", [1.0, 0.0], space="v")
        assert (await there.upsert_embedding("t:2", [1.0, 0.0, 0.0], space="v", metric="l2", index="flat")).token
