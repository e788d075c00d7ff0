"""Connections to Milvus, and how vectors lie there; what is no good for a store is said at the start.

    mnemesh_<shard>_<name>_<space>    a collection a space: rows {id, vector, type, attributes, complete}
    mnemesh_places                    a row a shard: up to where it was written, and up to where that was flushed

`<shard>` and `<space>` are hashes of what they stand for (a site and shard; a tenant and space), `<name>` is for
people. `id` is the entity's. The vector is float32: Milvus Lite has no other. `attributes` are those to filter by
(`milvus_rows`).

A URL is `milvus:` for a file of this replica's own (Milvus Lite), or `milvus://user:password@host:19530/database`, with
`milvus+s://` over TLS. Looks at `vector_reader` and `mnemesh`.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import grpc
from pymilvus import CollectionSchema, DataType, MilvusClient, MilvusException
from pymilvus.client.cache import GlobalCache

from memory_shards.stores.vector_reader import VectorSpace
from mnemesh.errors import BadRequest
from mnemesh.messages import IndexKind

LAYOUT = 1
"""Goes up with every change of the above; what was written by another is rebuilt."""

OUTAGES: tuple[type[Exception], ...] = (MilvusException, grpc.RpcError, grpc.FutureTimeoutError, OSError)
"""What the driver raises where the server does not do what it is asked."""

OLDEST = (2, 3)
CALL_S = 10.0
"""How long a call may take that writes, tries included."""

PLACES = "mnemesh_places"
LONGEST_TEXT = 65_535
"""Bytes: what a VARCHAR may have. An entity's id has 16 KiB at most."""

_clients: Counter[str] = Counter()
"""How many there are of each server or file in this process, on several threads."""
_counting = threading.Lock()

_REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_NO_DATABASE = re.compile(r"database.* not found")
_METRICS = {"cosine": "COSINE", "ip": "IP", "l2": "L2"}
_INDEXES: dict[IndexKind, tuple[str, dict[str, int]]] = {
    "auto": ("AUTOINDEX", {}),
    "flat": ("FLAT", {}),
    "hnsw": ("HNSW", {"M": 32, "efConstruction": 80}),
}


class Target(NamedTuple):
    """Where a URL leads: a server, or a file of Milvus Lite."""

    uri: str
    token: str
    database: str
    is_file: bool

    @classmethod
    def of(cls, url: str, folder: Path) -> Target:
        if url == "milvus:":
            return cls(str(folder / "milvus.db"), "", "", True)
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        token = "" if parts.username is None else f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        scheme = "https" if parts.scheme == "milvus+s" else "http"
        return cls(f"{scheme}://{host}", token, parts.path.strip("/"), False)


def connect(target: Target) -> MilvusClient:
    """A client. Raises `BadRequest` where the server is no good, one of `OUTAGES` where it is not there."""
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs what it raises, with a traceback
    with _counting:
        _clients[target.uri] += 1
    try:
        client = _connect(target)
    except BaseException:
        _let_go(target)
        raise
    return client


def _connect(target: Target) -> MilvusClient:
    try:
        client = MilvusClient(target.uri, token=target.token, db_name=target.database, timeout=CALL_S)
        version = str(client.get_server_version(timeout=CALL_S))
        client.list_collections(timeout=CALL_S)
    except ImportError as error:
        raise BadRequest(f"Milvus Lite is not installed: {error}") from error
    except MilvusException as error:
        refusal = _refusal_in(error)
        if refusal is None:
            raise
        raise BadRequest(f"Milvus refuses: {refusal[:200]}") from error
    numbers = re.search(r"(\d+)\.(\d+)", version)
    if numbers is not None and tuple(map(int, numbers.groups())) < OLDEST:
        client.close()
        raise BadRequest(f"Milvus {version} is too old: it must be {'.'.join(map(str, OLDEST))} or later")
    return client


def _refusal_in(error: MilvusException) -> str | None:
    """What a server that is there says against us; `None` where it may just be away. pymilvus tells both alike."""
    cause = error.__cause__
    if isinstance(cause, grpc.RpcError) and isinstance(cause, grpc.Call) and cause.code() in _REFUSALS:
        return str(cause.details())
    return str(error.message) if _NO_DATABASE.match(str(error.message)) else None


