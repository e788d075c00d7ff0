"""Digests: what a store holds of each partition, as a count and a hash, to compare stores with each other and the log.

The hash of a partition is the sum of its entities' hashes. So it does not matter in which order a store comes by them,
nor which kind of store it is: what is told of an entity is the same for all. Looks at `mnemesh` only.

    attributes   (alive, type, text, attributes, spaces), the keys of `merge.Ledger` that won, its events in order
    edges        of each edge, removed ones too: (relation, target, removed, its key, properties)
    text         the text that is searched
    vectors      (type, attributes), and of each vector its space, length and halves
    index        where vectors are searched by a server: each of its rows
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

from memory_shards.merge import Key, Ledger
from mnemesh import wire
from mnemesh.ids import partition_of
from mnemesh.messages import PartDigest

_BYTES = 16
_MODULUS = 1 << (8 * _BYTES)


class Digests:
    """Those of one part of what is remembered, by partition. `add` what there is, in any order.

    They are of what the store has after the log up to `at`; if not given, that of the counts that they are told with.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self._counts: Counter[int] = Counter()
        self._sums: Counter[int] = Counter()

    def add(self, tenant: str, entity_id: str, facts: object) -> None:
        """Take in what is held of an entity. Of one entity several things may be told."""
        partition = partition_of(tenant, entity_id)
        told = wire.encode([tenant, entity_id, ordered(facts)])
        self._counts[partition] += 1
        self._sums[partition] += int.from_bytes(blake2b(told, digest_size=_BYTES).digest())

    def by_partition(self) -> dict[str, PartDigest]:
        """Of those partitions of which there is something."""
        return {
            str(partition): PartDigest(count=count, hash=f"{self._sums[partition] % _MODULUS:0{2 * _BYTES}x}")
            for partition, count in sorted(self._counts.items())
        }

    def whole(self) -> str:
        """A hash over all of it."""
        return f"{sum(self._sums.values()) % _MODULUS:0{2 * _BYTES}x}"


def facts_of_document(
    alive: bool,
    type: str | None,
    text: str | None,
    attributes: Mapping[str, Any],
    spaces: Iterable[str],
    ledger: Ledger,
    events: Iterable[tuple[int, str, str]],
) -> object:
    """What is told of an entity's attributes; `events` as (stamp, site, id).

    Not the stamps of sites, the versions nor the types of the ledger: a log that was purged of what a forget erased no
    longer tells them. Nor from when on a state is exact: that depends on when a site heard of it.
    """
    return (
        (alive, type, text, attributes, list(spaces)),
        (ledger.tombstone, ledger.type, ledger.text, dict(ledger.attributes), dict(ledger.spaces)),
        [event_id for _, _, event_id in sorted(events)],
    )


def fact_of_edge(
    relation: str, target: str, removed: bool, key: Key, properties: Mapping[str, Any] | None
) -> tuple[object, ...]:
    """What is told of an edge."""
    return relation, target, removed, list(key), None if removed else (properties or None)


def ordered(value: object) -> object:
    """The value with the keys of its maps in order."""
    if isinstance(value, Mapping):
        return {key: ordered(value[key]) for key in sorted(value)}
    return [ordered(item) for item in value] if isinstance(value, list | tuple) else value
