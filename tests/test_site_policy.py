"""What a policy keeps on a device is nowhere at its hub: not on the line, not on the disk, whatever is asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import nats.errors
import numpy as np
import pytest
import pytest_asyncio
from sites import AGENT, TENANT, HubSite, alice_at, current, device, device_options, since, status_of, stolen
from test_hostile_device import event, send

import mnemesh
from bench.cable import Cable
from cli import check_edge
from cli.edge_node import EdgeNode
from cli.main import main
from cli.operator import asking
from cli.server_config import ServerOptions
from edge.confirming import TOLD, Confirming
from edge.uplink import Uplink
from memory_shards.batcher import Batcher
from memory_shards.stores.memory_vectors import MemoryVectors
from memory_shards.stores.sqlite import SqliteStore
from mnemesh import Memory, kv, subjects, wire
from mnemesh.asker import Asker
from mnemesh.call import ERROR_CODE, error_from
from mnemesh.clock import COUNTER_BITS, wall_ms
from mnemesh.connection import Link
from mnemesh.contract import Operation, R
from mnemesh.errors import Conflict, MnemeshError, NotFound
from mnemesh.event import Record
from mnemesh.jetstream import Stored, counts_of
from mnemesh.messages import (
    AskErasures,
    AskPosition,
    Carried,
    Interest,
    NextFeed,
    OpenFeed,
    Receipt,
    SearchEmbedding,
    Traversal,
    Want,
)
from services.site_policy import SiteEntry, SitePolicy

LONG_MS = 30_000
PUBLIC, SECRET = "PUBLIC-BYTES", "PROTECTED-BYTES"
POLICY = """
version: 1
rules:
  - {type: meter, leaves: nothing}
  - {type: forecast, leaves: scores}
  - {type: transformer, leaves: {attributes: [kv], edges: [feeds]}}
