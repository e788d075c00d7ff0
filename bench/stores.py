"""The stores suite: Redis, Neo4j and Milvus under a mesh, beside their bare drivers; how fast each store applies the
log; how soon another replica applies where one dies, and a shard starts from a snapshot."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import nats
import neo4j
import numpy as np
import redis.asyncio
from pymilvus import MilvusClient

from bench import bare, snapshots
from bench.documents import ATTRIBUTES, buses, write_all
from bench.report import Row, ratio, value
from bench.sampling import latencies, latency
from bench.sites import SITE, TENANT, agent_of, running_mesh, settled
from bench.store_servers import MilvusServer, Neo4jServer, RedisServer, Server, running
from bench.suite import Group, measured
from bench.vectors import K, load, made
from cli.mesh import Mesh
from memory_shards.outside import OutsideStore
from memory_shards.stores.embedded import MOST_VECTORS_APPLIED
from memory_shards.stores.memory_vectors import MemoryVectors
from memory_shards.stores.milvus_client import PLACES, collection_of
from memory_shards.stores.milvus_client import Target as MilvusTarget
from memory_shards.stores.milvus_reader import MOST_APPLIED as MILVUS_BATCH
from memory_shards.stores.milvus_store import MilvusStore
from memory_shards.stores.neo4j_client import Target, key_of
from memory_shards.stores.neo4j_reader import MOST_AHEAD, walk_query
from memory_shards.stores.neo4j_reader import MOST_APPLIED as NEO4J_BATCH
from memory_shards.stores.neo4j_store import Neo4jStore
from memory_shards.stores.redis_layout import Keys
from memory_shards.stores.redis_reader import MOST_APPLIED as REDIS_BATCH
from memory_shards.stores.redis_store import RedisStore
from memory_shards.stores.urls import StoreUrls
from memory_shards.stores.vector_file import VectorFile
from mnemesh import Consistency, Memory, wire
from mnemesh.clock import wall_ms
from mnemesh.errors import MnemeshError
from mnemesh.event import Event, Record
from mnemesh.ids import PARTITIONS, partition_of
from mnemesh.messages import GetContext

HOPS = 3
FANOUT = 3
LIMIT = 1_000
SENDERS = 4


class Sizes:
    """How much of everything. `quick` is for trying the suite out; its figures mean little."""

    def __init__(self, quick: bool, cold: int = 0) -> None:
        self.calls = 20 if quick else 400
        self.documents = 1_000 if quick else 50_000
        self.graph = 500 if quick else 20_000
        self.vectors = 1_000 if quick else 50_000
        self.searched = 3_000 if quick else 20_000
        self.kills = 2 if quick else 5
        self.applied = 1 if quick else 3
        self.cold = cold or (1_000 if quick else 200_000)


async def run(quick: bool, wanted: Sequence[str], cold: int = 0) -> list[Row]:
    """Measure what is wanted, or everything; the cold start with so many vectors, if any are named."""
    return await measured(GROUPS, Sizes(quick, cold), wanted)


# ── reads, through a mesh ───────────────────────────────────────────────────────────────────────────────────────────


async def get_context(sizes: Sizes) -> list[Row]:
    """A document from Redis: through the mesh, and by a bare HGETALL and a bare echo of as many bytes."""
    async with redis_server() as server, contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(running_mesh(shards=1, stores=StoreUrls(attributes=server.url)))
        memory = await stack.enter_async_context(agent_of(mesh))
        await memory.set_context("bus:7", type="bus", attributes=ATTRIBUTES)
        await settled(memory, "bus:7")
        client = redis.asyncio.Redis.from_url(server.url)
        stack.push_async_callback(client.aclose)
        key = Keys(SITE, partition_of(TENANT, "bus:7")).of(TENANT).entity("bus:7")
        echo = await stack.enter_async_context(echoing(len(wire.encode(await memory.get_context("bus:7")))))

        async def bare_read() -> object:
            await echo()
            return await client.hgetall(key)

        async def read() -> object:
            return await memory.get_context("bus:7")

        theirs, ours = await latencies([bare_read, read], sizes.calls)
    return list(latency("redis_get_context", ours, theirs, ratio("at most", 1.5)))


@contextlib.asynccontextmanager
async def echoing(size: int) -> AsyncIterator[Any]:
    """A raw NATS echo that answers with so many bytes."""
    async with bare.server() as url, bare.running("echo", url), await nats.connect(url) as raw:
        asked = wire.encode(GetContext())

        async def echo() -> object:
            return await raw.request(f"bare.reply.{size}", asked, timeout=5)

        yield echo


async def traverse(sizes: Sizes) -> list[Row]:
    """Three hops in Neo4j: through the mesh, and the same Cypher by the bare driver."""
    async with neo4j_server() as server, contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(running_mesh(shards=1, stores=StoreUrls(edges=server.url)))
        memory = await stack.enter_async_context(agent_of(mesh))
        await write_all(memory, graph(sizes.graph), senders=4)
        await settled(memory, "node:0")
        target = Target.of(server.url)
        driver = neo4j.AsyncGraphDatabase.driver(target.uri, **target.options)
        stack.push_async_callback(driver.close)
        asked = {
            "keys": [key_of(SITE, TENANT, "node:7")],
            "relations": [],
            "now": wall_ms(),
            "limit": LIMIT + 1,
            "shard": f"{SITE}.s0",
            "partitions": list(range(PARTITIONS)),
            "ahead": MOST_AHEAD,
        }

        async def bare_walk() -> object:
            async with driver.session(database=target.database, default_access_mode="READ") as session:
                return await (await session.run(walk_query(HOPS - 1, False), asked)).values()

        async def walk() -> object:
            return await memory.traverse(["node:7"], depth=HOPS, limit=LIMIT)

        theirs, ours = await latencies([bare_walk, walk], sizes.calls)
    return list(latency("neo4j_traverse", ours, theirs, ratio("at most", 1.3)))


def graph(nodes: int) -> list[Mapping[str, Any]]:
    """Nodes with three edges each, to nodes all over."""
    return [
        {
            "entity_id": f"node:{n}",
            "type": "node",
            "edges": [
                {"relation": "feeds", "target_id": f"node:{(n * 7919 + hop * 104_729) % nodes}"}
                for hop in range(FANOUT)
            ],
        }
        for n in range(nodes)
    ]


async def search_milvus(sizes: Sizes) -> list[Row]:
    """The ten nearest in Milvus: through the mesh, and by bare pymilvus in the same collection, as new."""
    vectors, queries, _ = made(sizes.searched, 256)
    async with milvus_server() as server, contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(running_mesh(shards=1, stores=StoreUrls(vectors=server.url)))
        memory = await stack.enter_async_context(agent_of(mesh))
        await load(memory, vectors, index="auto")
        client = MilvusClient(MilvusTarget.of(server.url, Path()).uri)
        stack.callback(client.close)
        shard = f"{SITE}.s0"
        (place,) = client.get(PLACES, [shard], output_fields=["visible_from"], consistency_level="Strong")
        asked = {"consistency_level": "Customized", "guarantee_timestamp": place["visible_from"]}
        collection = collection_of(shard, TENANT, "s")
        turn = itertools.cycle(queries)

        async def bare_search() -> object:
            return client.search(collection, [next(turn)], limit=K, **asked)

        async def search() -> object:
            return await memory.search_embedding(next(turn), space="s", k=K)

        theirs, ours = await latencies([bare_search, search], sizes.calls // 4)
    return list(latency("milvus_search", ours, theirs, ratio("at most", 1.15)))


# ── another replica ─────────────────────────────────────────────────────────────────────────────────────────────────


async def takeover(sizes: Sizes) -> list[Row]:
    """Two replicas of a shard on one Redis; who applies is killed under load: seconds until a later write is read."""
    async with redis_server() as server, contextlib.AsyncExitStack() as stack:
        urls = StoreUrls(attributes=server.url)
        mesh = await stack.enter_async_context(running_mesh(shards=1, replicas=2, stores=urls))
        memory = await stack.enter_async_context(agent_of(mesh))
        await memory.set_context("mark")
        await settled(memory, "mark")
        await stack.enter_async_context(writing(memory))
        took, taken = [], dict.fromkeys(leases_taken(mesh), 0)
        for _ in range(sizes.kills):
            (holder,) = (name for name, times in leases_taken(mesh).items() if times > taken[name])
            taken = leases_taken(mesh)
            took.append(await read_after_kill(mesh, holder, memory))
            await mesh.ready()
    return [
        Row(name="takeover_s", value=median(took), unit="s", goal=value("at most", 2), runs=len(took)),
        Row(name="takeover_max_s", value=max(took), unit="s", runs=len(took)),
    ]


@contextlib.asynccontextmanager
async def writing(memory: Memory) -> AsyncIterator[None]:
    """Some hundred writes a second while the block runs."""

    async def write(sender: int) -> None:
        for number in itertools.count():
            await memory.set_context(f"bus:{sender}.{number % 1000}", type="bus", attributes=ATTRIBUTES)
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        senders = [group.create_task(write(sender)) for sender in range(SENDERS)]
        yield
        for sender in senders:
            sender.cancel()


def leases_taken(mesh: Mesh) -> dict[str, int]:
    """How often each replica has taken the lease, by its log."""
    replicas = [child for name, child in mesh.children.items() if name.startswith("s0.")]
    return {child.name: child.log_file.read_text().count("this replica has the lease on") for child in replicas}


async def read_after_kill(mesh: Mesh, holder: str, memory: Memory) -> float:
    """Seconds from the kill until a write that was made after it is read with its token."""
    killed = mesh.children[holder].process
    assert killed is not None, "it has the lease, so it runs"
    killed.send_signal(signal.SIGKILL)
    began = time.perf_counter()
    await killed.wait()
    written = await memory.set_context("mark", attributes={"at": began})
    mine = Consistency(level="session", token=written.token)
    while True:
        try:
            await memory.get_context("mark", consistency=mine, budget_ms=30_000)
        except MnemeshError:  # whoever was asked is the one that died
            continue
        return time.perf_counter() - began


# ── applying, store by store ────────────────────────────────────────────────────────────────────────────────────────


async def apply_redis(sizes: Sizes) -> list[Row]:
    async with redis_server() as server:
        rates = [
            applied_outside(RedisStore(server.url, **of_site(n)), documents(sizes.documents), REDIS_BATCH)
            for n in range(sizes.applied)
        ]
    return [rate("redis_apply_rate", rates, 20_000)]


async def apply_neo4j(sizes: Sizes) -> list[Row]:
    async with neo4j_server() as server:
        rates = [
            applied_outside(Neo4jStore(server.url, **of_site(n)), documents(sizes.graph), NEO4J_BATCH)
            for n in range(sizes.applied)
        ]
    return [rate("neo4j_apply_rate", rates, 2_000)]


async def apply_milvus(sizes: Sizes) -> list[Row]:
    """Into Milvus alone, which was empty: the file of vectors, which it is written from, has them by then."""
    records = embeddings(sizes.searched)
    rates = []
    async with milvus_server() as server:
        for number in range(sizes.applied):
            with tempfile.TemporaryDirectory(prefix="mnemesh-bench-") as folder:
                file = VectorFile(Path(folder), site=of_site(number)["site"], incarnation="1")
                target = MilvusTarget.of(server.url, Path(folder))
                store = MilvusStore(target, file, partial(getattr, file, "watermark"), **of_site(number))
                with contextlib.closing(file), contextlib.closing(store):
                    store.open()
                    store.begin(afresh=False)
                    applied(file, records, MOST_VECTORS_APPLIED)
                    applied(store, records[:MILVUS_BATCH], MILVUS_BATCH)  # which makes the collection, in seconds
                    rates.append(applied(store, records[MILVUS_BATCH:], MILVUS_BATCH))
    return [Row(name="milvus_apply_rate", value=median(rates), unit="events/s", runs=len(rates))]


async def apply_faiss(sizes: Sizes) -> list[Row]:
    rates = []
    for _ in range(sizes.applied):
        with tempfile.TemporaryDirectory(prefix="mnemesh-bench-") as folder:
            store = MemoryVectors(Path(folder), site=SITE, incarnation="1")
            try:
                rates.append(applied(store, embeddings(sizes.vectors), MOST_VECTORS_APPLIED))
            finally:
                store.close()
    return [rate("faiss_apply_rate", rates, 50_000)]


async def start_cold(sizes: Sizes) -> list[Row]:
    return await snapshots.cold_start(sizes.cold)


def rate(name: str, rates: Sequence[float], least: int) -> Row:
    return Row(name=name, value=median(rates), unit="events/s", goal=value("at least", least), runs=len(rates))


def of_site(number: int) -> dict[str, Any]:
    """A site of its own for each run, so that each begins from empty on the same server."""
    return {"site": f"bench{number}", "shard": "s0", "partitions": range(PARTITIONS), "incarnation": "1"}


def applied_outside(store: OutsideStore, records: Sequence[Record], most: int) -> float:
    store.open()
    try:
        store.begin(afresh=False)
        store.look()
        return applied(store, records, most)
    finally:
        store.close()


def applied(store: Any, records: Sequence[Record], most: int) -> float:
    """Events a second, in the batches of the store's projection."""
    began = time.perf_counter()
    for start in range(0, len(records), most):
        some = records[start : start + most]
        store.apply(some, some[-1].sequence)
    return len(records) / (time.perf_counter() - began)


