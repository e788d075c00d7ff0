"""The core suite: calls, writes, recall, federation, replay and the demo's decision loop.

Both sides of a ratio are measured in turns within one run, so that a machine that drifts drifts for both.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import logging
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgpack
import nats
import numpy as np
from nats.aio.client import Client

from bench import bare
from bench.report import Row, percentile, ratio, value
from cli.mesh import Mesh, MeshOptions
from cli.server import ServerOptions, free_port
from mnemesh import Consistency, Memory, connect, subjects, wire
from mnemesh.asker import Asker
from mnemesh.connection import Link, LinkOptions
from mnemesh.messages import SetContext, ShardStatus, Status

logger = logging.getLogger("bench")

DIMENSION = 384
LATENT = 32
K = 10
ROUNDS = 5
Work = Callable[[], Awaitable[object]]


class Sizes:
    """How much of everything. `quick` is for trying the suite out; its figures mean little."""

    def __init__(self, quick: bool) -> None:
        self.calls = 100 if quick else 400
        self.reads_each = 20 if quick else 150
        self.writes_each = 10 if quick else 40
        self.ingested = 5_000 if quick else 60_000
        self.recalls = 30 if quick else 300
        self.federated = 2_000 if quick else 50_000
        self.alone = 2_000 if quick else 20_000
        self.queries = 64 if quick else 512
        self.demo = ("--days", "30", "--duration", "5", "--agents", "50") if quick else ()


async def run(quick: bool, wanted: Sequence[str]) -> list[Row]:
    """Measure every group that has a wanted row (all of them if none is named)."""
    sizes = Sizes(quick)
    rows: list[Row] = []
    for names, measure in GROUPS:
        if not wanted or set(names) & set(wanted):
            logger.info("measuring %s", ", ".join(names))
            rows += await measure(sizes)
    return [row for row in rows if not wanted or row.name in wanted]


# ── calls and writes ────────────────────────────────────────────────────────────────────────────────────────────


async def calls(sizes: Sizes) -> list[Row]:
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(bare.server())
        await stack.enter_async_context(bare.running("echo", url))
        await stack.enter_async_context(bare.running("actor", url))
        raw = await nats.connect(url)
        stack.push_async_callback(raw.close)
        link = await Link.open(LinkOptions(url=url, inbox_prefix=subjects.agent_inbox("bench", "caller")))
        stack.push_async_callback(link.close)
        asker = await Asker(link).open()
        memory = await stack.enter_async_context(mesh_memory(shards=1))
        await memory.set_context("bus:7", type="bus", attributes=ATTRIBUTES)
        await settled(memory, "bus:7")

        request = SetContext(entity_id="bus:7", attributes=ATTRIBUTES)
        subject = subjects.set_context("bench", "caller")
        said = wire.encode(request)
        context = wire.encode(await memory.get_context("bus:7"))

        async def echo() -> object:
            return await raw.request("bare.echo", said, timeout=5)

        async def echo_context() -> object:
            return await raw.request("bare.echo", context, timeout=5)

        async def call() -> object:
            return await asker.ask(subjects.SET_CONTEXT, subject, request)

        async def read() -> object:
            return await memory.get_context("bus:7")

        bare_call, our_call = await latencies([echo, call], sizes.calls)
        bare_read, our_read = await latencies([echo_context, read], sizes.calls)
        bare_rate, our_rate = await rates([echo_context, read], callers=32, each=sizes.reads_each)
        return [
            micro("actor_call_p50", our_call, bare_call, ratio("at most", 1.4)),
            micro("get_context_p50", our_read, bare_read, ratio("at most", 1.5)),
            rate("get_context_rate", our_rate, bare_rate, ratio("at least", 0.6)),
        ]


async def writes(sizes: Sizes) -> list[Row]:
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(bare.server())
        raw = await nats.connect(url)
        stack.push_async_callback(raw.close)
        js = raw.jetstream()
        await js.add_stream(name="RAW", subjects=["raw.*"])
        memory = await stack.enter_async_context(mesh_memory(shards=1))
        said = wire.encode(SetContext(entity_id="bus:7", type="bus", attributes=ATTRIBUTES))
        numbers = iter(range(1_000_000_000))

        async def publish() -> object:
            return await js.publish(f"raw.{next(numbers) % 1000}", said)

        async def write() -> object:
            return await memory.set_context(f"bus:{next(numbers) % 1000}", type="bus", attributes=ATTRIBUTES)

        bare_write, our_write = await latencies([publish, write], sizes.calls // 2)
        bare_rate, our_rate = await rates([publish, write], callers=64, each=sizes.writes_each)

        recalls = []
        vector = np.random.default_rng(1).standard_normal((sizes.recalls, DIMENSION)).astype(np.float32)
        for number in range(sizes.recalls):
            began = time.perf_counter()
            written = await memory.upsert_embedding(f"day:{number}", vector[number], space="recalled")
            seen = Consistency(level="session", token=written.token)
            found = await memory.search_embedding(vector[number], space="recalled", k=1, consistency=seen)
            recalls.append(time.perf_counter() - began)
            assert found.hits[0].entity_id == f"day:{number}", "a write was not recalled"
        return [
            micro("set_context_p50", our_write, bare_write, ratio("at most", 2.0)),
            rate("set_context_rate", our_rate, bare_rate, ratio("at least", 2.0)),
            Row(
                name="write_to_recall_p99",
                value=percentile(recalls, 0.99) * 1e3,
                unit="ms",
                goal=value("at most", 10),
                runs=len(recalls),
            ),
        ]


async def ingest_and_replay(sizes: Sizes) -> list[Row]:
    async with contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(running_mesh(shards=1))
        memory = await stack.enter_async_context(agent_of(mesh))
        documents: list[dict[str, Any]] = [
            {
                "entity_id": f"bus:{number}",
                "type": "bus",
                "attributes": {**ATTRIBUTES, "number": number},
                "edges": [
                    {"relation": "feeds", "target_id": f"bus:{number + 1}"},
                    {"relation": "supplies", "target_id": f"load:{number}"},
                ],
            }
            for number in range(sizes.ingested)
        ]
        requests = iter([documents[start : start + 500] for start in range(0, len(documents), 500)])

        async def send() -> None:
            for request in requests:
                done = await memory.ingest(request)
                assert done.accepted == len(request), "an entity was refused"

        began = time.perf_counter()
        await asyncio.gather(*(send() for _ in range(8)))
        took = time.perf_counter() - began
        ingested = Row(
            name="ingest_rate",
            value=len(documents) / took,
            unit="entities/s",
            goal=value("at least", 10_000),
            runs=len(documents) // 500,
        )
        return [ingested, await replay(mesh, len(documents))]


async def replay(mesh: Mesh, events: int) -> Row:
    """A second replica with an empty folder reads the whole log; from its first sign of life to the head."""
    operator = await Link.open(mesh.server.credentials.load("operator").link_options())
    asker = await Asker(operator).open()
    folder = mesh.options.server.data / "shards" / "replayed"
    credentials = mesh.server.credentials.load("shard").path

    async def positions() -> list[int]:
        replies = await asker.inbox.gather(subjects.shard_status("s0"), wire.encode(Status()), most=2, wait_s=1)
        return sorted(wire.decode_as(reply.data, ShardStatus).watermark["bench"] for reply in replies)

    while (await positions())[-1] < events:
        pass
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cli.main", "run", "shard", "--shard", "s0", "--folder", str(folder),
        "--site", "bench", "--credentials", str(credentials), stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while len(seen := await positions()) < 2:
            pass
        began, first = time.perf_counter(), seen[0]
        while (seen := await positions())[0] < events:
            pass
        took = time.perf_counter() - began
    finally:
        process.terminate()
        await process.wait()
        await operator.close()
    return Row(
        name="replay_rate",
        value=(events - first) / took,
        unit="events/s",
        goal=value("at least", 20_000),
        runs=events - first,
    )


# ── search ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def federated(sizes: Sizes) -> list[Row]:
    """Four shards with a flat space each, beside four bare responders over the same vectors, indexed alike."""
    vectors, queries, exact = made(sizes.federated * 4, sizes.queries)
    async with contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(running_mesh(shards=4))
        memory = await stack.enter_async_context(agent_of(mesh))
        await load(memory, vectors, index="flat")
        url = await stack.enter_async_context(bare.server())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for part in range(4):
            np.save(folder / f"{part}.npy", vectors[part::4])
            await stack.enter_async_context(bare.running("faiss", url, str(part), str(folder / f"{part}.npy")))
        raw = await nats.connect(url)
        stack.push_async_callback(raw.close)
        turn = iter(range(1_000_000_000))

        async def ours() -> object:
            return await memory.search_embedding(queries[next(turn) % len(queries)], space="s", k=K)

        async def theirs() -> object:
            return await bare_search(raw, queries[next(turn) % len(queries)])

        bare_p50, our_p50 = await latencies([theirs, ours], max(10, sizes.calls // 10))
        bare_rate, our_rate = await rates([theirs, ours], callers=64, each=max(2, sizes.reads_each // 25))
        return [
            micro("federated_search_p50", our_p50, bare_p50, ratio("at most", 1.3)),
            rate("federated_search_rate", our_rate, bare_rate, ratio("at least", 2.0)),
            await recall_row("federated_recall", memory, queries, exact),
        ]


async def bare_search(client: Client, query: np.ndarray[Any, Any]) -> list[tuple[float, int]]:
    """Scatter to the four responders, merge the best."""
    payload = query.tobytes()
    replies = await asyncio.gather(*(client.request(f"bare.faiss.{part}", payload, timeout=30) for part in range(4)))
    parts = [msgpack.unpackb(reply.data) for reply in replies]
    return heapq.nlargest(K, (hit for scores, found in parts for hit in zip(scores, found, strict=True)))


async def alone(sizes: Sizes) -> list[Row]:
    """One shard, one space of 20,000, the index that it chooses itself."""
    vectors, queries, exact = made(sizes.alone, sizes.queries)
    async with mesh_memory(shards=1) as memory:
        await load(memory, vectors, index="auto")
        turn = iter(range(1_000_000_000))

        async def search() -> object:
            return await memory.search_embedding(queries[next(turn) % len(queries)], space="s", k=K)

        async def filtered() -> object:
            return await memory.search_embedding(
                queries[next(turn) % len(queries)], space="s", k=K, filter={"tenth": 3}
            )

        await asyncio.sleep(20)  # the graph is built beside the searches; nothing tells a client that it is done
        (found,) = await rates([search], callers=32, each=sizes.reads_each)
        plain, narrow = await latencies([search, filtered], sizes.calls)
        tenth = np.arange(3, len(vectors), 10)
        best = np.argsort(-(queries @ vectors[tenth].T), axis=1)[:, :K]
        return [
            Row(
                name="search_rate_20k",
                value=median(found),
                unit="searches/s",
                goal=value("at least", 3_000),
                runs=len(found),
            ),
            await recall_row("search_rate_20k_recall", memory, queries, exact),
            micro("filtered_search_p50", narrow, plain, ratio("at most", 1.5)),
            await recall_row("filtered_search_recall", memory, queries, tenth[best], filter={"tenth": 3}),
        ]


def made(count: int, queries: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Unit vectors of 384 dimensions that mix 32 latent ones, with noise; queries alike; their exact best rows."""
    random = np.random.default_rng(7)
    mix = random.standard_normal((LATENT, DIMENSION)).astype(np.float32)

    def some(number: int) -> np.ndarray[Any, Any]:
        latent = random.standard_normal((number, LATENT)).astype(np.float32) @ mix
        noisy = latent + 0.3 * LATENT**0.5 * random.standard_normal((number, DIMENSION)).astype(np.float32)
        unit: np.ndarray[Any, Any] = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
        return unit

    vectors, asked = some(count), some(queries)
    exact = [np.argpartition(-(vectors @ query), K)[:K] for query in asked]
    return vectors, asked, np.stack(exact)


