"""What a device says of its own under its own name is not believed where it can harm others."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nats.errors
import pytest
from sites import TENANT, HubSite, alice_at, device, since, status_of, stolen

from cli.edge_node import EdgeNode
from cli.operator import asking
from mnemesh import Memory, subjects
from mnemesh.asker import Asker
from mnemesh.atomic_batch import BATCH_ID, BATCH_SEQUENCE
from mnemesh.connection import Link, Message
from mnemesh.errors import NotFound, Unavailable
from mnemesh.event import Event
from mnemesh.ids import partition_of_tokens
from mnemesh.inbox import Inbox
from mnemesh.jetstream import ALL, JetStreamError, check, history_of
from mnemesh.messages import AskDevices, AskErasures, ConfirmErased, Erasure, Interest, Receipt, Want
from mnemesh.origin import BORN, FORGETS, Mark

LONG_MS = 30_000
EVERYTHING = Interest(wants=[Want(tenant=TENANT)])
NO_HEADERS: Mapping[str, str] = {}


async def send(node: EdgeNode, subject: str, payload: bytes, headers: Mapping[str, str] = NO_HEADERS) -> Message:
    """Send as the device's edge, once its leaf is there; returns what the hub's log answers."""
    link = await Link.open(node.server.credentials.load("edge").link_options())
    try:
        inbox = Inbox(link)
        await inbox.open()
        while True:
            with contextlib.suppress(Unavailable):
                return await inbox.request(subject, payload, budget_s=5.0, headers=dict(headers))
    finally:
        await link.close()


def event(entity: str = "t1", **said: Any) -> bytes:
    told = {"id": "1", "op": "put", "agent": "x", "hlc": 1, "site": "sub7", "tenant": TENANT, "entity_id": entity}
    return Event(**(told | {"body": {"attributes": {"n": 1}}} | said)).encode()


def uplink(entity: str = "t1", tenant: str = TENANT) -> str:
    return subjects.uplink_event("sub7", tenant, partition_of_tokens(tenant, entity), entity)


NUMBERS: list[dict[str, Any]] = [
    {"hlc": (1 << 63) + 5},
    {"hlc": (1 << 64) - 1},
    {"saw": 1 << 63},
    {"valid_from": 1 << 63},
]


async def assert_goes_on(memory: Memory) -> None:
    """The hub's stores still take what comes."""
    written = await memory.set_context("t2", attributes={"n": 1}, vectors={"v": [1.0]})
    await memory.get_context("t2", consistency=since(written), budget_ms=LONG_MS)
    assert (await memory.search_embedding([1.0], space="v", consistency=since(written), budget_ms=LONG_MS)).hits


@pytest.mark.parametrize("said", NUMBERS, ids=str)
async def test_a_number_that_no_store_can_hold_is_skipped(hub: HubSite, tmp_path: Path, said: dict[str, Any]) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(hub.server) as there:
        await send(node, uplink(), event(**said), {BORN: "1 x"})
        await assert_goes_on(there)


@pytest.mark.parametrize("born", ["9" * 70 + " x", f"{1 << 64} x", "", "-1 x"])
async def test_a_birth_that_cannot_be_is_skipped(hub: HubSite, tmp_path: Path, born: str) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(hub.server) as there:
        await send(node, uplink(), event(), {BORN: born})
        await assert_goes_on(there)
        with pytest.raises(NotFound):
            await there.get_context("t1")