@contextmanager
def connected(target: Target) -> Iterator[MilvusClient]:
    """A client while the block runs."""
    client = connect(target)
    try:
        yield client
    finally:
        close(client, target)


def close(client: MilvusClient, target: Target) -> None:
    """Let go of the server, and of the file if it is one."""
    client.close()
    _let_go(target)


def is_gone(error: MilvusException) -> bool:
    """Whether it says that there is no such collection."""
    return re.search("collection.*not (found|exist)|can't find collection", str(error.message), re.I) is not None


def _let_go(target: Target) -> None:
    """Close the file once no client of this process has it any more."""
    with _counting:
        _clients[target.uri] -= 1
        if target.is_file and not _clients[target.uri]:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(target.uri)


def prefix_of(shard: str) -> str:
    """What the names of a shard's collections begin with. `shard` is `<site>.<shard>`."""
    return f"mnemesh_{_hash(shard)}_"


def collection_of(shard: str, tenant: str, space: str) -> str:
    """The name of a space's collection."""
    shown = re.sub(r"[^A-Za-z0-9]+", "_", f"{tenant}_{space}")[:60]
    return f"{prefix_of(shard)}{shown}_{_hash(tenant, space)}"


def make_collection(client: MilvusClient, shard: str, space: VectorSpace, *, in_file: bool) -> str:
    """Make a space's collection where there is none. Returns its name.

    Where the choice of an index is left to us, a file has none: Milvus Lite would take a graph, however small it is,
    and miss some of what is alike.
    """
    name = collection_of(shard, space.tenant, space.name)
    if is_loaded(client, name):
        return name
    schema = _schema(f"{shard}: vectors of {space.tenant} in {space.name}"[:200])
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=padded(space.dimension))
    schema.add_field("type", DataType.VARCHAR, max_length=LONGEST_TEXT)
    schema.add_field("attributes", DataType.JSON)
    schema.add_field("complete", DataType.BOOL)
    index = "flat" if in_file and space.index == "auto" else space.index
    _create(client, name, schema, _METRICS[space.metric], index)
    return name


def is_loaded(client: MilvusClient, collection: str) -> bool:
    """Whether there is such a collection, which is in memory then."""
    if not client.has_collection(collection, timeout=CALL_S):
        return False
    client.load_collection(collection, timeout=CALL_S)
    return True


def make_places(client: MilvusClient) -> None:
    """Make the collection of places where there is none."""
    if is_loaded(client, PLACES):
        return
    schema = _schema("up to where each shard of Mnemesh has written its vectors")
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)  # no collection goes without
    schema.add_field("counts", DataType.VARCHAR, max_length=LONGEST_TEXT)
    for name in ("written", "visible_from", "flushed"):
        schema.add_field(name, DataType.INT64)
    _create(client, PLACES, schema, "L2", "flat")


def padded(dimension: int) -> int:
    """How many numbers a vector has there: two at least, which a zero more makes no difference to."""
    return max(2, dimension)


def last_written(client: MilvusClient, collection: str, database: str) -> int:
    """When this process last wrote to a collection, as Milvus counts time; 0 if that is not known.

    pymilvus keeps it for reads at the level "Session", which other processes cannot have.
    """
    written: int | None = GlobalCache.collection_ts.get(_address(client), database, collection)
    return written or 0


def _address(client: MilvusClient) -> str:
    return str(client._get_connection().server_address)


def _schema(description: str) -> CollectionSchema:
    schema = CollectionSchema([], description=description, check_fields=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=LONGEST_TEXT)
    return schema


def _create(client: MilvusClient, name: str, schema: CollectionSchema, metric: str, index: IndexKind) -> None:
    """With its index, loaded."""
    kind, params = _INDEXES[index]
    indexes = MilvusClient.prepare_index_params()
    indexes.add_index("vector", index_type=kind, metric_type=metric, params=params)
    client.create_collection(name, schema=schema, index_params=indexes, timeout=CALL_S)


def _hash(*what: str) -> str:
    return blake2b("\0".join(what).encode(), digest_size=8).hexdigest()
