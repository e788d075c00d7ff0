"""A device as a process of its own, `mnemesh edge up`, at the end of a cable to its hub that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from bench.cable import Cable
from cli.credentials import Credentials
from cli.mesh import Child, ended, last_line, spawn
from cli.private import write_private
from cli.server import free_port
from cli.server_config import ServerOptions
from mnemesh import Memory, connect, messages, subjects
from mnemesh.asker import Asker
from mnemesh.connection import Link
from mnemesh.errors import MnemeshError, Unavailable
from mnemesh.messages import Interest

UP_S = 60.0
AGAIN_S = 0.1

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that is up. `memory_for` is a client of one of its agents, over its own server."""

    site: str
    tenant: str
    credentials: Credentials
    cable: Cable
    operator: Asker

    @contextlib.asynccontextmanager
    async def memory_for(self, agent: str) -> AsyncIterator[Memory]:
        async with connect(credentials=self.credentials.load(f"{self.tenant}.{agent}").path) as memory:
            yield memory

    async def status(self) -> messages.EdgeStatus:
        """Where it stands with its hub."""
        return await self.operator.ask(subjects.EDGE_STATUS, subjects.edge_status(self.site), messages.Status())

    async def holds(self) -> int:
        """How many entities its memory has."""
        status = subjects.shard_status(self.site)
        return (await self.operator.ask(subjects.SHARD_STATUS, status, messages.Status())).entities

    def cut(self) -> None:
        """From now on nothing passes to its hub or back, and neither is told."""
        self.cable.cut()

    def heal(self) -> None:
        self.cable.heal()


@contextlib.asynccontextmanager
async def device_up(
    site: str, data: Path, *, hub_port: int, tenant: str, agents: Sequence[str], interest: Interest
) -> AsyncIterator[Device]:
    """An enrolled device that runs within the block. Raises `Unavailable` if it does not come up."""
    cable = Cable(hub_port)
    async with contextlib.AsyncExitStack() as stack:
        line = await stack.enter_async_context(cable.laid())
        server = ServerOptions(
            data=data, site=site, port=free_port(), monitoring_port=free_port(), hub=f"nats://127.0.0.1:{line}"
        )
        credentials = server.credentials()
        process = await stack.enter_async_context(_running(server, tenant, agents, interest))
        operator = credentials.ensure("operator").link_options()
        link = await _once_up(process, lambda: Link.open(operator))
        stack.push_async_callback(link.close)
        asker = await Asker(link).open()
        device = Device(site=site, tenant=tenant, credentials=credentials, cable=cable, operator=asker)
        await _once_up(process, device.status)
        yield device


@contextlib.asynccontextmanager
async def _running(
    server: ServerOptions, tenant: str, agents: Sequence[str], interest: Interest
) -> AsyncIterator[Child]:
    server.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    wanted = server.data / "interest.json"
    write_private(wanted, msgspec.json.encode(interest).decode())
    command = [sys.executable, "-m", "cli.main", "edge", "up", "--until-stdin-closes"]
    command += ["--data", str(server.data), "--site", server.site, "--hub", server.hub, "--interest", str(wanted)]
    command += ["--port", str(server.port), "--monitoring-port", str(server.monitoring_port), "--metrics-port", "0"]
    command += [flag for agent in agents for flag in ("--agent", f"{tenant}.{agent}")]
    child = Child(server.site, command, server.data / "edge.log")
    child.process = await spawn(child)
    try:
        yield child
    finally:
        child.send(signal.SIGTERM)
        await ended(child)


async def _once_up(process: Child, attempt: Callable[[], Awaitable[Result]]) -> Result:
    """What the attempt returns, once it succeeds. Raises `Unavailable` if the process ends, or takes too long."""
    deadline = asyncio.get_running_loop().time() + UP_S
    while True:
        try:
            return await attempt()
        except MnemeshError as error:
            if process.pid is None or asyncio.get_running_loop().time() > deadline:
                raise Unavailable(f"{process.name} does not start: {last_line(process.log_file)}") from error
        await asyncio.sleep(AGAIN_S)