@pytest.mark.parametrize("mark", [b"nonsense", b"", Mark(incarnation="x" * 300, sequence=1).encode()])
async def test_a_mark_that_is_none_harms_no_other_device(tmp_path: Path, mark: bytes) -> None:
    hub = HubSite(tmp_path / "hub")
    async with (
        contextlib.AsyncExitStack() as stack,
        hub.up(),
        device(hub, tmp_path / "other", name="other", interest=EVERYTHING) as other,
        alice_at(other.server) as here,
        alice_at(hub.server) as there,
    ):
        node = await stack.enter_async_context(device(hub, tmp_path / "d"))
        await send(node, subjects.uplink_mark("sub7"), mark)
        written = await there.set_context("t2", attributes={"n": 1})
        while not (await status_of(other)).downlinked >= written.token["hub"]:
            pass
        assert (await here.get_context("t2")).attributes == {"n": 1}
        async with asking(hub.options, "test") as asker:
            seen = (await asker.ask(subjects.DEVICES, subjects.devices(), AskDevices())).devices
        assert {told.site for told in seen} == {"other", "sub7"}
        memory = await stack.enter_async_context(alice_at(node.server))
        written = await memory.set_context("t3", attributes={"n": 1})
        assert (await there.get_context("t3", consistency=since(written), budget_ms=LONG_MS)).attributes == {"n": 1}


