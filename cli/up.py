"""`mnemesh up`: a whole mesh on this machine until Ctrl-C or SIGTERM, on a data folder that outlives it."""

from __future__ import annotations

import argparse
import asyncio

from cli.mesh import Mesh, MeshOptions
from cli.server import ServerOptions
from mnemesh.errors import BadRequest
from mnemesh.ids import PARTITIONS


def options(flags: argparse.Namespace) -> MeshOptions:
    """What the flags describe. Raises `BadRequest` that says which one cannot be."""
    if not 1 <= flags.shards <= PARTITIONS:
        raise BadRequest(f"--shards must be 1 to {PARTITIONS}")
    if flags.replicas < 1:
        raise BadRequest("--replicas must be at least 1")
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
    """Run the mesh until `stop` is set; returns the exit status."""
    async with Mesh(options) as mesh:
        print(_greeting(mesh), flush=True)
        await stop.wait()
        print("draining …", flush=True)
    print("stopped; all that was acknowledged is in the data folder", flush=True)
    return 0


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
