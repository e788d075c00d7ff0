"""The shard map: which shard serves which partitions, kept current from its KV bucket."""

from __future__ import annotations

import asyncio
import json
from typing import NamedTuple

from mnemesh import subjects
from mnemesh.connection import Link
from mnemesh.ids import PARTITIONS, partition_of
from mnemesh.inbox import Inbox
from mnemesh.kv import BucketView


class ShardEntry(NamedTuple):
    """One shard: the partitions it serves, and how many replicas are meant to run."""

    name: str
    partitions: frozenset[int]
    replicas: int = 1

    def encode(self) -> bytes:
        return json.dumps({"partitions": sorted(self.partitions), "replicas": self.replicas}).encode()


def decode_entry(name: str, value: bytes) -> ShardEntry:
    """The entry under a key of the bucket."""
    fields = json.loads(value)
    return ShardEntry(name, frozenset(fields["partitions"]), fields.get("replicas", 1))


class ShardMap:
    """All shards by name. `follow` keeps them current."""

    def __init__(self) -> None:
        self._view = BucketView(subjects.SHARDS.name)
        self._version = -1
        self._shards: dict[str, ShardEntry] = {}
        self._owner: dict[int, str] = {}

    @property
    def ready(self) -> asyncio.Event:
        return self._view.ready

    async def follow(self, link: Link, inbox: Inbox) -> None:
        await self._view.follow(link, inbox)

    @property
    def shards(self) -> dict[str, ShardEntry]:
        """Every shard by name, in the order of the names."""
        if self._view.version != self._version:
            self._version = self._view.version
            entries = sorted(self._view.entries.items())
            self._shards = {name: decode_entry(name, value) for name, value in entries}
            self._owner = {partition: name for name, shard in self._shards.items() for partition in shard.partitions}
        return self._shards

    @property
    def are_whole(self) -> bool:
        """Whether every partition has a shard."""
        _ = self.shards
        return len(self._owner) == PARTITIONS

    def owner_of(self, tenant: str, entity_id: str) -> str | None:
        """The shard that has an entity, or `None` where no shard serves its partition."""
        _ = self.shards
        return self._owner.get(partition_of(tenant, entity_id))