async def test_a_forget_that_names_another_entity_than_its_subject_erases_neither(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(hub.server) as there:
        await there.set_context("victim", attributes={"n": 1})
        forget = event("nobody", op="forget", body={})
        await send(node, uplink("victim"), forget, {BORN: "1 x", FORGETS: "1"})
        last = await there.forget("another")
        async with asking(hub.options, "test") as asker:
            while not [told for told in await erasures(asker) if told.sequence == last.token["hub"]]:
                pass
            of_it = subjects.log_event("hub", TENANT, "*", "victim")
            assert len(await history_of(asker.inbox, subjects.log_stream("hub"), of_it, upto=last.token["hub"])) == 1


@pytest.mark.parametrize("status", ["1", "100", "204", "404", "503"])
async def test_a_header_that_is_called_status_stops_nobody_who_reads_the_log(
    hub: HubSite, tmp_path: Path, status: str
) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(hub.server) as there:
        await send(node, uplink(), b"", {BORN: "1 x", "Status": status})
        await assert_goes_on(there)
        async with asking(hub.options, "test") as asker:
            found = await history_of(asker.inbox, subjects.log_stream("hub"), ALL, upto=1 << 40)
        assert b"" in [stored.message.data for stored in found]


async def test_what_a_device_forgets_of_a_tenant_that_its_hub_lacks_keeps_nothing_from_going_on(
    hub: HubSite, tmp_path: Path
) -> None:
    async with (
        device(hub, tmp_path / "d") as node,
        device(hub, tmp_path / "other", name="other", interest=EVERYTHING) as other,
        alice_at(other.server) as here,
        alice_at(hub.server) as there,
    ):
        for number, op in enumerate(("put", "forget"), 1):
            told = event(op=op, tenant="ghost", id=str(number), hlc=number)
            headers = {BORN: f"{number} x"} | ({FORGETS: "1"} if op == "forget" else {})
            await send(node, uplink(tenant="ghost"), told, headers)
        await there.set_context("t1", attributes={"n": 1})
        forgotten = await there.forget("t1")
        async with asking(hub.options, "test") as asker:
            while {told.tenant for told in await erasures(asker)} != {"ghost", TENANT}:
                pass
            of_it = subjects.log_event("*", "ghost", "*", "*")
            assert len(await history_of(asker.inbox, subjects.log_stream("hub"), of_it, upto=1 << 40)) == 1
        with pytest.raises(NotFound):
            await here.get_context("t1", consistency=since(forgotten), budget_ms=LONG_MS)


async def erasures(asker: Asker) -> list[Erasure]:
    return (await asker.ask(subjects.ERASURES, subjects.erasures(), AskErasures())).erasures


@pytest.mark.parametrize(
    "body", [{"type": []}, {"edges": [1]}, {"edges": 1}, {"attributes": [1]}, {"text": 5}], ids=str
)
async def test_an_event_that_breaks_the_layout_does_not_stop_what_others_are_fed(
    hub: HubSite, tmp_path: Path, body: dict[str, Any]
) -> None:
    near = Interest(wants=[Want(tenant=TENANT, entities=["centre"], hops=1)])
    async with (
        device(hub, tmp_path / "d") as bad,
        device(hub, tmp_path / "everything", name="everything", interest=EVERYTHING) as one,
        device(hub, tmp_path / "near", name="near", interest=near) as other,
        alice_at(hub.server) as there,
    ):
        await send(bad, uplink("centre"), event("centre", body=body), {BORN: "1 x"})
        written = await there.set_context("centre", attributes={"n": 2})
        for node in (one, other):
            async with asyncio.timeout(LONG_MS / 1000):
                while (await status_of(node)).downlinked < written.token["hub"]:
                    pass


@pytest.mark.parametrize("rollup", ["all", "sub"])
async def test_a_device_cannot_erase_the_log_of_its_hub(hub: HubSite, tmp_path: Path, rollup: str) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(hub.server) as there:
        await there.set_context("t1", attributes={"n": 1})
        await send(node, uplink(), event(), {BORN: "1 x"})
        with pytest.raises(JetStreamError, match="rollup"):
            check(json.loads((await send(node, uplink(), event(), {BORN: "2 x", "Nats-Rollup": rollup})).data))
        async with asking(hub.options, "test") as asker:
            events = subjects.log_event("*", TENANT, "*", "*")
            assert len(await history_of(asker.inbox, subjects.log_stream("hub"), events, upto=1 << 40)) == 2


async def test_a_device_that_holds_all_batches_of_the_log_open_stops_no_write(hub: HubSite, tmp_path: Path) -> None:
    """nats-server has 50 of them for a stream, whoever's they are, for 10 s each."""
    await hub.enrol("sub7", tmp_path / "d")
    async with stolen(hub, tmp_path / "d") as thief, alice_at(hub.server) as there:
        while True:  # until the leaf is there
            with contextlib.suppress(nats.errors.Error):
                await thief.request(uplink(), b"{}", timeout=1.0)
                break
        for number in range(60):
            headers = {BATCH_ID: str(number), BATCH_SEQUENCE: "1"}
            await thief.publish(uplink(), event(), headers=headers)
        await thief.request(uplink(), b"{}", timeout=5.0)
        documents = [{"entity_id": f"e{n}", "attributes": {"n": n}} for n in range(200)]
        written = await there.ingest(documents, budget_ms=LONG_MS)
        assert (written.accepted, written.refused) == (200, 0)


async def test_a_device_cannot_take_the_id_of_another_callers_write(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(hub.server) as there:
        for taken in ("order-17", f"{TENANT}.alice.order-17"):
            await send(node, uplink(), event(), {BORN: "1 x", "Nats-Msg-Id": taken})
        written = await there.set_context("order", attributes={"n": 1}, message_id="order-17")
        assert not written.duplicate
        assert (await there.get_context("order", consistency=since(written))).attributes == {"n": 1}
        assert (await there.set_context("order", attributes={"n": 1}, message_id="order-17")).duplicate


async def test_a_receipt_that_is_named_like_a_debt_is_not_taken_for_one(tmp_path: Path) -> None:
    hub = HubSite(tmp_path / "hub")
    async with hub.up(), device(hub, tmp_path / "d") as node:
        forged = Receipt(
            forget="owed", site="sub7", tenant=TENANT, entity_id="x", sequence=1, events=0, erased_at=datetime.now(UTC)
        )
        link = await Link.open(node.server.credentials.load("edge").link_options())
        asker = await Asker(link).open()
        while True:
            with contextlib.suppress(Unavailable):
                confirming = ConfirmErased(receipts=[forged])
                await asker.ask(subjects.CONFIRM_ERASED, subjects.confirm_erased("sub7"), confirming)
                break
        await link.close()
    async with hub.up(), alice_at(hub.server) as there:
        last = await there.forget("another")
        async with asking(hub.options, "test") as operator:
            while not (await operator.ask(subjects.ERASURES, subjects.erasures(), AskErasures())).erasures:
                pass
        assert last.token
