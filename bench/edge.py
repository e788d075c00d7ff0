"""The edge suite: a device and its hub, with the line between them up and cut.

The hub is what `mnemesh up --leaf-port` runs, the device what `mnemesh edge up` runs, the line a TCP proxy that stops
passing bytes without closing anything (`bench.cable`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import nats
import numpy as np

from bench import bare
from bench.cable import CableProcess
from bench.documents import ATTRIBUTES, buses, write_all
from bench.processes import idle, pss_mib
from bench.report import Row, percentile, ratio, value
from bench.sampling import ROUNDS, Work, latencies, latency
from bench.sites import DEVICE, Device, agent_of, running_mesh
from bench.suite import Group, measured
from bench.vectors import made, write_to_recall
from cli.allocator import TRIM_S
from cli.mesh import Mesh
from cli.server import free_port
from mnemesh import Consistency, Memory, subjects, wire
from mnemesh.asker import Asker
from mnemesh.atomic_batch import MOST_IN_BATCH, Outgoing, publish_batch
from mnemesh.connection import Link, LinkOptions
from mnemesh.inbox import Inbox
from mnemesh.jetstream import stream_state
from mnemesh.messages import GetContext, Token

LONG_MS = 300_000
GRAPH_STEPS = 6
"""A search takes over the graph that was built so far, and has another built of what came meanwhile."""


class Sizes:
    """How much of everything. `quick` is for trying the suite out; its figures mean little."""

    def __init__(self, quick: bool) -> None:
        self.writes = 50 if quick else 1_000
        self.cuts = 1 if quick else 3
        self.cut_s = 6.0 if quick else 60.0
        self.backlog = 5_000 if quick else 50_000
        self.calls = 50 if quick else 400
        self.memories = 2_000 if quick else 50_000
        self.idle_s = 1.0 if quick else 1.2 * TRIM_S
        self.starts = 1 if quick else 5


async def run(quick: bool, wanted: Sequence[str]) -> list[Row]:
    """Measure what is wanted, or everything."""
    return await measured(GROUPS, Sizes(quick), wanted)


# ── while the line is up ────────────────────────────────────────────────────────────────────────────────────────


async def uplink(sizes: Sizes) -> list[Row]:
    """One writer on the device, one reader at the hub, one write after the other; and as many bare deliveries."""
    vectors, *_ = made(2 * sizes.writes, 1)
    async with (
        hub() as mesh,
        device_of(mesh) as device,
        device.up() as here,
        agent_of(mesh) as there,
        delivery(vectors[0].tobytes()) as deliver,
    ):
        first = await here.set_context("first", type="first")
        await there.get_context("first", consistency=since(first.token), budget_ms=LONG_MS)
        theirs, ours = await latencies([deliver, write_to_recall(here, there, vectors)], sizes.writes // ROUNDS)
    p50, bare_p50 = median(ours) * 1e3, median(theirs) * 1e3
    p99, bare_p99 = percentile(ours, 0.99) * 1e3, percentile(theirs, 0.99) * 1e3
    return [
        Row(name="uplink_p50", value=p50, unit="ms", reference=bare_p50, goal=value("at most", 5), runs=len(ours)),
        Row(name="uplink_p99", value=p99, unit="ms", reference=bare_p99, goal=value("at most", 20), runs=len(ours)),
    ]


@contextlib.asynccontextmanager
async def delivery(payload: bytes) -> AsyncIterator[Work]:
    """Publishes to the stream of a bare leaf, and waits until a consumer of its hub's stream has that."""
    async with bare.leaf() as (device, hub), await nats.connect(device) as here, await nats.connect(hub) as there:
        stream = here.jetstream()
        came = await there.jetstream().subscribe("hub.event", stream="HUB", ordered_consumer=True)

        async def deliver() -> None:
            await stream.publish("device.event", payload)
            await came.next_msg(timeout=10)

        yield deliver
        await came.unsubscribe()  # else its watch goes on when the connection is closed


