"""The stores of a shard, as its URLs choose them (`urls`), opened together.

What is kept in SQLite is kept in one file, in one transaction. Every other store is a projection of its own, which none
of the others waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from memory_shards.merger import Part
from memory_shards.outside import OutsideProjection
from memory_shards.projection import Projection
from memory_shards.stores import AnyProjection, Documents, Edges, Facet, Store, Texts, Vectors, gpu_flat
from memory_shards.stores.accelerator import Accelerator
from memory_shards.stores.array_space import ArraySpace
from memory_shards.stores.embedded import MOST_VECTORS_APPLIED, EmbeddedMemory, EmbeddedVectors
from memory_shards.stores.gpu_flat import GpuFlat
from memory_shards.stores.memory_vectors import AnySpace, MemoryVectors
from memory_shards.stores.space import Space
from memory_shards.stores.sqlite import SqliteStore
from memory_shards.stores.urls import StoreUrls, without_password
from memory_shards.stores.vector_file import VectorFile
from mnemesh.errors import BadRequest

if TYPE_CHECKING:
    from memory_shards.stores.milvus_reader import MilvusVectors


@dataclass(frozen=True)
class Origin:
    """Whose stores these are: of what site, which shard with what partitions, and which incarnation of its log."""

    site: str
    shard: str
    partitions: frozenset[int]
    incarnation: str
    folder: Path
    generations: Mapping[str, int] = field(default_factory=dict)
    """Of the stores that are servers, by their names: how often each was built anew."""

    def outside(self, name: str) -> dict[str, Any]:
        """What the store of this name takes that is a server."""
        return {
            "site": self.site,
            "shard": self.shard,
            "partitions": self.partitions,
            "incarnation": self.incarnation,
            "generation": self.generations.get(name, 0),
        }


@dataclass(frozen=True)
class Stores:
    """The stores of a shard, by what they are asked for; one may be there several times."""

    documents: Documents
    edges: Edges
    texts: Texts
    vectors: Vectors
    beside: tuple[Projection, ...] = ()
    """Of files that another of these is written from."""

    @property
    def facets(self) -> list[Facet]:
        """Each of them once."""
        return list(dict.fromkeys((self.documents, self.edges, self.texts, self.vectors)))

    def keeping(self, part: Literal["attributes", "edges", "text", "vectors"]) -> Facet:
        """The one that keeps this: a file may keep several."""
        return {"attributes": self.documents, "edges": self.edges, "text": self.texts, "vectors": self.vectors}[part]

    @property
    def projections(self) -> list[AnyProjection]:
        return [*self.beside, *(facet.projection for facet in self.facets)]

    @property
    def embedded(self) -> list[Projection]:
        """Those of stores that are files of this process, which follow the log together."""
        return [projection for projection in self.projections if isinstance(projection, Projection)]

    @property
    def outside(self) -> list[OutsideProjection]:
        """Those of stores that are servers."""
        return [projection for projection in self.projections if isinstance(projection, OutsideProjection)]

    def with_(self, new: Facet, *, instead_of: Facet) -> Stores:
        """These, but for one."""
        replaced = {each.name: new for each in fields(self) if getattr(self, each.name) is instead_of}
        return replace(self, **replaced)  # type: ignore[arg-type]  # it is of the same kind

    async def close(self) -> None:
        """Release all of them."""
        for facet in self.facets:
            await facet.close()
        for projection in self.beside:
            await projection.close()


async def open_stores(urls: StoreUrls, origin: Origin) -> Stores:
    """Open what the URLs name. A file that was built for another log is emptied.

    A server that is not there is opened later. Raises `BadRequest` that names the setting where one is no good,
    `sqlite3.Error` where a file is.
    """
    opened: list[Facet | Projection] = []
    settings: list[tuple[str, Facet]] = []
    try:
        memory = _memory(urls, origin)
        opened.append(memory)
        documents: Documents = memory
        if not urls.attributes.startswith("sqlite:"):
            documents = _redis(urls.attributes, origin)
            settings.append(("attributes", documents))
        edges: Edges = memory
        if not urls.edges.startswith("sqlite:"):
            edges = _neo4j(urls.edges, origin)
            settings.append(("edges", edges))
        vectors: Vectors
        beside: tuple[Projection, ...] = ()
        if urls.vectors.startswith("milvus"):
            stored = VectorFile(origin.folder, origin.partitions, site=origin.site, incarnation=origin.incarnation)
            file = Projection("vectors_file", stored, most=MOST_VECTORS_APPLIED)
            opened.append(file)
            beside = (file,)
            vectors = _milvus(urls.vectors, origin, file, stored)
            settings.append(("vectors", vectors))
        else:
            vectors = _vectors(urls.vectors, origin)
        opened.append(vectors)
        stores = Stores(documents, edges, memory, vectors, beside)
        opened = [*stores.facets, *beside]
        for setting, outside in settings:
            assert isinstance(outside.projection, OutsideProjection), "it is a server"
            await _open(setting, getattr(urls, setting), outside.projection)
        return stores
    except BaseException:
        for each in opened:
            await each.close()
        raise


def files_of(stores: Stores) -> list[Store]:
    """The stores that are files of this process, which is what a snapshot has."""
    return [projection.store for projection in stores.embedded]


async def open_beside(urls: StoreUrls, origin: Origin, current: Facet, where: Path | int) -> Facet:
    """Another store like one that is open: a file in another folder, or another generation of a server's.

    Raises as `open_stores` does.
    """
    if isinstance(where, Path):
        origin = replace(origin, folder=where)
    else:
        origin = replace(origin, generations={current.projection.name: where})
    if isinstance(current, EmbeddedMemory):
        return _memory(urls, origin)
    if isinstance(current, EmbeddedVectors):
        return _vectors(urls.vectors, origin)
    new: Facet
    setting = {"documents": "attributes", "edges": "edges", "vectors": "vectors"}[current.projection.name]
    if setting == "vectors":
        milvus = cast("MilvusVectors", current)
        new = _milvus(urls.vectors, origin, milvus.file, milvus.stored)
    else:
        new = _redis(urls.attributes, origin) if setting == "attributes" else _neo4j(urls.edges, origin)
    try:
        assert isinstance(new.projection, OutsideProjection), "it is a server"
        await _open(setting, getattr(urls, setting), new.projection)
    except BaseException:
        await new.close()
        raise
    return new


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


def _vectors(url: str, origin: Origin) -> EmbeddedVectors:
    """A file of vectors, and where they are searched."""
    store = MemoryVectors(
        origin.folder,
        origin.partitions,
        site=origin.site,
        incarnation=origin.incarnation,
        make_space=space_maker(url),
    )
    return EmbeddedVectors("vectors", store)


def space_maker(url: str) -> Callable[..., AnySpace]:
    """What makes a space that is searched there. Raises `BadRequest` that names the setting where it cannot be."""
    make_space: Callable[..., AnySpace] = Space
    kind, _, where = url.partition(":")
    try:
        if kind == "cuda":
            make_space = partial(ArraySpace, Accelerator(where))
        elif where == "gpu":
            gpu_flat.check()
            make_space = partial(Space, head=GpuFlat)
    except BadRequest as error:
        raise BadRequest(f"vectors {error.message}") from error
    return make_space


def _redis(url: str, origin: Origin) -> Documents:
    from memory_shards.stores.redis_reader import RedisDocuments
    from memory_shards.stores.redis_store import RedisStore

    return RedisDocuments(RedisStore(url, **origin.outside("documents")))


def _neo4j(url: str, origin: Origin) -> Edges:
    from memory_shards.stores.neo4j_reader import Neo4jEdges
    from memory_shards.stores.neo4j_store import Neo4jStore

    return Neo4jEdges(Neo4jStore(url, **origin.outside("edges")))


def _milvus(url: str, origin: Origin, file: Projection, stored: VectorFile) -> MilvusVectors:
    from memory_shards.stores.milvus_client import Target
    from memory_shards.stores.milvus_reader import MilvusVectors
    from memory_shards.stores.milvus_store import MilvusStore

    store = MilvusStore(Target.of(url, origin.folder), stored, lambda: file.stands_at, **origin.outside("vectors"))
    return MilvusVectors(store, file, stored)


async def _open(setting: str, url: str, projection: OutsideProjection) -> None:
    """What is no good names the setting, and never the password."""
    try:
        await projection.open()
    except BadRequest as error:
        raise BadRequest(f"{setting} {without_password(url)}: {error.message}") from error
