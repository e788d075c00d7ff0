"""The selection for a device: which entities of its hub it wants and may have, and how much of each event.

Asks the shards of the hub. Looks at `roster`, `sovereignty`, `router.inventory` and `mnemesh`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import NamedTuple, TypeAlias

from mnemesh.event import Event
from mnemesh.messages import Interest
from router.inventory import Inventory
from services.roster import Candidate, Key, Roster
from services.sovereignty import ALL, Leaves, derivation_of, reduced_event

LeavesOf: TypeAlias = Callable[[str, Collection[str], str], Leaves]
"""What may leave of (tenant, types, region where it was born)."""


class Wanted(NamedTuple):
    """An entity that a want asks for: where its last event is in the hub's log, and the bytes of its events."""

    want: int
    changed: int
    candidate: Candidate
    size: int


class Selection:
    """What of the memory of the hub `site` is for one `device`, by its interest and the policy."""

    def __init__(
        self,
        inventory: Inventory,
        interest: Interest,
        *,
        site: str,
        device: str,
        leaves: LeavesOf,
        region_of: Callable[[str], str],
    ) -> None:
        self.roster = Roster(interest)
        self.newcomers: set[Key] = set()
        """Entities that came into a neighbourhood. Whoever looks at them takes them out."""
        self._inventory = inventory
        self._site = site
        self._device = device
        self._leaves = leaves
        self._region_of = region_of

    async def fitting(self, held: Mapping[Key, int], upto: int, head: int) -> list[Wanted]:
        """What is wanted and likely fits, in the order in which it is to be admitted. `held` are bytes on the device.

        As of `upto` in the log, which ends at `head`, or later. By the bytes of events, vectors left out: what is too
        much after all is evicted when it comes.
        """
        interest = self.roster.interest
        entities, size = 0, 0
        fitting = []
        for wanted in sorted(
            await self._wanted(held.keys(), upto, head), key=lambda wanted: (wanted.want, -wanted.changed)
        ):
            its_size = max(wanted.size, held.get(wanted.candidate.key, 0))  # it has grown since it was noted
            if its_size > interest.most_bytes:
                continue
            entities, size = entities + 1, size + its_size
            if entities > interest.most_entities or size > interest.most_bytes:
                break
            fitting.append(wanted)
        return fitting[::-1]

    async def _wanted(self, held: Set[Key], upto: int, head: int) -> list[Wanted]:
        found: dict[Key, tuple[int, Candidate, int]] = {}
        for want in self.roster.interest.wants:
            if want.entities:
                continue
            listed = self._inventory.entities(want.tenant, upto=upto, types=want.types, with_sites=True)
            async for entity in listed:
                key = want.tenant, entity.entity_id
                regions, types = self._regions(entity.sites), frozenset(entity.types)
                candidate = Candidate(key, entity.type, regions, first=entity.first, types=types)
                found[candidate.key] = entity.version, candidate, entity.bytes
        await self.surround(upto)
        self.newcomers.clear()  # they are among the named
        for key, candidate in (await self.described(set(self.roster.named()) - found.keys(), upto)).items():
            found[key] = head, candidate, 0
        # What was forgotten is not listed, but stays held: a device knows by it that there is nothing.
        for key, candidate in (await self.described(held - found.keys(), upto)).items():
            if candidate.is_gone:
                found[key] = 0, candidate, 0
        return [
            Wanted(number, changed, candidate, size)
            for changed, candidate, size in found.values()
            if (number := self.wanted_by(candidate)) is not None
        ]

    def wanted_by(self, candidate: Candidate) -> int | None:
        """The first want, by its number, that an entity meets of which anything may go to the device."""
        tenant = candidate.key[0]
        regions = candidate.regions or {self._region_of(self._site)}
        if any(self._leaves(tenant, candidate.types, region).tells_fields for region in regions):
            return self.roster.want_of(candidate)
        return None

    async def surround(self, upto: int) -> None:
        """Bring the neighbourhoods up to date."""
        for number, want in self.roster.hoods():
            near = await self._inventory.neighbourhood(want.tenant, want.entities, want.hops, upto=upto)
            self.newcomers.update(self.roster.surround(number, near))

    def moves_a_hood(self, event: Event) -> bool:
        """Whether an event may bring somebody into a neighbourhood."""
        edges = event.body.get("edges")
        if not edges:
            return False
        ends = {event.entity_id, *(edge["target_id"] for edge in edges)}
        return any(
            want.tenant == event.tenant and any(self.roster.is_near(number, (event.tenant, end)) for end in ends)
            for number, want in self.roster.hoods()
        )

    async def described(self, keys: Set[Key], upto: int) -> dict[Key, Candidate]:
        """What the shards know of these, as of the log's sequence `upto` or later."""
        found = {}
        for tenant in sorted({tenant for tenant, _ in keys}):
            ids = sorted(entity_id for owner, entity_id in keys if owner == tenant)
            described = await self._inventory.describe(tenant, ids, upto=upto)
            for entity_id, told in described.items():
                key = tenant, entity_id
                regions, is_own, types = self._regions(told.sites), self._device in told.sites, frozenset(told.types)
                found[key] = Candidate(key, told.type, regions, told.is_gone, is_own, told.first, types)
        return found

    def _regions(self, sites: Sequence[str]) -> frozenset[str]:
        return frozenset(map(self._region_of, sites))

    def reduced(self, event: Event, origin: str, types: Collection[str]) -> Event | None:
        """What of an event of an entity of these types may go to the device; the same where all of it may.

        What a view made counts as born also where that was written which it is made of. A forget goes whatever the
        types: who is sent it has something of the entity, and is to erase that.
        """
        derived = derivation_of(event)
        told = event.body.get("type")
        leaves = ALL
        for region in self._regions([origin, *(derived.sites if derived is not None else ())]):
            leaves &= self._leaves(event.tenant, types, region)
            if isinstance(told, str):
                leaves &= self._leaves(event.tenant, {told}, region)
        if event.op == "forget" and not leaves.tells_fields:
            leaves = Leaves()
        return reduced_event(event, leaves)
