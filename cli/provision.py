"""Making a site ready for its services, as the operator: the log, the KV buckets, the tenants, the shard map."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from cli.devices import Devices
from cli.server_config import ServerOptions
from mnemesh import kv, subjects
from mnemesh.connection import Link, LinkOptions
from mnemesh.ids import PARTITIONS, check_name
from mnemesh.inbox import Inbox
from mnemesh.jetstream import SiteKind, ensure_bucket, ensure_log, ensure_objects
from router.shard_map import ShardEntry
from services.site_policy import SiteEntry


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


@contextlib.asynccontextmanager
async def _as_operator(options: LinkOptions) -> AsyncIterator[Inbox]:
    link = await Link.open(options)
    try:
        inbox = Inbox(link)
        await inbox.open()
        yield inbox
    finally:
        await link.close()


async def ensure_tenants(options: LinkOptions, tenants: Sequence[str]) -> None:
    """Make tenants that do not exist yet, as the operator."""
    async with _as_operator(options) as inbox:
        await _put_tenants(inbox, tenants)


async def _put_tenants(inbox: Inbox, tenants: Sequence[str]) -> None:
    for tenant in tenants:
        await kv.put(inbox, subjects.TENANTS.name, check_name("tenant", tenant), b"{}")


def sites_of(options: ServerOptions) -> dict[str, SiteEntry]:
    """What is said of a site itself, and of the devices that it lets connect."""
    devices = {device.name: SiteEntry(device.region, list(device.tenants)) for device in Devices(options.data).list()}
    return {options.site: SiteEntry(options.region)} | devices


async def put_sites(options: LinkOptions, sites: Mapping[str, SiteEntry]) -> None:
    """Make these the sites that are known, as the operator; what others wrote is still of their regions."""
    async with _as_operator(options) as inbox:
        await _put_sites(inbox, sites)


async def _put_sites(inbox: Inbox, sites: Mapping[str, SiteEntry]) -> None:
    for name, entry in sites.items():
        await kv.put(inbox, subjects.SITES.name, name, msgspec.json.encode(entry))
    for name in set(await kv.keys(inbox, subjects.SITES.name)) - sites.keys():
        if (held := await kv.get(inbox, subjects.SITES.name, name)) is not None:
            entry = replace(msgspec.json.decode(held, type=SiteEntry), revoked=True)
            await kv.put(inbox, subjects.SITES.name, name, msgspec.json.encode(entry))


async def provision(
    options: LinkOptions,
    *,
    site: str,
    tenants: Sequence[str],
    shards: Sequence[ShardEntry],
    sites: Mapping[str, SiteEntry] | None = None,
    policy: str | None = None,
    kind: SiteKind = "hub",
    log_replicas: int = 1,
) -> None:
    """Bring a site to this state. Safe to repeat.

    Shard map and sites become exactly these, tenants are only added; without a `policy` its own stays as it is.
    """
    async with _as_operator(options) as inbox:
        await ensure_log(inbox, site, kind=kind, replicas=log_replicas)
        for bucket in subjects.BUCKETS:
            await ensure_bucket(inbox, bucket.name, replicas=log_replicas)
        for bucket in subjects.OBJECTS if kind == "hub" else ():
            await ensure_objects(inbox, bucket.name, replicas=log_replicas)
        await _put_tenants(inbox, tenants)
        await _put_sites(inbox, sites or {site: SiteEntry()})
        if policy is not None:
            await kv.put(inbox, subjects.POLICIES.name, "own", policy.encode())
        for shard in shards:
            await kv.put(inbox, subjects.SHARDS.name, shard.name, shard.encode())
        for name in set(await kv.keys(inbox, subjects.SHARDS.name)) - {shard.name for shard in shards}:
            await kv.delete(inbox, subjects.SHARDS.name, name)