def documents(count: int) -> list[Record]:
    """One put of each of so many entities, as agents write them."""
    return records_of(
        {name: part for name, part in document.items() if name != "entity_id"} | {"id": document["entity_id"]}
        for document in buses(range(count))
    )


def embeddings(count: int) -> list[Record]:
    vectors, *_ = made(count, 1)
    return records_of({"id": f"memory:{n}", "vectors": {"s": np.asarray(vector)}} for n, vector in enumerate(vectors))


def records_of(bodies: Any) -> list[Record]:
    now = wall_ms()
    records = []
    for sequence, body in enumerate(bodies, 1):
        entity_id = body.pop("id")
        event = Event(
            id=f"bench.caller.{sequence}",
            tenant=TENANT,
            entity_id=entity_id,
            op="put",
            agent="caller",
            site=SITE,
            hlc=(now << 16) + sequence,
            body=body,
        )
        records.append(Record(sequence, now, partition_of(TENANT, entity_id), event))
    return records


# ── servers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def redis_server() -> AsyncIterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="mnemesh-redis-") as folder, served(RedisServer(Path(folder))) as server:
        yield server


@contextlib.asynccontextmanager
async def neo4j_server() -> AsyncIterator[Neo4jServer]:
    with tempfile.TemporaryDirectory(prefix="mnemesh-neo4j-") as folder, served(Neo4jServer(Path(folder))) as server:
        yield server


@contextlib.asynccontextmanager
async def milvus_server() -> AsyncIterator[MilvusServer]:
    with tempfile.TemporaryDirectory(prefix="mnemesh-milvus-") as folder, served(MilvusServer(Path(folder))) as server:
        yield server


@contextlib.contextmanager
def served(server: Any) -> Any:
    assert isinstance(server, Server)
    with running(server):
        yield server


GROUPS: tuple[Group[Sizes], ...] = (
    (("redis_get_context_p50", "redis_get_context_p99"), get_context),
    (("neo4j_traverse_p50", "neo4j_traverse_p99"), traverse),
    (("milvus_search_p50", "milvus_search_p99"), search_milvus),
    (("takeover_s", "takeover_max_s"), takeover),
    (("redis_apply_rate",), apply_redis),
    (("neo4j_apply_rate",), apply_neo4j),
    (("milvus_apply_rate",), apply_milvus),
    (("faiss_apply_rate",), apply_faiss),
    (snapshots.NAMES, start_cold),
)
