"""Which events of a device's log its hub puts aside, for they were stamped while the device's clock was ahead.

The device decides, some seconds before the hub would by itself, and says so in a header: so both know the same
events, also when the clocks have met again. Kept in the bucket of receipts until they are stamped anew. Looks at
`mnemesh` only.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mnemesh import kv, subjects
from mnemesh.clock import MOST_AHEAD_MS, stamp_ms
from mnemesh.inbox import Inbox

KEY = "aside"
MARGIN_MS = 15_000
"""How much sooner than a hub the device takes a stamp for ahead: more than it may err about the hub's clock."""


def is_ahead(stamp: int, hub_ms: int) -> bool:
    """Whether an event with this stamp is to be put aside by a hub whose clock shows `hub_ms`."""
    return stamp_ms(stamp) > hub_ms + MOST_AHEAD_MS - MARGIN_MS


class Aside:
    """The sequences of these events. `load` first."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._spans: list[tuple[int, int]] = []

    async def load(self) -> None:
        held = await kv.get(self._inbox, subjects.RECEIPTS.name, KEY)
        self._spans = msgspec.json.decode(held, type=list[tuple[int, int]]) if held else []

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self._spans)

    def __contains__(self, sequence: object) -> bool:
        return isinstance(sequence, int) and any(first <= sequence <= last for first, last in self._spans)

    async def add(self, sequences: Iterable[int]) -> None:
        """Note more of them, in their order."""
        for sequence in sequences:
            if self._spans and self._spans[-1][1] == sequence - 1:
                self._spans[-1] = self._spans[-1][0], sequence
            elif sequence not in self:
                self._spans.append((sequence, sequence))
        await kv.put(self._inbox, subjects.RECEIPTS.name, KEY, msgspec.json.encode(self._spans))

    async def clear(self) -> None:
        self._spans = []
        await kv.delete(self._inbox, subjects.RECEIPTS.name, KEY)
