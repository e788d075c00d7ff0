"""A hub and its devices, every one of them as processes of its own, with a cable of its own for each device."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from bench.cable import Cable
from cli.credentials import Credential
from cli.devices import Devices, public_of, seed_of
from cli.mesh import Child, Mesh, MeshOptions
from cli.server import free_port, running_pid
from cli.server_config import ServerOptions
from mnemesh import wire
from mnemesh.messages import Interest

HUB = "hub"
DRAIN_S = 30.0


class Device:
    """`mnemesh edge up` as a process that is started again whenever it ends."""

    def __init__(
        self, options: ServerOptions, cable: Cable, *, agents: Sequence[tuple[str, str]], interest: Interest
    ) -> None:
        self.options = options
        self.cable = cable
        self.up = asyncio.Event()
        """Set while it serves, whether or not its hub is in reach."""
        self.starts = 0
        self._agents = agents
        self._interest = options.data / "interest.json"
        self._interest.write_bytes(wire.encode(interest, as_json=True))
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def run(self) -> None:
        """Keep it running until this is cancelled; then it drains."""
        try:
            while True:
                await self._start()
                assert self._process is not None
                await self._process.wait()
                self.up.clear()
        finally:
            await self._stop()

    async def _start(self) -> None:
        options = self.options
        flags = ["--data", str(options.data), "--site", options.site, "--hub", options.hub, "--port", str(options.port)]
        flags += ["--monitoring-port", str(options.monitoring_port), "--metrics-port", "0"]
        flags += ["--durability", options.durability, "--interest", str(self._interest)]
        for tenant, agent in self._agents:
            flags += ["--agent", f"{tenant}.{agent}"]
        with (options.data / "edge.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cli.main", "edge", "up", *flags),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self.starts += 1
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            if b"Ctrl-C" in line:
                self.up.set()
                return

    async def _stop(self) -> None:
        if self._process is not None and self.pid is not None:
            self._process.terminate()
            try:
                async with asyncio.timeout(DRAIN_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        kill(running_pid(self.options.data))  # a device that was killed leaves its server behind


class Fleet:
    """The sites, by name: the hub first, then its devices."""

    def __init__(self, hub: Mesh, devices: Mapping[str, Device]) -> None:
        self.hub = hub
        self.devices = devices

    @property
    def sites(self) -> Mapping[str, ServerOptions]:
        return {HUB: self.hub.options.server} | {name: device.options for name, device in self.devices.items()}

    def credential(self, site: str, user: str) -> Credential:
        return self.sites[site].credentials().load(user)

    def shard_of(self, site: str) -> tuple[str, Path]:
        """A site's shard: its name, and the folder of its stores."""
        data = self.sites[site].data
        return ("s0", data / "shards" / "s0.0") if site == HUB else (site, data / "shard")

    @property
    def services(self) -> Mapping[str, Child]:
        """The hub's processes, but its server."""
        return self.hub.children

    def server_pid(self, site: str) -> int | None:
        return running_pid(self.sites[site].data)


def kill(pid: int | None) -> None:
    """End a process as a crash would, if it is there."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def fleet(
    data: Path, *, devices: Sequence[str], tenant: str, agents: Mapping[str, Sequence[str]], interest: Interest
) -> AsyncIterator[Fleet]:
    """A hub with one shard and its devices, all up within the block. `agents` are those of each site, by its name."""
    of = {site: [(tenant, agent) for agent in names] for site, names in agents.items()}
    server = ServerOptions(
        data=data / HUB,
        site=HUB,
        port=free_port(),
        monitoring_port=free_port(),
        leaf_port=free_port(),
        durability="interval",
    )
    async with contextlib.AsyncExitStack() as stack:
        made: dict[str, Device] = {}
        for name in devices:
            (folder := data / name).mkdir(parents=True)
            Devices(server.data).enrol(name, public_of(seed_of(folder)))
            cable = Cable(server.leaf_port)
            line = await stack.enter_async_context(cable.laid())
            options = ServerOptions(
                data=folder,
                site=name,
                port=free_port(),
                monitoring_port=free_port(),
                durability="interval",
                hub=f"nats://127.0.0.1:{line}",
            )
            made[name] = Device(options, cable, agents=of[name], interest=interest)
        hub = await stack.enter_async_context(
            Mesh(MeshOptions(server=server, shards=1, tenants=[tenant], agents=of[HUB]))
        )
        keepers = [asyncio.create_task(device.run(), name=f"keep {name}") for name, device in made.items()]
        try:
            for device in made.values():
                await device.up.wait()
            yield Fleet(hub, made)
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.wait(keepers)
