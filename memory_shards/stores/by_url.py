"""Which stores a shard has: chosen by URL, opened together.

    attributes   sqlite:      edges   sqlite:      text   sqlite:      vectors   faiss:cpu

What is kept in SQLite is kept in one file, in one transaction. Every other store is a projection of its own, which none
of the others waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

from memory_shards.merger import Part
from memory_shards.projection import Projection
from memory_shards.stores import Documents, Edges, Facet, Texts, Vectors
from memory_shards.stores.embedded import EmbeddedMemory, EmbeddedVectors
from memory_shards.stores.faiss_cpu import FaissStore
from memory_shards.stores.sqlite import SqliteStore
from mnemesh.errors import BadRequest


@dataclass(frozen=True)
class StoreUrls:
    """Where a shard keeps what: a URL each. Raises `BadRequest` on one that it does not know."""

    attributes: str = "sqlite:"
    edges: str = "sqlite:"
    text: str = "sqlite:"
    vectors: str = "faiss:cpu"

    def __post_init__(self) -> None:
        for field in fields(self):
            url, known = getattr(self, field.name), KNOWN[field.name]
            if not any(url == scheme or (scheme.endswith("://") and url.startswith(scheme)) for scheme in known):
                told = _without_password(url)
                raise BadRequest(f"{field.name}: {told!r} is no store of this kind; it may be {' or '.join(known)}")


KNOWN: Mapping[str, tuple[str, ...]] = {
    "attributes": ("sqlite:",),
    "edges": ("sqlite:",),
    "text": ("sqlite:",),
    "vectors": ("faiss:cpu",),
}

EMBEDDED = StoreUrls()


@dataclass(frozen=True)
class Origin:
    """Whose stores these are: of what site, which shard with what partitions, and which incarnation of its log."""

    site: str
    shard: str
    partitions: frozenset[int]
    incarnation: str
    folder: Path


@dataclass(frozen=True)
class Stores:
    """The stores of a shard, by what they are asked for; one may be there several times."""

    documents: Documents
    edges: Edges
    texts: Texts
    vectors: Vectors

    @property
    def facets(self) -> list[Facet]:
        """Each of them once."""
        return list(dict.fromkeys((self.documents, self.edges, self.texts, self.vectors)))

    @property
    def projections(self) -> list[Projection]:
        return [facet.projection for facet in self.facets]

    async def close(self) -> None:
        """Release all of them."""
        for facet in self.facets:
            await facet.close()


def open_stores(urls: StoreUrls, origin: Origin) -> Stores:
    """Open what the URLs name. Raises what a store raises that cannot be opened."""
    documents = _memory(urls, origin)
    store = FaissStore(origin.folder, origin.partitions, site=origin.site, incarnation=origin.incarnation)
    return Stores(documents, documents, documents, EmbeddedVectors("vectors", store))


def _memory(urls: StoreUrls, origin: Origin) -> EmbeddedMemory:
    parts: frozenset[Part] = frozenset(("attributes", "edges", "text"))
    store = SqliteStore(
        origin.folder, site=origin.site, partitions=origin.partitions, incarnation=origin.incarnation, parts=parts
    )
    return EmbeddedMemory("documents", store, origin.partitions)


def _without_password(url: str) -> str:
    """A URL as it may be told."""
    parts = urlsplit(url)
    return url if parts.password is None else url.replace(f":{parts.password}@", ":…@")
