"""`mnemesh doctor`: what is wrong with the mesh of a data folder, and what to do about it.

`diagnose` is the order of the checks. Each needs what the ones before it found in order, so it ends at the first
thing without which the others cannot be made. The checks are in `check_machine`, `check_access`, `check_mesh`,
`check_stores` and `check_edge`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cli import check_access, check_edge, check_machine, check_mesh, check_stores
from cli.contract import load as load_contract
from cli.finding import Finding, wrong
from cli.server_config import ServerOptions
from mnemesh.asker import Asker
from mnemesh.connection import Link, LinkOptions
from mnemesh.errors import MnemeshError

OPERATOR = "operator"
SIGNS = {"ok": "ok     ", "warning": "warning", "wrong": "WRONG  "}


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--stores", action="store_true", help="also compare every store with the log, from its start")


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status."""
    return asyncio.run(main(flags.data, stores=flags.stores))


async def main(data: Path, *, stores: bool = False) -> int:
    """Print every finding; returns the exit status. With `stores` also whether they hold what the log says."""
    findings = []
    with _quiet():
        async for finding in diagnose(data, stores=stores):
            findings.append(finding)
            print(f"{SIGNS[finding.verdict]}  {finding.what}", flush=True)
            if finding.advice:
                print(f"         → {finding.advice}", flush=True)
    return exit_status(findings)


@contextmanager
def _quiet() -> Iterator[None]:
    """What the probes provoke is told as findings, not logged."""
    logger = logging.getLogger("mnemesh")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def exit_status(findings: Iterable[Finding]) -> int:
    """0 if nothing is wrong; warnings do not count."""
    return int(any(finding.verdict == "wrong" for finding in findings))


async def diagnose(data: Path, *, stores: bool = False) -> AsyncIterator[Finding]:
    """All findings, in the order of the checks, as they are made."""
    yield check_machine.program()
    options, finding = check_machine.initialised(data)
    yield finding
    if options is None:
        return
    contract = load_contract()
    credentials = options.credentials(contract)
    for finding in check_machine.privacy(data, credentials):
        yield finding
    users, findings = check_machine.users(options, credentials, contract)
    for finding in findings:
        yield finding
    version, finding = await check_machine.listening(options)
    yield finding
    if version is None:
        return
    yield check_machine.running_version(version)
    yield await check_access.configuration(options, users, contract)
    async for finding in check_access.logins(options, users, contract):
        yield finding
    for operator in (user for user in users if user.role == OPERATOR):
        async for finding in _as_operator(options, operator.link_options("doctor"), stores):
            yield finding


async def _as_operator(options: ServerOptions, login: LinkOptions, stores: bool) -> AsyncIterator[Finding]:
    """The checks that ask the mesh itself."""
    try:
        link = await Link.open(login)
    except MnemeshError as error:
        yield wrong(f"the mesh cannot be looked at: {error.message}", "see what is said about the operator above")
        return
    try:
        asker = await Asker(link).open()
        stored = True
        async for finding in check_mesh.storage(asker.inbox, options):
            yield finding
            stored = stored and finding.verdict == "ok"
        if stored:
            async for finding in _services(link, asker, options, stores):
                yield finding
    except MnemeshError as error:
        yield wrong(f"the mesh stopped answering: {error.message}", "run `mnemesh doctor` again")
    finally:
        await link.close()


async def _services(link: Link, asker: Asker, options: ServerOptions, stores: bool) -> AsyncIterator[Finding]:
    shards, findings = await check_mesh.shard_map(asker.inbox)
    for finding in findings:
        yield finding
    found = await check_mesh.running(asker)
    for finding in check_mesh.services(found, shards):
        yield finding
    async for finding in check_mesh.views(asker.inbox, found):
        yield finding
    for finding in check_mesh.contracts(found):
        yield finding
    async for finding in check_mesh.lag(asker, options, found):
        yield finding
    if stores:
        async for finding in check_stores.stores(link, asker, options, check_mesh.replicas(found), shards):
            yield finding
    if options.leaf_port:
        async for finding in check_edge.devices(asker, options):
            yield finding
    if options.kind == "device":
        async for finding in check_edge.hub(asker, options):
            yield finding
