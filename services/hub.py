"""The hub: what a site that has devices does for them. It tells each up to where it has the device's log.

Of a device it keeps nothing but what the device last said of itself, for operators; the rest is the log's marks. Looks
at `mnemesh` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mnemesh import messages, subjects
from mnemesh.actor import Actor, handles
from mnemesh.call import Call
from mnemesh.clock import wall_ms
from mnemesh.connection import Link
from mnemesh.errors import NotFound
from mnemesh.guard import Guard
from mnemesh.jetstream import last_of, last_of_each
from mnemesh.messages import DeviceSeen
from mnemesh.origin import decode_mark, place_of
from mnemesh.stats import Gauge

LINKED_S = 15.0
"""A device that was heard of since is linked; it speaks every 5 s."""


class _Heard(NamedTuple):
    """What a device said, and when, by the hub's clock."""

    at_ms: int
    said: messages.AskPosition


class Hub(Actor):
    """Answers the devices of a site, and operators about them."""

    role = "hub"

    def __init__(self, link: Link, *, site: str, guard: Guard | None = None) -> None:
        super().__init__(link, guard=guard)
        self.site = site
        self._log = subjects.log_stream(site)
        self._heard: dict[str, _Heard] = {}

    def metadata(self) -> dict[str, str]:
        return {"site": self.site}

    def gauges(self) -> list[Gauge]:
        values: dict[str, tuple[str, Callable[[_Heard], float]]] = {
            "device_silent_seconds": ("Since a device was last heard of", lambda heard: _since_s(heard.at_ms)),
            "device_waiting": ("Events that a device has still to send", lambda heard: heard.said.waiting),
            "device_lag_seconds": ("For how long the oldest of them has waited", lambda heard: heard.said.lag_s),
            "device_clock_offset_seconds": (
                "How far a device's clock is ahead",
                lambda heard: _offset_ms(heard) / 1000,
            ),
            "device_log_bytes": ("Size of a device's log", lambda heard: heard.said.log_bytes),
        }
        return [
            Gauge(name, about, lambda read=read, heard=heard: read(heard), {"site": site})  # type: ignore[misc]
            for name, (about, read) in values.items()
            for site, heard in self._heard.items()
        ]

    @handles(subjects.UPLINK_POSITION)
    async def uplink_position(self, request: messages.AskPosition, call: Call) -> messages.Position:
        device = call.tokens["site"]
        self._heard[device] = _Heard(wall_ms(), request)
        try:
            stored = await last_of(self.asker.inbox, self._log, subjects.log_mark(device))
        except NotFound:
            return messages.Position(hub=self.site)
        mark = decode_mark(stored.message.data)
        return messages.Position(
            hub=self.site,
            place=stored.sequence,
            incarnation=mark.incarnation,
            sequence=mark.sequence,
            event_id=mark.event_id,
        )

    @handles(subjects.DEVICES)
    async def devices(self, request: messages.AskDevices, call: Call) -> messages.DevicesSeen:
        marks = {
            place_of(stored.message.subject).origin: stored
            for stored in await last_of_each(self.asker.inbox, self._log, subjects.log_mark("*"))
        }
        seen = []
        for site in sorted(marks.keys() | self._heard.keys()):
            stored, heard = marks.get(site), self._heard.get(site)
            uplinked = decode_mark(stored.message.data).sequence if stored else 0
            if heard is not None:
                silent_s = _since_s(heard.at_ms)
                seen.append(
                    DeviceSeen(
                        site=site,
                        linked=silent_s < LINKED_S,
                        silent_s=silent_s,
                        uplinked=uplinked,
                        waiting=heard.said.waiting,
                        lag_s=heard.said.lag_s,
                        clock_offset_ms=_offset_ms(heard),
                        log_bytes=heard.said.log_bytes,
                    )
                )
            elif stored is not None:
                silent_s = _since_s(stored.recorded_at)
                seen.append(DeviceSeen(site=site, linked=False, silent_s=silent_s, uplinked=uplinked))
        return messages.DevicesSeen(devices=seen)


def _since_s(moment_ms: int) -> float:
    return max(0.0, (wall_ms() - moment_ms) / 1000)


def _offset_ms(heard: _Heard) -> int:
    return heard.said.clock_ms - heard.at_ms
