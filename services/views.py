"""The views of a site: of each, the vectors are kept to what the texts of its entities are.

    follow which views there are → with the lease, an upkeep for each → say where they stand

Of several replicas one works, by a lease, and the others stand by. Which views there are is in one bucket, up to where
each has the log in another; so whoever takes over goes on from there. Looks at `view_upkeep`, `log_tail`,
`router` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec

from mnemesh import kv, messages, subjects
from mnemesh.actor import Actor, handles
from mnemesh.call import Call
from mnemesh.connection import Link
from mnemesh.errors import MnemeshError
from mnemesh.guard import Guard
from mnemesh.jetstream import stream_state
from mnemesh.kv import BucketView
from mnemesh.lease import Lease
from mnemesh.messages import ViewSeen
from mnemesh.stats import Gauge
from mnemesh.supervision import first_of
from router.inventory import Inventory
from router.shard_map import ShardMap
from services.log_tail import LogTail
from services.view import View, decode_view
from services.view_upkeep import Place, Upkeep

logger = logging.getLogger("mnemesh.views")


class Views(Actor):
    """Keeps the views of a site. Any number may run; `is_at_work` says whether this one does."""

    role = "views"

    def __init__(self, link: Link, *, site: str, guard: Guard | None = None) -> None:
        super().__init__(link, guard=guard)
        self.site = site
        self._views = BucketView(subjects.VIEWS.name)
        self._places = BucketView(subjects.VIEW_PLACES.name)
        self._shards = ShardMap()
        self._inventory = Inventory(self.asker, self._shards, site=site, name=self.role)
        self._lease = Lease(self.asker.inbox, subjects.LEASES.name, self.role, self.instance)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self.upkeeps: dict[str, Upkeep] = {}
        """By the name of the view; empty while another replica is at work."""

    @property
    def is_at_work(self) -> bool:
        return self._lease.is_held

    def metadata(self) -> dict[str, str]:
        return {"site": self.site}

    def gauges(self) -> list[Gauge]:
        return [gauge for upkeep in self.upkeeps.values() for gauge in upkeep.gauges()]

    def background(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        return {
            "views": partial(self._views.follow, self.link, self.asker.inbox),
            "places": partial(self._places.follow, self.link, self.asker.inbox),
            "shard_map": partial(self._shards.follow, self.link, self.asker.inbox),
            "lease": self._contend,
            "upkeep": self._keep_up,
        }

    async def ready(self) -> None:
        await self._views.ready.wait()
        await self._places.ready.wait()
        await self._shards.ready.wait()

    async def release(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    # ── what it does ────────────────────────────────────────────────────────────────────────────────────────

    async def _contend(self) -> None:
        """Want the lease as long as there is a view: to renew it is a write to disk, several times a second."""
        await self.ready()
        while True:
            await self._until(lambda: bool(self._views.entries))
            await first_of(self._lease.run(), self._until(lambda: not self._views.entries))

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of the views that there are."""
        while not holds():
            await self._views.changed(self._views.version)

    async def _keep_up(self) -> None:
        await self.ready()
        while True:
            await self._lease.taken.wait()
            try:
                await first_of(self._lease.lost.wait(), self._lead())
            finally:
                self.upkeeps = {}

    async def _lead(self) -> None:
        """An upkeep for each view, as long as the view is what it was."""
        tail = LogTail(self.link, self.asker.inbox, subjects.log_stream(self.site))
        works: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(tail.run())
            while True:
                version = self._views.version
                views = self._defined()
                for name in [name for name, upkeep in self.upkeeps.items() if views.get(name) != upkeep.view]:
                    del self.upkeeps[name]
                    works[name].cancel()
                    await asyncio.wait([works.pop(name)])
                for name in views.keys() - self.upkeeps.keys():
                    upkeep = self.upkeeps[name] = Upkeep(
                        views[name], self.asker, self._inventory, tail, self._executor, site=self.site
                    )
                    works[name] = tasks.create_task(upkeep.run(), name=f"view {name}")
                for name in self._places.entries.keys() - self._views.entries.keys():
                    await kv.delete(self.asker.inbox, subjects.VIEW_PLACES.name, name)
                await self._views.changed(version)

    def _defined(self) -> dict[str, View]:
        """The views that can be kept, by name."""
        found = {}
        for name, entry in self._views.entries.items():
            try:
                found[name] = decode_view(entry)
                found[name].check()
            except (msgspec.MsgspecError, MnemeshError) as error:
                logger.error("view %s cannot be read, so it is not kept: %s", name, error)
                found.pop(name, None)
        return found

    # ── what operators see ──────────────────────────────────────────────────────────────────────────────────

    @handles(subjects.VIEW_STATUS)
    async def view_status(self, request: messages.Status, call: Call) -> messages.ViewsSeen:
        """Any replica answers, from what is kept of each place: that is some seconds old."""
        head = (await stream_state(self.asker.inbox, subjects.log_stream(self.site))).last_sequence
        return messages.ViewsSeen(views=[self._seen(view, head) for _, view in sorted(self._defined().items())])

    def _seen(self, view: View, head: int) -> ViewSeen:
        seen = ViewSeen(
            name=view.name,
            tenant=view.tenant,
            type=view.type,
            attributes=view.attributes,
            space=view.space,
            embedder=view.embedder,
            removed=view.removed,
        )
        held = self._places.entries.get(view.name)
        if held is None:
            return seen
        place = msgspec.json.decode(held, type=Place)
        return msgspec.structs.replace(
            seen,
            definition=place.definition,
            place=place.sequence,
            waiting=max(0, head - place.sequence),
            filled=place.filled and place.definition == view.definition,
            refused=place.refused,
            trouble=place.trouble,
        )
