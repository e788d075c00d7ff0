"""Making a site ready for its services, as the operator: the log, the KV buckets, the tenants, the shard map."""

from __future__ import annotations

from collections.abc import Sequence

from mnemesh import kv, subjects
from mnemesh.connection import Link, LinkOptions
from mnemesh.ids import PARTITIONS, check_name
from mnemesh.inbox import Inbox
from mnemesh.jetstream import SiteKind, ensure_bucket, ensure_log
from router.shard_map import ShardEntry


def even_shards(count: int, replicas: int = 1) -> list[ShardEntry]:
    """`count` shards named s0, s1, … with equal runs of the partitions."""
    return [
        ShardEntry(
            f"s{index}",
            frozenset(range(index * PARTITIONS // count, (index + 1) * PARTITIONS // count)),
            replicas,
        )
        for index in range(count)
    ]


async def ensure_tenants(options: LinkOptions, tenants: Sequence[str]) -> None:
    """Make tenants that do not exist yet, as the operator."""
    link = await Link.open(options)
    try:
        inbox = Inbox(link)
        await inbox.open()
        await _put_tenants(inbox, tenants)
    finally:
        await link.close()


async def _put_tenants(inbox: Inbox, tenants: Sequence[str]) -> None:
    for tenant in tenants:
        await kv.put(inbox, subjects.TENANTS.name, check_name("tenant", tenant), b"{}")


async def provision(
    options: LinkOptions,
    *,
    site: str,
    tenants: Sequence[str],
    shards: Sequence[ShardEntry],
    kind: SiteKind = "hub",
    log_replicas: int = 1,
) -> None:
    """Bring a site to this state. Safe to repeat; the shard map becomes exactly `shards`, tenants are only added."""
    link = await Link.open(options)
    try:
        inbox = Inbox(link)
        await inbox.open()
        await ensure_log(inbox, site, kind=kind, replicas=log_replicas)
        for bucket in subjects.BUCKETS:
            await ensure_bucket(inbox, bucket.name, replicas=log_replicas)
        await _put_tenants(inbox, tenants)
        for shard in shards:
            await kv.put(inbox, subjects.SHARDS.name, shard.name, shard.encode())
        for name in set(await kv.keys(inbox, subjects.SHARDS.name)) - {shard.name for shard in shards}:
            await kv.delete(inbox, subjects.SHARDS.name, name)
    finally:
        await link.close()
