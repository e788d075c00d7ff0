"""What devices are owed is known again after the hub was restarted, until it is settled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from sites import HubSite

from mnemesh import subjects
from mnemesh.inbox import Inbox
from mnemesh.kv import BucketView
from services.debts import Debts


@contextlib.asynccontextmanager
async def debts_at(hub: HubSite) -> AsyncIterator[Debts]:
    async with hub.up():
        link = await hub.link("hub")
        try:
            inbox = Inbox(link)
            await inbox.open()
            view = BucketView(subjects.RECEIPTS.name)
            async with asyncio.TaskGroup() as tasks:
                following = tasks.create_task(view.follow(link, inbox))
                await view.ready.wait()
                debts = Debts(inbox)
                debts.load(view.entries)
                yield debts
                following.cancel()
        finally:
            await link.close()


async def test_a_debt_lasts_until_it_is_settled(tmp_path: Path) -> None:
    hub = HubSite(tmp_path / "hub")
    key, other = ("acme", "a b.c>"), ("acme", "sub7")
    async with debts_at(hub) as debts:
        await debts.add("sub7", key)
        await debts.add("sub7", other)
        assert debts.to("sub7") == {key, other}
    async with debts_at(hub) as debts:
        assert (debts.to("sub7"), debts.to("sub8")) == ({key, other}, set())
        await debts.settle("sub7", key)
    async with debts_at(hub) as debts:
        assert debts.to("sub7") == {other}


async def test_what_is_owed_anew_while_it_is_settled_stays_owed(tmp_path: Path) -> None:
    hub = HubSite(tmp_path / "hub")
    key = ("acme", "e1")
    async with debts_at(hub) as debts:
        await debts.add("sub7", key)
        await asyncio.gather(debts.settle("sub7", key), debts.add("sub7", key))
        assert debts.to("sub7") == {key}
    async with debts_at(hub) as debts:
        assert debts.to("sub7") == {key}
