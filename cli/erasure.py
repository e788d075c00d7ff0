"""`mnemesh erasure status`: what was forgotten, which sites have erased it, and which are away and have still to."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli.operator import asking, options_of
from cli.server_config import ServerOptions
from mnemesh import subjects
from mnemesh.messages import AskErasures, Erasure


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    command = verbs.add_parser("status", help="at a hub: who has erased what was forgotten, and who is pending")
    command.add_argument("--data", type=Path, default=data, help="the hub's folder (default: %(default)s)")
    command.add_argument("--tenant", help="of this tenant alone")
    command.add_argument("--entity", help="of this entity alone")
    command.add_argument("--limit", type=int, default=20, help="the latest so many (default: %(default)s)")


def run(flags: argparse.Namespace) -> int:
    """Returns 0 if nothing is pending, else 1. Raises a `MnemeshError` that says what cannot be."""
    asked = AskErasures(tenant=flags.tenant, entity_id=flags.entity, limit=flags.limit)
    erasures = asyncio.run(_ask(options_of(flags.data), asked))
    table = Table("tenant", "entity", "log", "site", "erased", "when", box=None)
    for erasure in erasures:
        for row in _rows(erasure):
            table.add_row(erasure.tenant, erasure.entity_id, str(erasure.sequence), *row)
    Console().print(table)
    return int(any(erasure.pending for erasure in erasures))


async def _ask(options: ServerOptions, asked: AskErasures) -> list[Erasure]:
    async with asking(options, "erasure status") as asker:
        return (await asker.ask(subjects.ERASURES, subjects.erasures(), asked)).erasures


def _rows(erasure: Erasure) -> list[tuple[str, str, str]]:
    """(site, what it erased, when) of each site."""
    rows = [
        (receipt.site, f"{receipt.events} events, at {receipt.sequence}", f"{receipt.erased_at:%Y-%m-%d %H:%M:%S}")
        for receipt in erasure.receipts
    ]
    rows += [(site, "had nothing", "") for site in erasure.nothing]
    for waiting in erasure.pending:
        silent = "since the hub started" if waiting.silent_s is None else f"for {waiting.silent_s:.0f} s"
        rows.append((waiting.site, "pending", f"silent {silent}"))
    return rows
