"""A device: its nats-server, and everything else of it in this one process, kept small.

The server is a leaf of the hub's; whether the hub is in reach makes no difference to the device's own agents.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.allocator import keep_small
from cli.keeping import heal, keep
from cli.provision import provision, sites_of
from cli.server import NatsServer
from cli.server_config import ServerOptions
from edge.node import Edge
from edge.returning import ReturnGuard
from memory_shards.shard import Shard
from mnemesh.connection import Link
from mnemesh.guard import Guard
from mnemesh.host import hosted, link_as
from mnemesh.ids import PARTITIONS
from mnemesh.messages import Interest
from router.router import Router
from router.shard_map import ShardEntry
from services.gateway import Gateway
from services.observer import observed
from services.policy import TenantGuard
from services.read_policy import SiteReadPolicy

logger = logging.getLogger("mnemesh.edge")

CONNECT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class EdgeOptions:
    """What a device runs. `interest` is what it holds of its hub's; `uplink_bytes_per_s` bounds what it sends.

    `policy` is the text of its own one (`None`: it stays as it is); `metrics_port` 0 is a free port. After an absence
    of `erase_first_after_s` it erases what was forgotten before it serves.
    """

    server: ServerOptions
    tenants: Sequence[str] = ("demo",)
    agents: Sequence[tuple[str, str]] = (("demo", "alice"),)
    metrics_port: int = 0
    interest: Interest = field(default_factory=Interest)
    policy: str | None = None
    uplink_bytes_per_s: float | None = None
    erase_first_after_s: float = 3600.0


def shard_folder(options: ServerOptions) -> Path:
    """Where a device has its stores; all of it comes back from the log."""
    return options.data / "shard"


class EdgeNode:
    """One device, that serves within the block and is drained at its end."""

    def __init__(self, options: EdgeOptions) -> None:
        self.options = options
        self.server = NatsServer(options.server, agents=options.agents)
        self.metrics_port = 0
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> EdgeNode:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        server, site = self.server, self.options.server.site
        self._run_beside(keep_small())
        await self._stack.enter_async_context(server)
        operator = server.credentials.load("operator").link_options("provision")
        shards = [ShardEntry(site, frozenset(range(PARTITIONS)))]
        await provision(
            operator,
            site=site,
            tenants=sorted({*self.options.tenants, *(want.tenant for want in self.options.interest.wants)}),
            shards=shards,
            sites=sites_of(self.options.server),
            policy=self.options.policy,
            kind="device",
        )
        self._run_beside(keep(server))
        self._run_beside(heal(server))
        edge = Edge(
            await self._link("edge"),
            site=site,
            folder=self.options.server.data,
            interest=self.options.interest,
            uplink_bytes_per_s=self.options.uplink_bytes_per_s,
            erase_first_after_s=self.options.erase_first_after_s,
        )
        shard = Shard(
            await self._link("shard"),
            name=site,
            site=site,
            partitions=range(PARTITIONS),
            folder=shard_folder(self.options.server),
            guard=self._guard(edge),
            hub=edge.hub,
            reads=SiteReadPolicy(),
        )
        actors = (
            Gateway(await self._link("gateway"), site=site, kind="device", guard=self._guard(edge)),
            Router(await self._link("router"), guard=self._guard(edge), peers=edge.hub),
            shard,
            edge,
        )
        self._host = await self._stack.enter_async_context(hosted(*actors))
        self.metrics_port = await self._stack.enter_async_context(
            observed(actors, host="127.0.0.1", port=self.options.metrics_port)
        )

    def _run_beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._stack.callback(task.cancel)

    def _guard(self, edge: Edge) -> Guard:
        return ReturnGuard(TenantGuard(), edge)

    async def _link(self, role: str) -> Link:
        return await link_as(self.server.credentials.load(role).link_options(role), CONNECT_S)

    async def ended(self) -> None:
        """Return once its actors have ended by themselves; leaving the block then raises why."""
        await self._host.ended.wait()
