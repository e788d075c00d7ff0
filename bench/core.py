"""The core suite: calls, writes, recall, federation, replay and the demo's decision loop.

Both sides of a ratio are measured in turns within one run, so that a machine that drifts drifts for both.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import logging
import os
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
from cli.mesh import Child, Mesh, MeshOptions
from cli.server import free_port
from cli.server_config import ServerOptions
from mnemesh import Consistency, Memory, connect, subjects, wire
from mnemesh.asker import Asker
from mnemesh.connection import Link, LinkOptions
from mnemesh.errors import BadRequest
from mnemesh.jetstream import stream_state
from mnemesh.messages import GetContext, SetContext

logger = logging.getLogger("bench")

DIMENSION = 384
LATENT = 32
K = 10
ROUNDS = 5
REPLAY_S = 120.0
BUILD_S = 300.0
WATERMARKS = ("mnemesh_shard_documents_watermark ", "mnemesh_shard_vectors_watermark ")
Work = Callable[[], Awaitable[object]]


class Sizes:
    """How much of everything. `quick` is for trying the suite out; its figures mean little."""

    def __init__(self, quick: bool) -> None:
        self.calls = 100 if quick else 400
        self.seconds = 0.3 if quick else 2.0
        self.ingested = 5_000 if quick else 60_000
        self.replayed = 10_000 if quick else 200_000
        self.recalls = 50 if quick else 1_000
        self.federated = 2_000 if quick else 50_000
        self.alone = 2_000 if quick else 20_000
        self.queries = 64 if quick else 512
        self.demo = ("--days", "30", "--duration", "5", "--agents", "50") if quick else ()


async def run(quick: bool, wanted: Sequence[str]) -> list[Row]:
    """Measure every group that has a wanted row (all of them if none is named)."""
    known = [name for names, _ in GROUPS for name in names]
    if strangers := set(wanted) - set(known):
        raise BadRequest(f"no row {', '.join(sorted(strangers))}; there are {', '.join(known)}")
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
        asked = wire.encode(GetContext())
        answered = f"bare.reply.{len(wire.encode(await memory.get_context('bus:7')))}"

        async def echo() -> object:
            return await raw.request("bare.echo", said, timeout=5)

        async def echo_context() -> object:
            return await raw.request(answered, asked, timeout=5)

        async def call() -> object:
            return await asker.ask(subjects.SET_CONTEXT, subject, request)

        async def read() -> object:
            return await memory.get_context("bus:7")

        bare_call, our_call = await latencies([echo, call], sizes.calls)
        bare_read, our_read = await latencies([echo_context, read], sizes.calls)
        bare_rate, our_rate = await rates([echo_context, read], callers=32, seconds=sizes.seconds)
        return [
            *latency("actor_call", our_call, bare_call, ratio("at most", 1.4)),
            *latency("get_context", our_read, bare_read, ratio("at most", 1.5)),
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
        bare_rate, our_rate = await rates([publish, write], callers=64, seconds=sizes.seconds)

        return [
            *latency("set_context", our_write, bare_write, ratio("at most", 2.0)),
            rate("set_context_rate", our_rate, bare_rate, ratio("at least", 2.0)),
        ]


async def ingest_and_replay(sizes: Sizes) -> list[Row]:
    async with contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(running_mesh(shards=1))
        memory = await stack.enter_async_context(agent_of(mesh))
        took = await ingest(memory, range(sizes.ingested))
        ingested = Row(
            name="ingest_rate",
            value=sizes.ingested / took,
            unit="entities/s",
            goal=value("at least", 10_000),
            runs=sizes.ingested // 500,
        )
        await ingest(memory, range(sizes.ingested, sizes.replayed))
        await settled(memory, "bus:0")
        rate, events = await replay(mesh)
        return [
            ingested,
            Row(name="replay_rate", value=rate, unit="events/s", goal=value("at least", 20_000), runs=events),
        ]


async def ingest(memory: Memory, numbers: range) -> float:
    """Write these documents, eight requests of 500 under way; returns how many seconds the acknowledgement took."""
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
        for number in numbers
    ]
    requests = iter([documents[start : start + 500] for start in range(0, len(documents), 500)])

    async def send() -> None:
        for request in requests:
            done = await memory.ingest(request)
            assert done.accepted == len(request), "an entity was refused"

    began = time.perf_counter()
    await asyncio.gather(*(send() for _ in range(8)))
    return time.perf_counter() - began


async def replay(mesh: Mesh) -> tuple[float, int]:
    """A second replica of the only shard reads the whole log into an empty folder: events a second, and how many.

    From when it was last seen at 0 until both stores are at the head. Progress is read off its metrics page, which asks
    nothing of the stores: `shard_status` counts rows on the threads that are to be measured.
    """
    operator = await Link.open(mesh.server.credentials.load("operator").link_options())
    try:
        head = (await stream_state((await Asker(operator).open()).inbox, subjects.log_stream("bench"))).last_sequence
    finally:
        await operator.close()
    port = free_port()
    credentials = mesh.server.credentials.load("shard").path
    with tempfile.TemporaryDirectory(prefix="mnemesh-replayed-") as folder:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cli.main", "run", "shard", "--shard", "s0", "--folder", folder, "--site", "bench",
            "--credentials", str(credentials), "--metrics-port", str(port), "--until-stdin-closes",
            stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            began = time.perf_counter()
            async with asyncio.timeout(REPLAY_S):
                while (seen := await applied(port)) < head:
                    if not seen:
                        began = time.perf_counter()
                    await asyncio.sleep(0.2)
            return head / (time.perf_counter() - began), head
        finally:
            process.terminate()
            await process.wait()


async def applied(port: int) -> int:
    """The lower watermark of a shard's two stores, from its metrics page; 0 while there is none."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return 0
    try:
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        page = (await reader.read()).decode()
    except OSError:
        return 0
    finally:
        writer.close()
    marks = [float(line.split()[1]) for line in page.splitlines() if line.startswith(WATERMARKS)]
    return int(min(marks)) if len(marks) == len(WATERMARKS) else 0


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
        bare_rate, our_rate = await rates([theirs, ours], callers=64, seconds=1.5 * sizes.seconds)
        return [
            *latency("federated_search", our_p50, bare_p50, ratio("at most", 1.3)),
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
    async with running_mesh(shards=1) as mesh, agent_of(mesh) as memory:
        await load(memory, vectors, index="auto")
        turn = iter(range(1_000_000_000))

        async def search() -> object:
            return await memory.search_embedding(queries[next(turn) % len(queries)], space="s", k=K)

        async def filtered() -> object:
            return await memory.search_embedding(
                queries[next(turn) % len(queries)], space="s", k=K, filter={"tenth": 3}
            )

        await built(mesh.children["s0.0"])
        (found,) = await rates([search], callers=32, seconds=sizes.seconds)
        plain, narrow = await latencies([search, filtered], sizes.calls)
        tenth = np.arange(3, len(vectors), 10)
        best = np.argsort(-(queries @ vectors[tenth].T), axis=1)[:, :K]
        recall = await recall_row("search_rate_20k_recall", memory, queries, exact)
        filtered_recall = await recall_row("filtered_search_recall", memory, queries, tenth[best], filter={"tenth": 3})
        found_again = await write_to_recall(memory, made(sizes.recalls, 1, seed=8)[0])
        replayed, events = await replay(mesh)
        return [
            Row(
                name="search_rate_20k",
                value=median(found),
                unit="searches/s",
                goal=value("at least", 3_000),
                runs=len(found),
                holds=recall.met is True,
            ),
            recall,
            *latency("filtered_search", narrow, plain, ratio("at most", 1.5), holds=filtered_recall.met is True),
            filtered_recall,
            Row(
                name="write_to_recall_p99",
                value=percentile(found_again, 0.99) * 1e3,
                unit="ms",
                goal=value("at most", 10),
                runs=len(found_again),
            ),
            Row(name="write_to_recall_p50", value=median(found_again) * 1e3, unit="ms", runs=len(found_again)),
            Row(name="replay_vectors_rate", value=replayed, unit="events/s", runs=events),
        ]


async def built(shard: Child) -> None:
    """Wait until a shard was idle for a second: its graph is built beside searches, and nothing tells when that ends.

    The next search swaps it in.
    """

    def cpu_s() -> float:
        fields = Path(f"/proc/{shard.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async with asyncio.timeout(BUILD_S):
        while True:
            before = cpu_s()
            await asyncio.sleep(1)
            if cpu_s() - before < 0.1:
                return


async def write_to_recall(memory: Memory, vectors: np.ndarray[Any, Any]) -> list[float]:
    """Seconds from the start of each write until a search has found it, one after the other."""
    took = []
    for number, vector in enumerate(vectors):
        began = time.perf_counter()
        written = await memory.upsert_embedding(f"new:{number}", vector, space="s")
        mine = Consistency(level="session", token=written.token)
        found = await memory.search_embedding(vector, space="s", k=1, consistency=mine)
        took.append(time.perf_counter() - began)
        assert found.hits[0].entity_id == f"new:{number}", "a write was not recalled"
    return took


def made(
    count: int, queries: int, seed: int = 7
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Unit vectors of 384 dimensions that mix 32 latent ones, with noise; queries alike; their exact best rows."""
    mix = np.random.default_rng(0).standard_normal((LATENT, DIMENSION)).astype(np.float32)
    random = np.random.default_rng(seed)

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


async def rates(sides: Sequence[Work], *, callers: int, seconds: float) -> list[list[float]]:
    """Calls a second of each side with so many callers at once, one figure a round, in turns after a warm-up."""
    samples: list[list[float]] = [[] for _ in sides]
    for work in sides:
        await calls_a_second(work, callers, seconds / 4)
    for _ in range(ROUNDS):
        for work, side in zip(sides, samples, strict=True):
            side.append(await calls_a_second(work, callers, seconds))
    return samples


async def calls_a_second(work: Work, callers: int, seconds: float) -> float:
    """Each caller makes one call after another for so long; the last ones to end are waited for and count."""
    began = time.perf_counter()

    async def caller() -> int:
        made = 0
        while time.perf_counter() - began < seconds:
            await work()
            made += 1
        return made

    made = await asyncio.gather(*(caller() for _ in range(callers)))
    return sum(made) / (time.perf_counter() - began)


def latency(
    name: str, ours: Sequence[float], theirs: Sequence[float], goal: Any, *, holds: bool = True
) -> tuple[Row, Row]:
    """The median with its goal, and the 99th percentile beside it."""
    return (
        Row(
            name=f"{name}_p50",
            value=median(ours) * 1e6,
            unit="µs",
            reference=median(theirs) * 1e6,
            goal=goal,
            runs=len(ours),
            holds=holds,
        ),
        Row(
            name=f"{name}_p99",
            value=percentile(ours, 0.99) * 1e6,
            unit="µs",
            reference=percentile(theirs, 0.99) * 1e6,
            runs=len(ours),
        ),
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
    await memory.get_context(entity_id, consistency=Consistency(level="strong"), budget_ms=120_000)


GROUPS: tuple[tuple[tuple[str, ...], Callable[[Sizes], Awaitable[list[Row]]]], ...] = (
    (("actor_call_p50", "actor_call_p99", "get_context_p50", "get_context_p99", "get_context_rate"), calls),
    (("set_context_p50", "set_context_p99", "set_context_rate"), writes),
    (("ingest_rate", "replay_rate"), ingest_and_replay),
    (("federated_search_p50", "federated_search_p99", "federated_search_rate", "federated_recall"), federated),
    (
        (
            "search_rate_20k",
            "search_rate_20k_recall",
            "filtered_search_p50",
            "filtered_search_p99",
            "filtered_search_recall",
            "write_to_recall_p50",
            "write_to_recall_p99",
            "replay_vectors_rate",
        ),
        alone,
    ),
    (("decision_loop_p99", "decision_loop_p50"), decision_loop),
)
