"""Connections to Neo4j, and how the graph lies there; what is no good for a store is said at the start.

    (:Entity {key, site, tenant, id, partition, type, ledger, exact_from})
            what is only ever a target has no `ledger`; what is forgotten has one, and the label `Forgotten`
    (:Entity)-[:EDGE {relation, _valid_from, _stamp, _site, _properties}]->(:Entity)
            an edge that was put last; its properties as JSON, and simple ones also by their names
    (:Entity)-[:GONE {relation, _valid_from, _stamp, _site}]->(:Entity)
            one that was removed last, whose key may win over what comes late
    (:Entity)-[:SAID]->(:Event {sequence, stamp, site, kept})
            what its events said of edges (`merger.Kept`)
    (:Shard {key, counts, watermark, edges})
            up to where a shard has applied its log, and how many edges it has
    (:Commit {key, begun, ended})
            the same of a shard while none of its transactions commits, for Neo4j shows what commits piece by piece

`key` is `<site>.<tenant>.<token of the id>`, for an index takes no more than 8 KB. A relation is a property and no
type: there can be 65,535 types, and they are never given back.

A URL is `bolt://user:password@host:7687/database`, or `neo4j://` for a cluster, with `+s` over TLS. Looks at `mnemesh`.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import neo4j
from neo4j.exceptions import AuthError, ClientError, ConfigurationError, DriverError, Neo4jError

from mnemesh.errors import BadRequest
from mnemesh.ids import to_token

LAYOUT = 1
"""Goes up with every change of the above; what was written by another is rebuilt."""

OUTAGES: tuple[type[Exception], ...] = (Neo4jError, DriverError, OSError)
"""What the driver raises where the server does not do what it is asked."""

OLDEST = (5, 23)
CONNECT_S = 5.0
RETRY_S = 2.0
"""How long a transaction is tried again that met another; where the server is away, the projection tries again."""
_INTEGERS = range(-(1 << 63), 1 << 63)

SCHEMA = (
    "CREATE CONSTRAINT mnemesh_entity IF NOT EXISTS FOR (e:Entity) REQUIRE e.key IS UNIQUE",
    "CREATE CONSTRAINT mnemesh_shard IF NOT EXISTS FOR (s:Shard) REQUIRE s.key IS UNIQUE",
    "CREATE CONSTRAINT mnemesh_commit IF NOT EXISTS FOR (c:Commit) REQUIRE c.key IS UNIQUE",
    "CREATE INDEX mnemesh_place IF NOT EXISTS FOR (e:Entity) ON (e.site, e.partition)",
)


class Target(NamedTuple):
    """Where a URL leads."""

    uri: str
    auth: tuple[str, str] | None
    database: str

    @classmethod
    def of(cls, url: str) -> Target:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        auth = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
        return cls(f"{parts.scheme}://{host}", auth, parts.path.strip("/") or "neo4j")

    @property
    def options(self) -> dict[str, Any]:
        """What a driver of either kind takes."""
        return {
            "auth": self.auth,
            "connection_timeout": CONNECT_S,
            "connection_acquisition_timeout": CONNECT_S,
            "max_transaction_retry_time": RETRY_S,
            "notifications_min_severity": "OFF",
        }


def open_sync(target: Target) -> neo4j.Driver:
    """A driver for a thread, once the server is there and its schema is.

    Raises `BadRequest` where the server is no good, one of `OUTAGES` where it is not there.
    """
    driver = None
    try:
        driver = neo4j.GraphDatabase.driver(target.uri, **target.options)
        version = driver.get_server_info().agent.partition("/")[2]
        if tuple(map(int, version.split(".")[:2])) < OLDEST:
            raise BadRequest(f"Neo4j {version} is too old: it must be {'.'.join(map(str, OLDEST))} or later")
        with driver.session(database=target.database) as session:
            for statement in SCHEMA:
                session.run(statement).consume()
    except BaseException as error:
        if driver is not None:
            driver.close()
        is_refusal = isinstance(error, AuthError | ClientError | ConfigurationError | ValueError)
        if is_refusal and not isinstance(error, BadRequest):  # which is a ValueError, and says it all
            raise BadRequest(f"Neo4j refuses: {str(error)[:200]}") from error
        raise
    return driver


def key_of(site: str, tenant: str, entity_id: str) -> str:
    """The `key` of an entity."""
    return f"{site}.{tenant}.{to_token(entity_id)}"


def simple(properties: dict[str, Any]) -> dict[str, Any]:
    """Those of an edge's properties that Neo4j can hold as they are, under names that are none of ours."""
    return {
        name: value
        for name, value in properties.items()
        if name != "relation"
        and name
        and not name.startswith("_")
        and "\0" not in name
        and (isinstance(value, str | float | bool) or (isinstance(value, int) and value in _INTEGERS))
    }
