"""Rebuilding a store while it is read: another is filled from the log beside it, and then takes its place.

    a file     in a folder of its own (`folder.beside`); the next start moves it to where it belongs
    a server   under names of its own: of the next `generation`. Who applies fills it, then says so in KV, and all
               replicas of the shard read that one from then on

What is half done when a process ends is left, and the next rebuild begins it anew. Looks at `served`, `folder`,
`outside`, `stores` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import nats.nuid
from msgspec.structs import replace

from memory_shards import folder as folders
from memory_shards.outside import Follow, Head, OutsideProjection
from memory_shards.projection import Projection
from memory_shards.served import Served
from memory_shards.stores import Facet, Vectors
from mnemesh import kv
from mnemesh.connection import Link
from mnemesh.errors import Conflict, MnemeshError, Unavailable
from mnemesh.inbox import Inbox
from mnemesh.kv import BucketView
from mnemesh.lease import Held, Lease
from mnemesh.messages import RebuildState

logger = logging.getLogger("mnemesh.rebuild")

LET_GO_S = 3.0
"""How long a store is kept that was replaced: reads of it may be under way, here or at another replica."""

POLL_S = 0.05

Make: TypeAlias = Callable[[Facet, Path | int], Awaitable[Facet]]
"""Another store like one: in a folder if it is a file, or of a generation if it is a server's. Opened."""


async def generations_in(inbox: Inbox, bucket: str, key: str, folder: Path) -> dict[str, int]:
    """The generation of each store of a shard that was ever rebuilt, by its name: of the shared, and of our own."""
    found = folders.kept_generations(folder)
    for name in await kv.keys(inbox, bucket):
        if name.startswith(f"{key}.") and (value := await kv.get(inbox, bucket, name)):
            found[name.removeprefix(f"{key}.")] = int(value)
    return found


