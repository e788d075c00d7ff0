"""`mnemesh run gateway|router|shard|hub|views`: one service in this process, against any NATS that is provisioned."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from cli import shard_flags
from cli.allocator import give_large_back
from memory_shards.snapshots.settings import NONE, SnapshotSettings
from memory_shards.stores.urls import EMBEDDED, StoreUrls
from mnemesh import kv, subjects
from mnemesh.actor import Actor
from mnemesh.client import read_credentials
from mnemesh.connection import Link, LinkOptions
from mnemesh.host import Host, link_as
from mnemesh.host import run as run_process
from mnemesh.inbox import Inbox
from router.shard_map import decode_entry
from services.observer import observed
from services.policy import TenantGuard

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


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    parser.add_argument("service", choices=("gateway", "router", "shard", "hub", "views"))
    parser.add_argument("--credentials", type=Path, help="credentials file of the service's role")
    parser.add_argument("--url", help="NATS server (default: the credentials' own)")
    parser.add_argument("--site", default="hub", help="site whose log it serves (default: %(default)s)")
    parser.add_argument("--shard", default="s0", help="name in the shard map (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help=f"where the shard's stores are (default: {data}/shards/NAME)")
    shard_flags.add_flags(parser)
    parser.add_argument("--metrics-host", default="127.0.0.1")
    parser.add_argument("--metrics-port", type=int, default=0, help="0: a free one, which the log names")
    parser.add_argument("--until-stdin-closes", action="store_true", help="also drain when standard input ends")
    parser.set_defaults(data=data)


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status. Raises `BadRequest`, `Unavailable`."""
    held = read_credentials(flags.credentials) if flags.credentials else {}
    options = RunOptions(
        service=flags.service,
        link=LinkOptions(
            url=flags.url or held.get("url", "nats://127.0.0.1:4222"),
            user=held.get("user"),
            password=held.get("password"),
            inbox_prefix=held.get("inbox_prefix", f"_INBOX_{flags.service}_0"),
            name=flags.service if flags.service != "shard" else f"shard {flags.shard}",
        ),
        site=flags.site,
        shard=flags.shard,
        folder=flags.folder or flags.data / "shards" / flags.shard,
        stores=shard_flags.stores(flags),
        snapshots=shard_flags.snapshots(flags),
        metrics_host=flags.metrics_host,
        metrics_port=flags.metrics_port,
        until_stdin_closes=flags.until_stdin_closes,
    )
    return run_process(lambda stop: _serve(options, stop))


async def _serve(options: RunOptions, stop: asyncio.Event) -> int:
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
    """The service, whose modules alone are loaded."""
    guard = TenantGuard()
    if options.service == "gateway":
        from services.gateway import Gateway

        return Gateway(link, site=options.site, guard=guard)
    if options.service == "router":
        from router.peers import Devices
        from router.router import Router
        from services.site_policy import SitePolicy

        return Router(link, peers=Devices(SitePolicy(options.site)), guard=guard)
    if options.service == "hub":
        from services.hub import Hub

        return Hub(link, site=options.site)
    if options.service == "views":
        from services.views import Views

        return Views(link, site=options.site)
    from memory_shards.shard import Shard
    from services.read_policy import SiteReadPolicy

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