"""
NEW = AskPosition()
SECRET_VECTOR = np.array([0.123456, 0.654321, 0.111213], np.float32)


@pytest_asyncio.fixture
async def hub(tmp_path: Path) -> AsyncIterator[HubSite]:
    async with HubSite(tmp_path / "hub", leaf_compression="off").up() as hub:
        yield hub


async def write_all(memory: Memory) -> None:
    """Every kind of write, with what is protected in every part that can hold it."""
    hidden = {
        "attributes": {SECRET: SECRET, "kv": 20, "list": [SECRET, {"deep": SECRET}]},
        "edges": [{"relation": f"r {SECRET}", "target_id": f"t {SECRET}", "properties": {SECRET: SECRET}}],
        "text": f"words {SECRET}",
        "vectors": {"shape": SECRET_VECTOR},
    }
    for n, kind in enumerate(("meter", "forecast", "transformer")):
        name = f"{SECRET}:{kind}" if kind == "meter" else f"{kind}:1"
        await memory.set_context(name, type=kind, **hidden, message_id=f"{SECRET} {n}")  # type: ignore[arg-type]
        await memory.set_context(name, attributes={SECRET: n}, remove_edges=[{"relation": SECRET, "target_id": SECRET}])
        await memory.upsert_embedding(name, SECRET_VECTOR, space="shape", attributes={SECRET: SECRET})
        await memory.ingest([{"entity_id": name, "text": SECRET}] * 2)
    await memory.set_context(f"{SECRET}:meter", type="bus", valid_to=datetime(2000, 1, 1, tzinfo=UTC))
    await memory.set_context(f"{SECRET}:meter", attributes={"more": SECRET})
    await memory.set_context(f"{SECRET}:gone", type="meter", attributes={SECRET: SECRET})
    await memory.set_context(f"{SECRET}:gone", attributes={"more": SECRET})
    await memory.forget(f"{SECRET}:gone", message_id=SECRET)
    await memory.set_context("transformer:1", edges=[{"relation": "feeds", "target_id": "bus:1"}])


async def ask_all(memory: Memory) -> None:
    """Every kind of read, and some that fail."""
    for name in (f"{SECRET}:meter", "forecast:1", "transformer:1", f"{SECRET}:gone"):
        for read in (memory.get_context(name, include_vectors=True), memory.timeline(name)):
            with contextlib.suppress(MnemeshError):
                await read
    for vector in (SECRET_VECTOR, [1.0]):
        for space in ("shape", "nowhere"):
            for filter in ({}, {SECRET: SECRET}, {"kv": 20}):
                with contextlib.suppress(MnemeshError):
                    await memory.search_embedding(
                        vector,
                        space=space,
                        k=50,
                        filter=filter,
                        output_fields=[SECRET, "kv"],
                        include_vectors=True,
                    )
    for words in (SECRET, "words"):
        await memory.search_text(words)
    for start in (f"{SECRET}:meter", "forecast:1", "transformer:1", "bus:1", f"t {SECRET}"):
        for direction in ("out", "in", "both"):
            await memory.traverse(start, depth=3, direction=direction)  # type: ignore[arg-type]
    await memory.timeline(limit=1000)


def on_disk(folder: Path, wanted: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and wanted in path.read_bytes()]


async def test_no_protected_byte_is_on_the_line_or_on_the_hubs_disk(hub: HubSite, tmp_path: Path) -> None:
    sent = bytearray()
    cable = Cable(hub.options.leaf_port, tap=sent)
    async with (
        cable.laid() as port,
        device(
            hub,
            tmp_path / "d",
            line=f"nats://127.0.0.1:{port}",
            policy=POLICY,
            interest=Interest(wants=[Want(tenant=TENANT)]),
        ) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await write_all(here)
        written = await here.set_context("bus:1", type="bus", attributes={"note": PUBLIC})
        found = await there.get_context("bus:1", consistency=since(written), budget_ms=LONG_MS)
        assert found.attributes == {"note": PUBLIC}
        transformer = await there.get_context("transformer:1")
        assert (transformer.type, transformer.attributes, transformer.text) == ("transformer", {"kv": 20}, None)
        assert [edge["relation"] for edge in transformer.edges] == ["feeds"]
        for kept in (f"{SECRET}:meter", "forecast:1"):
            with pytest.raises(NotFound):
                await there.get_context(kept)
        await current(node)
        line_before = bytes(sent)
        assert SECRET.encode() not in line_before
        await ask_all(here)
        await until_answered(there)
        sent_before_questions = len(sent)
        await ask_all(there)
        assert len(sent) > sent_before_questions  # the device was asked, and answered
    assert PUBLIC.encode() in sent
    assert on_disk(tmp_path / "hub", PUBLIC.encode())
    for protected in (SECRET.encode(), SECRET_VECTOR.tobytes()):
        assert protected not in line_before
        assert on_disk(tmp_path / "d", protected)
        assert not on_disk(tmp_path / "hub", protected)


async def test_what_is_kept_from_the_hub_is_read_on_the_device_while_the_line_is_up(
    hub: HubSite, tmp_path: Path
) -> None:
    async with (
        device(hub, tmp_path / "d", policy=POLICY) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        of_each = {
            "meter:1": await here.set_context("meter:1", type="meter", attributes={"kv": 1, SECRET: 2}),
            "transformer:1": await here.set_context(
                "transformer:1", type="transformer", attributes={"kv": 1, SECRET: 2}
            ),
            "bus:1": await here.set_context("bus:1", type="bus", attributes={"kv": 1, SECRET: 2}),
        }
        await there.get_context("bus:1", consistency=since(of_each["bus:1"]), budget_ms=LONG_MS)
        while not (await status_of(node)).linked:
            pass
        for name, written in of_each.items():
            found = await here.get_context(name, consistency=since(written))
            assert (found.attributes, found.complete) == ({"kv": 1, SECRET: 2}, name == "bus:1")


async def test_what_a_walk_reaches_over_protected_edges_is_not_asked_elsewhere(hub: HubSite, tmp_path: Path) -> None:
    sent = bytearray()
    cable = Cable(hub.options.leaf_port, tap=sent)
    async with (
        cable.laid() as port,
        device(hub, tmp_path / "d", line=f"nats://127.0.0.1:{port}", policy=POLICY) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await there.set_context("bus:1", type="bus", edges=[{"relation": "feeds", "target_id": "bus:2"}])
        await there.set_context("bus:2", type="bus", edges=[{"relation": "feeds", "target_id": "bus:3"}])
        await here.set_context(f"customer:{SECRET}", type="meter", edges=[{"relation": "at", "target_id": "home:1"}])
        serves = [{"relation": "serves", "target_id": f"customer:{SECRET}"}]
        written = await here.set_context("meter:1", type="meter", edges=serves)
        await here.set_context("open:1", edges=[{"relation": "at", "target_id": "bus:1"}])
        await current(node)
        while "bus:3" not in (found := await walked(here, "open:1")).reached:
            pass
        assert not found.restricted
        sent.clear()
        for direction in ("out", "in", "both"):
            found = await walked(here, "meter:1", direction=direction, consistency=since(written))
            while found.site != "answered":
                found = await walked(here, "meter:1", direction=direction, consistency=since(written))
            assert found.restricted == (direction != "in")
        assert b"meter:1" in sent  # the agent named it
        for protected in (SECRET, "home:1"):
            assert protected.encode() not in sent


class Walked(NamedTuple):
    reached: list[str]
    site: str
    restricted: bool


async def walked(memory: Memory, start: str, **how: Any) -> Walked:
    found = await memory.traverse(start, depth=4, **how)
    (site,) = found.coverage.sites or [None]
    return Walked([node.entity_id for node in found.nodes], site.state if site else "", found.restricted)


async def test_what_waits_for_a_device_does_not_leave_once_the_policy_keeps_it_back(
    hub: HubSite, tmp_path: Path
) -> None:
    await hub.enrol("sub7", tmp_path / "d")
    many = 8
    async with (
        alice_at(hub.server) as there,
        asking(hub.options, "test") as operator,
        stolen(hub, tmp_path / "d") as device,
    ):
        for n in range(many):
            await there.set_context(f"meter:{n}", type="meter", text="x" * 300_000)

        async def ask(operation: Operation[Any, R], subject: str, asked: object) -> R:
            while True:  # until the leaf is there
                with contextlib.suppress(nats.errors.Error):
                    message = await device.request(subject, wire.encode(asked), timeout=5.0)
                    code = (message.headers or {}).get(ERROR_CODE)
                    if code is not None:
                        raise error_from(code, wire.decode(message.data))
                    return wire.decode_as(message.data, operation.reply)

        wants = OpenFeed(session="s", interest=Interest(wants=[Want(tenant=TENANT)]))
        await ask(subjects.OPEN_FEED, subjects.open_feed("sub7"), wants)
        first = await ask(subjects.NEXT_FEED, subjects.next_feed("sub7"), NextFeed(session="s", turn=1))
        assert 0 < len([item for item in first.items if isinstance(item, Carried)]) < many
        await kv.put(operator.inbox, subjects.POLICIES.name, "own", POLICY.encode())
        follows = NextFeed(session="s", turn=2)
        with pytest.raises(Conflict, match="has changed"):
            await ask(subjects.NEXT_FEED, subjects.next_feed("sub7"), follows)


async def test_what_waits_for_the_uplink_does_not_leave_once_the_policy_keeps_it_back(
    hub: HubSite, tmp_path: Path
) -> None:
    """On a slow line a batch that was read is on its way for long."""
    many = 12
    async with (
        EdgeNode(device_options("sub7", tmp_path / "d", "nats://127.0.0.1:1")) as node,
        alice_at(node.server) as here,
    ):
        for n in range(many):
            written = await here.set_context(f"meter:{n}", type="meter", text="x" * 20_000)
    async with device(hub, tmp_path / "d", uplink_bytes_per_s=50_000) as node, alice_at(hub.server) as there:
        while (await status_of(node)).uplinked < 2:
            pass
        async with asking(node.options.server, "test") as operator:
            await kv.put(operator.inbox, subjects.POLICIES.name, "own", POLICY.encode())
        with pytest.raises(NotFound):
            await there.get_context(f"meter:{many - 1}", consistency=since(written), budget_ms=LONG_MS)


async def until_answered(memory: Memory) -> None:
    """Once the hub's router asks the device."""
    while True:
        with contextlib.suppress(NotFound):  # as long as no site is known that may have such a space
            found = await memory.search_embedding(SECRET_VECTOR, space="shape")
            assert found.coverage is not None
            if found.hits:
                assert [hit.entity_id for hit in found.hits] == ["forecast:1", "transformer:1"]
                return


