"""Stores: one file a backend, each kept up to date from the log by a projection.

A store is opened on a folder or URL and then lives on two sides:

* `apply` runs on the store's own worker thread, never two at a time. It takes records in log order and commits
  their effects and the new watermark in one transaction. A record at or below the watermark has no effect.
  `settle` runs there too, while no records wait: it finishes what they left undone. That side is `Store`.
* reads run on the event loop, while `apply` goes on, and say what they saw. A shard asks `Documents`, `Edges`, `Texts`
  and `Vectors`; one store may be several of them.

What a store keeps is derived: deleting it loses nothing, the log rebuilds it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import msgspec

from mnemesh.event import Record
from mnemesh.messages import Description, Direction, Hit, Left, ListedEntity, Suspect, TimelineEvent
from mnemesh.wire import Vector

if TYPE_CHECKING:
    from memory_shards.digests import Digests
    from memory_shards.merge import Document
    from memory_shards.outside import OutsideProjection
    from memory_shards.projection import Projection

AnyProjection: TypeAlias = "Projection | OutsideProjection"

Edge: TypeAlias = dict[str, Any]
"""An edge as readers see it: `{relation, target_id, properties?}`."""


def namespace(site: str, generation: int) -> str:
    """What stands for a site in a server's names. A store that is built anew lies beside the one that is read, as the
    next generation."""
    return f"{site}~{generation}" if generation else site


class WentBack(Exception):
    """A server has less of the log than it had: it was restored, or another took over that had not heard of all."""


class Walk(NamedTuple):
    """Edges (from, relation, to) in the direction walked, sorted where no hop was walked ahead.

    `ahead` are the entities beyond those asked about whose edges are here too. Nothing in it is from after `latest`.
    """

    edges: list[tuple[str, str, str]]
    truncated: bool
    ahead: list[str]
    latest: int


class Searched(NamedTuple):
    """The nearest, best first: all that the log says up to `at`, and nothing from after `latest`."""

    hits: list[Hit]
    at: int
    latest: int


class Counted(NamedTuple):
    """How much there is, of one moment where a digest was asked for; else at least as new as `at` says.

    `things` are entities of documents and vectors of vectors. Where only edges are kept there are no things. `digests`
    are those of each part that is kept.
    """

    things: int
    edges: int
    at: int
    digests: Mapping[str, Digests] = {}

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        return "-".join(digests.whole() for digests in self.digests.values())


class VectorQuery(msgspec.Struct, frozen=True, kw_only=True):
    """One search: the `k` nearest to a float32 vector (d,) in a tenant's space that pass the filter."""

    tenant: str
    vector: Vector
    space: str = "default"
    k: int = 10
    type: str | None = None
    filter: dict[str, Any] = {}
    output_fields: list[str] = []
    include_vectors: bool = False


class Store(Protocol):
    """What a projection needs of any store, and snapshots of its file."""

    @property
    def file(self) -> Path:
        """The SQLite file that holds all of it."""

    @staticmethod
    def stands_in(connection: sqlite3.Connection) -> int:
        """Up to where a file like its own has the log."""

    @property
    def watermark(self) -> int:
        """The last log sequence applied and committed."""

    def shows(self, record: Record) -> bool:
        """Whether a read can tell that this record, the next one, was applied. Called between two applies."""

    def apply(self, records: Sequence[Record], watermark: int) -> None:
        """Commit the effects of `records` and then stand at `watermark` (≥ the last record's sequence).

        `watermark` may be past the last record: the log's events in between belong to other shards.
        """

    @property
    def is_settled(self) -> bool:
        """Whether all that the records ask for is done. May be asked on any thread."""

    def settle(self) -> None:
        """Commit a small step of what is left, such as to erase from the file what was forgotten."""

    def digest(self) -> str:
        """A hash over all that it holds: the same on replicas that have applied the same log."""

    def close(self) -> None:
        """Release files and threads. The store is not used after."""


