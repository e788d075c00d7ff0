"""`mnemesh agent add | ls | rm`: who may log in, on a mesh that runs or not."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from cli.credentials import AGENT
from cli.provision import ensure_tenants
from cli.server import reload_running
from cli.server_config import saved_options
from mnemesh.errors import BadRequest


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for verb, about in (("add", "make an agent's credentials"), ("rm", "end them at once"), ("ls", "list the agents")):
        command = verbs.add_parser(verb, help=about)
        command.add_argument("--data", type=Path, default=data, help="folder of the mesh (default: %(default)s)")
        if verb != "ls":
            command.add_argument("name", help="TENANT.AGENT")


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status. Raises `BadRequest` or `NotFound`."""
    try:
        options = saved_options(flags.data)
    except FileNotFoundError as error:
        raise BadRequest(
            f"{flags.data} is no mesh's data folder; `mnemesh up --data {flags.data}` makes one"
        ) from error
    credentials = options.credentials()
    if flags.verb == "ls":
        for user in credentials.list():
            if user.role == AGENT:
                print(f"{user.user}\t{user.path}")
        return 0
    tenant, dot, agent = flags.name.partition(".")
    if not dot:
        raise BadRequest(f"{flags.name}: expected TENANT.AGENT")
    if flags.verb == "add":
        print(credentials.add_agent(tenant, agent).path)
    else:
        credentials.remove(flags.name)
    if asyncio.run(reload_running(flags.data)) and flags.verb == "add":
        asyncio.run(ensure_tenants(credentials.load("operator").link_options(), [tenant]))
    return 0