async def test_a_hub_hands_its_policy_to_devices_before_they_send_and_their_own_copy_wins(
    hub: HubSite, tmp_path: Path
) -> None:
    async with asking(hub.options, "test") as asker:
        await kv.put(asker.inbox, subjects.POLICIES.name, "own", b"version: 7\notherwise: nothing\n")
    async with alice_at(hub.server) as there:
        async with device(hub, tmp_path / "a", name="a") as node, alice_at(node.server) as here:
            await here.set_context("e1", attributes={"n": 1})
            written = await here.set_context("e2", attributes={"n": 1})
            with pytest.raises(NotFound):  # the token is reached, for the mark passes over what is kept back
                await there.get_context("e2", consistency=since(written), budget_ms=LONG_MS)
        open_copy = "version: 1\notherwise: all\n"
        async with device(hub, tmp_path / "b", name="b", policy=open_copy) as node, alice_at(node.server) as here:
            written = await here.set_context("e3", attributes={"n": 1})
            await there.get_context("e3", consistency=since(written), budget_ms=LONG_MS)


async def test_devices_take_what_their_hub_hands_whatever_version_they_had(hub: HubSite, tmp_path: Path) -> None:
    async def policy(*verb: str) -> None:
        assert await asyncio.to_thread(main, ["policy", *verb, "--data", str(tmp_path / "hub")]) == 0

    async def handed(text: str) -> None:
        while await kv.get(asker.inbox, subjects.POLICIES.name, "handed") != text.encode():
            pass

    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("version: 5\n")
    new.write_text("version: 1\notherwise: nothing\n")
    await policy("set", str(old))
    async with device(hub, tmp_path / "d") as node, asking(node.options.server, "test") as asker:
        await handed(old.read_text())
        await policy("rm")
        await handed("version: 6\notherwise: all\n")
        async with asking(hub.options, "test") as operator:  # as in a hub that was made anew
            await kv.delete(operator.inbox, subjects.POLICIES.name, "own")
        await policy("set", str(new))
        await handed(new.read_text())


