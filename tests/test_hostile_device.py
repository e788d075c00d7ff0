"""What a device says of its own under its own name is not believed where it can harm others."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sites import TENANT, HubSite, alice_at, device, since, status_of

from cli.edge_node import EdgeNode
from cli.operator import asking
from mnemesh import Consistency, Memory, subjects
from mnemesh.asker import Asker
from mnemesh.atomic_batch import BATCH_ID, BATCH_SEQUENCE, Outgoing, publish_all
from mnemesh.clock import COUNTER_BITS, wall_ms
from mnemesh.connection import Link
from mnemesh.errors import BadRequest, Busy, Conflict, MnemeshError, NotFound, Unavailable
from mnemesh.event import LARGEST, Event, decode_event
from mnemesh.jetstream import ALL, history_of
from mnemesh.messages import (
    AskDevices,
    AskErasures,
    AskPosition,
    ConfirmErased,
    DeviceSeen,
    Erasure,
    Interest,
    OwnEvent,
    OwnEvents,
    Receipt,
    Uplinked,
    Want,
)
from services.uplinks import checked

LONG_MS = 30_000
EVERYTHING = Interest(wants=[Want(tenant=TENANT)])
NO_HEADERS: Mapping[str, str] = {}


async def send(node: EdgeNode, *payloads: bytes, first: int = 1, **said: Any) -> Uplinked:
    """Send as the device's edge, once its leaf is there, as events of a log of its own making."""
    site = node.options.server.site
    events = [OwnEvent(number, payload) for number, payload in enumerate(payloads, first)]
    link = await Link.open(node.server.credentials.load("edge").link_options())
    try:
        asker = await Asker(link).open()
        while True:
            with contextlib.suppress(Unavailable, Conflict):
                asked = AskPosition()
                place = (await asker.ask(subjects.UPLINK_POSITION, subjects.uplink_position(site), asked)).place
                told = {"incarnation": "x", "sequence": first + len(payloads) - 1} | said
                own = OwnEvents(events=events, place=place, **told)
                return await asker.ask(subjects.UPLINK, subjects.uplink(site), own)
    finally:
        await link.close()


def event(entity: str = "t1", **said: Any) -> bytes:
    told = {"id": "1", "op": "put", "agent": "x", "hlc": 1, "site": "sub7", "tenant": TENANT, "entity_id": entity}
    return Event(**(told | {"body": {"attributes": {"n": 1}}} | said)).encode()


def nested(depth: int) -> bytes:
    """An event whose body holds lists in lists."""
    deep = event(body={"attributes": {"n": 0}})
    return deep.replace(b"\xa1n\x00", b"\xa1n" + b"\x91" * depth + b"\x00")


REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "nonsense": b"nonsense",
    "json": json.dumps({"id": "1", "op": "put", "agent": "x", "hlc": 1, "site": "sub7", "tenant": TENANT}).encode(),
    "a large stamp": event(hlc=(1 << 64) - 1),
    "a stamp of a bit too many": event(hlc=(1 << 63) + 5),
    "a large place": event(saw=1 << 63),
    "a large time": event(valid_from=1 << 63),
    "a time after all": event(valid_from=1 << 60),
    "a type that is a list": event(body={"type": []}),
    "an edge that is a number": event(body={"edges": [1]}),
    "edges that are a number": event(body={"edges": 1}),
    "attributes that are a list": event(body={"attributes": [1]}),
    "an array where a map belongs": event(body={"attributes": np.zeros(4, np.float32)}),
    "spaces that are a number": event(body={"vectors": {"v": np.zeros(2, np.float32)}, "spaces": 1}),
    "a metric of later": event(body={"spaces": {"v": {"metric": "later"}}}),
    "a text that is a number": event(body={"text": 5}),
    "a large number": event(body={"attributes": {"n": (1 << 64) - 1}}).replace(b"\xcf", b"\xc7"),
    "a vector of too many": event(body={"vectors": {"v": np.zeros(4097, np.float32)}}),
    "deep nesting": nested(1000),
    "nesting": nested(50),
    "another site": event(site="hub"),
    "another device": event(site="other"),
    "a wildcard as tenant": event(tenant="*"),
    "tokens as tenant": event(tenant="a.b"),
    "a blank in the tenant": event(tenant="a\x0bb"),
    "a long tenant": event(tenant="x" * 5000),
    "a long agent": event(agent="x" * 5000),
    "a long id": event(id="x" * 5000),
    "no id": event(id=""),
    "a long entity": event("x" * 20_000),
    "a long target": event(body={"edges": [{"relation": "r", "target_id": "x" * 20_000}]}),
    "a space by wildcard": event(body={"vectors": {"*": np.zeros(2, np.float32)}}),
    "what it holds": event(op="hold", body={}),
    "what it lets go": event(op="release", body={}),
    "an operation of later": event(op="later"),
    "too much": event(body={"text": "x" * LARGEST}),
}


async def assert_goes_on(memory: Memory) -> None:
    """The hub's stores still take what comes."""
    written = await memory.set_context("t2", attributes={"n": 1}, vectors={"v": [1.0]})
    await memory.get_context("t2", consistency=since(written), budget_ms=LONG_MS)
    assert (await memory.search_embedding([1.0], space="v", consistency=since(written), budget_ms=LONG_MS)).hits


@pytest.mark.parametrize("payload", REFUSED.values(), ids=REFUSED.keys())
def test_what_no_store_can_hold_or_is_not_the_devices_own_is_not_taken(payload: bytes) -> None:
    with pytest.raises((MnemeshError, ValueError)):
        checked(payload, "sub7", [])


