"""A whole mesh on one machine: nats-server and every service as a process of its own, kept alive.

`Mesh` is what `mnemesh up`, the demo, the benchmarks and the crash tests run. A process that ends is started again with
backoff; the services end with their parent, however that ends, because their standard input closes then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

from cli.credentials import Credential
from cli.keeping import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, heal, keep
from cli.provision import even_shards, provision, sites_of
from cli.server import NatsServer
from cli.server_config import ServerOptions
from memory_shards.snapshots.settings import NONE, SnapshotSettings
from memory_shards.stores.urls import EMBEDDED, StoreUrls, environment
from mnemesh.asker import Asker
from mnemesh.discovery import ping_all
from mnemesh.errors import Unavailable
from mnemesh.host import link_as

logger = logging.getLogger("mnemesh.mesh")

READY_S = 60.0
DRAIN_S = 30.0
STEADY_S = 10.0
"""A process that lived this long has its backoff forgotten."""

MOST_FAILURES = 3


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """What runs. `metrics_port` is the first of the services' ports, in the order of `Mesh.children`; 0: free ones."""

    server: ServerOptions
    shards: int = 2
    replicas: int = 1
    tenants: Sequence[str] = ("demo",)
    agents: Sequence[tuple[str, str]] = (("demo", "alice"),)
    metrics_port: int = 0
    stores: StoreUrls = EMBEDDED
    snapshots: SnapshotSettings = NONE


@dataclass
class Child:
    """One service process. `name` is unique in the mesh: `gateway`, `router`, `views`, `hub`, `s0.0`, `s0.1`, …"""

    name: str
    command: list[str]
    log_file: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    failures: int = 0
    """How often in a row it ended by itself before it lived `STEADY_S`."""

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and self.process.returncode is None else None

    def send(self, signum: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signum)


class Mesh:
    """Starts everything, keeps it alive while the block runs, drains it at the end."""

    def __init__(self, options: MeshOptions) -> None:
        self.options = options
        self.server = NatsServer(options.server, agents=options.agents)
        self.children: dict[str, Child] = {}
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def url(self) -> str:
        return self.server.url

    def credential(self, tenant: str, agent: str) -> Credential:
        """The credentials of an agent that the mesh was started with, or that was added since."""
        return self.server.credentials.load(f"{tenant}.{agent}")

    async def __aenter__(self) -> Mesh:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _start(self) -> None:
        await self.server.start()
        operator = self.server.credentials.load("operator")
        await provision(
            operator.link_options("provision"),
            site=self.options.server.site,
            tenants=self.options.tenants,
            shards=even_shards(self.options.shards, self.options.replicas),
            sites=sites_of(self.options.server),
        )
        self.children = {child.name: child for child in self._plan()}
        self._keepers = [
            asyncio.create_task(keep(self.server), name="keep nats-server"),
            asyncio.create_task(heal(self.server), name="heal nats-server"),
        ]
        self._keepers += [
            asyncio.create_task(self._keep(child), name=f"keep {child.name}") for child in self.children.values()
        ]
        await self.ready()

    def _plan(self) -> list[Child]:
        data = self.options.server.data.absolute()
        services = [("gateway", ["gateway"]), ("router", ["router"]), ("views", ["views"])]
        if self.options.server.leaf_port:
            services.append(("hub", ["hub"]))
        for shard in even_shards(self.options.shards):
            for replica in range(self.options.replicas):
                name = f"{shard.name}.{replica}"
                folder = str(data / "shards" / name)
                services.append((name, ["shard", "--shard", shard.name, "--folder", folder]))
        children = []
        for index, (name, arguments) in enumerate(services):
            role = arguments[0]
            port = self.options.metrics_port + index if self.options.metrics_port else 0
            command = [sys.executable, "-m", "cli.main", "run", *arguments]
            command += ["--site", self.options.server.site, "--metrics-port", str(port)]
            command += ["--credentials", str(self.server.credentials.load(role).path), "--until-stdin-closes"]
            told = self._settings() if role == "shard" else {}
            children.append(Child(name, command, data / "logs" / f"{name}.log", told))
        return children

    def _settings(self) -> dict[str, str]:
        """What a shard is told by its environment, for a URL may hold a password."""
        snapshots = self.options.snapshots
        settings = {
            **asdict(self.options.stores),
            "snapshots": snapshots.url,
            "snapshot_every": f"{snapshots.every_s}s",
        }
        return {environment(setting): value for setting, value in settings.items()}

    async def ready(self) -> None:
        """Wait until every service answers discovery. Raises `Unavailable` if one does not, or keeps failing."""
        operator = self.server.credentials.load("operator")
        link = await link_as(operator.link_options("ready"), READY_S)
        try:
            asker = await Asker(link).open()
            async with asyncio.timeout(READY_S):
                while len(await ping_all(asker, at_least=len(self.children))) < len(self.children):
                    for child in self.children.values():
                        if child.failures >= MOST_FAILURES:
                            raise Unavailable(f"{child.name} does not start: {last_line(child.log_file)}")
        except TimeoutError as error:
            logs = self.options.server.data / "logs"
            raise Unavailable(f"not every service came up in {READY_S:.0f} s; {logs} say more") from error
        finally:
            await link.close()

    async def stop(self) -> None:
        """Drain the services, gateway first, so that what it has taken is still committed; then stop the server."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for child in self.children.values():
            child.send(signal.SIGCONT)
            child.send(signal.SIGTERM)
        await asyncio.gather(*(ended(child) for child in self.children.values()))
        await self.server.stop()

    async def _keep(self, child: Child) -> None:
        """Run a service, again and again."""
        loop = asyncio.get_running_loop()
        backoff = FIRST_BACKOFF_S
        while True:
            began = loop.time()
            child.process = await spawn(child)
            status = await child.process.wait()
            if loop.time() - began > STEADY_S:
                backoff, child.failures = FIRST_BACKOFF_S, 0
            else:
                backoff = min(LONGEST_BACKOFF_S, backoff * 2)
                child.failures += status > 0  # a signal (below 0) is somebody else's doing
            logger.warning("%s ended with status %d; it starts again (%s)", child.name, status, child.log_file)
            child.restarts += 1
            await asyncio.sleep(backoff)


def last_line(log_file: Path) -> str:
    lines = log_file.read_text(errors="replace").splitlines()
    return lines[-1].removeprefix("mnemesh: ") if lines else f"see {log_file}"


async def spawn(child: Child) -> asyncio.subprocess.Process:
    child.log_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(child.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        return await asyncio.create_subprocess_exec(
            *child.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=descriptor,
            stderr=descriptor,
            env=os.environ | child.environment,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


async def ended(child: Child) -> None:
    """Wait for a service to drain; kill it if it does not."""
    if child.process is None:
        return
    try:
        async with asyncio.timeout(DRAIN_S):
            await child.process.wait()
    except TimeoutError:
        logger.warning("%s did not drain in %s s; killing it", child.name, DRAIN_S)
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()
        await child.process.wait()
