"""Stores that drifted from the log: `doctor --stores` finds them, `rebuild` builds them anew while they are read."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import neo4j
import pytest
import redis
from conftest import server_options
from ledger import STRONG
from test_crash import alice_on

from bench.store_servers import Neo4jServer, RedisServer
from cli.doctor import diagnose
from cli.main import main
from cli.mesh import Mesh, MeshOptions
from cli.operator import asking
from memory_shards.stores.milvus_client import Target, connected, prefix_of
from memory_shards.stores.urls import StoreUrls
from mnemesh import Consistency, Memory, subjects
from mnemesh.errors import NotFound, Stale, Timeout, Unavailable
from mnemesh.jetstream import api
from mnemesh.messages import Status

SITE = "hub"
LONG_MS = 60_000


def options(data: Path, urls: StoreUrls, replicas: int) -> MeshOptions:
    return MeshOptions(
        server=server_options(data),
        shards=1,
        replicas=replicas,
        tenants=["acme"],
        agents=[("acme", "alice")],
        stores=urls,
    )


def folder_of(mesh: Mesh) -> Path:
    """Where the first replica keeps its files."""
    return next(mesh.options.server.data.rglob("vectors.db")).parent


async def write_some(memory: Memory) -> None:
    for n in range(40):
        await memory.set_context(
            f"e{n}",
            type="thing",
            attributes={"n": n},
            text=f"words of {n}",
            edges=[{"relation": "after", "target_id": f"e{n - 1}"}],
            vectors={"v": [float(n + 1), 1.0]},
        )
    await memory.forget("e7")


async def amiss(data: Path) -> list[str]:
    """What doctor says of stores that do not hold what the log says, and of nothing else."""
    found = [finding async for finding in diagnose(data, stores=True)]
    assert not [finding for finding in found if finding.verdict == "wrong" and "the log says" not in finding.what]
    return [finding.what for finding in found if finding.verdict == "wrong"]


async def rebuilt(data: Path, store: str) -> int:
    return await asyncio.to_thread(main, ["rebuild", "--shard", "s0", "--store", store, "--data", str(data)])


async def check_reads(memory: Memory) -> None:
    context = await memory.get_context("e5", consistency=STRONG, include_vectors=True, budget_ms=LONG_MS)
    assert (context.attributes, context.edges) == ({"n": 5}, [{"relation": "after", "target_id": "e4"}])
    assert list(context.vectors or {}) == ["v"]
    with pytest.raises(NotFound):
        await memory.get_context("e7", consistency=STRONG, budget_ms=LONG_MS)
    hits = (await memory.search_embedding([6.0, 1.0], space="v", k=100, consistency=STRONG, budget_ms=LONG_MS)).hits
    assert {hit.entity_id for hit in hits} == {f"e{n}" for n in range(40) if n != 7}


async def is_back(memory: Memory) -> None:
    """Wait until a shard that was killed answers again."""
    while True:
        try:
            await memory.get_context("e5", consistency=STRONG)
        except (Timeout, Unavailable, Stale):
            await asyncio.sleep(0.05)
        else:
            return


class Reading:
    """Reads what does not change, again and again, and counts."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.done = 0

    async def run(self) -> None:
        while True:
            context = await self._memory.get_context("e5", include_vectors=True)
            assert (context.attributes, len(context.edges), list(context.vectors or {})) == ({"n": 5}, 1, ["v"])
            hits = (await self._memory.search_embedding([6.0, 1.0], space="v", k=3)).hits
            assert len(hits) == 3
            self.done += 1


async def while_reading(memory: Memory, work: Callable[[], object]) -> None:
    reading = Reading(memory)
    task = asyncio.ensure_future(reading.run())
    try:
        await work()  # type: ignore[misc]
        wanted = reading.done + 5
        while reading.done < wanted and not task.done():  # noqa: ASYNC110  # another task reads
            await asyncio.sleep(0.01)
    finally:
        task.cancel()
        done, _ = await asyncio.wait([task])
    assert all(each.cancelled() for each in done), task.exception()


