"""The inventory of a site: which entities its shards have, asked shard by shard.

For what a site exchanges with others: a hub asks what a device may want, a device what it holds. Looks at `shard_map`
and `mnemesh`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence

from mnemesh import messages, subjects
from mnemesh.asker import Asker
from mnemesh.errors import Unavailable
from mnemesh.messages import Consistency, Description, ListedEntity
from router.portions import bytes_of, portions
from router.shard_map import ShardMap

MOST_DESCRIBED = 5_000
MOST_BYTES_DESCRIBED = 500_000
MOST_WALKED = 100_000


class Inventory:
    """Asks as `name`, a role of the site, which has a tenant's rights. `shards` is followed by whoever owns it."""

    def __init__(self, asker: Asker, shards: ShardMap, *, site: str, name: str) -> None:
        self._asker = asker
        self._shards = shards
        self._site = site
        self._name = name

    async def entities(
        self, tenant: str, *, upto: int, types: Sequence[str] = (), held: bool = False, with_sites: bool = False
    ) -> AsyncIterator[ListedEntity]:
        """Every entity of a tenant, as of the log's sequence `upto` or later. Raises what the shards raise."""
        self._require_shards()
        for shard in self._shards.shards:
            after, more = "", True
            while more:
                wanted = messages.ListEntities(
                    types=list(types), held=held, with_sites=with_sites, after=after, consistency=self._at(upto)
                )
                subject = subjects.shard_list(self._site, shard, tenant, self._name)
                page = await self._asker.ask(subjects.SHARD_LIST, subject, wanted)
                for entity in page.entities:
                    yield entity
                    after = entity.entity_id
                more = page.more

    async def describe(self, tenant: str, entity_ids: Sequence[str], *, upto: int) -> dict[str, Description]:
        """The types of entities and who wrote them, as of the log's sequence `upto` or later."""
        self._require_shards()
        parts: dict[str, list[str]] = defaultdict(list)
        for entity_id in entity_ids:
            parts[self._shards.owner_of(tenant, entity_id) or ""].append(entity_id)
        if "" in parts:
            raise Unavailable(f"no shard of {self._site} serves some of the entities", retry_after_ms=500)
        found: dict[str, Description] = {}
        for shard, ids in parts.items():
            subject = subjects.shard_describe(self._site, shard, tenant, self._name)
            for some in portions(ids, most=MOST_DESCRIBED, most_bytes=MOST_BYTES_DESCRIBED, size_of=bytes_of):
                wanted = messages.Describe(entity_ids=list(some), consistency=self._at(upto))
                told = await self._asker.ask(subjects.SHARD_DESCRIBE, subject, wanted)
                found |= zip(some, told.entities, strict=True)
        return found

    async def held(self) -> tuple[int, int]:
        """How many entities are held for this device, and the bytes that its hub sent of them."""
        self._require_shards()
        entities = size = 0
        for shard in self._shards.shards:
            subject = subjects.shard_held(self._site, shard)
            told = await self._asker.ask(subjects.SHARD_HELD, subject, messages.AskHeld())
            entities, size = entities + told.entities, size + told.bytes
        return entities, size

    async def erased(self, tenant: str, entity_id: str, sequences: Sequence[int]) -> messages.Erased:
        """What is left of an entity after these messages of the log, once a replica of its shard has applied them."""
        self._require_shards()
        shard = self._shards.owner_of(tenant, entity_id)
        if shard is None:
            raise Unavailable(f"no shard of {self._site} serves the entity", retry_after_ms=500)
        subject = subjects.shard_erased(self._site, shard, tenant, self._name)
        wanted = messages.AskErased(entity_id=entity_id, sequences=list(sequences))
        return await self._asker.ask(subjects.SHARD_ERASED, subject, wanted)

    async def forgotten(self, sequences: Sequence[int]) -> list[int]:
        """Those at which the log has a forget, or what came after the forget that wins over it. They must grow.

        As one replica of each shard has it, once that has applied them.
        """
        self._require_shards()
        wanted = messages.AskForgotten(sequences=list(sequences))
        told = await asyncio.gather(
            *(
                self._asker.ask(subjects.SHARD_FORGOTTEN, subjects.shard_forgotten(self._site, shard), wanted)
                for shard in self._shards.shards
            )
        )
        return sorted(sequence for each in told for sequence in each.sequences)

    async def neighbourhood(self, tenant: str, entity_ids: Sequence[str], hops: int, *, upto: int) -> list[str]:
        """The entities up to so many edges away, in whatever direction, these included, by what this site knows."""
        if not hops:
            return list(entity_ids)
        wanted = messages.Traverse(
            start=list(entity_ids),
            direction="both",
            depth=hops,
            limit=MOST_WALKED,
            scope="here",  # a device that is out of reach, or holds little, would leave every neighbourhood incomplete
            consistency=self._at(upto),
        )
        walked = await self._asker.ask(subjects.TRAVERSE, subjects.traverse(tenant, self._name), wanted)
        if not walked.coverage.complete:
            raise Unavailable("some shards did not answer", retry_after_ms=500)
        return [node.entity_id for node in walked.nodes]

    def _at(self, sequence: int) -> Consistency:
        return Consistency(level="session", token={self._site: sequence})

    def _require_shards(self) -> None:
        if not self._shards.are_whole:
            raise Unavailable(f"some partitions of {self._site} have no shard that is known", retry_after_ms=500)
