"""A whole mesh in this process, on a real nats-server: what the tests of operations stand on.

Each service has a link of its own and can be stopped and started again by name: `gateway`, `router`, `views`, `s0`
and `s1`, and `s0b`, `s1b` and `views2`, which are second replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from nats.aio.client import Client
from nats.aio.msg import Msg

import mnemesh
from cli.provision import even_shards
from cli.server import NatsServer
from memory_shards.shard import Shard
from mnemesh import Consistency, Memory
from mnemesh.actor import Actor
from mnemesh.call import ERROR_CODE
from mnemesh.connection import Link
from mnemesh.host import Host, hosted
from router.peers import Devices
from router.router import Router
from services.gateway import Gateway
from services.policy import TenantGuard
from services.read_policy import SiteReadPolicy
from services.site_policy import SitePolicy
from services.views import Views

SHARDS = ("s0", "s1")
STRONG = Consistency(level="strong")
SPARE_TENANTS = tuple(f"t{number}" for number in range(100))


class Mesh:
    """The services on one server. `tenant()` names a tenant that no other test has used; its agent is `ann`."""

    def __init__(self, server: NatsServer, site: str) -> None:
        self.server = server
        self.site = site
        self.folder = server.options.data / "shards"
        self.actors: dict[str, Actor] = {}
        self._running: dict[str, contextlib.AbstractAsyncContextManager[Host]] = {}
        self._spare: Iterator[str] = iter(SPARE_TENANTS)

    def tenant(self) -> str:
        return next(self._spare)

    async def start(self, *names: str) -> None:
        """Have these services serve when this returns."""
        for name in names:
            self.actors[name] = actor = await self._actor(name)
            self._running[name] = hosted(actor)
            await self._running[name].__aenter__()

    async def stop(self, *names: str) -> None:
        """Drain these services."""
        for name in names:
            del self.actors[name]
            await self._running.pop(name).__aexit__(None, None, None)

    @contextlib.asynccontextmanager
    async def without(self, *names: str) -> AsyncIterator[None]:
        """These services are gone within the block."""
        await self.stop(*names)
        try:
            yield
        finally:
            await self.start(*names)

    def shard(self, name: str) -> PausableShard:
        shard = self.actors[name]
        assert isinstance(shard, PausableShard)
        return shard

    async def close(self) -> None:
        await self.stop(*reversed(self.actors))

    @contextlib.asynccontextmanager
    async def connect(self, user: str = "acme.alice") -> AsyncIterator[Memory]:
        async with mnemesh.connect(credentials=self.server.credentials.load(user).path) as memory:
            yield memory

    async def link(self, user: str) -> Link:
        return await Link.open(self.server.credentials.load(user).link_options(user))

    async def _actor(self, name: str) -> Actor:
        makers: dict[str, Callable[[Link], Actor]] = {
            "gateway": lambda link: Gateway(link, site=self.site, guard=TenantGuard()),
            "router": lambda link: Router(link, peers=Devices(SitePolicy(self.site)), guard=TenantGuard()),
            "views": lambda link: Views(link, site=self.site),
            "views2": lambda link: Views(link, site=self.site),
        }
        if name in makers:
            return makers[name](await self.link(name.rstrip("2")))
        (entry,) = (entry for entry in even_shards(len(SHARDS)) if entry.name == name[:2])
        return PausableShard(
            await self.link("shard"),
            name=entry.name,
            site=self.site,
            partitions=entry.partitions,
            folder=Path(self.folder) / name,
            guard=TenantGuard(),
            reads=SiteReadPolicy(),
        )


class PausableShard(Shard):
    """A shard that a test can keep from following the log."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._follows = asyncio.Event()
        self._follows.set()

    async def _follow(self) -> None:
        while True:
            await self._follows.wait()
            self._following = asyncio.ensure_future(super()._follow())
            try:
                await self._following
            except asyncio.CancelledError:
                if self._follows.is_set():
                    raise

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Within the block the stores learn nothing new."""
        self._follows.clear()
        self._following.cancel()
        await asyncio.wait([self._following])
        try:
            yield
        finally:
            self._follows.set()

    async def caught_up(self) -> None:
        """Wait until every store has applied what the log holds now."""
        head = await self._ask_head()
        for projection in self.stores.projections:
            await projection.watermark.reached(head)


async def ask_raw(
    client: Client, subject: str, payload: bytes, headers: Mapping[str, str] | None = None, timeout_s: float = 10.0
) -> Msg:
    """One request as any program with a NATS client would send it."""
    return await client.request(subject, payload, timeout=timeout_s, headers=dict(headers) if headers else None)


def body_of(reply: Msg) -> dict[str, Any]:
    """The map in a reply. A vector is a list."""
    if reply.data[:1] == b"{":
        body: dict[str, Any] = json.loads(reply.data)
    else:
        body = msgpack.unpackb(reply.data, ext_hook=lambda _, data: np.frombuffer(data, "<f4").tolist(), timestamp=3)
    return body


def code_of(reply: Msg) -> str | None:
    """The error's code in the header, which must be the body's; `None` where the reply is none."""
    code = (reply.headers or {}).get(ERROR_CODE)
    if code is not None:
        assert body_of(reply)["code"] == code
        assert body_of(reply)["message"]
    return code