# ── cut, and back ───────────────────────────────────────────────────────────────────────────────────────────────


async def cut(sizes: Sizes) -> list[Row]:
    """Each cut: reads on the device and a backlog written there; then the line is back, and the hub catches up."""
    resumed, caught_up, published = [], [], []
    async with contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(hub())
        cable = CableProcess(mesh.options.server.leaf_port)
        device = await stack.enter_async_context(device_of(mesh, port=await stack.enter_async_context(cable.laid())))
        here = await stack.enter_async_context(device.up())
        there = await stack.enter_async_context(agent_of(mesh))
        first = await here.set_context("bus:7", type="bus", attributes=ATTRIBUTES)
        await there.get_context("bus:7", consistency=since(first.token), budget_ms=LONG_MS)
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(sizes.cuts):
            await cable.cut()
            until = time.perf_counter() + sizes.cut_s
            first = await here.set_context("bus:7", type="bus", attributes=ATTRIBUTES)
            raw, own = await reads(here, sizes.calls)
            theirs += raw
            ours += own
            written = await write_all(here, buses(range(sizes.backlog)), senders=8)
            await asyncio.sleep(until - time.perf_counter())
            await cable.heal()
            healed = time.perf_counter()
            seen = await there.get_context("bus:7", consistency=since(first.token), budget_ms=LONG_MS)
            flows = time.perf_counter()
            await there.get_context("bus:7", consistency=since(written), budget_ms=LONG_MS)
            resumed.append(flows - healed)
            caught_up.append((written[DEVICE] - seen.watermark[DEVICE]) / (time.perf_counter() - flows))
            published.append(await batched_publish(sizes.backlog, await event_bytes(device)))
    return [
        *latency("edge_get_context", ours, theirs, ratio("at most", 1.5)),
        Row(name="resume_s", value=median(resumed), unit="s", reference=2.0, goal=value("at most", 5), runs=sizes.cuts),
        Row(name="resume_s_worst", value=max(resumed), unit="s", runs=sizes.cuts),
        Row(
            name="catch_up_rate",
            value=median(caught_up),
            unit="events/s",
            reference=median(published),
            goal=value("at least", 10_000),
            runs=sizes.cuts,
        ),
    ]


async def reads(here: Memory, count: int) -> list[list[float]]:
    """Seconds of each read: raw echoes of as many bytes, and ours, in turns."""
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(bare.server())
        await stack.enter_async_context(bare.running("echo", url))
        raw = await nats.connect(url)
        stack.push_async_callback(raw.close)
        asked = wire.encode(GetContext())
        answered = f"bare.reply.{len(wire.encode(await here.get_context('bus:7')))}"

        async def echo() -> object:
            return await raw.request(answered, asked, timeout=5)

        async def read() -> object:
            return await here.get_context("bus:7")

        return await latencies([echo, read], count)


async def batched_publish(count: int, size: int) -> float:
    """Messages a second that go into a stream in atomic batches, as many bytes each, one batch after the other."""
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(bare.server())
        link = await Link.open(LinkOptions(url=url, inbox_prefix="_INBOX"))
        stack.push_async_callback(link.close)
        inbox = Inbox(link)
        await inbox.open()
        stream = {"name": "RAW", "subjects": ["raw.*"], "storage": "file", "allow_atomic": True}
        await inbox.request("$JS.API.STREAM.CREATE.RAW", json.dumps(stream).encode(), budget_s=5)
        batch = [Outgoing(f"raw.{number}", bytes(size), {}) for number in range(MOST_IN_BATCH)]
        began = time.perf_counter()
        for _ in range(0, count, MOST_IN_BATCH):
            await publish_batch(link, inbox, batch, budget_s=5)
        return count / (time.perf_counter() - began)


async def event_bytes(device: Device) -> int:
    """What an event of its log takes, in bytes."""
    link = await Link.open(device.credential("operator").link_options())
    try:
        state = await stream_state((await Asker(link).open()).inbox, subjects.log_stream(DEVICE))
    finally:
        await link.close()
    return state.bytes // state.messages


