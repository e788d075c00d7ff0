"""`mnemesh up`: a whole mesh on this machine until Ctrl-C or SIGTERM, on a data folder that outlives it."""

from __future__ import annotations

import argparse
import asyncio

from cli.mesh import Mesh, MeshOptions
from cli.server import ServerOptions
from mnemesh.errors import BadRequest
from mnemesh.host import until_stopped
from mnemesh.ids import PARTITIONS, check_name

LAST_PORT = 65_535


def options(flags: argparse.Namespace) -> MeshOptions:
    """What the flags describe. Raises `BadRequest` that says which one cannot be."""
    if not 1 <= flags.shards <= PARTITIONS:
        raise BadRequest(f"--shards must be 1 to {PARTITIONS}")
    if flags.replicas < 1:
        raise BadRequest("--replicas must be at least 1")
    check_name("site", flags.site)
    if not (1 <= flags.port <= LAST_PORT and 1 <= flags.monitoring_port <= LAST_PORT):
        raise BadRequest(f"--port and --monitoring-port must be 1 to {LAST_PORT}")
    last_metrics_port = LAST_PORT - 2 - flags.shards * flags.replicas
    if not 0 <= flags.metrics_port <= last_metrics_port:
        raise BadRequest(f"--metrics-port must be 0 (free ones) or up to {last_metrics_port}: each service has one")
    agents = []
    for name in flags.agent or ["demo.alice"]:
        tenant, dot, agent = name.partition(".")
        if not dot:
            raise BadRequest(f"--agent {name}: expected TENANT.AGENT")
        agents.append((tenant, agent))
    tenants = dict.fromkeys([*(flags.tenant or []), *(tenant for tenant, _ in agents)])
    return MeshOptions(
        server=ServerOptions(
            data=flags.data,
            site=flags.site,
            host=flags.host,
            port=flags.port,
            monitoring_port=flags.monitoring_port,
            durability=flags.durability,
        ),
        shards=flags.shards,
        replicas=flags.replicas,
        tenants=tuple(tenants),
        agents=tuple(agents),
        metrics_port=flags.metrics_port,
    )


async def up(options: MeshOptions, stop: asyncio.Event) -> int:
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
