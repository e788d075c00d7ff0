"""`mnemesh snapshot take | list`: snapshots of the shards of a running mesh, as its shards take and see them."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from cli.operator import asking, options_of
from mnemesh import kv, subjects
from mnemesh.asker import Asker
from mnemesh.errors import NotFound
from mnemesh.messages import ListSnapshots, Snapshot, Snapshots, TakeSnapshot

WIDTH = 200
"""Of a table that nobody's terminal wraps."""
COLUMNS = ("shard", "snapshot", "taken", "took", "log", "files", "stored", "")


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for verb, about in {"take": "take one of each shard now", "list": "what there is of each shard"}.items():
        command = verbs.add_parser(verb, help=about)
        command.add_argument("shard", nargs="?", help="of this shard alone")
        command.add_argument("--data", type=Path, default=data, help="the mesh's folder (default: %(default)s)")


def run(flags: argparse.Namespace) -> int:
    """Returns 0, or 1 where a listed snapshot is damaged. Raises a `MnemeshError` that says what cannot be."""
    return asyncio.run(_take(flags) if flags.verb == "take" else _list(flags))


async def _take(flags: argparse.Namespace) -> int:
    async with asking(options_of(flags.data), "snapshot take") as asker:
        for shard in await _shards(asker, flags.shard):
            taken = await asker.ask(subjects.TAKE_SNAPSHOT, subjects.take_snapshot(shard), TakeSnapshot())
            print(f"{shard}: {taken.id}, {decimal(taken.stored)} in {taken.seconds:.1f} s, read back and compared")
    return 0


async def _list(flags: argparse.Namespace) -> int:
    table = Table(*COLUMNS, box=None)
    damaged = False
    async with asking(options_of(flags.data), "snapshot list") as asker:
        for shard in await _shards(asker, flags.shard):
            found: Snapshots = await asker.ask(subjects.LIST_SNAPSHOTS, subjects.list_snapshots(shard), ListSnapshots())
            for snapshot in found.snapshots:
                table.add_row(*_row(snapshot))
            for id, reason in found.damaged.items():
                table.add_row(shard, id, "", "", "", "", "", f"damaged: {reason}")
            damaged = damaged or bool(found.damaged)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    return int(damaged)


def _row(snapshot: Snapshot) -> tuple[str, ...]:
    return (
        snapshot.shard,
        snapshot.id,
        f"{snapshot.taken_at:%Y-%m-%d %H:%M:%S}",
        f"{snapshot.seconds:.1f} s",
        str(min(snapshot.files.values())),
        decimal(snapshot.bytes),
        decimal(snapshot.stored),
        "" if snapshot.unfit is None else f"not used: {snapshot.unfit}",
    )


async def _shards(asker: Asker, named: str | None) -> list[str]:
    """Those of the shard map. Raises `NotFound` where the named one is not in it."""
    bucket = subjects.SHARDS.name
    shards = [name for name in await kv.keys(asker.inbox, bucket) if await kv.get(asker.inbox, bucket, name)]
    if named is None:
        return shards
    if named not in shards:
        raise NotFound(f"there is no shard {named}; there are {', '.join(shards)}")
    return [named]
