"""Which stores a shard has: chosen by URL, opened together.

    attributes   sqlite: | redis://…
    edges        sqlite: | bolt://… | neo4j://…
    text         sqlite:
    vectors      faiss:cpu

What is kept in SQLite is kept in one file, in one transaction. Every other store is a projection of its own, which none
of the others waits for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from memory_shards.merger import Part
from memory_shards.projection import Projection
from memory_shards.stores import Documents, Edges, Facet, Texts, Vectors
from memory_shards.stores.embedded import EmbeddedMemory, EmbeddedVectors
from memory_shards.stores.faiss_cpu import FaissStore
from memory_shards.stores.sqlite import SqliteStore
from mnemesh.errors import BadRequest, MnemeshError

Opened = TypeVar("Opened")


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
    "attributes": ("sqlite:", "redis://", "rediss://"),
    "edges": ("sqlite:", "bolt://", "bolt+s://", "bolt+ssc://", "neo4j://", "neo4j+s://", "neo4j+ssc://"),
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


async def open_stores(urls: StoreUrls, origin: Origin, *, afresh: bool = False) -> Stores:
    """Open what the URLs name, each empty where it was built for another log, or where `afresh`.

    Raises `BadRequest` or `Unavailable` that names the setting where a server is no good or not there, `sqlite3.Error`
    where a file is not.
    """
    opened: list[Facet] = []
    try:
        memory = _memory(urls, origin)
        opened.append(memory)
        documents: Documents = memory
        if not urls.attributes.startswith("sqlite:"):
            documents = await _named("attributes", urls.attributes, _redis(urls.attributes, origin, afresh))
            opened.append(documents)
        edges: Edges = memory
        if not urls.edges.startswith("sqlite:"):
            edges = await _named("edges", urls.edges, _neo4j(urls.edges, origin, afresh))
            opened.append(edges)
        faiss = FaissStore(origin.folder, origin.partitions, site=origin.site, incarnation=origin.incarnation)
        return Stores(documents, edges, memory, EmbeddedVectors("vectors", faiss))
    except BaseException:
        for facet in opened:
            await facet.close()
        raise


def _memory(urls: StoreUrls, origin: Origin) -> EmbeddedMemory:
    """What is kept in SQLite: some text at least."""
    parts = _embedded(urls)
    store = SqliteStore(
        origin.folder, site=origin.site, partitions=origin.partitions, incarnation=origin.incarnation, parts=parts
    )
    name = "documents" if "attributes" in parts else "edges" if "edges" in parts else "texts"
    return EmbeddedMemory(name, store, origin.partitions)


def _embedded(urls: StoreUrls) -> frozenset[Part]:
    """What is kept in SQLite."""
    kept: Mapping[Part, str] = {"attributes": urls.attributes, "edges": urls.edges, "text": urls.text}
    return frozenset(part for part, url in kept.items() if url == "sqlite:")


async def _redis(url: str, origin: Origin, afresh: bool) -> Documents:
    from memory_shards.stores.redis_reader import RedisDocuments
    from memory_shards.stores.redis_store import RedisStore

    return RedisDocuments(url, await _opened(RedisStore, url, origin, afresh))


async def _neo4j(url: str, origin: Origin, afresh: bool) -> Edges:
    from memory_shards.stores.neo4j_reader import Neo4jEdges
    from memory_shards.stores.neo4j_store import Neo4jStore

    return Neo4jEdges(await _opened(Neo4jStore, url, origin, afresh))


async def _opened(store: Callable[..., Opened], url: str, origin: Origin, afresh: bool) -> Opened:
    """A store that is outside, opened beside the event loop."""
    return await asyncio.to_thread(
        store,
        url,
        site=origin.site,
        shard=origin.shard,
        partitions=origin.partitions,
        incarnation=origin.incarnation,
        afresh=afresh,
    )


async def _named(setting: str, url: str, opening: Awaitable[Opened]) -> Opened:
    """What is opened. Whatever keeps it from that names the setting, and never the password."""
    try:
        return await opening
    except MnemeshError as error:
        raise type(error)(f"{setting} {_without_password(url)}: {error.message}") from error
    except ImportError as error:
        raise BadRequest(f"{setting} {_without_password(url)} needs a package: {error}") from error


def _without_password(url: str) -> str:
    """A URL as it may be told."""
    parts = urlsplit(url)
    return url if parts.password is None else url.replace(f":{parts.password}@", ":…@")
