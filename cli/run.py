"""`mnemesh run gateway|router|shard|hub|views`: one service in this process, against any NATS that is provisioned."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from cli.allocator import give_large_back
from memory_shards.shard import Shard
from memory_shards.snapshots.settings import NONE, SnapshotSettings
from memory_shards.stores.urls import EMBEDDED, StoreUrls
from mnemesh import kv, subjects
from mnemesh.actor import Actor
from mnemesh.connection import Link, LinkOptions
from mnemesh.host import Host, link_as
from mnemesh.inbox import Inbox
from router.peers import Devices
from router.router import Router
from router.shard_map import decode_entry
from services.gateway import Gateway
from services.hub import Hub
from services.observer import observed
from services.policy import TenantGuard
from services.read_policy import SiteReadPolicy
from services.site_policy import SitePolicy
from services.views import Views

logger = logging.getLogger("mnemesh.run")

PATIENCE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What one service needs. `shard`, `folder`, `stores` and `snapshots` are the shard's alone."""

    service: str
    link: LinkOptions
    site: str
    shard: str = ""
    folder: Path = Path("mnemesh-data")
    stores: StoreUrls = EMBEDDED
    snapshots: SnapshotSettings = NONE
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    until_stdin_closes: bool = False


async def run_service(options: RunOptions, stop: asyncio.Event) -> int:
    """Serve until `stop` is set, then drain. Returns the exit status."""
    if options.until_stdin_closes:
        await stop_when_stdin_closes(stop)
    link = await link_as(options.link, PATIENCE_S)
    host = Host(await _actor(options, link))
    async with observed(host.actors, host=options.metrics_host, port=options.metrics_port) as port:
        logger.info("%s serves metrics and health on port %d", options.service, port)
        stopping = asyncio.ensure_future(_stop_when(stop, host))
        try:
            await host.run()
        finally:
            stopping.cancel()
    return 0


async def stop_when_stdin_closes(stop: asyncio.Event) -> None:
    """The parent holds the other end of standard input; the kernel closes it when the parent dies, however it dies."""

    class Watch(asyncio.Protocol):
        def connection_lost(self, error: Exception | None) -> None:
            stop.set()

    await asyncio.get_running_loop().connect_read_pipe(Watch, sys.stdin)


async def _stop_when(stop: asyncio.Event, host: Host) -> None:
    await stop.wait()
    host.stop()


async def _actor(options: RunOptions, link: Link) -> Actor:
    guard = TenantGuard()
    if options.service == "gateway":
        return Gateway(link, site=options.site, guard=guard)
    if options.service == "router":
        return Router(link, peers=Devices(SitePolicy(options.site)), guard=guard)
    if options.service == "hub":
        return Hub(link, site=options.site)
    if options.service == "views":
        return Views(link, site=options.site)
    if options.snapshots.url:
        give_large_back()
    partitions = await _partitions(link, options.shard)
    return Shard(
        link,
        name=options.shard,
        site=options.site,
        partitions=partitions,
        folder=options.folder,
        guard=guard,
        stores=options.stores,
        reads=SiteReadPolicy(),
        snapshots=options.snapshots,
    )


async def _partitions(link: Link, shard: str) -> frozenset[int]:
    """What the shard map gives this shard; waits until it is in the map."""
    inbox = Inbox(link)
    await inbox.open()
    view = kv.BucketView(subjects.SHARDS.name)
    following = asyncio.ensure_future(view.follow(link, inbox))
    try:
        async with asyncio.timeout(PATIENCE_S):
            return decode_entry(shard, await view.wait_for(shard)).partitions
    finally:
        following.cancel()
