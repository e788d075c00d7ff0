"""The core suite: calls, writes, recall, federation, replay and the demo's decision loop.

Both sides of a ratio are measured in turns within one run, so that a machine that drifts drifts for both.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgpack
import nats
import numpy as np
from nats.aio.client import Client

from bench import bare
from bench.documents import ATTRIBUTES, buses, write_all
from bench.processes import idle
from bench.report import Row, percentile, ratio, value
from bench.sampling import ROUNDS, latencies, latency, rate, rates
from bench.sites import agent_of, mesh_memory, running_mesh, settled
from bench.suite import Group, measured
from bench.vectors import K, load, made, write_to_recall
from cli.mesh import Mesh
from cli.server import free_port
from mnemesh import Memory, subjects, wire
from mnemesh.asker import Asker
from mnemesh.connection import Link, LinkOptions
from mnemesh.jetstream import stream_state
from mnemesh.messages import GetContext, SetContext

REPLAY_S = 120.0
WATERMARKS = ("mnemesh_shard_documents_watermark ", "mnemesh_shard_vectors_watermark ")


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
    """Measure what is wanted, or everything."""
    return await measured(GROUPS, Sizes(quick), wanted)


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
    """Write these documents, eight requests under way; returns how many seconds the acknowledgement took."""
    documents = buses(numbers)
    began = time.perf_counter()
    await write_all(memory, documents, senders=8)
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

        await idle(mesh.children["s0.0"].pid)
        (found,) = await rates([search], callers=32, seconds=sizes.seconds)
        plain, narrow = await latencies([search, filtered], sizes.calls)
        tenth = np.arange(3, len(vectors), 10)
        best = np.argsort(-(queries @ vectors[tenth].T), axis=1)[:, :K]
        recall = await recall_row("search_rate_20k_recall", memory, queries, exact)
        filtered_recall = await recall_row("filtered_search_recall", memory, queries, tenth[best], filter={"tenth": 3})
        fresh, *_ = made(2 * sizes.recalls, 1, seed=8)
        (found_again,) = await latencies([write_to_recall(memory, memory, fresh)], sizes.recalls // ROUNDS)
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


GROUPS: tuple[Group[Sizes], ...] = (
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