async def test_embedded_stores_that_were_written_to_by_hand_are_found_and_built_anew(tmp_path: Path) -> None:
    async with Mesh(options(tmp_path, StoreUrls(), replicas=1)) as mesh, alice_on(mesh.server) as memory:
        await write_some(memory)
        await check_reads(memory)
        assert await amiss(tmp_path) == []
        folder = folder_of(mesh)
        for file, statement in (
            ("memory.db", "UPDATE entity SET text = 'other' WHERE entity_id = 'e3'"),
            ("vectors.db", "UPDATE vectors SET length = 9 WHERE place = (SELECT max(place) FROM vectors)"),
        ):
            with closing(sqlite3.connect(folder / file)) as connection, connection:
                connection.execute(statement)
        found = await amiss(tmp_path)
        assert [line.split()[4] for line in found] == ["attributes", "text", "vectors"]

        async def rebuild() -> None:
            assert await rebuilt(tmp_path, "attributes") == 0
            await memory.set_context("meanwhile", attributes={"n": 1}, vectors={"v": [-1.0, 1.0]})
            assert await rebuilt(tmp_path, "vectors") == 0

        await while_reading(memory, rebuild)
        assert await amiss(tmp_path) == []
        await memory.forget("meanwhile")
        await check_reads(memory)
        mesh.children["s0.0"].send(signal.SIGKILL)
        await is_back(memory)
        await check_reads(memory)
        assert await amiss(tmp_path) == []
        assert await rebuilt(tmp_path, "vectors") == 0  # of a shard that has heard nothing new
        await check_reads(memory)
        mesh.children["s0.0"].send(signal.SIGKILL)
        await is_back(memory)
        assert sorted(name for name in os.listdir(folder) if not name.endswith(("-wal", "-shm"))) == [
            "lock",
            "memory.db",
            "vectors.db",
        ]


async def test_servers_that_were_written_to_by_hand_are_found_and_built_anew(
    tmp_path: Path, redis_server: RedisServer, neo4j_server: Neo4jServer
) -> None:
    urls = StoreUrls(attributes=redis_server.url, edges=neo4j_server.url)
    with redis.Redis(port=redis_server.port) as client:
        for key in client.scan_iter(f"mnemesh:{{{SITE}*"):
            client.delete(key)
    async with Mesh(options(tmp_path, urls, replicas=2)) as mesh, alice_on(mesh.server) as memory:
        await write_some(memory)
        await check_reads(memory)
        assert await amiss(tmp_path) == []
        with redis.Redis(port=redis_server.port) as client:
            (key,) = client.keys(f"mnemesh:{{{SITE}.*:acme:entity:e3")
            client.hset(key, "n", "33")
        with neo4j.GraphDatabase.driver(
            f"bolt://127.0.0.1:{neo4j_server.port}", auth=("neo4j", Neo4jServer.PASSWORD)
        ) as driver:
            driver.execute_query(
                "MATCH (e:Entity {site: $site, id: 'e9'})-[r:EDGE]->() DELETE r", parameters_={"site": SITE}
            )
        found = await amiss(tmp_path)
        assert sorted({line.split()[4] for line in found}) == ["attributes", "edges"]

        async def rebuild() -> None:
            assert await rebuilt(tmp_path, "attributes") == 0
            await memory.set_context("meanwhile", attributes={"n": 1}, vectors={"v": [-1.0, 1.0]})
            assert await rebuilt(tmp_path, "edges") == 0
            assert await rebuilt(tmp_path, "text") == 0  # of a file that is named for nothing else

        await while_reading(memory, rebuild)
        assert await amiss(tmp_path) == []
        await memory.forget("meanwhile")
        await check_reads(memory)
        with redis.Redis(port=redis_server.port) as client:
            while client.keys(f"mnemesh:{{{SITE}.*"):  # the generation before  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            assert client.keys(f"mnemesh:{{{SITE}~1.*")
        for replica in ("s0.0", "s0.1"):
            mesh.children[replica].send(signal.SIGKILL)
        await is_back(memory)
        await check_reads(memory)
        assert await amiss(tmp_path) == []


async def test_an_index_in_milvus_that_lost_a_row_is_found_and_filled_anew(tmp_path: Path) -> None:
    async with (
        Mesh(options(tmp_path, StoreUrls(vectors="milvus:"), replicas=1)) as mesh,
        alice_on(mesh.server) as memory,
    ):
        await write_some(memory)
        await check_reads(memory)
        assert await amiss(tmp_path) == []
        folder = folder_of(mesh)
    with connected(Target.of("milvus:", folder)) as client:
        (collection,) = (name for name in client.list_collections() if name.startswith(prefix_of(f"{SITE}.s0")))
        client.delete(collection, ids=["e9"])
        client.flush(collection)
    async with (
        Mesh(options(tmp_path, StoreUrls(vectors="milvus:"), replicas=1)) as mesh,
        alice_on(mesh.server) as memory,
    ):
        found = await amiss(tmp_path)
        assert [line.split()[4] for line in found] == ["index"]

        async def rebuild() -> None:
            assert await rebuilt(tmp_path, "vectors") == 0

        await while_reading(memory, rebuild)
        assert await amiss(tmp_path) == []
        await check_reads(memory)
        mesh.children["s0.0"].send(signal.SIGKILL)
        await is_back(memory)
        await check_reads(memory)
        assert await amiss(tmp_path) == []


