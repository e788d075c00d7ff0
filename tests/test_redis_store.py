"""What others see who look into Redis: an entity is a hash of JSON values, which ends when all of it does. And what a
cluster loses where a node fails over to one that has not heard of all."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from backends import Backend, apply
from redis.cluster import RedisCluster
from test_merge import FUTURE, forget, put
from test_stores import edge, got, log_of

from bench.store_servers import RedisServer, redis_cluster, running
from cli.server import free_port
from memory_shards.outside import OutsideProjection
from memory_shards.stores import WentBack
from memory_shards.stores.by_url import Stores
from memory_shards.stores.redis_layout import Keys
from memory_shards.stores.redis_store import RedisStore
from memory_shards.stores.urls import StoreUrls
from mnemesh.clock import wall_ms
from mnemesh.event import Record
from mnemesh.ids import PARTITIONS, partition_of
from mnemesh.lease import HELD


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_server.port, decode_responses=True) as client:
        yield client


@pytest.fixture
def backend(redis_server: RedisServer, tmp_path: Path) -> Backend:
    return Backend.of(StoreUrls(attributes=redis_server.url), tmp_path / "stores")


def hash_of(backend: Backend, entity_id: str) -> str:
    keys = Keys(backend.origin.site, partition_of("acme", entity_id))
    return keys.of("acme").entity(entity_id).decode()


async def test_an_entity_is_a_hash_of_json_values_under_its_tenant(backend: Backend, client: redis.Redis) -> None:
    async with backend.opened() as stores:
        attributes = {"kv": 20.0, "name": "Bus ☃", "tags": ["a"], "on": True}
        await apply(stores, log_of(put(ms=1, type="bus", attributes=attributes, text="hums")))
        assert ":acme:entity:pump" in hash_of(backend, "pump")
        fields: Any = client.hgetall(hash_of(backend, "pump"))
        assert {name: json.loads(value) for name, value in fields.items()} == attributes | {
            ":type": "bus",
            ":text": "hums",
            ":version": 1,
        }


async def test_redis_drops_an_entity_when_all_of_it_ends_and_no_sooner(backend: Backend, client: redis.Redis) -> None:
    soon = wall_ms() + 3_600_000
    log = log_of(
        put(ms=1, attributes={"n": 1}, valid_to=soon),
        put(ms=2, attributes={"m": 2}, valid_to=FUTURE),
        put(ms=3, attributes={"o": 3}),
        put(ms=4, entity_id="over", attributes={"n": 1}, valid_to=1000),
    )
    async with backend.opened() as stores:
        await apply(stores, log[:1])
        assert client.pexpiretime(hash_of(backend, "pump")) == soon
        await apply(stores, log[:2])
        assert client.pexpiretime(hash_of(backend, "pump")) == FUTURE
        await apply(stores, log)
        assert client.pexpiretime(hash_of(backend, "pump")) == -1
        assert not client.exists(hash_of(backend, "over"))
        assert len(await stores.documents.timeline("acme", "over", 0, 9)) == 1


async def test_what_was_forgotten_is_in_no_key(backend: Backend, client: redis.Redis) -> None:
    log = log_of(put(ms=1, attributes={"n": "SECRET"}, text="SECRET", edges=[edge("SECRET")]), forget(ms=2))
    async with backend.opened() as stores:
        await apply(stores, log[:1])
        await apply(stores, log)
        dumped = []
        with redis.Redis(port=client.get_connection_kwargs()["port"]) as raw:
            for key in raw.scan_iter(f"mnemesh:{{{backend.origin.site}.*"):
                match raw.type(key):
                    case b"hash":
                        dumped.append(str(raw.hgetall(key)))
                    case b"zset":
                        dumped.append(str(raw.zrange(key, 0, -1)))
                    case b"string":
                        dumped.append(str(raw.get(key)))
        assert dumped
        assert "SECRET" not in "".join(dumped)


# ── a node of a cluster fails over ──────────────────────────────────────────────────────────────────────────


class GrowingLog:
    """A log that a projection follows while it grows."""

    def __init__(self) -> None:
        self._records: Sequence[Record] = []
        self._grew = asyncio.Event()

    def grow(self, records: Sequence[Record]) -> None:
        self._records = records
        self._grew.set()

    async def follow(self, after: int) -> AsyncGenerator[tuple[list[Record], int], None]:
        while True:
            self._grew.clear()
            if fresh := [each for each in self._records if each.sequence > after]:
                after = fresh[-1].sequence
                yield fresh, after
            await self._grew.wait()

    async def head(self) -> int:
        return len(self._records)


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


async def test_a_node_that_fails_over_without_the_last_writes_is_given_them_again(tmp_path: Path) -> None:
    """Its replica is stopped before the last writes, and takes its place when it is killed: what they were is lost."""
    log = log_of(*(put(ms=n, entity_id=f"e{n % 100}", attributes={f"a{n}": n}) for n in range(1, 401)))
    with redis_cluster(tmp_path / "cluster") as nodes:
        primary = nodes[1]
        replica = RedisServer(tmp_path / "replica", "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        with running(replica):
            await asyncio.to_thread(replicate, primary, replica, nodes)
            backend = Backend.of(StoreUrls(attributes=nodes[0].url), tmp_path / "stores")
            async with backend.opened() as stores:
                projection, growing = stores.documents.projection, GrowingLog()
                assert isinstance(projection, OutsideProjection)
                growing.grow(log[:200])
                running_on = asyncio.ensure_future(projection.run(growing.follow, growing.head, HELD))
                await projection.watermark.reached(200)
                with redis.Redis(port=primary.port) as client:
                    assert await asyncio.to_thread(client.wait, 1, 10_000) == 1
                replica.kill()
                growing.grow(log[:300])
                await projection.watermark.reached(300)
                primary.kill()
                await asyncio.to_thread(take_over, replica)
                growing.grow(log)
                async with asyncio.timeout(30):
                    await projection.watermark.reached(400)
                await check_whole(stores, log)
                running_on.cancel()
                with suppress(asyncio.CancelledError):
                    await running_on


def replicate(primary: RedisServer, replica: RedisServer, nodes: Sequence[RedisServer]) -> None:
    """Have one node follow another, once all know it, and return when it has all that this has."""
    with ExitStack() as stack:
        clients = [stack.enter_context(redis.Redis(port=node.port)) for node in (*nodes, replica)]
        leading, following = clients[nodes.index(primary)], clients[-1]
        leading.config_set("repl-diskless-sync-delay", 0)
        bus = following.config_get("cluster-port")["cluster-port"]
        leading.execute_command("CLUSTER MEET", "127.0.0.1", replica.port, bus)
        names = [client.execute_command("CLUSTER MYID").decode() for client in clients]
        until(lambda: all(name in str(client.execute_command("CLUSTER NODES")) for client in clients for name in names))
        following.execute_command("CLUSTER REPLICATE", names[nodes.index(primary)])
        until(lambda: following.info("replication").get("master_link_status") == "up")


def take_over(replica: RedisServer) -> None:
    """Have it be the primary of its slots, with what it has."""
    replica.start()
    with redis.Redis(port=replica.port) as client:
        client.execute_command("CLUSTER FAILOVER", "TAKEOVER")
        until(lambda: client.info("replication")["role"] == "master")


def test_a_node_that_fails_over_after_it_was_asked_is_not_applied_to(
    redis_cluster_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just then nothing can be killed for sure: where the partition stood is lowered by hand, on the real server."""
    site = Backend.of(StoreUrls(attributes=redis_cluster_url), tmp_path).origin.site
    log = log_of(*(put(ms=n, attributes={"n": n}) for n in range(1, 4)))
    store = RedisStore(redis_cluster_url, site=site, shard="s0", partitions=range(PARTITIONS), incarnation="1")
    with closing(store), RedisCluster.from_url(redis_cluster_url) as client:
        store.open()
        store.begin(afresh=False)
        store.apply(log[:2], 2)
        checked = store._check

        def lost_after_that(after: int) -> int:
            stands = checked(after)
            client.hset(store.keys[log[0].partition].meta.decode(), "applied", 1)
            return stands

        monkeypatch.setattr(store, "_check", lost_after_that)
        with pytest.raises(WentBack, match="stands at 1, and stood at 2"):
            store.apply(log[2:], 3, 2)
        assert store.look() == 1


async def check_whole(stores: Stores, log: Sequence[Record]) -> None:
    """Every event counts, once."""
    written: dict[str, list[int]] = {}
    for record in log:
        written.setdefault(record.event.entity_id, []).append(record.sequence)
    for entity_id, sequences in written.items():
        events = await stores.documents.timeline("acme", entity_id, 0, 1000)
        assert [event.sequence for event in events] == sequences
        seen = await got(stores, entity_id) or {}
        assert seen["attributes"] == {f"a{n}": n for n in sequences}


async def test_a_batch_may_be_larger_than_what_redis_takes_as_one_argument(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis", "--proto-max-bulk-len", "20mb")
    with running(server):
        backend = Backend.of(StoreUrls(attributes=server.url), tmp_path / "stores")
        async with backend.opened() as stores:
            blob = "x" * 400_000
            await apply(stores, log_of(*(put(ms=n, entity_id=f"e{n}", attributes={"b": blob}) for n in range(1, 81))))
            for n in (1, 40, 80):
                document = await stores.documents.get("acme", f"e{n}")
                assert document is not None
                assert document.attributes == {"b": blob}