# ── with much to remember ───────────────────────────────────────────────────────────────────────────────────────


async def holding(sizes: Sizes) -> list[Row]:
    """What a device takes that has written many memories and sent them; then how soon it starts with them."""
    vectors, *_ = made(sizes.memories, 1)
    async with hub() as mesh, device_of(mesh) as device, agent_of(mesh) as there:
        async with device.up() as here:
            written = await write_all(here, memories(vectors), senders=4)
            await there.search_embedding(
                vectors[0], space="s", scope="here", consistency=since(written), budget_ms=LONG_MS
            )
            server, node = await held(device, here, vectors, sizes.idle_s)
        await idle(*(child.pid for child in mesh.children.values()))
        starts = [await device.started_s("memory:7") for _ in range(sizes.starts)]
        async with device.up() as here:
            afresh = sum(await held(device, here, vectors, sizes.idle_s))
    return [
        Row(name="edge_memory_mib", value=server + node, unit="MiB", goal=value("at most", 200)),
        Row(name="edge_memory_server_mib", value=server, unit="MiB"),
        Row(name="edge_memory_started_mib", value=afresh, unit="MiB"),
        Row(
            name="edge_cold_start_s",
            value=median(starts),
            unit="s",
            goal=value("at most", 3),
            runs=len(starts),
        ),
    ]


async def held(device: Device, here: Memory, vectors: np.ndarray[Any, Any], idle_s: float) -> tuple[float, float]:
    """MiB of a device's nats-server and of the rest of it, idle for so long, searching with its whole graph."""
    await here.search_embedding(
        vectors[0], space="s", scope="here", consistency=Consistency(level="strong"), budget_ms=LONG_MS
    )
    for _ in range(GRAPH_STEPS):
        await idle(*device.pids)
        await here.search_embedding(vectors[0], space="s", scope="here")
    await asyncio.sleep(idle_s)
    server, node = map(pss_mib, device.pids)
    return server, node


def memories(vectors: np.ndarray[Any, Any]) -> list[Mapping[str, Any]]:
    """What agents note down: a sentence, a few attributes, two edges and an embedding each."""
    return [
        {
            "entity_id": f"memory:{number}",
            "type": "observation",
            "attributes": {"severity": number % 5, "source": f"sensor {number % 200}", "open": number % 3 == 0},
            "text": f"Transformer {number % 500} hums louder than on day {number % 365}; phase {number % 3} draws "
            f"{number % 97} A, {number % 13} more than its neighbours, and the oil is at {number % 80} degrees.",
            "edges": [
                {"relation": "about", "target_id": f"transformer:{number % 500}"},
                {"relation": "follows", "target_id": f"memory:{number - 1}"},
            ],
            "vectors": {"s": vector},
        }
        for number, vector in enumerate(vectors)
    ]


# ── the two sites ───────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def hub() -> AsyncIterator[Mesh]:
    async with running_mesh(shards=1, leaf_port=free_port()) as mesh:
        yield mesh


@contextlib.asynccontextmanager
async def device_of(mesh: Mesh, *, port: int | None = None) -> AsyncIterator[Device]:
    """A device that this hub knows, not started, gone afterwards. `port` is where its line to the hub begins."""
    with tempfile.TemporaryDirectory(prefix="mnemesh-device-") as folder:
        device = Device(Path(folder), f"nats://127.0.0.1:{port or mesh.options.server.leaf_port}")
        await device.enrol(mesh)
        yield device


def since(token: Token) -> Consistency:
    """A read that is to see what this token covers."""
    return Consistency(level="session", token=token)


GROUPS: tuple[Group[Sizes], ...] = (
    (("uplink_p50", "uplink_p99"), uplink),
    (("edge_get_context_p50", "edge_get_context_p99", "resume_s", "resume_s_worst", "catch_up_rate"), cut),
    (("edge_memory_mib", "edge_memory_server_mib", "edge_memory_started_mib", "edge_cold_start_s"), holding),
)