async def test_what_a_hub_does_not_take_is_told_and_the_rest_is_stored(hub: HubSite, tmp_path: Path) -> None:
    refused = [payload for name, payload in REFUSED.items() if name != "too much"]
    async with (
        device(hub, tmp_path / "other", name="other", interest=EVERYTHING) as other,
        device(hub, tmp_path / "d") as node,
        alice_at(hub.server) as there,
    ):
        told = await send(node, event("t3"), *refused, event("t4", id="3"))
        assert [each.sequence for each in told.refused] == [*range(2, len(refused) + 2)]
        await assert_goes_on(there)
        written = await there.set_context("t2", attributes={"n": 2})
        for entity in ("t3", "t4"):
            assert (await there.get_context(entity, consistency=since(written))).attributes == {"n": 1}
        with pytest.raises(NotFound):
            await there.get_context("t1")
        while (await status_of(other)).downlinked < written.token["hub"]:
            pass
        async with asking(hub.options, "test") as asker:
            (seen,) = [told for told in await seen_by(asker) if told.site == "sub7"]
        assert seen.refused == len(refused)


async def test_what_is_stamped_ahead_and_not_put_aside_is_not_taken(hub: HubSite, tmp_path: Path) -> None:
    """Its forget would erase the log, and have no effect in the stores."""
    ahead = event(op="forget", id="2", hlc=wall_ms() + 600_000 << COUNTER_BITS, body={})
    async with device(hub, tmp_path / "d") as node, alice_at(hub.server) as there:
        await send(node, event())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await send(node, ahead, first=2)
        found = await there.get_context("t1", consistency=Consistency(level="strong"), budget_ms=LONG_MS)
        assert found.attributes == {"n": 1}
        async with asking(hub.options, "test") as asker:
            of_it = subjects.log_event("sub7", TENANT, "*", "*")
            held = await history_of(asker.inbox, subjects.log_stream("hub"), of_it, upto=1 << 40)
        assert [decode_event(stored.message.data).op for stored in held] == ["put"]


async def test_one_who_sends_much_at_once_keeps_no_other_device_waiting(hub: HubSite, tmp_path: Path) -> None:
    """Each request takes long to look at. What is more than 64 MiB nats-server does not wait for a service to read."""
    empty = b"\xa5later\x90"
    lists = event(body={"later": []}).replace(empty, b"\xa5later\xdd\x00\x04\x00\x00" + b"\x90" * (1 << 18))
    async with (
        device(hub, tmp_path / "d") as node,
        device(hub, tmp_path / "other", name="other") as other,
        alice_at(other.server) as here,
        alice_at(hub.server) as there,
    ):
        await send(node, event())
        link = await Link.open(node.server.credentials.load("edge").link_options())
        asker = await Asker(link).open()
        told = OwnEvents(events=[OwnEvent(2, lists)], place=1, incarnation="x", sequence=2)
        flood = [
            asyncio.create_task(asker.ask(subjects.UPLINK, subjects.uplink("sub7"), told, budget_s=LONG_MS / 1000))
            for _ in range(20)
        ]
        written = await here.set_context("t9", attributes={"n": 9})
        found = await there.get_context("t9", consistency=since(written), budget_ms=LONG_MS)
        assert found.attributes == {"n": 9}
        answers = await asyncio.gather(*flood, return_exceptions=True)
        await link.close()
    assert sum(isinstance(answer, Busy) for answer in answers) >= 10


MARKS: list[dict[str, Any]] = [
    {"incarnation": "x\r\nNats-Rollup: all"},
    {"incarnation": "x" * 300},
    {"incarnation": ""},
    {"sequence": 0},
    {"sequence": 1 << 63},
    {"hlc": 1 << 63},
    {"last": "x" * 300},
    {"first": 0},
]


async def test_a_mark_that_cannot_be_is_refused(hub: HubSite, tmp_path: Path) -> None:
    async with device(hub, tmp_path / "d") as node, alice_at(hub.server) as there:
        for said in MARKS:
            with pytest.raises(BadRequest):
                await send(node, event(), **said)
        await assert_goes_on(there)
        with pytest.raises(NotFound):
            await there.get_context("t1")


async def test_a_header_that_is_called_status_stops_nobody_who_reads_the_log(hub: HubSite) -> None:
    subject = subjects.log_event("hub", TENANT, 7, "t1")
    async with alice_at(hub.server) as there, asking(hub.options, "test", role="gateway") as gateway:
        for status in ("1", "100", "204", "404", "503"):
            await publish_all(gateway.link, gateway.inbox, [Outgoing(subject, b"", {"Status": status})], budget_s=5.0)
        await assert_goes_on(there)
        found = await history_of(gateway.inbox, subjects.log_stream("hub"), ALL, upto=1 << 40)
        assert [stored.message.data for stored in found].count(b"") == 5


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
            await send(node, told, first=number)
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


async def seen_by(asker: Asker) -> list[DeviceSeen]:
    return (await asker.ask(subjects.DEVICES, subjects.devices(), AskDevices())).devices


async def test_writes_go_on_though_all_batches_of_the_log_are_held_open(hub: HubSite) -> None:
    """nats-server has 50 of them for a stream, for 10 s each."""
    async with alice_at(hub.server) as there, asking(hub.options, "test", role="gateway") as gateway:
        subject = subjects.log_event("hub", TENANT, 7, "t1")
        for number in range(60):
            await gateway.link.publish(subject, b"", headers={BATCH_ID: str(number), BATCH_SEQUENCE: "1"})
        await gateway.link.flush()
        documents = [{"entity_id": f"e{n}", "attributes": {"n": n}} for n in range(200)]
        written = await there.ingest(documents, budget_ms=LONG_MS)
        assert (written.accepted, written.refused) == (200, 0)


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
