"""The edge: what a device does for its hub, beside serving its own agents like any site.

Its uplink sends what is born here; `status` says how far that is. Looks at `uplink` and `mnemesh`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from edge.uplink import Uplink
from mnemesh import messages, subjects
from mnemesh.actor import Actor, handles
from mnemesh.call import Call
from mnemesh.connection import Link
from mnemesh.contract import AnyOperation
from mnemesh.guard import Guard
from mnemesh.stats import Gauge


class Edge(Actor):
    """Connects a device's memory with its hub's."""

    role = "edge"

    def __init__(
        self, link: Link, *, site: str, guard: Guard | None = None, uplink_bytes_per_s: float | None = None
    ) -> None:
        super().__init__(link, guard=guard)
        self.site = site
        self._uplink = Uplink(self.asker, site=site, bytes_per_s=uplink_bytes_per_s)

    def bindings(self, operation: AnyOperation) -> list[Mapping[str, str]]:
        return [{"site": self.site}]

    def metadata(self) -> dict[str, str]:
        return {"site": self.site}

    def gauges(self) -> list[Gauge]:
        uplink = self._uplink
        return [
            Gauge("uplink_linked", "1 while the hub answers", lambda: uplink.linked),
            Gauge("uplink_sequence", "Up to where the hub has this device's log", lambda: uplink.position.sequence),
            Gauge("uplink_waiting", "Events that the hub lacks", lambda: uplink.waiting),
            Gauge("uplink_lag_seconds", "For how long the oldest of them has waited", lambda: uplink.lag_s),
            Gauge("uplink_sent", "Events sent since the start", lambda: uplink.sent),
            Gauge("uplink_trouble", "1 while it stands still until somebody mends it", lambda: bool(uplink.trouble)),
        ]

    def background(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        return {"uplink": self._uplink.run}

    @handles(subjects.EDGE_STATUS)
    async def status(self, request: messages.Status, call: Call) -> messages.EdgeStatus:
        uplink = self._uplink
        return messages.EdgeStatus(
            site=self.site,
            hub=uplink.position.hub,
            linked=uplink.linked,
            uplinked=uplink.position.sequence,
            waiting=uplink.waiting,
            lag_s=uplink.lag_s,
            trouble=uplink.trouble,
        )