async def load(memory: Memory, vectors: np.ndarray[Any, Any], *, index: Any) -> None:
    await memory.upsert_embedding("row:0", vectors[0], space="s", index=index)
    requests = iter(range(0, len(vectors), 500))
    tokens: list[dict[str, int]] = []

    async def send() -> None:
        for start in requests:
            done = await memory.ingest(
                [
                    {"entity_id": f"row:{row}", "attributes": {"tenth": row % 10}, "vectors": {"s": vectors[row]}}
                    for row in range(start, min(start + 500, len(vectors)))
                ]
            )
            tokens.append(done.token)

    await asyncio.gather(*(send() for _ in range(4)))
    last = max(tokens, key=lambda token: token["bench"])
    await memory.search_embedding(
        vectors[0], space="s", k=1, consistency=Consistency(level="session", token=last), budget_ms=120_000
    )


async def recall_row(
    name: str, memory: Memory, queries: np.ndarray[Any, Any], exact: np.ndarray[Any, Any], **search: Any
) -> Row:
    """The share of the exact ten that the mesh finds, over all queries."""
    found = 0
    for query, best in zip(queries, exact, strict=True):
        hits = await memory.search_embedding(query, space="s", k=K, **search)
        found += len({hit.entity_id for hit in hits.hits} & {f"row:{row}" for row in best})
    return Row(name=name, value=found / exact.size, unit="recall@10", goal=value("at least", 0.98), runs=len(queries))