class Rebuilds:
    """Rebuilds stores of a shard, one at a time. `run` and `follow` for ever.

    `key` is what the shard's generations are kept under in `bucket`, one a store.
    """

    def __init__(
        self,
        served: Served,
        make: Make,
        *,
        follow: Follow,
        head: Head,
        lease: Lease | Held,
        folder: Path,
        inbox: Inbox,
        bucket: str,
        key: str,
        generations: dict[str, int],
    ) -> None:
        self._served = served
        self._make = make
        self._follow = follow
        self._head = head
        self._lease = lease
        self._folder = folder
        self._inbox = inbox
        self._bucket = bucket
        self._key = key
        self._generations = generations
        self._filled: dict[str, tuple[int, Facet]] = {}
        self._asked: asyncio.Queue[tuple[str, str, bool]] = asyncio.Queue()
        self._view = BucketView(bucket)
        self._seen = 0
        self.states: dict[str, RebuildState] = {}
        """Of each rebuild that was asked for since the start, by its id: how far it is."""

    def ask(self, facet: Facet, *, may_lack: bool) -> str:
        """Have a store rebuilt. The rebuild's id. Where the log `may_lack` something, what has less takes no place.

        Raises `Conflict` where it is done elsewhere, or is under way.
        """
        name = facet.projection.name
        if _is_shared(facet) and not self._lease.is_held:
            raise Conflict("another replica writes to this store, and rebuilds it")
        if any(held.store == name and held.state == "building" for held in self.states.values()):
            raise Conflict(f"the store of the {name} is being rebuilt")
        id = nats.nuid.NUID().next().decode()
        self.states[id] = RebuildState(store=name, state="building")
        self._asked.put_nowait((id, name, may_lack))
        return id

    async def run(self) -> None:
        """Rebuild what is asked for; the next one once the store that was replaced before is let go."""
        while True:
            id, name, may_lack = await self._asked.get()
            facet = self._served.named(name)
            assert facet is not None, "it was looked up when it was asked for"
            try:
                let_go = await self._rebuild(facet, id, may_lack)
            except Exception as error:
                self.states[id] = RebuildState(store=name, state="failed", said=str(error)[:300])
                logger.error("the store of the %s cannot be rebuilt: %s", name, error)
                if not isinstance(error, (MnemeshError, OSError, sqlite3.Error, *_outages(facet))):
                    raise
            else:
                self.states[id] = RebuildState(store=name, state="done")
                await let_go()

    async def _rebuild(self, old: Facet, id: str, may_lack: bool) -> Callable[[], Awaitable[object]]:
        """Have another take its place. What lets go of it."""
        name = old.projection.name
        logger.info("the store of the %s is built anew beside the one that is read", name)

        def say(said: str) -> None:
            self.states[id] = replace(self.states[id], said=said)

        if isinstance(old.projection, Projection):
            await self._rebuild_file(old, may_lack, say)
            return partial(self._let_go, old)
        generation = self._generations.get(name, 0) + 1
        if generation > 1:  # whoever replaced it may have ended before it was dropped
            await self._drop(await self._make(old, generation - 2))
        new = await self._make(old, generation)
        try:
            await self._fill_server(new, old, say)
            if may_lack:
                await _check(new, old)
        except BaseException:
            await new.close()
            raise
        if not _is_shared(old):
            self._generations[name] = generation
            folders.keep_generation(self._folder, name, generation)
            self._served.put(new, old)
            return partial(self._let_go, old, drop=True)
        self._filled[name] = generation, new
        await kv.put(self._inbox, self._bucket, f"{self._key}.{name}", b"%d" % generation)
        while self._generations.get(name, 0) < generation:  # noqa: ASYNC110  # `follow` sees it, and lets go of it
            await asyncio.sleep(POLL_S)
        return partial(asyncio.sleep, LET_GO_S)

    async def _rebuild_file(self, old: Facet, may_lack: bool, say: Callable[[str], None]) -> None:
        """Bring the log to a new file until it has all that was handed to the old one, and let it take its place.

        Nothing is handed to either between the two.
        """
        beside = folders.beside(self._folder)
        new = await self._make(old, beside)
        projection = new.projection
        assert isinstance(projection, Projection), "a file's"
        async with contextlib.AsyncExitStack() as handing:
            try:
                if self._served.offered_to:
                    await self._fill_file(projection, old, say, handing)
                if may_lack:
                    await _check(new, old)
                await asyncio.to_thread(folders.finished, beside)
            except BaseException:
                await new.close()
                await asyncio.to_thread(shutil.rmtree, beside)
                raise
            self._served.put(new, old)

    async def _fill_file(
        self, projection: Projection, old: Facet, say: Callable[[str], None], handing: contextlib.AsyncExitStack
    ) -> None:
        """Apply the log to a new file. In the end nothing is handed to any until `handing` is left."""
        async with contextlib.aclosing(self._follow(0)) as batches, _while_running(projection.run()) as applying:
            async for records, last in batches:
                await applying.unless_failed(projection.offer(records, last))
                say(f"{projection.watermark.value:,} of {old.projection.watermark.value:,}")
                if projection.offered >= self._served.offered_to:
                    await handing.enter_async_context(self._served.handing)
                    if projection.offered >= self._served.offered_to:
                        await applying.unless_failed(projection.watermark.reached(self._served.offered_to))
                        return
                    await handing.aclose()

    async def _fill_server(self, new: Facet, old: Facet, say: Callable[[str], None]) -> None:
        """Have a server's new generation filled until it is as far as the one that is read."""
        projection = new.projection
        assert isinstance(projection, OutsideProjection), "a server's"
        await projection.on_worker(lambda: projection.store.begin(afresh=True))
        lease = self._lease if projection.store.is_shared else Held()
        async with _while_running(projection.run(self._follow, self._head, lease)) as applying:
            while projection.watermark.value < (head := old.projection.watermark.value):
                if not lease.is_held:
                    raise Unavailable("another replica writes to this store now; ask again")
                say(f"{projection.watermark.value:,} of {head:,}")
                await applying.unless_failed(asyncio.sleep(POLL_S))

    async def _let_go(self, old: Facet, *, drop: bool = False) -> None:
        """Close what is read no more, once nobody can be reading it."""
        async with _while_running(_answering(old)):
            await asyncio.sleep(LET_GO_S)
        if drop:
            await self._drop(old)
        else:
            await old.close()

    async def _drop(self, old: Facet) -> None:
        """Delete what a server has of a generation that nobody reads."""
        projection = old.projection
        assert isinstance(projection, OutsideProjection), "a server's"
        with contextlib.suppress(*projection.store.outages):
            await projection.on_worker(projection.store.drop)
        await old.close()

    # ── what another replica rebuilt ────────────────────────────────────────────────────────────────────────

    async def follow(self, link: Link) -> None:
        """Read the generation that the bucket names, of each store that is shared."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._view.follow(link, self._inbox))
            while True:
                await self._view.changed(self._seen)
                self._seen = self._view.version
                for facet in self._served.stores.facets:
                    name = facet.projection.name
                    value = self._view.entries.get(f"{self._key}.{name}")
                    if _is_shared(facet) and value and int(value) > self._generations.get(name, 0):
                        await self._adopt(facet, int(value))
                        tasks.create_task(self._let_go(facet, drop=self._lease.is_held))

    async def _adopt(self, old: Facet, generation: int) -> None:
        """Read another generation of a store from now on."""
        name = old.projection.name
        filled, new = self._filled.pop(name, (0, old))
        if filled != generation:
            new = await self._make(old, generation)
        self._served.put(new, old)
        self._generations[name] = generation
        logger.info("the store of the %s is generation %d now", name, generation)


async def _check(new: Facet, old: Facet) -> None:
    """Raise `Conflict` where a store that was built from a log without its beginning has less than the one before."""
    has, had = await new.counted(digest=False), await old.counted(digest=False)
    if has.things < had.things or has.edges < had.edges:
        raise Conflict(
            f"the log no longer has its beginning: from it come {has.things:,} entities and {has.edges:,} edges, where "
            f"the store has {had.things:,} and {had.edges:,}. That is kept; --force builds what the log says"
        )


class _Running:
    """Work that goes on beside other work, whose failure that is to hear of."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    async def unless_failed(self, work: Awaitable[object]) -> None:
        """Do the work; raise what the other raises, if that ends meanwhile."""
        mine = asyncio.ensure_future(work)
        try:
            await asyncio.wait([mine, self._task], return_when=asyncio.FIRST_COMPLETED)
            if self._task.done():
                self._task.result()
            mine.result()
        finally:
            mine.cancel()
            await asyncio.gather(mine, return_exceptions=True)


@contextlib.asynccontextmanager
async def _while_running(work: Awaitable[None]) -> AsyncIterator[_Running]:
    task = asyncio.ensure_future(work)
    try:
        yield _Running(task)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _answering(facet: Facet) -> None:
    """Answer the searches that wait for a store, if it is of vectors."""
    if facet.projection.name == "vectors":
        await cast(Vectors, facet).run()
    await asyncio.Event().wait()


def _is_shared(facet: Facet) -> bool:
    return isinstance(facet.projection, OutsideProjection) and facet.projection.store.is_shared


def _outages(facet: Facet) -> tuple[type[Exception], ...]:
    return facet.projection.store.outages if isinstance(facet.projection, OutsideProjection) else ()
