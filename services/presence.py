"""The presence of a hub's devices: what each last said of itself, and when. In memory: a device speaks every 5 s.

Looks at `mnemesh`.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import NamedTuple

from msgspec.structs import replace

from mnemesh.clock import wall_ms
from mnemesh.jetstream import Stored
from mnemesh.messages import AskPosition, DeviceSeen
from mnemesh.origin import mark_in
from mnemesh.stats import Gauge

LINKED_S = 15.0
"""A device that was heard of since is linked."""


class _Heard(NamedTuple):
    """What a device said, and when, by the hub's clock."""

    at_ms: int
    said: AskPosition

    @property
    def silent_s(self) -> float:
        return since_s(self.at_ms)

    @property
    def offset_ms(self) -> int:
        return self.said.clock_ms - self.at_ms


_GAUGES: dict[str, tuple[str, Callable[[_Heard], float]]] = {
    "device_silent_seconds": ("Since a device was last heard of", lambda heard: heard.silent_s),
    "device_waiting": ("Events that a device has still to send", lambda heard: heard.said.waiting),
    "device_lag_seconds": ("For how long the oldest of them has waited", lambda heard: heard.said.lag_s),
    "device_clock_offset_seconds": ("How far a device's clock is ahead", lambda heard: heard.offset_ms / 1000),
    "device_downlink_sequence": ("Up to where a device has the log", lambda heard: heard.said.downlinked),
    "device_held": ("Entities that a device holds of the hub's", lambda heard: heard.said.held),
    "device_held_bytes": ("Bytes that it was sent of them", lambda heard: heard.said.held_bytes),
    "device_log_bytes": ("Size of a device's log", lambda heard: heard.said.log_bytes),
}


class Presence:
    """What the devices of a hub said of themselves since it started."""

    def __init__(self) -> None:
        self._heard: dict[str, _Heard] = {}

    @property
    def devices(self) -> Set[str]:
        return self._heard.keys()

    def hear(self, device: str, said: AskPosition) -> None:
        self._heard[device] = _Heard(wall_ms(), said)

    def silent_s(self, device: str) -> float | None:
        """For how long nothing was heard of a device, in seconds; `None`: it was not heard of yet."""
        heard = self._heard.get(device)
        return None if heard is None else heard.silent_s

    def has_erased(self, device: str, sequence: int) -> bool:
        """Whether a device says that what was forgotten up to this sequence of the hub's log is erased there."""
        heard = self._heard.get(device)
        return heard is not None and heard.said.erased >= sequence

    def gauges(self) -> list[Gauge]:
        return [
            Gauge(name, about, lambda read=read, device=device: read(self._heard[device]), {"site": device})  # type: ignore[misc]
            for name, (about, read) in _GAUGES.items()
            for device in self._heard
        ]

    def seen(self, device: str, mark: Stored | None) -> DeviceSeen:
        """What is known of a device by what it said, and by its last mark in the log."""
        decoded = mark_in(mark.message) if mark is not None else None
        seen = DeviceSeen(
            site=device,
            linked=False,
            silent_s=since_s(0 if mark is None else mark.recorded_at),
            uplinked=0 if decoded is None else decoded.sequence,
        )
        heard = self._heard.get(device)
        if heard is None:
            return seen
        said = heard.said
        return replace(
            seen,
            linked=heard.silent_s < LINKED_S,
            silent_s=heard.silent_s,
            waiting=said.waiting,
            lag_s=said.lag_s,
            downlinked=said.downlinked,
            erased=said.erased,
            held=said.held,
            held_bytes=said.held_bytes,
            contract=said.contract,
            refused=said.refused,
            clock_offset_ms=heard.offset_ms,
            log_bytes=said.log_bytes,
        )


def since_s(moment_ms: int) -> float:
    """How long ago that was, in seconds; never less than none."""
    return max(0.0, (wall_ms() - moment_ms) / 1000)
