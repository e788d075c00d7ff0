"""What `mnemesh doctor` looks at as each user: whether the server lets it in, and lets it do what the contract says.

Permissions are tried, not read: what counts is what the running server does. A publish whose reply subject the server
reserves to itself is refused after the permission check and before anything is delivered, so it tells whether the
publish is allowed and does nothing. (Measured with nats-server 2.15: `Permissions Violation for Publish to …` is a
denied subject, `… for Publish with Reply of …` an allowed one.) What the server allows beyond the contract does not
show in such probes; it shows in the digest of its configuration.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from cli.credentials import SYSTEM, Credential
from cli.finding import Finding, named, ok, warning, wrong
from cli.permissions import allowed
from cli.private import write_private
from cli.server import NatsServerMissing, find_nats_server, monitoring
from cli.server_config import ServerOptions, render_config
from mnemesh import subjects
from mnemesh.connection import Link
from mnemesh.contract import fill
from mnemesh.errors import Denied, MnemeshError

RESERVED_REPLY = "_R_.doctor"
PROBE = "doctor"

Contract = dict[str, Any]


async def logins(options: ServerOptions, users: Sequence[Credential], contract: Contract) -> AsyncIterator[Finding]:
    """Whether the server knows each user by the password in its file, and what it lets one user of each role do."""
    restart = f"restart the mesh (`mnemesh up --data {options.data}`): its server takes the users from these files"
    tried: set[str] = {SYSTEM}
    refused = False
    lacking = False
    for user in users:
        try:
            link = await Link.open(user.link_options("doctor"))
        except Denied:
            refused = True
            yield wrong(f"the server does not let {user.user} in with the password in {user.path}", restart)
            continue
        except MnemeshError as error:
            refused = True
            yield wrong(f"{user.user} cannot log in: {error.message}", restart)
            continue
        try:
            missing = [] if user.role in tried else await _missing(link, user, options.site, contract)
        finally:
            await link.close()
        tried.add(user.role)
        if missing:
            lacking = True
            yield wrong(f"the server does not let {user.user} {named(missing)}, which the contract does", restart)
    if not refused:
        yield ok("the server lets every user in")
    if not lacking:
        yield ok(f"the server lets each role do what contract {subjects.CONTRACT} says")


async def _missing(link: Link, user: Credential, site: str, contract: Contract) -> list[str]:
    """What the contract lets a user do and the server does not."""
    tokens = {"site": site, "tenant": user.tenant, "agent": user.agent}
    permissions = allowed(contract, user.role)
    probes = [("publish", _concrete(fill(pattern, **tokens))) for pattern in permissions.publish]
    probes += [("subscribe", _concrete(fill(pattern, **tokens))) for pattern in permissions.subscribe]
    return [f"{verb} {subject}" for verb, subject in probes if not await _is_allowed(link, verb, subject)]


def _concrete(pattern: str) -> str:
    """A subject that a pattern allows, and that nobody uses."""
    return ".".join(PROBE if token in ("*", ">") else token for token in pattern.split("."))


async def _is_allowed(link: Link, verb: str, subject: str) -> bool:
    def ignore(message: object) -> None:
        """Nobody uses the subject of a probe."""

    link.last_error = None
    if verb == "publish":
        await link.publish(subject, b"", reply=RESERVED_REPLY)
        await link.flush()
        return "violation for publish to" not in str(link.last_error).lower()
    subscription = await link.subscribe(subject, ignore)
    await link.flush()
    denied = link.last_error is not None
    await subscription.unsubscribe()
    return not denied


async def configuration(options: ServerOptions, users: Sequence[Credential], contract: Contract) -> Finding:
    """Whether the server runs with the configuration that Mnemesh would write for it now."""
    restart = f"restart the mesh (`mnemesh up --data {options.data}`), which writes it anew"
    running = (await monitoring(options, "/varz")).get("config_digest")
    if running is None:
        return warning(
            f"{options.monitoring_url}/varz does not tell the server's configuration",
            f"see whether another program took port {options.monitoring_port}; or {restart}",
        )
    expected = _digest(render_config(options, users, contract))
    if expected is None:
        return warning("the server's configuration cannot be compared", "see what is said about nats-server above")
    if running != expected:
        return wrong(
            f"the server runs with another configuration than contract {subjects.CONTRACT} and the credentials demand",
            restart,
        )
    return ok(f"the server runs with the configuration of contract {subjects.CONTRACT}")


def _digest(configuration: str) -> str | None:
    """The digest that nats-server gives a configuration; `None` if it does not take it."""
    try:
        program = find_nats_server()
    except NatsServerMissing:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "nats-server.conf"
        write_private(file, configuration)
        checked = subprocess.run([program, "-t", "-c", file], capture_output=True, text=True, timeout=10, check=False)
    _, parenthesis, rest = checked.stderr.rpartition(" is valid (")
    return rest.strip().removesuffix(")") if parenthesis else None