# ── the demo ────────────────────────────────────────────────────────────────────────────────────────────────────


async def decision_loop(sizes: Sizes) -> list[Row]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cli.main", "demo", "--json", *sizes.demo, stdout=asyncio.subprocess.PIPE
    )
    told, _ = await process.communicate()
    figures = json.loads(told.splitlines()[-1])
    return [
        Row(
            name="decision_loop_p99",
            value=figures["loop"]["p99"],
            unit="ms",
            goal=value("at most", 22),
            runs=figures["decisions"],
        ),
        Row(name="decision_loop_p50", value=figures["loop"]["p50"], unit="ms", runs=figures["decisions"]),
    ]


# ── how things are measured ─────────────────────────────────────────────────────────────────────────────────────

ATTRIBUTES: dict[str, Any] = {"name": "MV1.101 Bus 7", "kv": 20.0, "zone": 3, "active": True}


async def latencies(sides: Sequence[Work], count: int) -> list[list[float]]:
    """Seconds of each call of each side, one caller, in turns after a warm-up."""
    samples: list[list[float]] = [[] for _ in sides]
    for work in sides:
        for _ in range(max(5, count // 10)):
            await work()
    for _ in range(ROUNDS):
        for work, side in zip(sides, samples, strict=True):
            for _ in range(count):
                began = time.perf_counter()
                await work()
                side.append(time.perf_counter() - began)
    return samples


async def rates(sides: Sequence[Work], *, callers: int, each: int) -> list[list[float]]:
    """Calls a second of each side with so many callers at once, one figure a round, in turns."""
    samples: list[list[float]] = [[] for _ in sides]

    async def caller(work: Work) -> None:
        for _ in range(each):
            await work()

    for _ in range(ROUNDS):
        for work, side in zip(sides, samples, strict=True):
            began = time.perf_counter()
            await asyncio.gather(*(caller(work) for _ in range(callers)))
            side.append(callers * each / (time.perf_counter() - began))
    return samples


def micro(name: str, ours: Sequence[float], theirs: Sequence[float], goal: Any) -> Row:
    return Row(
        name=name,
        value=median(ours) * 1e6,
        unit="µs",
        reference=median(theirs) * 1e6,
        goal=goal,
        runs=len(ours),
    )


def rate(name: str, ours: Sequence[float], theirs: Sequence[float], goal: Any) -> Row:
    return Row(name=name, value=median(ours), unit="1/s", reference=median(theirs), goal=goal, runs=len(ours))


@contextlib.asynccontextmanager
async def running_mesh(*, shards: int) -> AsyncIterator[Mesh]:
    """A mesh of processes in a temporary folder, synced, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mnemesh-bench-") as folder:
        server = ServerOptions(data=Path(folder), site="bench", port=free_port(), monitoring_port=free_port())
        options = MeshOptions(server=server, shards=shards, tenants=("bench",), agents=(("bench", "caller"),))
        async with Mesh(options) as mesh:
            yield mesh


@contextlib.asynccontextmanager
async def agent_of(mesh: Mesh) -> AsyncIterator[Memory]:
    async with connect(credentials=mesh.credential("bench", "caller").path) as memory:
        yield memory


@contextlib.asynccontextmanager
async def mesh_memory(*, shards: int) -> AsyncIterator[Memory]:
    async with running_mesh(shards=shards) as mesh, agent_of(mesh) as memory:
        yield memory


async def settled(memory: Memory, entity_id: str) -> None:
    await memory.get_context(entity_id, consistency=Consistency(level="strong"))


GROUPS: tuple[tuple[tuple[str, ...], Callable[[Sizes], Awaitable[list[Row]]]], ...] = (
    (("actor_call_p50", "get_context_p50", "get_context_rate"), calls),
    (("set_context_p50", "set_context_rate", "write_to_recall_p99"), writes),
    (("ingest_rate", "replay_rate"), ingest_and_replay),
    (("federated_search_p50", "federated_search_rate", "federated_recall"), federated),
    (("search_rate_20k", "search_rate_20k_recall", "filtered_search_p50", "filtered_search_recall"), alone),
    (("decision_loop_p99", "decision_loop_p50"), decision_loop),
)
