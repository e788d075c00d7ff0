"""What others see who look into Redis: an entity is a hash of JSON values, which ends when all of it does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from backends import Backend, apply
from test_merge import FUTURE, forget, put
from test_stores import edge, log_of

from bench.store_servers import RedisServer
from memory_shards.stores.redis_layout import Keys
from memory_shards.stores.urls import StoreUrls
from mnemesh.clock import wall_ms
from mnemesh.ids import partition_of


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
        for key in client.scan_iter(f"mnemesh:{{{backend.origin.site}.*"):
            match client.type(key):
                case "hash":
                    dumped.append(str(client.hgetall(key)))
                case "stream":
                    with redis.Redis(port=client.get_connection_kwargs()["port"]) as raw:
                        dumped.append(str(raw.xrange(key)))
                case "zset":
                    dumped.append(str(client.zrange(key, 0, -1)))
        assert dumped
        assert "SECRET" not in "".join(dumped)
