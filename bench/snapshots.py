"""A shard's cold start from a snapshot: from the process's start on an empty folder until it has answered a search.

A mesh with one shard is given so many vectors of 384 dimensions, in a flat space, and takes a snapshot to a folder.
Then the shard's folder is removed and its process killed; `mnemesh up` starts another, which finds nothing but the
snapshot and the log. What it takes of memory is the process's peak (`VmHWM`) until then, beside the vectors alone in
fp16.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.documents import write_all
from bench.report import Row, ratio, value
from bench.sites import agent_of, running_mesh
from bench.vectors import DIMENSION, some
from cli.mesh import Mesh
from memory_shards.snapshots.settings import SnapshotSettings
from mnemesh import Consistency, Memory, subjects
from mnemesh.asker import Asker
from mnemesh.connection import Link
from mnemesh.errors import MnemeshError
from mnemesh.messages import Snapshot, TakeSnapshot

NAMES = ("snapshot_cold_start_s", "snapshot_cold_start_memory", "snapshot_taken_s", "snapshot_vectors")
BLOCK = 10_000
NEVER_S = 1e9
PATIENCE_S = 600.0
ASKED_AGAIN_S = 0.005


async def cold_start(vectors: int, target: str = "") -> list[Row]:
    """The rows `NAMES`, with so many vectors; `target` is another one than a folder."""
    with tempfile.TemporaryDirectory(prefix="mnemesh-snapshots-") as folder:
        settings = SnapshotSettings(url=target or f"file://{folder}", every_s=NEVER_S)
        async with running_mesh(shards=1, snapshots=settings) as mesh, agent_of(mesh) as memory:
            probe = await _fill(memory, vectors)
            snapshot = await _snapshot(mesh)
            seconds, peak = await _started(mesh, memory, probe)
    halves = vectors * DIMENSION * 2
    return [
        Row(name=NAMES[0], value=seconds, unit="s", goal=value("at most", 20)),
        Row(name=NAMES[1], value=peak / 2**20, unit="MiB", reference=halves / 2**20, goal=ratio("at most", 1.3)),
        Row(name=NAMES[2], value=snapshot.seconds, unit="s"),
        Row(name=NAMES[3], value=vectors, unit="vectors"),
    ]


async def _fill(memory: Memory, count: int) -> np.ndarray[Any, Any]:
    """Write so many vectors, wait until the shard has them, and return that of `v:7`."""
    probe: np.ndarray[Any, Any] | None = None
    for block in _blocks(count):
        if probe is None:
            probe = block[7]["vectors"]["s"]
            await memory.upsert_embedding("v:7", probe, space="s", index="flat")
        await write_all(memory, block, senders=4)
    assert probe is not None, "there are vectors"
    strong = Consistency(level="strong")
    await memory.search_embedding(probe, space="s", k=1, consistency=strong, budget_ms=round(PATIENCE_S * 1000))
    return probe


def _blocks(count: int) -> Iterator[list[Mapping[str, Any]]]:
    """As `bench.vectors` makes them, a part at a time."""
    random = np.random.default_rng(7)
    for start in range(0, count, BLOCK):
        vectors = some(min(BLOCK, count - start), random)
        yield [{"entity_id": f"v:{start + n}", "vectors": {"s": vector}} for n, vector in enumerate(vectors)]


async def _snapshot(mesh: Mesh) -> Snapshot:
    async with _operator(mesh) as asker:
        return await asker.ask(subjects.TAKE_SNAPSHOT, subjects.take_snapshot("s0"), TakeSnapshot())


@contextlib.asynccontextmanager
async def _operator(mesh: Mesh) -> AsyncIterator[Asker]:
    link = await Link.open(mesh.server.credentials.load("operator").link_options("bench"))
    try:
        yield await Asker(link).open()
    finally:
        await link.close()


async def _started(mesh: Mesh, memory: Memory, probe: np.ndarray[Any, Any]) -> tuple[float, int]:
    """Seconds from the start of the shard's new process to its first answer, and its peak of memory in bytes."""
    shard = mesh.children["s0.0"]
    before = shard.process
    assert before is not None, "it runs"
    await asyncio.to_thread(shutil.rmtree, mesh.options.server.data / "shards" / "s0.0")
    shard.send(signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        while shard.process is before or shard.pid is None:  # noqa: ASYNC110  # it is `Mesh` that starts it
            await asyncio.sleep(ASKED_AGAIN_S)
        began = time.perf_counter()
        while not await _answers(memory, probe):  # noqa: ASYNC110  # nobody tells when the shard serves
            await asyncio.sleep(ASKED_AGAIN_S)
        seconds = time.perf_counter() - began
    return seconds, _peak(shard.pid)


async def _answers(memory: Memory, probe: np.ndarray[Any, Any]) -> bool:
    try:
        found = await memory.search_embedding(probe, space="s", k=1, budget_ms=1_000)
    except MnemeshError:
        return False
    return [hit.entity_id for hit in found.hits] == ["v:7"]


def _peak(pid: int) -> int:
    """Bytes that a process ever had in memory at once."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
