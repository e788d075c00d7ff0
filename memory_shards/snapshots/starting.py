"""Starting from a snapshot: the newest good one that fits takes the place of stores that have nothing.

    for each manifest, newest first    does it fit?  →  pieces, checksums compared  →  in place  →  open
    a damaged one                      is told, and the next older one is tried
    none                               the stores begin from empty, and the log fills them

Also finds where the log has a hole, which only a snapshot can fill. Looks at `manifest`, `targets` and `stores`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sqlite3
import zlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path

from memory_shards.snapshots.manifest import (
    PIECE,
    Damaged,
    Manifest,
    Piece,
    SnapshotFile,
    checksum_of,
    decode,
    manifests_of,
    piece_at,
)
from memory_shards.snapshots.taking import in_groups
from memory_shards.snapshots.targets import Target
from memory_shards.stores import Store
from memory_shards.stores.by_url import Stores, files_of
from memory_shards.stores.provenance import built_for
from mnemesh.atomic_batch import ROLLUP
from mnemesh.errors import MnemeshError, NotFound, Unavailable
from mnemesh.inbox import Inbox
from mnemesh.jetstream import ALL, StreamState, next_of

logger = logging.getLogger("mnemesh.snapshots")


async def start(
    target: Target,
    stores: Stores,
    reopen: Callable[[], Awaitable[Stores]],
    *,
    site: str,
    shard: str,
    state: StreamState,
) -> Stores:
    """These stores, or those of the newest good snapshot where one of these has nothing, or stands before a hole.

    `reopen` opens them again once they are closed and their files are others. Never raises for what a target does.
    """
    try:
        found, damaged = await manifests(target, site, shard)
    except MnemeshError as error:
        logger.warning("there is no starting from a snapshot: %s", error.message)
        return stores
    for id, reason in damaged.items():
        logger.warning("snapshot %s of %s is damaged, and skipped: %s", id, shard, reason)
    for manifest in found:
        empty = [store for store in files_of(stores) if store.watermark < max(1, state.first_sequence - 1)]
        wanted = [(store, file) for store in empty if (file := manifest.file(store.file.name)) is not None]
        newer = [(store, file) for store, file in wanted if store.watermark < file.watermark]
        if not newer:
            continue
        if (why := unfit(manifest, [store for store, _ in newer], state.last_sequence)) is not None:
            logger.info("snapshot %s of %s is not used: %s", manifest.id, shard, why)
            continue
        stores = await _started(target, manifest, newer, stores, reopen)
        if all(store.watermark >= file.watermark for store, file in _pairs(stores, newer)):
            logger.info(
                "%s starts from snapshot %s, which has the log up to %d", shard, manifest.id, manifest.watermark
            )
            return stores
    return stores


async def manifests(target: Target, site: str, shard: str) -> tuple[list[Manifest], dict[str, str]]:
    """The snapshots that there are, newest first, and of each damaged one what is wrong. Raises a `MnemeshError`."""
    prefix = manifests_of(site, shard)
    found: list[Manifest] = []
    damaged: dict[str, str] = {}
    for name in await target.names(prefix):
        try:
            found.append(decode(await target.get(name)))
        except (Damaged, NotFound) as error:
            damaged[name.removeprefix(prefix)] = str(error)
    found.sort(key=lambda manifest: (manifest.watermark, manifest.taken_at, manifest.id), reverse=True)
    return found, damaged


def unfit(manifest: Manifest, stores: Sequence[Store], log_ends: int | None = None) -> str | None:
    """Why these stores cannot start from a snapshot, of a log that ends there; `None` if they can."""
    for store in stores:
        file = manifest.file(store.file.name)
        if file is None:
            return f"it has no {store.file.name}"
        if log_ends is not None and file.watermark > log_ends:
            return f"{file.name} has the log up to {file.watermark}, which ends at {log_ends}"
        with closing(sqlite3.connect(store.file, isolation_level=None)) as connection:
            if reason := _differing(file.built_for, built_for(connection)):
                return f"{file.name} is of {reason}"
    return None


def is_of_this_log(manifest: Manifest, stores: Sequence[Store]) -> bool:
    """Whether all files of a snapshot were built from the log that these stores are of, with whatever tables."""
    with closing(sqlite3.connect(stores[0].file, isolation_level=None)) as connection:
        site, _, incarnation, *_ = json.loads(built_for(connection))
    origins = (json.loads(file.built_for) for file in manifest.files)
    return all((origin[0], origin[2]) == (site, incarnation) for origin in origins)


async def check_for_hole(inbox: Inbox, log: str, stores: Stores, state: StreamState) -> None:
    """Raise `Unavailable` where the log was cut off after what a store has: it would answer from a hole.

    A forget, and a mark, take earlier messages of their own subject out of the log, so where there is one nobody can
    tell what stood at its beginning, and no hole is found. Where there is none, nothing of the log may be missing.
    """
    for store in files_of(stores):
        if state.first_sequence <= store.watermark + 1 or not state.last_sequence > store.watermark:
            continue
        if not await was_cut(inbox, log, state):
            return
        raise Unavailable(
            f"{log} begins at {state.first_sequence}, and {store.file} has it up to {store.watermark}: what was in "
            "between is gone from the log, and in no snapshot that fits. Give the shard the target of its snapshots "
            "(--snapshots), or restore the log"
        )


async def was_cut(inbox: Inbox, log: str, state: StreamState) -> bool:
    """Whether something is missing at the beginning of the log that neither a forget nor a mark took out."""
    return state.first_sequence > 1 and not await _holds_rollup(inbox, log, state)


async def _holds_rollup(inbox: Inbox, log: str, state: StreamState) -> bool:
    after = state.first_sequence - 1
    while some := await next_of(inbox, log, ALL, after=after):
        if any(ROLLUP in stored.message.headers for stored in some):
            return True
        after = some[-1].sequence
        if after >= state.last_sequence:
            break
    return False


def _pairs(stores: Stores, wanted: Sequence[tuple[Store, SnapshotFile]]) -> list[tuple[Store, SnapshotFile]]:
    """The stores that are open now, with the files that they were to start from."""
    files = {store.file: file for store, file in wanted}
    return [(store, files[store.file]) for store in files_of(stores) if store.file in files]


_BUILT_FOR = ("another site", "other partitions", "another incarnation of the log", "another layout", "other parts")


def _differing(held: str, wanted: str) -> str | None:
    """What a file was built for otherwise than is wanted (`stores.provenance` writes both)."""
    pairs = zip(json.loads(held), json.loads(wanted), strict=True)
    return next((name for name, (one, other) in zip(_BUILT_FOR, pairs, strict=True) if one != other), None)


# ── from the target into place ──────────────────────────────────────────────────────────────────────────────────────


async def _started(
    target: Target,
    manifest: Manifest,
    wanted: Sequence[tuple[Store, SnapshotFile]],
    stores: Stores,
    reopen: Callable[[], Awaitable[Stores]],
) -> Stores:
    """The stores opened on the snapshot's files; as they were, or from empty, where those are no good."""
    folder = wanted[0][0].file.parent / "from-snapshot"
    try:
        await asyncio.to_thread(_emptied, folder)
        for _, file in wanted:
            await _fetch(target, manifest, file, folder / file.name)
    except (Damaged, MnemeshError) as error:
        logger.warning("snapshot %s of %s is damaged, and skipped: %s", manifest.id, manifest.shard, error)
        await asyncio.to_thread(shutil.rmtree, folder)
        return stores
    await stores.close()
    for store, file in wanted:
        _replace(store.file, folder / file.name)
    await asyncio.to_thread(shutil.rmtree, folder)
    try:
        return await reopen()
    except sqlite3.DatabaseError as error:
        logger.warning("snapshot %s of %s cannot be opened, and is skipped: %s", manifest.id, manifest.shard, error)
        for store, _ in wanted:
            _remove(store.file)
        return await reopen()


async def _fetch(target: Target, manifest: Manifest, file: SnapshotFile, into: Path) -> None:
    """A snapshot's file, compared piece by piece and synced. Raises `Damaged`, or a `MnemeshError` of the target."""

    async def fetch(number: int, piece: Piece) -> None:
        name = piece_at(manifest.site, manifest.shard, manifest.id, file.name, number)
        await asyncio.to_thread(_put_into, handle, number, piece, await target.get(name), name)

    handle = os.open(into, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        await in_groups(fetch(number, piece) for number, piece in enumerate(file.pieces))
        await asyncio.to_thread(os.fsync, handle)
    finally:
        os.close(handle)


def _put_into(handle: int, number: int, piece: Piece, content: bytes, name: str) -> None:
    if checksum_of(content) != piece.checksum:
        raise Damaged(f"{name} is not as it was written: its checksum differs")
    if piece.is_deflated:
        content = zlib.decompress(content)
    os.pwrite(handle, content, number * PIECE)


def _replace(file: Path, by: Path) -> None:
    """What was written ahead to the old file goes first, and the old file with it: it is nothing without."""
    _remove(file)
    by.replace(file)


def _remove(file: Path) -> None:
    for path in (file, file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}-shm")):
        path.unlink(missing_ok=True)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