class Facet(Protocol):
    """What a shard needs of each of its stores, whatever it keeps."""

    @property
    def projection(self) -> AnyProjection:
        """What keeps it up to date."""

    async def counted(self, *, digest: bool) -> Counted:
        """How much it holds, and with `digest` a hash of all of it."""

    async def close(self) -> None:
        """Release what it reads with, and its projection."""


class Documents(Facet, Protocol):
    """What is remembered of each entity, and the history of that. Times are milliseconds since 1970."""

    @property
    def quarantined(self) -> Mapping[str, int]:
        """How many events of each site were put aside."""

    @property
    def rejected(self) -> int:
        """How many events broke a rule and were skipped."""

    async def held(self) -> tuple[int, int]:
        """How many entities are held for this device, and the bytes that its hub sent of them."""

    async def get(
        self, tenant: str, entity_id: str, as_of_ms: int | None = None, valid_at_ms: int | None = None
    ) -> Document | None:
        """What is remembered of an entity; `None` if nothing is. `edges` is `None` where they are in another store.

        `as_of_ms`: what was recorded by then; `valid_at_ms`: what held then (now, if not given).
        """

    async def suspects(self, tenant: str, entity_id: str) -> list[Suspect]:
        """What lost to a write that did not know of it."""

    async def timeline(self, tenant: str, entity_id: str, after: int, limit: int) -> list[TimelineEvent]:
        """The entity's events after sequence `after`, in log order."""

    async def timeline_range(
        self, tenant: str, start_ms: int | None, end_ms: int | None, type: str | None, after: int, limit: int
    ) -> list[TimelineEvent]:
        """All entities' events whose valid time starts in [`start_ms`, `end_ms`), after `after`, in log order."""

    async def list_entities(
        self, tenant: str, after: str, limit: int, *, types: Sequence[str] = (), held: bool, with_sites: bool
    ) -> list[ListedEntity]:
        """Entities in the order of their ids: those remembered (of `types`, if any), or those noted as `held`."""

    async def describe(self, tenant: str, entity_ids: Sequence[str]) -> list[Description]:
        """The types of these entities and who wrote them, in their order."""

    async def erased(
        self, tenant: str, entity_id: str, sequences: Sequence[int]
    ) -> tuple[list[int], list[int], list[Left]]:
        """How many events the forgets at these sequences erased, which of these are left, and what is left."""

    async def forgotten(self, sequences: Sequence[int]) -> list[int]:
        """Those of the log's sequences that are of forgets, or of what came after the forget that wins over it."""


class Edges(Facet, Protocol):
    """The graph. An edge belongs to the entity that it starts from."""

    async def edges_of(self, tenant: str, entity_id: str) -> tuple[list[Edge], int]:
        """The edges from an entity that hold now, by relation and target, and the place that none is after."""

    async def expand(
        self,
        tenant: str,
        entity_ids: Sequence[str],
        relations: Sequence[str],
        direction: Direction,
        limit: int,
        ahead: int = 0,
    ) -> Walk:
        """The edges one hop from `entity_ids` along `relations` (all if empty), at most `limit`.

        Outward also those up to `ahead` hops on, as far as that is at hand.
        """


class Texts(Facet, Protocol):
    """The full-text index."""

    async def search_text(self, tenant: str, query: str, k: int, type: str | None) -> tuple[list[Hit], int]:
        """The `k` entities whose text answers best to any word of `query`, and the place that no hit is after."""


class Vectors(Facet, Protocol):
    """The vector spaces. `run` works for searches, for ever."""

    async def run(self) -> None: ...

    async def search(self, query: VectorQuery) -> Searched:
        """The nearest. Raises `NotFound`, `BadRequest`."""

    async def vectors_of(self, tenant: str, entity_id: str) -> tuple[dict[str, Vector], int]:
        """An entity's vectors by space, and the place that none is after."""
