"""The backlog of a view: the entities whose text may have changed, and up to where the log is dealt with.

What happens to an entity more often than it is looked at is looked at once. Plain data: no NATS. Looks at nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple

MOST = 50_000
"""Entities that may wait: about 20 MB. The log is read on when they are fewer."""


class Change(NamedTuple):
    """What is to be looked at again: the log sequences of its first and last change, and when the first one was (ms).

    It is `contested` where somebody wrote between a look and what followed from it.
    """

    first: int
    last: int
    since_ms: int
    contested: bool = False

    def merged(self, other: Change) -> Change:
        return Change(
            min(self.first, other.first),
            max(self.last, other.last),
            min(self.since_ms, other.since_ms),
            self.contested or other.contested,
        )


class Backlog:
    """What waits, in the order in which it came. It begins with the log dealt with up to `read`."""

    def __init__(self, read: int) -> None:
        self._read = read
        self._waiting: dict[str, Change] = {}
        self._taken: Mapping[str, Change] = {}
        self._came = asyncio.Event()
        self._went = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def place(self) -> int:
        """Up to here of the log nothing is left to do."""
        return min((change.first - 1 for change in self._all()), default=self._read)

    @property
    def since_ms(self) -> int | None:
        """When the oldest change was that is still to be dealt with, in milliseconds since 1970."""
        return min((change.since_ms for change in self._all()), default=None)

    def _all(self) -> Iterable[Change]:
        return (*self._waiting.values(), *self._taken.values())

    def read(self, sequence: int) -> None:
        """The log was read up to here."""
        self._read = max(self._read, sequence)

    def add(self, entity_id: str, change: Change) -> None:
        held = self._waiting.get(entity_id)
        self._waiting[entity_id] = change if held is None else held.merged(change)
        self._came.set()

    def settle(self, entity_id: str) -> None:
        """All that is known of an entity so far is dealt with."""
        if self._waiting.pop(entity_id, None) is not None:
            self._went.set()

    async def take(self, most: int) -> Mapping[str, Change]:
        """The next 1 to `most`; they count as not dealt with until `done`."""
        while not self._waiting:
            self._came.clear()
            await self._came.wait()
        taken = list(islice(self._waiting, most))
        self._taken = {entity_id: self._waiting.pop(entity_id) for entity_id in taken}
        self._went.set()
        return self._taken

    def done(self, again: Mapping[str, Change]) -> None:
        """What was taken is dealt with, but for what is to be done `again`."""
        self._taken = {}
        for entity_id, change in again.items():
            self.add(entity_id, change)

    async def below(self, most: int) -> None:
        """Wait until fewer than so many wait."""
        while len(self._waiting) >= most:
            self._went.clear()
            await self._went.wait()
