"""The mesh and the device that are measured: processes in temporary folders, synced, gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from cli.credentials import Credential
from cli.devices import Devices, public_of, seed_of
from cli.mesh import Mesh, MeshOptions
from cli.provision import put_sites, sites_of
from cli.server import free_port, running_pid
from cli.server_config import ServerOptions
from memory_shards.snapshots.settings import NONE, SnapshotSettings
from memory_shards.stores.urls import EMBEDDED, StoreUrls
from mnemesh import Consistency, Memory, connect
from mnemesh.errors import MnemeshError, NotFound

SITE, TENANT, AGENT = "bench", "bench", "caller"
DEVICE = "device"
START_S = 60.0
ASKED_AGAIN_S = 0.005


@contextlib.asynccontextmanager
async def running_mesh(
    *,
    shards: int,
    replicas: int = 1,
    leaf_port: int = 0,
    stores: StoreUrls = EMBEDDED,
    snapshots: SnapshotSettings = NONE,
) -> AsyncIterator[Mesh]:
    with tempfile.TemporaryDirectory(prefix="mnemesh-bench-") as folder:
        server = ServerOptions(
            data=Path(folder), site=SITE, port=free_port(), monitoring_port=free_port(), leaf_port=leaf_port
        )
        options = MeshOptions(
            server=server,
            shards=shards,
            replicas=replicas,
            tenants=(TENANT,),
            agents=((TENANT, AGENT),),
            stores=stores,
            snapshots=snapshots,
        )
        async with Mesh(options) as mesh:
            yield mesh


@contextlib.asynccontextmanager
async def agent_of(mesh: Mesh) -> AsyncIterator[Memory]:
    async with connect(credentials=mesh.credential(TENANT, AGENT).path) as memory:
        yield memory


@contextlib.asynccontextmanager
async def mesh_memory(*, shards: int) -> AsyncIterator[Memory]:
    async with running_mesh(shards=shards) as mesh, agent_of(mesh) as memory:
        yield memory


async def settled(memory: Memory, entity_id: str) -> None:
    await memory.get_context(entity_id, consistency=Consistency(level="strong"), budget_ms=120_000)


class Device:
    """`mnemesh edge up` as a process, on a folder that outlives it. `hub` is the URL that it has of its hub."""

    def __init__(self, data: Path, hub: str) -> None:
        self.options = ServerOptions(data=data, site=DEVICE, port=free_port(), monitoring_port=free_port(), hub=hub)
        self._key = public_of(seed_of(data))
        self._agent = self.options.credentials().add_agent(TENANT, AGENT)
        self._process: asyncio.subprocess.Process

    async def enrol(self, mesh: Mesh) -> None:
        """Let it connect to this hub."""
        hub = mesh.options.server
        Devices(hub.data).enrol(DEVICE, self._key)
        await put_sites(mesh.server.credentials.load("operator").link_options(), sites_of(hub))
        await mesh.server.reload()

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Memory]:
        """An agent on it, once it has answered a read, until the block ends."""
        server = self.options
        flags = ["--data", str(server.data), "--site", server.site, "--hub", server.hub, "--port", str(server.port)]
        flags += ["--monitoring-port", str(server.monitoring_port), "--metrics-port", "0"]
        with (server.data / "edge.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cli.main", "edge", "up", *flags, "--agent", f"{TENANT}.{AGENT}"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(START_S):
                    memory = await stack.enter_async_context(self._answering())
                yield memory
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            await self._process.wait()

    async def started_s(self, entity_id: str) -> float:
        """Start it and stop it again: seconds from its start until it has answered a read of this entity."""
        began = time.perf_counter()
        async with self.up() as memory:
            context = await memory.get_context(entity_id)
            took = time.perf_counter() - began
            assert context.entity_id == entity_id
        return took

    def credential(self, user: str) -> Credential:
        return self.options.credentials().load(user)

    @property
    def pids(self) -> tuple[int | None, int | None]:
        """Its two processes: nats-server, and everything else of it."""
        return running_pid(self.options.data), self._process.pid

    @contextlib.asynccontextmanager
    async def _answering(self) -> AsyncIterator[Memory]:
        """An agent that is connected, once a read of it was answered."""
        async with contextlib.AsyncExitStack() as stack:
            while True:
                if self._process.returncode is not None:
                    raise RuntimeError(f"the device has ended: {(self.options.data / 'edge.log').read_text()}")
                try:
                    memory = await stack.enter_async_context(connect(credentials=self._agent.path))
                    break
                except MnemeshError:
                    await asyncio.sleep(ASKED_AGAIN_S)
            while True:
                try:
                    await memory.get_context("nobody", budget_ms=100)
                except NotFound:
                    break
                except MnemeshError:
                    await asyncio.sleep(ASKED_AGAIN_S)
            yield memory
