"""The roster of a device: which entities it is to hold, by what it wants and how much fits.

Wants have their order, and so has the roster: what no longer fits is evicted from the last want backwards, and of one
want the entity that has not changed for longest goes first. One that is larger than all that fits goes alone, and makes
room for nobody. Pure: no NATS, no clock. Looks at `mnemesh.messages`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Set
from typing import TypeAlias

import msgspec

from mnemesh.messages import Interest, Want

Key: TypeAlias = tuple[str, str]
"""(tenant, entity id)"""


class Candidate(msgspec.Struct, frozen=True):
    """An entity that a device may want: its type, and the regions in which it was written.

    One that `is_gone` was forgotten, and its type is that of then. Of one that `is_own` the device wrote some itself.
    `first` is where in the hub's log its events begin; 0: nobody can say. `types` decide what may leave of it.
    """

    key: Key
    type: str | None = None
    regions: Set[str] = frozenset()
    is_gone: bool = False
    is_own: bool = False
    first: int = 0
    types: Set[str] = frozenset()


class Roster:
    """What one device holds, and what it is to hold. `bytes` is what it was sent of it."""

    def __init__(self, interest: Interest) -> None:
        self.interest = interest
        self.bytes = 0
        self.left_out = 0
        """How often an entity that is wanted did not fit, or had to go."""
        self._near: list[set[Key]] = [
            {(want.tenant, entity_id) for entity_id in want.entities} for want in interest.wants
        ]
        self._members: list[OrderedDict[Key, int]] = [OrderedDict() for _ in interest.wants]
        self._want_of: dict[Key, int] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._want_of

    def __len__(self) -> int:
        return len(self._want_of)

    @property
    def tenants(self) -> Set[str]:
        return frozenset(want.tenant for want in self.interest.wants)

    # ── what is wanted ──────────────────────────────────────────────────────────────────────────────────────

    def hoods(self) -> Iterable[tuple[int, Want]]:
        """The wants that take in a neighbourhood, by their number."""
        return [(number, want) for number, want in enumerate(self.interest.wants) if want.entities and want.hops]

    def surround(self, number: int, entity_ids: Iterable[str]) -> list[Key]:
        """Add entities to the neighbourhood of a want; returns those that are new. Whoever was in it stays."""
        tenant = self.interest.wants[number].tenant
        new = [key for entity_id in entity_ids if (key := (tenant, entity_id)) not in self._near[number]]
        self._near[number].update(new)
        return new

    def is_near(self, number: int, key: Key) -> bool:
        return key in self._near[number]

    def named(self) -> Iterable[Key]:
        """The entities that are wanted by their names, and their neighbours."""
        return {key for near in self._near for key in near}

    def may_want(self, key: Key) -> bool:
        """Whether an entity may meet a want, whatever its type and where it was written."""
        return any(
            key[0] == want.tenant and (not want.entities or key in self._near[number])
            for number, want in enumerate(self.interest.wants)
        )

    def want_of(self, candidate: Candidate) -> int | None:
        """The first want that an entity meets, by its number."""
        return next((n for n, want in enumerate(self.interest.wants) if self._meets(n, want, candidate)), None)

    def _meets(self, number: int, want: Want, candidate: Candidate) -> bool:
        return (
            candidate.key[0] == want.tenant
            and (not want.types or candidate.type in want.types)
            and (not want.regions or not candidate.regions.isdisjoint(want.regions))
            and (not want.entities or candidate.key in self._near[number])
        )

    # ── what fits ───────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, key: Key, want: int, size: int) -> list[Key]:
        """Take an entity in, as the one of its want that changed last. Returns those that had to go, maybe itself."""
        if key in self:
            self.drop(key)
        self._want_of[key] = want
        self._members[want][key] = size
        self.bytes += size
        return self._evicted(key)

    def grow(self, key: Key, size: int) -> list[Key]:
        """Note that a member changed, by so many bytes. Returns those that had to go."""
        members = self._members[self._want_of[key]]
        members[key] += size
        members.move_to_end(key)
        self.bytes += size
        return self._evicted(key)

    def size_of(self, key: Key) -> int:
        return self._members[self._want_of[key]][key]

    def _evicted(self, changed: Key) -> list[Key]:
        gone = []
        while self.bytes > self.interest.most_bytes or len(self) > self.interest.most_entities:
            if changed in self and self.size_of(changed) > self.interest.most_bytes:
                key = changed
            else:
                key = next(iter(next(members for members in reversed(self._members) if members)))
            self.drop(key)
            self.left_out += 1
            gone.append(key)
        return gone

    def drop(self, key: Key) -> None:
        self.bytes -= self._members[self._want_of.pop(key)].pop(key)
