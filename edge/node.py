"""The edge: what a device does for its hub, beside serving its own agents like any site.

Its uplink sends what is born here, its downlink keeps what is wanted of the hub's; `status` says how far both are.
It answers the hub's router with what the device's policy lets out. Looks at its own files, `router`, `mnemesh`, and at
`services.disclosure` and `services.site_policy`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from edge.confirming import Confirming
from edge.downlink import Downlink
from edge.from_hub import FromHub
from edge.sent import Sent
from edge.uplink import Uplink
from mnemesh import messages, subjects
from mnemesh.actor import Actor, handles
from mnemesh.call import Call
from mnemesh.clock import wall_ms
from mnemesh.connection import Link
from mnemesh.contract import AnyOperation
from mnemesh.errors import Unavailable
from mnemesh.guard import Guard
from mnemesh.jetstream import last_of_each
from mnemesh.messages import AskPosition, Interest
from mnemesh.stats import Gauge
from router.inventory import Inventory
from router.shard_map import ShardMap
from services.disclosure import Disclosure
from services.erasure import Eraser
from services.read_policy import SiteReadPolicy
from services.site_policy import SitePolicy

LINK_S = 3.0
"""How long the line to the hub may take to come up after a start."""

COUNT_S = 5.0
"""How often what is held is counted, for operators."""


class Edge(Actor):
    """Connects a device's memory with its hub's. `folder` is the device's own."""

    role = "edge"

    def __init__(
        self,
        link: Link,
        *,
        site: str,
        folder: Path,
        interest: Interest | None = None,
        guard: Guard | None = None,
        uplink_bytes_per_s: float | None = None,
        erase_first_after_s: float = 3600.0,
    ) -> None:
        super().__init__(link, guard=guard)
        self.site = site
        self._erase_first_after_s = erase_first_after_s
        self._policy = SitePolicy(site)
        self._reads = SiteReadPolicy()
        self._shards = ShardMap()
        self._inventory = inventory = Inventory(self.asker, self._shards, site=site, name=self.role)
        self._uplink = Uplink(
            self.asker,
            inventory,
            self._policy,
            self._reads,
            site=site,
            sent=Sent(folder / "sent"),
            bytes_per_s=uplink_bytes_per_s,
            says=self._says,
        )
        self._downlink = Downlink(
            self.asker, inventory, site=site, interest=interest or Interest(), hub=self._uplink.reaches
        )
        self._eraser = Eraser(self.asker, inventory, site=site)
        self._held = (0, 0)
        self._was_away = True  # until it is known better
        self._started_at = float("inf")
        self._disclosure = Disclosure(self.asker, inventory, self._policy)
        self.hub = FromHub(self.asker, self._policy, self._disclosure, site=site, line=self._uplink)
        self._confirming = Confirming(self.asker, self._disclosure, self._policy, site=site, hub=self._uplink.reaches)

    def bindings(self, operation: AnyOperation) -> list[Mapping[str, str]]:
        return [{"site": self.site}]

    def metadata(self) -> dict[str, str]:
        return {"site": self.site}

    def gauges(self) -> list[Gauge]:
        uplink, downlink = self._uplink, self._downlink
        return [
            Gauge("uplink_linked", "1 while the hub answers", lambda: uplink.linked),
            Gauge("uplink_silent_seconds", "Since when the hub does not answer", lambda: uplink.silent_s),
            Gauge("uplink_sequence", "Up to where the hub has this device's log", lambda: uplink.position.sequence),
            Gauge("uplink_waiting", "Events that the hub lacks", lambda: uplink.waiting),
            Gauge("uplink_lag_seconds", "For how long the oldest of them has waited", lambda: uplink.lag_s),
            Gauge("uplink_sent", "Events sent since the start", lambda: uplink.sent_events),
            Gauge("uplink_trouble", "1 while it stands still until somebody mends it", lambda: bool(uplink.trouble)),
            Gauge("clock_offset_ms", "How far this device's clock is ahead", lambda: uplink.clock_offset_ms),
            Gauge("downlink_sequence", "Up to where this device has its hub's log", lambda: downlink.sequence),
            Gauge(
                "downlink_trouble", "1 while it stands still until somebody mends it", lambda: bool(downlink.trouble)
            ),
            Gauge("downlink_received", "Events received since the start", lambda: downlink.received),
            Gauge("downlink_current", "1 while all that is wanted is here", lambda: downlink.current.is_set()),
            Gauge("held", "Entities of the hub's that are held here", lambda: self._held[0]),
            Gauge("held_bytes", "Bytes that the hub sent of them", lambda: self._held[1]),
            *self._eraser.gauges(),
        ]

    def background(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        return {
            "policy": partial(self._policy.follow, self.link, self.asker.inbox),
            "read_policy": partial(self._reads.follow, self.link, self.asker.inbox),
            "shard_map": partial(self._shards.follow, self.link, self.asker.inbox),
            "uplink": partial(self._once_ready, self._uplink.run),
            "downlink": partial(self._once_ready, self._downlink.run),
            "erase": partial(self._once_ready, self._eraser.run),
            "confirm": partial(self._once_ready, self._confirming.run),
            "holdings": partial(self._once_ready, self._count_held),
        }

    async def prepare(self) -> None:
        await self._note_absence()

    async def ready(self) -> None:
        await self._policy.ready()
        await self._reads.ready()
        await self._shards.ready.wait()

    async def _once_ready(self, work: Callable[[], Awaitable[None]]) -> None:
        """Nothing is sent before it is known what may leave."""
        await self.ready()
        await work()

    def _says(self, said: AskPosition) -> AskPosition:
        entities, size = self._held
        return replace(
            said,
            downlinked=self._downlink.sequence,
            erased=self._erased(),
            held=entities,
            held_bytes=size,
        )

    async def _count_held(self) -> None:
        while True:
            self._held = await self._inventory.held()
            await asyncio.sleep(COUNT_S)

    # ── what the hub's router asks ──────────────────────────────────────────────────────────────────────────

    @handles(subjects.DEVICE_SEARCH)
    async def search(self, request: messages.SearchEmbedding, call: Call) -> messages.Hits:
        self._require_current()
        return await self._disclosure.search(request, call)

    @handles(subjects.DEVICE_SEARCH_TEXT)
    async def search_text(self, request: messages.SearchText, call: Call) -> messages.Hits:
        self._require_current()
        return await self._disclosure.search_text(request, call)

    @handles(subjects.DEVICE_TRAVERSE)
    async def traverse(self, request: messages.Traverse, call: Call) -> messages.Traversal:
        self._require_current()
        return await self._disclosure.traverse(request, call)

    def _require_current(self) -> None:
        """What was forgotten elsewhere while the line was down is erased before others are told of it."""
        if not self._has_erased():
            raise Unavailable(f"{self.site} has still to hear what was forgotten", retry_after_ms=1000)

    @property
    def must_erase_first(self) -> bool:
        """Whether agents wait: this device was away for long, and its hub is, or may be, in reach."""
        if not self._was_away or self._has_erased():
            self._was_away = False
            return False
        return self._uplink.linked or asyncio.get_running_loop().time() < self._started_at + LINK_S

    async def _note_absence(self) -> None:
        """For how long nothing came from the hub, by the marks in the log."""
        self._started_at = asyncio.get_running_loop().time()
        marks = await last_of_each(self.asker.inbox, subjects.log_stream(self.site), subjects.log_mark("*"))
        newest = max((stored.recorded_at for stored in marks), default=None)
        self._was_away = newest is not None and abs(wall_ms() - newest) > self._erase_first_after_s * 1000

    def _has_erased(self) -> bool:
        downlink = self._downlink
        return downlink.current.is_set() and self._erased() >= downlink.current_from

    def _erased(self) -> int:
        """Up to where what was forgotten in the hub's log is erased here."""
        return self._eraser.upto(self._uplink.hub, self._downlink.incarnation)

    @handles(subjects.EDGE_STATUS)
    async def status(self, request: messages.Status, call: Call) -> messages.EdgeStatus:
        uplink, downlink = self._uplink, self._downlink
        return messages.EdgeStatus(
            site=self.site,
            hub=uplink.hub,
            linked=uplink.linked,
            silent_s=uplink.silent_s,
            uplinked=uplink.position.sequence,
            waiting=uplink.waiting,
            lag_s=uplink.lag_s,
            downlinked=downlink.sequence,
            current=downlink.current.is_set(),
            clock_offset_ms=uplink.clock_offset_ms,
            hub_contract=uplink.hub_contract,
            put_aside=uplink.put_aside,
            refused=uplink.refused,
            untold=sorted(uplink.untold),
            trouble=uplink.trouble or downlink.trouble,
        )
