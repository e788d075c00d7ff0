"""Fixtures that many tests share: real servers on free ports, and raw connections to them as any user."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import pytest_asyncio
from backends import GPU_IS_HERE, Backend
from mesh import SHARDS, SPARE_TENANTS, Mesh
from nats.aio.client import Client
from sites import HubSite

from bench.store_servers import MilvusServer, Neo4jServer, NotToBeHad, RedisServer, redis_cluster, running
from cli.provision import even_shards, provision
from cli.server import NatsServer, free_port
from cli.server_config import ServerOptions
from memory_shards.stores.urls import EMBEDDED, StoreUrls
from mnemesh import Memory
from mnemesh.asker import Asker
from mnemesh.connection import Link

T = TypeVar("T")

SITE = "hub"
TENANTS = ("acme", "zeta")
AGENTS = (("acme", "alice"), ("acme", "bob"), ("zeta", "carol"))


@dataclass
class Raw:
    """A nats-py connection, and every error that the server sent it."""

    client: Client
    errors: list[str] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def settle(self) -> list[str]:
        """Wait until the server has handled all that was sent; return the errors since the last time.

        Twice, because nats-py writes the PING of `flush` ahead of publishes that are still in its buffer.
        """
        await self.client.flush()
        await self.client.flush()
        errors, self.errors = self.errors, []
        return errors


async def open_raw(server: NatsServer, user: str) -> Raw:
    """Log in as a user of the server, with its private inbox."""
    credential = server.credentials.load(user)
    raw = Raw(Client())

    async def note(error: Exception) -> None:
        raw.errors.append(str(error))

    async def note_closed() -> None:
        raw.closed.set()

    await raw.client.connect(
        server.url,
        user=credential.user,
        password=credential.password,
        inbox_prefix=credential.inbox_prefix,
        error_cb=note,
        closed_cb=note_closed,
        allow_reconnect=False,
    )
    return raw


def server_options(data: Path) -> ServerOptions:
    """Free ports; no sync for each write, which tests of crashes of the machine alone would notice."""
    return ServerOptions(data=data, site=SITE, port=free_port(), monitoring_port=free_port(), durability="interval")


async def start_mesh_server(
    data: Path, *, tenants: Sequence[str] = TENANTS, agents: Sequence[tuple[str, str]] = AGENTS
) -> NatsServer:
    """A started server with every role, these agents, the log, the buckets, two shards in the map."""
    server = NatsServer(server_options(data))
    for tenant, agent in agents:
        server.credentials.add_agent(tenant, agent)
    await server.start()
    operator = server.credentials.load("operator")
    await provision(operator.link_options(), site=SITE, tenants=tenants, shards=even_shards(2))
    return server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def mesh_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NatsServer]:
    """A provisioned server that all tests share: leave its users, streams and process as they are."""
    server = await start_mesh_server(tmp_path_factory.mktemp("mesh"))
    yield server
    await server.stop()


@pytest_asyncio.fixture
async def own_mesh_server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A provisioned server of the test's own, to kill, fill or spoil."""
    server = await start_mesh_server(tmp_path)
    yield server
    await server.stop()


@pytest_asyncio.fixture
async def connect_as(mesh_server: NatsServer) -> AsyncIterator[Callable[[str], Awaitable[Raw]]]:
    """`await connect_as("acme.alice")`: a raw connection to `mesh_server`, closed after the test."""
    opened: list[Raw] = []

    async def connect(user: str) -> Raw:
        opened.append(await open_raw(mesh_server, user))
        return opened[-1]

    yield connect
    for raw in opened:
        await raw.client.close()


OpenLink = Callable[..., Awaitable[Link]]
OpenAsker = Callable[..., Awaitable[Asker]]


@pytest_asyncio.fixture
async def open_link(mesh_server: NatsServer) -> AsyncIterator[OpenLink]:
    """`await open_link("gateway")`: a `Link` to `mesh_server`, or to another `server`; closed after the test."""
    opened: list[Link] = []

    async def open_one(user: str, server: NatsServer = mesh_server) -> Link:
        opened.append(await Link.open(server.credentials.load(user).link_options(user)))
        return opened[-1]

    yield open_one
    for link in opened:
        await link.close()


