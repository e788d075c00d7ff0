"""`mnemesh rebuild`: have a shard build one of its stores anew from the log, while it is read."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from cli.check_mesh import STATUS_S, replicas, running
from cli.operator import asking, options_of
from cli.server_config import ServerOptions
from memory_shards.stores.urls import KNOWN
from mnemesh import messages, subjects, wire
from mnemesh.asker import Asker, reply_of
from mnemesh.errors import Conflict, MnemeshError, NotFound, Unavailable
from mnemesh.messages import ShardStatus

ASK_EVERY_S = 0.5
SILENT_S = 5.0
"""How long a replica may say nothing of a rebuild that it has begun."""


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    parser.add_argument("--shard", required=True, help="the shard whose store is to be built anew")
    parser.add_argument("--store", required=True, choices=sorted(KNOWN), help="what that store keeps")
    parser.add_argument("--force", action="store_true", help="also where the log is cut off, and says less")
    parser.add_argument("--data", type=Path, default=data, help="the site's folder (default: %(default)s)")


def run(flags: argparse.Namespace) -> int:
    """Returns 0 once it is built. Raises a `MnemeshError` that says what cannot be."""
    return asyncio.run(_rebuild(options_of(flags.data), flags.shard, flags.store, force=flags.force))


async def _rebuild(options: ServerOptions, shard: str, store: str, *, force: bool) -> int:
    async with asking(options, "rebuild") as asker:
        there = replicas(await running(asker))
        count = there[shard]
        if not count:
            raise NotFound(f"no replica of shard {shard!r} runs; there are {', '.join(sorted(there)) or 'none at all'}")
        request = wire.encode({"store": store, "force": force})
        answers = await asker.inbox.gather(subjects.shard_rebuild(shard), request, most=count, wait_s=STATUS_S)
        begun = set()
        refused: MnemeshError = NotFound(f"no replica of shard {shard!r} answers")
        for answer in answers:
            try:
                begun.add(reply_of(subjects.SHARD_REBUILD, answer).id)
            except Conflict as error:
                refused = error
        if not begun:
            raise refused
        print(f"{len(begun)} of {count} replicas build the store of the {store} anew; they are read meanwhile")
        return await _finished(asker, shard, begun, count)


async def _finished(asker: Asker, shard: str, begun: set[str], count: int) -> int:
    """Wait until these rebuilds are over. One that nobody tells of ended with its replica."""
    shown = ""
    silent = 0
    while True:
        told = {id: held for status in await _statuses(asker, shard, count) for id, held in status.rebuilds.items()}
        states = [told[id] for id in begun if id in told]
        if (now := "; ".join(f"{held.state} {held.said}".strip() for held in states)) != shown:
            shown = now
            print(f"  {now}", flush=True)
        if any(held.state == "failed" for held in states):
            return 1
        silent = silent + 1 if len(states) < len(begun) else 0
        if silent * ASK_EVERY_S > SILENT_S:
            raise Unavailable("a replica that built ended meanwhile: its store is as it was; ask again")
        if len(states) == len(begun) and all(held.state == "done" for held in states):
            return 0
        await asyncio.sleep(ASK_EVERY_S)


async def _statuses(asker: Asker, shard: str, count: int) -> list[ShardStatus]:
    """What the replicas of a shard say of themselves; one that starts or stops says nothing."""
    asked = wire.encode(messages.Status())
    answers = await asker.inbox.gather(subjects.shard_status(shard), asked, most=count, wait_s=STATUS_S)
    found = []
    for answer in answers:
        try:
            found.append(reply_of(subjects.SHARD_STATUS, answer))
        except MnemeshError:
            continue
    return found
