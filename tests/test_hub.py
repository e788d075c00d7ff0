"""A hub has one feed for each device: the one that the device began last, however its requests come."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import pytest
from sites import TENANT, HubSite, alice_at, current, device, status_of

from cli.operator import asking
from edge.downlink import Downlink
from mnemesh import kv, subjects
from mnemesh.asker import Asker
from mnemesh.errors import Conflict, Denied, TooLarge
from mnemesh.event import Event
from mnemesh.ids import partition_of_tokens
from mnemesh.messages import (
    AskPosition,
    ConfirmErased,
    FeedBatch,
    FeedOpened,
    HeldState,
    Holding,
    Interest,
    NextFeed,
    OpenFeed,
    Want,
)
from mnemesh.origin import FORGETS, decode_mark
from services.feed import Feed
from services.presence import Presence

INTEREST = Interest(wants=[Want(tenant=TENANT)])


@contextlib.asynccontextmanager
async def sub7(hub: HubSite, data: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Asker]:
    """A device that asks for nothing by itself."""

    async def idle(self: Downlink) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Downlink, "run", idle)
    async with device(hub, data) as node, asking(node.options.server, "test", role="edge") as asker:
        while not (await status_of(node)).linked:
            pass
        yield asker


async def open_feed(asker: Asker, session: str) -> FeedOpened:
    return await asker.ask(subjects.OPEN_FEED, subjects.open_feed("sub7"), OpenFeed(session=session, interest=INTEREST))


async def first_of(asker: Asker, session: str) -> FeedBatch:
    return await asker.ask(subjects.NEXT_FEED, subjects.next_feed("sub7"), NextFeed(session=session, turn=1))


async def test_a_feed_that_opens_late_does_not_take_the_place_of_a_newer_one(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Feed.open
    began, let_on = asyncio.Event(), asyncio.Event()

    async def late(self: Feed) -> None:
        if not began.is_set():
            began.set()
            await let_on.wait()
        await opened(self)

    monkeypatch.setattr(Feed, "open", late)
    async with sub7(hub, tmp_path / "d", monkeypatch) as asker:
        older = asyncio.create_task(open_feed(asker, "older"))
        await began.wait()
        await open_feed(asker, "newer")
        let_on.set()
        with pytest.raises(Conflict, match="another feed"):
            await older
        assert (await first_of(asker, "newer")).turn == 1


async def test_a_feed_whose_opening_is_repeated_is_opened_once(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Feed.open
    opening: list[Feed] = []

    async def noted(self: Feed) -> None:
        opening.append(self)
        await opened(self)

    monkeypatch.setattr(Feed, "open", noted)
    async with sub7(hub, tmp_path / "d", monkeypatch) as asker:
        one, other = await asyncio.gather(open_feed(asker, "s"), open_feed(asker, "s"))
        assert one == other == await open_feed(asker, "s")
        assert (await first_of(asker, "s")).turn == 1
    assert len(opening) == 1


async def forget_in_zeta(hub: HubSite) -> int:
    """A forget of a tenant that the device was not enrolled for; returns its place in the hub's log."""
    forgotten = Event(id="f", tenant="zeta", entity_id="e", op="forget", agent="x", site="hub", hlc=1)
    subject = subjects.log_event("hub", "zeta", partition_of_tokens("zeta", "e"), "e")
    async with asking(hub.options, "test", role="gateway") as gateway:
        headers = {FORGETS: "1"}
        stored = await gateway.inbox.request(subject, forgotten.encode(), budget_s=5.0, headers=headers)
    place: int = json.loads(stored.data)["seq"]
    return place


@pytest.mark.parametrize("state", ["some", "whole"])
async def test_a_device_that_says_it_holds_what_it_may_not_is_told_to_drop_it_and_no_more(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: HeldState
) -> None:
    await hub.enrol("sub7", tmp_path / "d", tenants=[TENANT])
    async with sub7(hub, tmp_path / "d", monkeypatch) as asker:
        opening = OpenFeed(session="s", interest=INTEREST, held=[("zeta", "e", 1, state)])
        await asker.ask(subjects.OPEN_FEED, subjects.open_feed("sub7"), opening)
        place = await forget_in_zeta(hub)
        batches = [await first_of(asker, "s")]
        while batches[-1].place < place:
            asked = NextFeed(session="s", turn=batches[-1].turn + 1)
            batches.append(await asker.ask(subjects.NEXT_FEED, subjects.next_feed("sub7"), asked))
        (item,) = [item for batch in batches for item in batch.items]
        assert isinstance(item, Holding)
        assert (item.tenant, item.entity_id, item.bytes) == ("zeta", "e", None)


async def test_no_device_gets_a_hash_of_what_others_wrote(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could confirm by it what it guesses, of whatever tenant that is."""
    async with (
        sub7(hub, tmp_path / "d", monkeypatch) as asker,
        device(hub, tmp_path / "o", name="other") as other,
        alice_at(other.server) as there,
    ):
        written = await there.set_context("e", attributes={"n": 1})
        await open_feed(asker, "s")
        batch = await first_of(asker, "s")
        while "other" not in batch.marks or decode_mark(batch.marks["other"]).sequence < written.token["other"]:
            asked = NextFeed(session="s", turn=batch.turn + 1)
            batch = await asker.ask(subjects.NEXT_FEED, subjects.next_feed("sub7"), asked)
        assert decode_mark(batch.marks["other"]).last == ""


async def test_a_device_cannot_make_its_hub_keep_any_number_of_names(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.hub.MOST_HELD_BYTES", 10_000)
    async with sub7(hub, tmp_path / "d", monkeypatch) as asker:

        async def say_on() -> None:
            for n in count():
                held: list[tuple[str, str, int, HeldState]] = [(TENANT, f"e{n}", 1, "whole")]
                opening = OpenFeed(session="s", interest=INTEREST, held=held, more=True)
                await asker.ask(subjects.OPEN_FEED, subjects.open_feed("sub7"), opening)

        with pytest.raises(TooLarge):
            await say_on()
        assert (await open_feed(asker, "other")).hub == "hub"


async def test_a_device_always_says_what_there_is_to_say_of_it(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[AskPosition] = []
    hear = Presence.hear

    def noted(self: Presence, device: str, said: AskPosition) -> None:
        heard.append(said)
        hear(self, device, said)

    monkeypatch.setattr(Presence, "hear", noted)
    async with device(hub, tmp_path / "d", interest=INTEREST) as node:
        await current(node)
    assert {said.contract for said in heard} == {subjects.CONTRACT}


async def test_a_device_that_the_hub_has_no_entry_of_is_told_nothing(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server knows it already, and what is said of it has not come."""
    async with sub7(hub, tmp_path / "d", monkeypatch) as asker:
        async with asking(hub.options, "test") as operator:
            await kv.delete(operator.inbox, subjects.SITES.name, "sub7")

        async def ask_on() -> None:  # until the hub knows that
            while True:
                await asker.ask(subjects.UPLINK_POSITION, subjects.uplink_position("sub7"), AskPosition())

        with pytest.raises(Denied, match="not enrolled"):
            await ask_on()
        with pytest.raises(Denied, match="not enrolled"):
            await open_feed(asker, "s")
        with pytest.raises(Denied, match="not enrolled"):
            await asker.ask(subjects.CONFIRM_ERASED, subjects.confirm_erased("sub7"), ConfirmErased(receipts=[]))
