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
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeAlias, cast

from memory_shards import folder as folders
from memory_shards.outside import Follow, Head, OutsideProjection
from memory_shards.projection import Projection
from memory_shards.served import Served
from memory_shards.stores import Facet, Vectors
from mnemesh import kv
from mnemesh.connection import Link
from mnemesh.errors import BadRequest, Conflict, MnemeshError, Unavailable
from mnemesh.inbox import Inbox
from mnemesh.kv import BucketView
from mnemesh.lease import Held, Lease

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
        self._asked: asyncio.Queue[str] = asyncio.Queue()
        self._view = BucketView(bucket)
        self._seen = 0
        self.states: dict[str, str] = {}
        """Of each store that was to be rebuilt since the start: how far that is."""

    def ask(self, name: str) -> None:
        """Have a store rebuilt. Raises `BadRequest` where there is none, `Conflict` where it is done elsewhere, or is
        under way."""
        facet = self._served.named(name)
        if facet is None:
            names = sorted(projection.name for projection in self._served.stores.projections)
            raise BadRequest(f"this shard has no store {name!r}; it has {', '.join(names)}")
        if _is_shared(facet) and not self._lease.is_held:
            raise Conflict("another replica writes to this store, and rebuilds it")
        if self.states.get(name, "").startswith("building"):
            raise Conflict(f"the store of the {name} is being rebuilt")
        self.states[name] = "building"
        self._asked.put_nowait(name)

    async def run(self) -> None:
        """Rebuild what is asked for."""
        while True:
            name = await self._asked.get()
            facet = self._served.named(name)
            assert facet is not None, "it was looked up when it was asked for"
            try:
                await self._rebuild(facet)
            except Exception as error:
                self.states[name] = f"failed: {str(error)[:300]}"
                logger.error("the store of the %s cannot be rebuilt: %s", name, error)
                if not isinstance(error, (MnemeshError, OSError, sqlite3.Error, *_outages(facet))):
                    raise
            else:
                self.states[name] = "done"

    async def _rebuild(self, old: Facet) -> None:
        name = old.projection.name
        logger.info("the store of the %s is built anew beside the one that is read", name)
        if isinstance(old.projection, Projection):
            beside = folders.beside(self._folder)
            new = await self._make(old, beside)
            try:
                await self._fill_file(new, old)
            except BaseException:
                await new.close()
                raise
            folders.finished(beside)
            self._served.put(new, old)
            await self._let_go(old)
            return
        generation = self._generations.get(name, 0) + 1
        if generation > 1:  # whoever replaced it may have ended before it was dropped
            await self._drop(await self._make(old, generation - 2))
        new = await self._make(old, generation)
        try:
            await self._fill_server(new, old)
        except BaseException:
            await new.close()
            raise
        if _is_shared(old):
            self._filled[name] = generation, new
            await kv.put(self._inbox, self._bucket, f"{self._key}.{name}", b"%d" % generation)
            while self._generations.get(name, 0) < generation:  # noqa: ASYNC110  # `follow` sees it
                await asyncio.sleep(POLL_S)
        else:
            self._generations[name] = generation
            folders.keep_generation(self._folder, name, generation)
            self._served.put(new, old)
            await self._let_go(old, drop=True)

    async def _fill_file(self, new: Facet, old: Facet) -> None:
        """Bring the log to a new file until it has what the old one has, and no batch fell between the two."""
        name, projection = old.projection.name, new.projection
        assert isinstance(projection, Projection), "a file's"
        if not self._served.offered_to:
            return  # nothing was written yet
        async with contextlib.aclosing(self._follow(0)) as batches, _while_running(projection.run()) as applying:
            async for records, last in batches:
                await applying.unless_failed(projection.offer(records, last))
                head = old.projection.watermark.value
                self.states[name] = f"building: {projection.watermark.value:,} of {head:,}"
                if projection.offered >= self._served.offered_to:
                    await applying.unless_failed(projection.watermark.reached(min(last, head)))
                    if projection.offered >= self._served.offered_to:
                        return

    async def _fill_server(self, new: Facet, old: Facet) -> None:
        """Have a server's new generation filled until it is as far as the one that is read."""
        name, projection = old.projection.name, new.projection
        assert isinstance(projection, OutsideProjection), "a server's"
        await projection.on_worker(lambda: projection.store.begin(afresh=True))
        lease = self._lease if projection.store.is_shared else Held()
        async with _while_running(projection.run(self._follow, self._head, lease)) as applying:
            while projection.watermark.value < (head := old.projection.watermark.value):
                if not lease.is_held:
                    raise Unavailable("another replica writes to this store now; ask again")
                self.states[name] = f"building: {projection.watermark.value:,} of {head:,}"
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
