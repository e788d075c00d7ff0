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
from mnemesh.errors import BadRequest, Conflict, MnemeshError, NotFound
from mnemesh.messages import ShardStatus

ASK_EVERY_S = 0.5
NAMES = {"attributes": ("documents",), "edges": ("edges", "documents"), "text": ("texts", "edges", "documents")}
"""Which store of a shard keeps what: the first that it has, for a file may keep all of it."""


def add_flags(parser: argparse.ArgumentParser, data: Path) -> None:
    parser.add_argument("--shard", required=True, help="the shard whose store is to be built anew")
    parser.add_argument("--store", required=True, choices=sorted(KNOWN), help="what that store keeps")
    parser.add_argument("--data", type=Path, default=data, help="the site's folder (default: %(default)s)")


def run(flags: argparse.Namespace) -> int:
    """Returns 0 once it is built. Raises a `MnemeshError` that says what cannot be."""
    return asyncio.run(_rebuild(options_of(flags.data), flags.shard, flags.store))


async def _rebuild(options: ServerOptions, shard: str, part: str) -> int:
    async with asking(options, "rebuild") as asker:
        count = replicas(await running(asker))[shard]
        if not count:
            raise NotFound(f"no replica of shard {shard!r} runs")
        before = await _statuses(asker, shard, count)
        store = next((name for name in NAMES.get(part, (part,)) if name in before[0].stores), part)
        request = wire.encode(messages.Rebuild(store=store))
        answers = await asker.inbox.gather(subjects.shard_rebuild(shard), request, most=count, wait_s=STATUS_S)
        begun = 0
        for answer in answers:
            try:
                reply_of(subjects.SHARD_REBUILD, answer)
                begun += 1
            except Conflict as error:
                refused = error
        if not begun:
            raise refused if answers else NotFound(f"no replica of shard {shard!r} answers")
        print(f"{begun} of {count} replicas build the store of the {store} anew; they are read meanwhile", flush=True)
        return await _finished(asker, shard, store, begun, count)


async def _finished(asker: Asker, shard: str, store: str, begun: int, count: int) -> int:
    shown = ""
    while True:
        states = [status.rebuilds.get(store, "") for status in await _statuses(asker, shard, count)]
        now = "; ".join(state for state in states if state)
        if now != shown:
            shown = now
            print(f"  {now}", flush=True)
        if any(state.startswith("failed") for state in states):
            return 1
        if sum(state == "done" for state in states) >= begun:
            return 0
        await asyncio.sleep(ASK_EVERY_S)


async def _statuses(asker: Asker, shard: str, count: int) -> list[ShardStatus]:
    """What the replicas of a shard say of themselves. Raises `BadRequest` where none does."""
    asked = wire.encode(messages.Status())
    answers = await asker.inbox.gather(subjects.shard_status(shard), asked, most=count, wait_s=STATUS_S)
    found = []
    for answer in answers:
        try:
            found.append(reply_of(subjects.SHARD_STATUS, answer))
        except MnemeshError:
            continue  # it is stopping, say; the others tell
    if not found:
        raise BadRequest(f"no replica of shard {shard!r} says where it stands; see `mnemesh doctor`")
    return found
