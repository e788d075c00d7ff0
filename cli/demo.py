"""`mnemesh demo`: the smart grid of `examples/` on a mesh of its own, in a temporary folder unless one is named."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.device_process import Device, device_up
from cli.devices import Devices, public_of, seed_of
from cli.mesh import Mesh, MeshOptions
from cli.provision import put_sites, sites_of
from cli.server import free_port
from cli.server_config import ServerOptions
from mnemesh import Memory, connect
from mnemesh.errors import BadRequest, MnemeshError
from mnemesh.host import run as run_process
from mnemesh.host import until_stopped
from mnemesh.messages import Interest

if TYPE_CHECKING:
    from rich.console import Console

    from examples.smart_grid.demo import Options
    from examples.smart_grid.report import Report
    from examples.smart_grid.substations import Substation

MISSING = "the demo needs its extra: pip install 'mnemesh-server[demo]' (make demo does)"


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    """The demo's own flags, where its extra is installed, and the mesh's."""
    shards = max(1, (os.cpu_count() or 2) // 2)
    parser.add_argument("--shards", type=int, default=shards, help="default: one for every two cores, %(default)s here")
    parser.add_argument("--data", type=Path, help="keep the mesh's data in this folder")
    with contextlib.suppress(ImportError):
        from examples.smart_grid import demo

        demo.add_flags(parser)


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status. Raises `BadRequest` where the extra is missing or a flag cannot be."""
    try:
        from examples.smart_grid import demo
    except ImportError as error:
        raise BadRequest(MISSING) from error
    try:
        options = demo.from_flags(flags)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    logging.getLogger().setLevel(logging.WARNING)
    _allow_sockets(4096)
    return run_process(lambda stop: _demo(flags, options, stop))


async def _demo(flags: argparse.Namespace, options: Options, stop: asyncio.Event) -> int:
    from rich.console import Console

    from examples.smart_grid import report

    console = Console(stderr=flags.json)
    told = await until_stopped(stop, _told(flags, options, console))
    if told is None:
        return 130
    if flags.json:
        print(report.as_json(told))
    else:
        report.show(told, console)
    sys.stdout.flush()
    return 0


async def _told(flags: argparse.Namespace, options: Options, console: Console) -> Report:
    """What the demo did, on a mesh that is gone when this returns."""
    from examples.smart_grid import demo, report

    with contextlib.ExitStack() as cleanup:
        data = flags.data or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mnemesh-demo-")))
        leaf_port = free_port() if options.substations else 0
        server = ServerOptions(data=data, port=free_port(), monitoring_port=free_port(), leaf_port=leaf_port)
        mesh_options = MeshOptions(server=server, shards=flags.shards, tenants=(demo.TENANT,), agents=())
        async with Mesh(mesh_options) as mesh:
            credentials = mesh.server.credentials

            async def prepare(agents: list[str]) -> None:
                for agent in agents:
                    credentials.add_agent(demo.TENANT, agent)
                await mesh.server.reload()

            @contextlib.asynccontextmanager
            async def memory_for(agent: str) -> AsyncIterator[Memory]:
                async with connect(credentials=credentials.load(f"{demo.TENANT}.{agent}").path) as memory:
                    yield memory

            with report.bars(console) as progress:
                return await demo.run(
                    options,
                    memory_for,
                    prepare_agents=prepare,
                    devices_for=lambda wanted: _devices(mesh, wanted, demo.TENANT),
                    progress=progress,
                )


@contextlib.asynccontextmanager
async def _devices(
    mesh: Mesh, wanted: Sequence[tuple[Substation, Interest]], tenant: str
) -> AsyncIterator[list[Device]]:
    """A device for each substation, enrolled and up."""
    hub = mesh.options.server
    folders = {station.site: hub.data / "substations" / station.site for station, _ in wanted}
    for site, folder in folders.items():
        Devices(hub.data).enrol(site, public_of(seed_of(folder)))
    await put_sites(mesh.server.credentials.load("operator").link_options(), sites_of(hub))
    await mesh.server.reload()
    async with contextlib.AsyncExitStack() as stack:
        try:
            async with asyncio.TaskGroup() as group:
                devices = [
                    group.create_task(
                        stack.enter_async_context(
                            device_up(
                                station.site,
                                folders[station.site],
                                hub_port=hub.leaf_port,
                                tenant=tenant,
                                agents=station.agents,
                                interest=interest,
                            )
                        )
                    )
                    for station, interest in wanted
                ]
        except* MnemeshError as failed:
            raise failed.exceptions[0] from None
        yield [device.result() for device in devices]


def _allow_sockets(wanted: int) -> None:
    """An agent is a connection: let this process and the server it starts have so many open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))
