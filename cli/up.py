"""`mnemesh up`: a whole mesh on this machine until Ctrl-C or SIGTERM, on a data folder that outlives it."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

from cli import shard_flags
from cli.mesh import Mesh, MeshOptions
from cli.server_config import ServerOptions
from mnemesh.errors import BadRequest
from mnemesh.host import run as run_process
from mnemesh.host import until_stopped
from mnemesh.ids import PARTITIONS, check_name

LAST_PORT = 65_535
COMPRESSIONS = ("s2_auto", "s2_fast", "s2_better", "s2_best", "off")


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    """Those of a whole mesh."""
    add_server_flags(parser, data)
    parser.add_argument("--site", default="hub", help="the site's name (default: %(default)s)")
    parser.add_argument("--region", default="", help="where the site is, for policies and for what devices want")
    parser.add_argument("--leaf-port", type=int, default=0, help="where devices connect; NATS's own is 7422 (0: none)")
    parser.add_argument(
        "--leaf-compression", default="s2_auto", choices=COMPRESSIONS, help="of what crosses to devices"
    )
    parser.add_argument("--shards", type=int, default=2, help="how many shards (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=1, help="processes of each shard (default: %(default)s)")
    shard_flags.add_flags(parser)
    parser.add_argument("--metrics-port", type=int, default=9464, help="first of the services' ports; 0: free ones")


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status. Raises `BadRequest`, `NatsServerError`."""
    return run_process(lambda stop: _up(options(flags), stop))


def add_server_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    """The flags of whoever runs a nats-server and lets agents in."""
    parser.add_argument("--data", type=Path, default=data, help="folder for everything (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="where NATS listens (default: %(default)s)")
    parser.add_argument("--port", type=int, default=4222, help="NATS port (default: %(default)s)")
    parser.add_argument("--monitoring-port", type=int, default=8222)
    parser.add_argument(
        "--durability",
        choices=("synced", "interval"),
        default="synced",
        help="synced: every commit is on disk before it is acknowledged (default); interval: left to the server",
    )
    parser.add_argument("--tenant", action="append", help="a tenant to make; may be repeated (default: demo)")
    parser.add_argument("--agent", action="append", help="TENANT.AGENT to make; may be repeated (default: demo.alice)")


def options(flags: argparse.Namespace) -> MeshOptions:
    """What the flags describe. Raises `BadRequest` that says which one cannot be."""
    if not 1 <= flags.shards <= PARTITIONS:
        raise BadRequest(f"--shards must be 1 to {PARTITIONS}")
    if flags.replicas < 1:
        raise BadRequest("--replicas must be at least 1")
    last_metrics_port = LAST_PORT - 3 - flags.shards * flags.replicas
    if not 0 <= flags.metrics_port <= last_metrics_port:
        raise BadRequest(f"--metrics-port must be 0 (free ones) or up to {last_metrics_port}: each service has one")
    tenants, agents = users(flags)
    return MeshOptions(
        server=server_options(flags, leaf_port=flags.leaf_port, leaf_compression=flags.leaf_compression),
        shards=flags.shards,
        replicas=flags.replicas,
        tenants=tenants,
        agents=agents,
        metrics_port=flags.metrics_port,
        stores=shard_flags.stores(flags),
        snapshots=shard_flags.snapshots(flags),
    )


def server_options(
    flags: argparse.Namespace, *, leaf_port: int = 0, leaf_compression: str = "s2_auto", hub: str = ""
) -> ServerOptions:
    """The server that the flags describe. Raises `BadRequest`."""
    check_name("site", flags.site)
    if not (1 <= flags.port <= LAST_PORT and 1 <= flags.monitoring_port <= LAST_PORT and 0 <= leaf_port <= LAST_PORT):
        raise BadRequest(f"--port and --monitoring-port must be 1 to {LAST_PORT}, --leaf-port up to that")
    return ServerOptions(
        data=flags.data,
        site=flags.site,
        host=flags.host,
        port=flags.port,
        monitoring_port=flags.monitoring_port,
        durability=flags.durability,
        leaf_port=leaf_port,
        leaf_compression=leaf_compression,
        hub=hub,
        region=flags.region and check_name("region", flags.region),
    )


def users(flags: argparse.Namespace) -> tuple[Sequence[str], Sequence[tuple[str, str]]]:
    """The tenants and the (tenant, agent) to make. Raises `BadRequest`."""
    agents = []
    for name in flags.agent or ["demo.alice"]:
        tenant, dot, agent = name.partition(".")
        if not dot:
            raise BadRequest(f"--agent {name}: expected TENANT.AGENT")
        agents.append((tenant, agent))
    return list(dict.fromkeys([*(flags.tenant or []), *(tenant for tenant, _ in agents)])), agents


async def _up(options: MeshOptions, stop: asyncio.Event) -> int:
    """Run the mesh until `stop` is set, also while it starts; returns the exit status."""
    await until_stopped(stop, _serve(options))
    print("stopped; all that was acknowledged is in the data folder", flush=True)
    return 0


async def _serve(options: MeshOptions) -> None:
    async with Mesh(options) as mesh:
        print(_greeting(mesh), flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            print("draining …", flush=True)


def _greeting(mesh: Mesh) -> str:
    options = mesh.options
    server = options.server
    credentials = [str(mesh.credential(tenant, agent).path) for tenant, agent in options.agents]
    metrics = "free ports (see the logs)"
    if options.metrics_port:
        last = options.metrics_port + len(mesh.children) - 1
        metrics = f"http://127.0.0.1:{options.metrics_port}/metrics to :{last} ({', '.join(mesh.children)})"
    lines = [
        f"mnemesh is up: {options.shards} shards, {options.replicas} replica(s) each, durability {server.durability}",
        f"  connect      {mesh.url}",
        *(f"  credentials  {path}" for path in credentials),
        f"  monitoring   {server.monitoring_url}",
        f"  metrics      {metrics}",
        f"  logs         {server.data / 'logs'}",
        "Ctrl-C drains and stops.",
    ]
    return "\n".join(lines)
