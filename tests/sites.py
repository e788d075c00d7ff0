"""A hub and its devices on one machine. `bench.cable` is what lies between them where a test is to cut it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import nats.errors
from nats.aio.client import Client

import mnemesh
from cli.devices import Devices, public_of, seed_of
from cli.edge_node import EdgeNode, EdgeOptions
from cli.provision import even_shards, provision, put_sites, sites_of
from cli.server import NatsServer, find_nats_server, free_port
from cli.server_config import ServerOptions
from memory_shards.shard import Shard
from mnemesh import Consistency, Memory, messages, subjects
from mnemesh.actor import Actor
from mnemesh.asker import Asker
from mnemesh.connection import Link
from mnemesh.host import hosted
from mnemesh.ids import PARTITIONS
from router import peers
from router.router import Router
from services.gateway import Gateway
from services.hub import Hub
from services.policy import TenantGuard
from services.read_policy import SiteReadPolicy
from services.site_policy import SitePolicy

TENANT = "acme"
AGENT = (TENANT, "alice")
ONCE: dict[str, Any] = {"max_reconnect_attempts": 1, "allow_reconnect": False}


class HubSite:
    """A hub with one shard, in this process."""

    def __init__(self, data: Path, **options: Any) -> None:
        """`options` are further ones of `ServerOptions`."""
        ports = {"port": free_port(), "monitoring_port": free_port(), "leaf_port": free_port()}
        self.options = ServerOptions(data=data, durability="interval", **ports, **options)
        self.server = NatsServer(self.options, agents=[AGENT])

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[HubSite]:
        """The hub runs within the block, on what its folder holds."""
        async with self.server:
            operator = self.server.credentials.load("operator").link_options()
            sites = sites_of(self.options)
            await provision(operator, site="hub", tenants=[TENANT], shards=even_shards(1), sites=sites)
            actors: list[Actor] = [
                Gateway(await self.link("gateway"), site="hub", guard=TenantGuard()),
                Router(await self.link("router"), peers=peers.Devices(SitePolicy("hub")), guard=TenantGuard()),
                Shard(
                    await self.link("shard"),
                    name="s0",
                    site="hub",
                    partitions=range(PARTITIONS),
                    folder=self.options.data / "shard",
                    guard=TenantGuard(),
                    reads=SiteReadPolicy(),
                ),
            ]
            async with hosted(*actors), hosted(Hub(await self.link("hub"), site="hub")) as self.for_devices:
                yield self

    async def link(self, role: str) -> Link:
        return await Link.open(self.server.credentials.load(role).link_options(role))

    async def enrol(self, name: str, data: Path, *, region: str = "", tenants: Sequence[str] = ()) -> None:
        """Let the device whose data folder this is connect as `name`."""
        Devices(self.options.data).enrol(name, public_of(seed_of(data)), region=region, tenants=tenants)
        await self.say_sites()
        await self.server.reload()

    async def say_sites(self) -> None:
        """Tell the services which devices may connect."""
        operator = self.server.credentials.load("operator").link_options()
        await put_sites(operator, sites_of(self.options))


def device_options(name: str, data: Path, hub: str, *, region: str = "", **options: Any) -> EdgeOptions:
    """`options` are those of `EdgeOptions`."""
    ports = {"port": free_port(), "monitoring_port": free_port()}
    server = ServerOptions(data=data, site=name, region=region, durability="interval", hub=hub, **ports)
    return EdgeOptions(**{"server": server, "tenants": [TENANT], "agents": [AGENT], **options})


@contextlib.asynccontextmanager
async def device(
    hub: HubSite, data: Path, *, name: str = "sub7", line: str = "", **options: Any
) -> AsyncIterator[EdgeNode]:
    """An enrolled device with a direct line to its hub, or by way of `line`."""
    if name not in [known.name for known in Devices(hub.options.data).list()]:
        await hub.enrol(name, data)
    async with EdgeNode(
        device_options(name, data, line or f"nats://127.0.0.1:{hub.options.leaf_port}", **options)
    ) as node:
        yield node


@contextlib.asynccontextmanager
async def alice_at(server: NatsServer) -> AsyncIterator[Memory]:
    async with mnemesh.connect(credentials=server.credentials.load(".".join(AGENT)).path) as memory:
        yield memory


def since(written: messages.Written | messages.Ingested) -> Consistency:
    """A read that is to see this write."""
    return Consistency(level="session", token=written.token)


async def status_of(node: EdgeNode) -> messages.EdgeStatus:
    """Where a device stands with its hub, by itself."""
    link = await Link.open(node.server.credentials.load("operator").link_options())
    try:
        asker = await Asker(link).open()
        site = node.options.server.site
        return await asker.ask(subjects.EDGE_STATUS, subjects.edge_status(site), messages.Status())
    finally:
        await link.close()


async def current(node: EdgeNode) -> messages.EdgeStatus:
    """Once the device has all that its hub has for it."""
    while not (status := await status_of(node)).current:
        pass
    return status


@contextlib.asynccontextmanager
async def stolen(hub: HubSite, data: Path) -> AsyncIterator[Client]:
    """A client without any limits on a nats-server that has the key of the device whose folder this is."""
    data.joinpath("thief").mkdir(parents=True)
    port = free_port()
    remote = f'url: "nats://127.0.0.1:{hub.options.leaf_port}", nkey: "{seed_of(data)}"'
    config = data / "thief" / "nats.conf"
    config.write_text(f"port: {port}\nhttp: {free_port()}\nleafnodes {{ remotes: [ {{ {remote} }} ] }}\n")
    process = await asyncio.create_subprocess_exec(
        *(find_nats_server(), "-c", config),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    client = Client()
    try:
        while not client.is_connected:
            with contextlib.suppress(OSError, nats.errors.Error):
                await client.connect(f"nats://127.0.0.1:{port}", inbox_prefix=subjects.edge_inbox("sub7"), **ONCE)
        yield client
    finally:
        await client.close()
        process.terminate()
        await process.wait()
