"""Taking a snapshot: a copy of each file as of one moment, cut into pieces that are read back before they count.

`VACUUM INTO` copies what one read transaction sees, on a connection of its own: `apply` goes on meanwhile, and no
read waits. The copy has no free pages, its pages are in the order that a load reads them in, and of what was forgotten
before nothing is left in it. Looks at `manifest`, `targets` and `stores`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import sys
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TypeVar

from memory_shards.snapshots.manifest import (
    PIECE,
    Damaged,
    Manifest,
    Piece,
    SnapshotFile,
    checksum_of,
    decode,
    manifests_of,
    new_id,
    piece_at,
)
from memory_shards.snapshots.targets import Target
from memory_shards.stores import Store
from memory_shards.stores.provenance import built_for
from mnemesh.errors import NotFound

Result = TypeVar("Result")

AT_ONCE = 4
"""Pieces under way: together less than the 64 MiB that nats-server lets wait for a connection."""

SAMPLE = 64 * 1024
DEFLATED_FROM = 0.8
"""A piece is deflated where its first `SAMPLE` bytes shrink to less than this share. Documents shrink to a third,
vectors not at all."""


async def take(target: Target, stores: Sequence[Store], *, site: str, shard: str, folder: Path) -> Manifest:
    """Take a snapshot of these stores. `folder` is for one file's copy at a time, and is gone afterwards.

    Raises `Damaged` where what is read back differs, a `MnemeshError` of the target, `sqlite3.Error`, `OSError`.
    """
    began = time.monotonic()
    id = new_id()
    with ThreadPoolExecutor(2, thread_name_prefix="snapshot", initializer=_give_way) as threads:
        taking = _Taking(target, threads, site=site, shard=shard, id=id)
        try:
            await taking.on_thread(_emptied, folder)
            files = [await taking.file(store, folder / store.file.name) for store in stores]
        finally:
            await asyncio.shield(taking.on_thread(shutil.rmtree, folder, True))
        manifest = Manifest(
            id=id,
            site=site,
            shard=shard,
            taken_at=datetime.now(UTC),
            seconds=time.monotonic() - began,
            files=files,
        )
        await _write(target, manifest)
    return manifest


async def _write(target: Target, manifest: Manifest) -> None:
    """From here on it exists."""
    name = f"{manifests_of(manifest.site, manifest.shard)}{manifest.id}"
    await target.put(name, manifest.encode())
    try:
        if decode(await target.get(name)) != manifest:
            raise Damaged("the manifest that was read back is another")
    except (Damaged, NotFound):
        await target.remove([name])
        raise


class _Taking:
    def __init__(self, target: Target, threads: ThreadPoolExecutor, *, site: str, shard: str, id: str) -> None:
        self._target = target
        self._threads = threads
        self._site, self._shard, self._id = site, shard, id

    async def on_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def file(self, store: Store, copy: Path) -> SnapshotFile:
        """Bring a copy of a store's file to the target and compare it there."""
        watermark, provenance = await self._copied(store, copy)
        size = (await self.on_thread(copy.stat)).st_size
        count = -(-size // PIECE)
        pieces = await in_groups(self._put(copy, number) for number in range(count))
        await self.on_thread(copy.unlink)
        await in_groups(self._verify(copy.name, number, piece) for number, piece in enumerate(pieces))
        return SnapshotFile(name=copy.name, watermark=watermark, built_for=provenance, pieces=pieces)

    async def _copied(self, store: Store, copy: Path) -> tuple[int, str]:
        with closing(sqlite3.connect(store.file, isolation_level=None, check_same_thread=False)) as connection:
            copying = asyncio.ensure_future(self.on_thread(_copy, connection, store, copy))
            try:
                return await asyncio.shield(copying)
            except asyncio.CancelledError:
                connection.interrupt()
                await asyncio.wait([copying])
                raise

    async def _put(self, copy: Path, number: int) -> Piece:
        piece, content = await self.on_thread(_cut, copy, number)
        await self._target.put(self._name(copy.name, number), content)
        return piece

    async def _verify(self, file: str, number: int, piece: Piece) -> None:
        name = self._name(file, number)
        if await self.on_thread(checksum_of, await self._target.get(name)) != piece.checksum:
            raise Damaged(f"{name} is not as it was written a moment ago")

    def _name(self, file: str, number: int) -> str:
        return piece_at(self._site, self._shard, self._id, file, number)


async def in_groups(works: Iterable[Awaitable[Result]]) -> list[Result]:
    """The results of all, in order, `AT_ONCE` at a time. Raises what the first of a group that failed raised."""
    waiting = iter(works)
    results: list[Result] = []
    while group := list(islice(waiting, AT_ONCE)):
        for outcome in await asyncio.gather(*group, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
            results.append(outcome)
    return results


# ── on a thread ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _copy(connection: sqlite3.Connection, store: Store, copy: Path) -> tuple[int, str]:
    """Copy a store's file as it is at one moment; up to where that has the log, and what it was built for."""
    connection.execute("VACUUM INTO ?", (str(copy),))
    with closing(sqlite3.connect(copy, isolation_level=None)) as copied:
        return store.stands_in(copied), built_for(copied)


def _cut(copy: Path, number: int) -> tuple[Piece, bytes]:
    """A piece of a file, and its bytes as they are to be kept."""
    with copy.open("rb") as file:
        file.seek(number * PIECE)
        content = file.read(PIECE)
    size = len(content)
    is_deflated = len(zlib.compress(content[:SAMPLE], 1)) < DEFLATED_FROM * len(content[:SAMPLE])
    if is_deflated:
        content = zlib.compress(content, 1)
    return Piece(size, len(content), is_deflated, checksum_of(content)), content


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _give_way() -> None:
    """Let reads and writes go first, where threads have a priority of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
