"""The hybrid logical clock that stamps events (Kulkarni et al., "Logical Physical Clocks", 2014).

A stamp is one 64-bit integer: 48 bits of milliseconds since 1970, then 16 bits of counter. Stamps of one clock
always grow, stay within the counter of physical time, and never fall behind a stamp that the clock has seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

COUNTER_BITS = 16


def wall_ms() -> int:
    """Milliseconds since 1970 by the machine's clock."""
    return time.time_ns() // 1_000_000


class HybridClock:
    """Issues growing stamps. `observe` makes it never fall behind a stamp from elsewhere."""

    def __init__(self, physical_ms: Callable[[], int] = wall_ms) -> None:
        self._physical_ms = physical_ms
        self._last = 0

    def now(self) -> int:
        """A stamp larger than every stamp issued or observed so far."""
        self._last = max(self._physical_ms() << COUNTER_BITS, self._last + 1)
        return self._last

    def observe(self, stamp: int) -> None:
        """Never issue a stamp at or below this one."""
        self._last = max(self._last, stamp)


MOST_AHEAD_MS = 60_000
"""How far a device's stamps may be ahead of the hub's clock. Beyond that they would win for as long as it is wrong."""


def is_too_far_ahead(stamp: int, recorded_at: int) -> bool:
    """Whether a stamp is further ahead of when a hub recorded it than may be: such an event is put aside."""
    return stamp_ms(stamp) > recorded_at + MOST_AHEAD_MS


def stamp_ms(stamp: int) -> int:
    """The physical part of a stamp, in milliseconds since 1970."""
    return stamp >> COUNTER_BITS


def to_ms(moment: datetime) -> int:
    """Milliseconds since 1970 of a time with a zone."""
    return round(moment.timestamp() * 1000)


def from_ms(milliseconds: int) -> datetime:
    """The UTC time of milliseconds since 1970."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
