"""Bad weather between a device and its hub: a line that flaps, a device that is killed while it takes things in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from sites import TENANT, HubSite, alice_at, device, device_options, since, status_of
from test_edge_command import edge_up

from bench.cable import Cable
from cli.operator import asking
from cli.server import NatsServer
from cli.server_config import ServerOptions
from mnemesh import Consistency, Memory, messages, subjects
from mnemesh.messages import Interest, Want

LONG_MS = 60_000
EVERYTHING = Interest(wants=[Want(tenant=TENANT)])


@pytest_asyncio.fixture
async def hub(tmp_path: Path) -> AsyncIterator[HubSite]:
    async with HubSite(tmp_path / "hub").up() as hub:
        yield hub


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
