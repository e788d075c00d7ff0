"""Connections to Redis, or to the Redis Cluster that a URL leads to; what is no good for a store is said at the start.

A URL is what redis-py takes: `redis://user:password@host:6379/0`, `rediss://` over TLS. Whether it is a cluster the
server says. Looks at `mnemesh` only.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import redis
import redis.asyncio
from redis.asyncio.cluster import RedisCluster as AsyncCluster
from redis.cluster import RedisCluster

from mnemesh.errors import BadRequest

AnyRedis: TypeAlias = Any
"""A client of a server or of a cluster: redis-py gives them the same methods and no type in common."""

OUTAGES: tuple[type[Exception], ...] = (redis.RedisError, OSError)
"""What redis-py raises where the server does not do what it is asked."""

OLDEST = (6, 2)
TIMEOUT_S = 5.0
MOST_CONNECTIONS = 2_048
"""More than a shard has requests under way: redis-py's own 100 are too few. A pool that waits costs 100 µs a read."""


def open_sync(url: str) -> tuple[AnyRedis, bool]:
    """A client for a thread, and whether it is one of a cluster.

    Raises `BadRequest` where what answers is no good, one of `OUTAGES` where nobody does.
    """
    timeouts = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
    try:
        client = redis.Redis.from_url(url, **timeouts)
        if not _is_cluster(client):
            return client, False
        client.close()
        return RedisCluster.from_url(url, **timeouts), True
    except BadRequest:  # which is a ValueError, and says it all
        raise
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError, ValueError) as error:
        raise BadRequest(f"Redis refuses: {str(error)[:200]}") from error


def open_async(url: str, *, is_cluster: bool) -> AnyRedis:
    """A client for the event loop. It connects when it is used."""
    timeouts: dict[str, Any] = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
    if is_cluster:
        return AsyncCluster.from_url(url, **timeouts)
    return redis.asyncio.Redis.from_url(url, max_connections=MOST_CONNECTIONS, **timeouts)


def _is_cluster(client: AnyRedis) -> bool:
    """Raises `BadRequest` if the server would lose what a store writes, or cannot do what it needs."""
    told: dict[str, Any] = client.info()
    version = str(told["redis_version"])
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise BadRequest(f"Redis {version} is too old: it must be {'.'.join(map(str, OLDEST))} or later")
    if (policy := told.get("maxmemory_policy", "noeviction")) != "noeviction" and told.get("maxmemory"):
        raise BadRequest(f"its maxmemory-policy is {policy}, which drops what is remembered: set it to noeviction")
    return bool(told.get("cluster_enabled"))