async def test_a_device_keeps_the_policy_that_it_was_handed_where_its_hub_has_none_any_more(
    hub: HubSite, tmp_path: Path
) -> None:
    await set_policy(hub.options, POLICY)
    async with alice_at(hub.server) as there:
        async with device(hub, tmp_path / "d") as node, asking(node.options.server, "test") as asker:
            while not await kv.get(asker.inbox, subjects.POLICIES.name, "handed"):
                pass
        async with asking(hub.options, "test") as operator:  # as in a hub that was made anew
            await kv.delete(operator.inbox, subjects.POLICIES.name, "own")
        async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here:
            await here.set_context("meter:1", type="meter", attributes={"n": 1})
            written = await here.set_context("bus:1", attributes={"n": 1})
            await there.get_context("bus:1", consistency=since(written), budget_ms=LONG_MS)
            with pytest.raises(NotFound):
                await there.get_context("meter:1")


async def test_what_a_hub_keeps_back_its_devices_do_not_get(hub: HubSite, tmp_path: Path) -> None:
    async with asking(hub.options, "test") as asker:
        await kv.put(asker.inbox, subjects.POLICIES.name, "own", POLICY.encode())
    own_copy = "version: 1\notherwise: all\n"
    everything = Interest(wants=[Want(tenant=TENANT)])
    async with (
        device(hub, tmp_path / "d", policy=own_copy, interest=everything) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await write_all(there)
        await there.set_context("bus:1", attributes={"note": PUBLIC})
        await until_public(here)
        await current(node)
        await ask_all(here)
        transformer = await here.get_context("transformer:1")
        assert transformer.attributes == {"kv": 20}
        with pytest.raises(MnemeshError):
            await here.get_context("forecast:1")
    assert on_disk(tmp_path / "d", PUBLIC.encode())
    assert not on_disk(tmp_path / "d" / "shard", SECRET.encode())
    assert not on_disk(tmp_path / "d" / "jetstream", SECRET.encode())


NORTH_STAYS = "version: 1\nrules: [{region: north, type: meter, leaves: nothing}]\n"


async def set_policy(site: ServerOptions, text: str) -> None:
    async with asking(site, "test") as operator:
        await kv.put(operator.inbox, subjects.POLICIES.name, "own", text.encode())


async def test_what_a_region_keeps_back_it_keeps_back_of_a_device_that_was_revoked(
    hub: HubSite, tmp_path: Path
) -> None:
    await set_policy(hub.options, NORTH_STAYS)
    await hub.enrol("sub7", tmp_path / "d", region="north")
    open_copy = "version: 1\notherwise: all\n"
    async with alice_at(hub.server) as there:
        async with device(hub, tmp_path / "d", policy=open_copy) as node, alice_at(node.server) as here:
            written = await here.set_context("meter:1", type="meter", attributes={SECRET: 1})
            await there.get_context("meter:1", consistency=since(written), budget_ms=LONG_MS)
        assert await asyncio.to_thread(main, ["edge", "revoke", "sub7", "--data", str(tmp_path / "hub")]) == 0
        everything = Interest(wants=[Want(tenant=TENANT)])
        async with device(hub, tmp_path / "o", name="o", interest=everything) as node, alice_at(node.server) as here:
            await there.set_context("bus:1", attributes={"note": PUBLIC})
            await until_public(here)
            await current(node)
            with pytest.raises(MnemeshError):
                await here.get_context("meter:1")
    assert on_disk(tmp_path / "o", PUBLIC.encode())
    assert not on_disk(tmp_path / "o", SECRET.encode())


@pytest.mark.parametrize(("said_here", "said_at_hub"), [("", "north"), ("south", "north"), ("north", "south")])
async def test_a_device_judges_by_the_region_that_its_hub_says_and_by_its_own(
    hub: HubSite, tmp_path: Path, said_here: str, said_at_hub: str
) -> None:
    await set_policy(hub.options, NORTH_STAYS)
    await hub.enrol("sub7", tmp_path / "d", region=said_at_hub)
    async with (
        device(hub, tmp_path / "d", region=said_here) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await here.set_context("meter:1", type="meter", attributes={"n": 1})
        written = await here.set_context("bus:1", attributes={"n": 1})
        await there.get_context("bus:1", consistency=since(written), budget_ms=LONG_MS)
        with pytest.raises(NotFound):
            await there.get_context("meter:1")


async def test_a_device_knows_while_it_is_cut_off_what_its_hub_said_of_it(hub: HubSite, tmp_path: Path) -> None:
    await hub.enrol("sub7", tmp_path / "d", region="north", tenants=[TENANT])
    async with device(hub, tmp_path / "d") as node:
        while not (await status_of(node)).linked:
            pass
    apart = device_options("sub7", tmp_path / "d", "nats://127.0.0.1:1")
    async with EdgeNode(apart), asking(apart.server, "test", role="edge") as asker:
        policy = SitePolicy("sub7")
        following = asyncio.create_task(policy.follow(asker.link, asker.inbox))
        await policy.ready()
        assert policy.regions_of("sub7") == {"north"}
        assert policy.enrolled == SiteEntry("north", [TENANT])
        following.cancel()


async def test_what_a_device_has_of_tenants_that_it_was_not_enrolled_for_stays_there(
    hub: HubSite, tmp_path: Path
) -> None:
    await hub.enrol("sub7", tmp_path / "d", tenants=[TENANT])
    own = {"tenants": [TENANT, "zeta"], "agents": [AGENT, ("zeta", "alice")]}
    async with device(hub, tmp_path / "d", **own) as node, alice_at(hub.server) as there:
        async with mnemesh.connect(credentials=node.server.credentials.load("zeta.alice").path) as other:
            await other.set_context("e1", attributes={SECRET: 1})
            await other.set_context("e2", attributes={SECRET: 1})
            await other.forget("e2")
        async with alice_at(node.server) as here:
            written = await here.set_context("bus:1", attributes={"note": PUBLIC})
        found = await there.get_context("bus:1", consistency=since(written), budget_ms=LONG_MS)
        assert found.attributes == {"note": PUBLIC}
        assert (await status_of(node)).untold == ["zeta"]
        async with asking(node.options.server, "test") as operator:
            told = [finding.what async for finding in check_edge.hub(operator, node.options.server)]
        assert "what is written here of zeta stays here: this device was not enrolled for that" in told
        async with asking(hub.options, "test") as operator:
            log = subjects.log_stream("hub")
            assert not await counts_of(operator.inbox, log, subjects.log_event("*", "zeta", "*", "*"))


async def forget_a_meter(memory: Memory) -> None:
    await memory.set_context("meter:1", type="meter", attributes={"n": 1})
    await memory.forget("meter:1")


async def assert_not_confirmed(hub: HubSite, node: EdgeNode) -> None:
    """The device has gone through its receipts, and of none of them its hub has heard."""
    bucket = subjects.RECEIPTS.name
    async with asking(node.options.server, "test") as asker:
        while not await kv.get(asker.inbox, bucket, TOLD):
            pass
        (receipt,) = [key for key in await kv.keys(asker.inbox, bucket) if key.endswith(".sub7")]
    async with asking(hub.options, "test") as operator:
        assert receipt not in await kv.keys(operator.inbox, bucket)


async def test_a_receipt_that_waits_does_not_leave_once_the_policy_keeps_it_back(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell, waits = Confirming._tell, asyncio.Event()

    async def noted(self: Confirming, receipts: list[Receipt]) -> None:
        waits.set()
        await tell(self, receipts)

    monkeypatch.setattr(Confirming, "_tell", noted)
    cable = Cable(hub.options.leaf_port)
    async with (
        cable.laid() as port,
        device(hub, tmp_path / "d", line=f"nats://127.0.0.1:{port}") as node,
        alice_at(node.server) as here,
    ):
        while not (await status_of(node)).linked:
            pass
        cable.cut()
        await forget_a_meter(here)
        await waits.wait()
        await set_policy(node.options.server, POLICY)
        cable.heal()
        await assert_not_confirmed(hub, node)


async def test_no_receipt_leaves_before_the_hub_has_handed_its_policy(hub: HubSite, tmp_path: Path) -> None:
    async with (
        EdgeNode(device_options("sub7", tmp_path / "d", "nats://127.0.0.1:1")) as node,
        alice_at(node.server) as here,
        asking(node.options.server, "test") as asker,
    ):
        await forget_a_meter(here)
        while not [key for key in await kv.keys(asker.inbox, subjects.RECEIPTS.name) if key.endswith(".sub7")]:
            pass
    await set_policy(hub.options, POLICY)
    async with device(hub, tmp_path / "d") as node:
        await assert_not_confirmed(hub, node)


async def test_patches_and_forgets_that_name_no_type_reach_devices_where_all_but_one_type_stays(
    hub: HubSite, tmp_path: Path
) -> None:
    async with asking(hub.options, "test") as asker:
        text = b"version: 1\nrules: [{type: bus, leaves: all}]\notherwise: nothing\n"
        await kv.put(asker.inbox, subjects.POLICIES.name, "own", text)
    async with (
        device(hub, tmp_path / "d", interest=Interest(wants=[Want(tenant=TENANT)])) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await there.set_context("bus:1", type="bus", attributes={"note": "old"})
        await current(node)
        written = await there.set_context("bus:1", attributes={"note": PUBLIC})
        found = await here.get_context("bus:1", consistency=since(written), budget_ms=LONG_MS)
        assert found.attributes == {"note": PUBLIC}
        forgotten = await there.forget("bus:1")
        with pytest.raises(NotFound):
            await here.get_context("bus:1", consistency=since(forgotten), budget_ms=LONG_MS)


async def until_public(memory: Memory) -> None:
    while True:
        with contextlib.suppress(MnemeshError):
            if (await memory.get_context("bus:1")).attributes:
                return


@pytest.mark.parametrize(
    ("text", "says"), [("rules: 7", "version"), ("version: 1\notherwise: some", "some"), ("{", "YAML")]
)
def test_a_policy_that_is_none_is_named(
    tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    assert main(["policy", "set", str(file), "--data", str(tmp_path)]) == 1
    assert says in capsys.readouterr().err
    assert main(["edge", "up", "--site", "a", "--hub", "nats://x", "--policy", str(file)]) == 1


@pytest.mark.parametrize(
    ("interest", "says"),
    [
        ({"wants": [{"tenant": "a", "hops": 2}]}, "hops"),
        ({"wants": [{"types": ["x"]}]}, "tenant"),
        ({"wants": [], "most_entites": 3}, "most_entites"),
    ],
)
def test_an_interest_that_cannot_be_is_named(
    tmp_path: Path, interest: object, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "interest.json"
    file.write_text(json.dumps(interest))
    assert main(["edge", "up", "--site", "a", "--hub", "nats://x", "--interest", str(file)]) == 1
    assert says in capsys.readouterr().err


async def test_a_device_does_not_lift_the_policy_of_its_hub_by_another_type(hub: HubSite, tmp_path: Path) -> None:
    """Be that the newest, or one that loses: what the hub kept back stays, and what is written later."""
    async with asking(hub.options, "test") as asker:
        await kv.put(asker.inbox, subjects.POLICIES.name, "own", POLICY.encode())
    async with (
        device(hub, tmp_path / "d", interest=Interest(wants=[Want(tenant=TENANT)])) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        for n, kind in enumerate(("meter", "transformer")):
            name = f"{kind}1"
            await there.set_context(name, type=kind)
            await there.set_context(name, attributes={SECRET: n}, message_id=str(n))
        await current(node)
        now = wall_ms() << COUNTER_BITS
        for name, hlc in ("meter1", now), ("transformer1", 1):
            told = event(name, id=name, hlc=hlc, body={"type": "x"})
            await send(node, told)
        for name in ("meter1", "transformer1"):
            await there.set_context(name, attributes={SECRET: 7, "kv": 20})
        written = await there.set_context("bus:1", type="bus")
        await here.get_context("bus:1", consistency=since(written), budget_ms=LONG_MS)
        await ask_all(here)
        assert (await here.get_context("transformer1")).attributes == {"kv": 20}
        with pytest.raises(MnemeshError):
            await here.get_context("meter1")
    assert not on_disk(tmp_path / "d" / "shard", SECRET.encode())
    assert not on_disk(tmp_path / "d" / "jetstream", SECRET.encode())


async def test_what_waits_for_the_uplink_does_not_leave_once_its_type_keeps_it_back_or_it_is_forgotten(
    hub: HubSite, tmp_path: Path
) -> None:
    many = 12
    async with (
        EdgeNode(device_options("sub7", tmp_path / "d", "nats://127.0.0.1:1")) as node,
        alice_at(node.server) as here,
    ):
        for n in range(many):
            words = PUBLIC if n < many - 2 else SECRET
            await here.set_context(f"bus:{n}", type="bus", text=f"{words} {'x' * 20_000}")
    async with (
        device(hub, tmp_path / "d", uplink_bytes_per_s=50_000, policy=POLICY) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        while (await status_of(node)).uplinked < 2:
            pass
        await here.forget(f"bus:{many - 2}")
        written = await here.set_context(f"bus:{many - 1}", type="meter")
        for n in (many - 2, many - 1):
            with pytest.raises(NotFound):
                await there.get_context(f"bus:{n}", consistency=since(written), budget_ms=LONG_MS)
    assert on_disk(tmp_path / "hub", PUBLIC.encode())
    assert not on_disk(tmp_path / "hub", SECRET.encode())


async def test_a_policy_that_the_hub_hands_while_a_batch_is_judged_holds_for_it(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The uplink asks where its clock was set, and what it is told may be a stricter policy."""
    judge = Uplink._leaving

    async def judge_before_the_policy_is_set(self: Uplink, own: Sequence[Stored]) -> list[Any]:
        leaving = await judge(self, own)
        async with asking(hub.options, "test") as operator:
            await kv.put(operator.inbox, subjects.POLICIES.name, "own", b"version: 7\notherwise: nothing\n")
        while not (await self._asker.ask(subjects.UPLINK_POSITION, subjects.uplink_position("sub7"), NEW)).policy:
            pass
        return leaving

    monkeypatch.setattr(Uplink, "_leaving", judge_before_the_policy_is_set)
    monkeypatch.setattr(Uplink, "_clock_was_set", lambda self: True)
    async with device(hub, tmp_path / "d") as node, alice_at(node.server) as here, alice_at(hub.server) as there:
        written = await here.set_context("e1", attributes={"n": 1})
        with pytest.raises(NotFound):
            await there.get_context("e1", consistency=since(written), budget_ms=LONG_MS)


async def test_a_forget_of_what_the_hub_wrote_reaches_it_whatever_the_device_keeps_back(
    hub: HubSite, tmp_path: Path
) -> None:
    """So does the receipt. Of what the device alone wrote the hub hears nothing."""
    everything = Interest(wants=[Want(tenant=TENANT)])
    async with (
        device(hub, tmp_path / "d", policy=POLICY, interest=everything) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        told = await there.set_context("meter:1", type="meter", attributes={"n": 1})
        await here.get_context("meter:1", consistency=since(told), budget_ms=LONG_MS)
        await here.set_context(f"{SECRET}:1", type="meter")
        await here.forget(f"{SECRET}:1")
        forgotten = await here.forget("meter:1")
        with pytest.raises(NotFound):
            await there.get_context("meter:1", consistency=since(forgotten), budget_ms=LONG_MS)
        async with asking(hub.options, "test") as asker:
            receipts: set[str] = set()
            while receipts != {"hub", "sub7"}:
                asked = AskErasures(tenant=TENANT, entity_id="meter:1")
                erasures = (await asker.ask(subjects.ERASURES, subjects.erasures(), asked)).erasures
                receipts = {receipt.site for erasure in erasures for receipt in erasure.receipts}
    assert not on_disk(tmp_path / "hub", SECRET.encode())


async def test_a_walk_that_is_told_to_another_site_does_not_count_what_is_kept_back(
    hub: HubSite, tmp_path: Path
) -> None:
    async with asking(hub.options, "test") as asker:
        await kv.put(asker.inbox, subjects.POLICIES.name, "own", POLICY.encode())

    async def walked(memory: Memory, start: str, limit: int) -> Traversal:
        while True:
            found = await memory.traverse(start, limit=limit)
            if [site.state for site in found.coverage.sites] == ["answered"]:
                return found

    async with (
        device(hub, tmp_path / "d") as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        meters = [f"meter:{n}" for n in range(9)]
        for name in meters:
            await there.set_context(name, type="meter", edges=[{"relation": "serves", "target_id": "x"}])
        targets = [*meters, "y", "z"]
        edges = [{"relation": "feeds", "target_id": target} for target in targets]
        written = await there.set_context("bus:1", type="bus", edges=edges)
        await there.get_context("bus:1", consistency=since(written), budget_ms=LONG_MS)
        for limit, nodes, truncated in (1, [], True), (2, ["y"], True), (3, ["y", "z"], False), (9, ["y", "z"], False):
            found = await walked(here, "bus:1", limit)
            assert ([node.entity_id for node in found.nodes], found.truncated) == (["bus:1", *nodes], truncated)
        found = await walked(here, "meter:1", 1)
        assert ([node.entity_id for node in found.nodes], found.truncated) == (["meter:1"], False)


async def test_a_search_that_sees_what_was_written_while_it_waited_asks_for_the_types_as_of_then(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the vectors, which are ahead of the documents then; and these know the types."""
    applying, vectors_may, documents_may = threading.Event(), threading.Event(), threading.Event()
    vectors_in, documents_in, ask = MemoryVectors.apply, SqliteStore.apply, Batcher.ask

    def is_held_up(records: Sequence[Record]) -> bool:
        return any((record.event.site, record.event.entity_id) == ("hub", "meter1") for record in records)

    def apply_vectors(self: MemoryVectors, records: Sequence[Record], watermark: int) -> None:
        if is_held_up(records):
            applying.set()
            vectors_may.wait()
        vectors_in(self, records, watermark)

    def apply_documents(self: SqliteStore, records: Sequence[Record], watermark: int) -> None:
        if is_held_up(records):
            documents_may.wait()
        documents_in(self, records, watermark)

    async def asks(self: Batcher[Any, Any], query: Any) -> Any:
        if applying.is_set():
            vectors_may.set()
        return await ask(self, query)

    monkeypatch.setattr(MemoryVectors, "apply", apply_vectors)
    monkeypatch.setattr(SqliteStore, "apply", apply_documents)
    monkeypatch.setattr(Batcher, "ask", asks)
    async with asking(hub.options, "test") as asker:
        await kv.put(asker.inbox, subjects.POLICIES.name, "own", POLICY.encode())
    async with device(hub, tmp_path / "d") as node, alice_at(hub.server) as there:
        question = SearchEmbedding(vector=SECRET_VECTOR, space="shape")
        subject = subjects.hub_search("sub7", TENANT, "alice")
        written = await there.set_context("bus1", type="bus", vectors={"shape": SECRET_VECTOR})
        await there.get_context("bus1", consistency=since(written), budget_ms=LONG_MS)
        while not (await status_of(node)).linked:
            pass
        link = await Link.open(node.server.credentials.load("edge").link_options())
        try:
            edge = await Asker(link).open()
            await there.set_context("meter1", type="meter", vectors={"shape": SECRET_VECTOR})
            await asyncio.to_thread(applying.wait)
            with pytest.raises(MnemeshError):
                await edge.ask(subjects.HUB_SEARCH, subject, question, budget_s=1.0)
            documents_may.set()
            found = await edge.ask(subjects.HUB_SEARCH, subject, question, budget_s=LONG_MS / 1000)
            assert [hit.entity_id for hit in found.hits] == ["bus1"]
        finally:
            vectors_may.set()
            documents_may.set()
            await link.close()


async def test_what_is_forgotten_and_comes_back_as_another_type_is_fed_by_that_alone(
    hub: HubSite, tmp_path: Path
) -> None:
    async with asking(hub.options, "test") as asker:
        await kv.put(asker.inbox, subjects.POLICIES.name, "own", POLICY.encode())
    async with (
        device(hub, tmp_path / "d", interest=Interest(wants=[Want(tenant=TENANT)])) as node,
        alice_at(node.server) as here,
        alice_at(hub.server) as there,
    ):
        await there.set_context("e1", type="transformer", attributes={"kv": 20, SECRET: 1})
        await current(node)
        await there.forget("e1")
        await there.set_context("e1", type="bus", attributes={"note": PUBLIC})
        written = await there.set_context("e1", attributes={"more": PUBLIC})
        found = await here.get_context("e1", consistency=since(written), budget_ms=LONG_MS)
        assert (found.type, found.attributes) == ("bus", {"note": PUBLIC, "more": PUBLIC})