async def test_a_store_that_is_rebuilt_again_and_again_misses_nothing_of_what_is_written_meanwhile(
    tmp_path: Path,
) -> None:
    """While its worker is kept busy too, so that what is handed to it has to wait."""
    async with Mesh(options(tmp_path, StoreUrls(), replicas=1)) as mesh, alice_on(mesh.server) as memory:
        await write_some(memory)
        written: dict[str, int] = {}

        async def write() -> None:
            for n in itertools.count():
                done = await memory.set_context(f"w{n}", attributes={"n": n}, vectors={"v": [float(n), 2.0]})
                written[f"w{n}"] = done.version

        async def look() -> None:
            async with asking(mesh.options.server, "test") as operator:
                while True:
                    await operator.ask(subjects.SHARD_STATUS, subjects.shard_status("s0"), Status(digest=True))

        tasks = [asyncio.ensure_future(write()), asyncio.ensure_future(look())]
        for store in ("attributes", "vectors", "attributes"):
            assert await rebuilt(tmp_path, store) == 0
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(told, asyncio.CancelledError) for told in await asyncio.gather(*tasks, return_exceptions=True)
        )
        since = Consistency(level="session", token={SITE: max(written.values())})
        for name in list(written)[::5]:
            context = await memory.get_context(name, consistency=since, include_vectors=True, budget_ms=LONG_MS)
            assert (context.attributes, list(context.vectors or {})) == ({"n": int(name[1:])}, ["v"])
        assert await amiss(tmp_path) == []


async def test_what_was_rebuilt_and_cannot_be_read_is_left_aside(tmp_path: Path) -> None:
    async with Mesh(options(tmp_path, StoreUrls(), replicas=1)) as mesh, alice_on(mesh.server) as memory:
        await write_some(memory)
        assert await rebuilt(tmp_path, "attributes") == 0
        folder = folder_of(mesh)
    (folder / "beside-1" / "memory.db").write_bytes(b"no database at all" * 1000)
    (folder / "beside-1" / "memory.db-wal").unlink(missing_ok=True)
    (folder / "beside-of-a-stranger").mkdir()
    (folder / "generation-vectors").touch()
    async with Mesh(options(tmp_path, StoreUrls(), replicas=1)) as mesh, alice_on(mesh.server) as memory:
        await check_reads(memory)
        assert await amiss(tmp_path) == []


async def test_a_log_that_lost_its_beginning_takes_nothing_from_a_store(tmp_path: Path) -> None:
    async with Mesh(options(tmp_path, StoreUrls(), replicas=1)) as mesh, alice_on(mesh.server) as memory:
        await write_some(memory)
        async with asking(mesh.options.server, "test") as operator:
            await api(operator.inbox, f"STREAM.PURGE.{subjects.log_stream(SITE)}", {"seq": 20})
        assert await rebuilt(tmp_path, "attributes") == 1  # with a forget in it, nobody can tell that it was cut
        await check_reads(memory)


async def test_what_differs_is_told_while_more_is_written(tmp_path: Path) -> None:
    async with Mesh(options(tmp_path, StoreUrls(), replicas=1)) as mesh, alice_on(mesh.server) as memory:
        await write_some(memory)
        await check_reads(memory)
        with closing(sqlite3.connect(folder_of(mesh) / "memory.db")) as connection, connection:
            connection.execute("UPDATE entity SET text = 'other' WHERE entity_id = 'e3'")

        async def write() -> None:
            for n in itertools.count():
                await memory.set_context(f"w{n % 7}", attributes={"n": n})

        writing = asyncio.ensure_future(write())
        assert [line.split()[4] for line in await amiss(tmp_path)] == ["attributes", "text"]
        writing.cancel()


@pytest.mark.weather
async def test_a_rebuild_that_dies_with_its_replica_is_told(
    tmp_path: Path, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with redis.Redis(port=redis_server.port) as client:
        for key in client.scan_iter(f"mnemesh:{{{SITE}*"):
            client.delete(key)
    urls = StoreUrls(attributes=redis_server.url)
    async with Mesh(options(tmp_path, urls, replicas=1)) as mesh, alice_on(mesh.server) as memory:
        await memory.ingest([{"entity_id": f"e{n}", "attributes": {"n": n}} for n in range(3000)])
        await memory.get_context("e5", consistency=STRONG, budget_ms=LONG_MS)
        command = asyncio.ensure_future(rebuilt(tmp_path, "attributes"))
        with redis.Redis(port=redis_server.port) as client:
            while not client.keys(f"mnemesh:{{{SITE}~1.*"):  # noqa: ASYNC110  # another process writes them
                await asyncio.sleep(0.01)
        mesh.children["s0.0"].send(signal.SIGKILL)
        assert await command == 1
        assert "ended meanwhile" in capsys.readouterr().err
        assert (await memory.get_context("e5", budget_ms=LONG_MS)).attributes == {"n": 5}
        assert await rebuilt(tmp_path, "attributes") == 0