@pytest_asyncio.fixture
async def open_asker(open_link: OpenLink) -> OpenAsker:
    """`await open_asker("acme.alice")`: an `Asker` on a link of its own."""

    async def open_one(user: str, *server: NatsServer) -> Asker:
        return await Asker(await open_link(user, *server)).open()

    return open_one


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    """A gateway, a router and two shards on a server of the module's own. Its tests share the module's loop.

    `ghost.gus` is a user whose tenant the mesh does not have.
    """
    server = await start_mesh_server(
        tmp_path_factory.mktemp("whole"),
        tenants=(*TENANTS, *SPARE_TENANTS),
        agents=(*AGENTS, *((tenant, "ann") for tenant in SPARE_TENANTS), ("ghost", "gus")),
    )
    mesh = Mesh(server, SITE)
    await mesh.start("gateway", "router", *SHARDS)
    yield mesh
    await mesh.close()
    await server.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alice(mesh: Mesh) -> AsyncIterator[Memory]:
    """`acme.alice`, in a memory that the module's tests share: each uses entities and spaces of its own."""
    async with mesh.connect("acme.alice") as memory:
        yield memory


@pytest_asyncio.fixture(loop_scope="module")
async def own(mesh: Mesh) -> AsyncIterator[Memory]:
    """An agent of a tenant that no other test has used."""
    async with mesh.connect(f"{mesh.tenant()}.ann") as memory:
        yield memory


@pytest_asyncio.fixture
async def hub(tmp_path: Path) -> AsyncIterator[HubSite]:
    """A hub of its own for one test, which devices reach."""
    async with HubSite(tmp_path / "hub").up() as hub:
        yield hub


def server_or_skip(make: Callable[[], T]) -> T:
    """A server that tests need: where it is not to be had they are skipped, or fail where all are needed."""
    try:
        return make()
    except NotToBeHad as missing:
        if os.environ.get("MNEMESH_NEEDS_ALL_SERVERS"):
            pytest.fail(f"{missing}, and MNEMESH_NEEDS_ALL_SERVERS is set")
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that all tests share: each uses a site of its own, and leaves the process as it is."""
    server = server_or_skip(lambda: RedisServer(tmp_path_factory.mktemp("redis")))
    with running(server):
        yield server


@pytest.fixture(scope="session")
def redis_cluster_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis Cluster of three that all tests share."""
    with redis_cluster(tmp_path_factory.mktemp("redis-cluster")) as nodes:
        yield nodes[0].url


@pytest.fixture(scope="session")
def neo4j_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neo4jServer]:
    """A Neo4j that all tests share: each uses a site of its own, and leaves the process as it is."""
    server = server_or_skip(lambda: Neo4jServer(tmp_path_factory.mktemp("neo4j")))
    with running(server):
        yield server


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    """A Milvus that all tests share: each uses a site of its own, and leaves the process as it is."""
    server = server_or_skip(lambda: MilvusServer(tmp_path_factory.mktemp("milvus")))
    with running(server):
        yield server


URLS: dict[str, Callable[[pytest.FixtureRequest], StoreUrls]] = {
    "embedded": lambda request: EMBEDDED,
    "cuda": lambda request: StoreUrls(vectors="cuda:" if GPU_IS_HERE else "cuda:numpy"),
    "faiss-gpu": lambda request: StoreUrls(vectors="faiss:gpu"),
    "milvus-lite": lambda request: StoreUrls(vectors="milvus:"),
    "milvus": lambda request: StoreUrls(vectors=request.getfixturevalue("milvus_server").url),
    "redis": lambda request: StoreUrls(attributes=request.getfixturevalue("redis_server").url),
    "neo4j": lambda request: StoreUrls(edges=request.getfixturevalue("neo4j_server").url),
    "redis-neo4j": lambda request: StoreUrls(
        attributes=request.getfixturevalue("redis_server").url, edges=request.getfixturevalue("neo4j_server").url
    ),
    "redis-cluster": lambda request: StoreUrls(attributes=request.getfixturevalue("redis_cluster_url")),
}


OF_VECTORS = ("cuda", "faiss-gpu", "milvus-lite", "milvus")
"""Those that differ in vectors alone."""


@pytest.fixture(params=[name for name in URLS if name not in OF_VECTORS])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """The stores of a shard, by every choice of them in turn, for a site of the test's own."""
    return Backend.of(URLS[request.param](request), tmp_path / "stores")
