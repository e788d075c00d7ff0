"""What a device says of its own under its own name is not believed where it can harm others."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sites import TENANT, HubSite, alice_at, device, since

from cli.edge_node import EdgeNode
from mnemesh import Memory, subjects
from mnemesh.connection import Link
from mnemesh.errors import NotFound, Unavailable
from mnemesh.event import Event
from mnemesh.ids import partition_of_tokens
from mnemesh.inbox import Inbox
from mnemesh.origin import BORN

LONG_MS = 30_000


@pytest_asyncio.fixture
async def hub(tmp_path: Path) -> AsyncIterator[HubSite]:
    async with HubSite(tmp_path / "hub").up() as hub:
        yield hub


async def send(node: EdgeNode, subject: str, payload: bytes, headers: dict[str, str]) -> None:
    """Send as the device's edge, once its leaf is there."""
    link = await Link.open(node.server.credentials.load("edge").link_options())
    try:
        inbox = Inbox(link)
        await inbox.open()
        while True:
            with contextlib.suppress(Unavailable):
                await inbox.request(subject, payload, budget_s=5.0, headers=headers)
                return
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
