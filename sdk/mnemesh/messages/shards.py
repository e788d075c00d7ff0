"""What routers, gateways and hubs ask shards."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mnemesh.messages.base import Consistency, Direction, HeldState, Relations, Reply, Request, Sequence, Time, Token


class Expand(Request, frozen=True, kw_only=True):
    """Request of `shard_expand`: the edges that touch `entity_ids` on this shard, one hop.

    Outward it may walk up to `ahead` more hops, as far as it has the entities itself and that is cheap: the asker, who
    will want those edges next, finds them there.
    """

    entity_ids: list[str]
    relations: Relations = []
    direction: Direction = "out"
    ahead: Annotated[int, Meta(ge=0)] = 0
    limit: Annotated[int, Meta(ge=1)] = 100_000
    consistency: Consistency | None = None


class Expanded(Reply, frozen=True, kw_only=True):
    """Edges as (from, relation, to) in the direction walked. `truncated` if there were more than `limit`.

    `ahead` are the entities beyond those asked for whose edges are all there too, also where there are none. Of those
    that are `lacking` a device's hub may know more. Nothing is from after `latest` of the site's log.
    """

    edges: list[tuple[str, str, str]]
    truncated: bool
    ahead: list[str] = []
    lacking: list[str] = []
    watermark: Token
    latest: int = 0


class ListEntities(Request, frozen=True, kw_only=True):
    """Request of `shard_list`: a tenant's entities in the order of their ids, after the id `after`.

    Only those of `types`, if there are any; only those that are noted as `held` for this device, in whatever state;
    `with_sites` tells who wrote.
    """

    types: list[str] = []
    held: bool = False
    with_sites: bool = False
    after: str = ""
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 5_000
    consistency: Consistency | None = None


class ListedEntity(msgspec.Struct, frozen=True, array_like=True):
    """One entity: its type, the log sequence of its last event, and the bytes of its events, vectors left out.

    `first` is the log sequence of the first of its events that is left. Of one that is held, `state` says how, and
    `bytes` are those that the hub had sent then. `types` are all that it was ever given, as in a description.
    """

    entity_id: str
    type: str | None
    version: int
    bytes: int
    sites: list[str] = []
    first: int = 0
    state: HeldState | None = None
    types: list[str] = []


class Entities(Reply, frozen=True, kw_only=True):
    """Reply of `shard_list`. `more`: ask again, after the last of these."""

    entities: list[ListedEntity]
    more: bool
    watermark: Token


class Describe(Request, frozen=True, kw_only=True):
    """Request of `shard_describe`."""

    entity_ids: Annotated[list[str], Meta(max_length=10_000)]
    consistency: Consistency | None = None


class Description(msgspec.Struct, frozen=True, array_like=True):
    """The type of an entity, and the sites that ever wrote it, forgotten writes too.

    One that `is_gone` was forgotten, and its type is that of then. `first` is the log sequence of the first of its
    events that is left; 0: there is none. `types` are all that it was given since it was last forgotten, also those
    that lost or do not hold now, or that it had then: together they decide what may leave of it.
    """

    type: str | None = None
    sites: list[str] = []
    is_gone: bool = False
    first: int = 0
    types: list[str] = []


class Descriptions(Reply, frozen=True, kw_only=True):
    """Reply of `shard_describe`, in the order of the request."""

    entities: list[Description]
    watermark: Token


class AskHeld(Request, frozen=True, kw_only=True):
    """Request of `shard_held`."""


class Held(Reply, frozen=True, kw_only=True):
    """Reply of `shard_held`: entities that are held for this device, and the bytes that its hub sent of them."""

    entities: int
    bytes: int


class AskErased(Request, frozen=True, kw_only=True):
    """Request of `shard_erased`: about one entity's messages at these `sequences` of the site's log, which grow."""

    entity_id: Annotated[str, Meta(min_length=1)]
    sequences: Annotated[list[Sequence], Meta(min_length=1, max_length=1_000)]


class Left(msgspec.Struct, frozen=True, array_like=True):
    """Of one site's events of an entity, how many a store has, or are put aside, and where the first of them is.

    What came to a log twice is at its first place.
    """

    site: str
    first: int
    count: int


class Erased(Reply, frozen=True, kw_only=True):
    """Reply of `shard_erased`: how many `events` each of the messages erased, and what is `left` of the entity.

    `has` are those of the messages that are left themselves.
    """

    events: list[int]
    has: list[int]
    left: list[Left]
    watermark: Token


class AskForgotten(Request, frozen=True, kw_only=True):
    """Request of `shard_forgotten`: about messages at these `sequences` of the site's log, which grow."""

    sequences: Annotated[list[Sequence], Meta(min_length=1, max_length=10_000)]


class Forgotten(Reply, frozen=True, kw_only=True):
    """Reply of `shard_forgotten`: those of the `sequences` at which the shard's partitions have something to erase."""

    sequences: list[int]
    watermark: Token


class Status(Request, frozen=True, kw_only=True):
    """Request of `shard_status`."""

    digest: bool = False


class Rebuild(Request, frozen=True, kw_only=True):
    """Request of `shard_rebuild`: build the store anew that keeps this.

    Where the log no longer has its beginning, and says less than the store has, that is kept, unless by `force`.
    """

    store: Literal["attributes", "edges", "text", "vectors"]
    force: bool = False


class Rebuilding(Reply, frozen=True, kw_only=True):
    """Reply of `shard_rebuild`, by a replica that has begun. `ShardStatus.rebuilds` tells how far it is, by this id."""

    id: str


class RebuildState(msgspec.Struct, frozen=True, kw_only=True):
    """How far a rebuild of a store is: `said` tells more, in words."""

    store: str
    state: Literal["building", "done", "failed"]
    said: str = ""


class PartDigest(msgspec.Struct, frozen=True, kw_only=True):
    """How many entities (or rows) a partition has, and a hash of all that is held of them."""

    count: int
    hash: str


class StoreDigest(msgspec.Struct, frozen=True, kw_only=True):
    """What a store holds of one part of what is remembered, by partition, after the log up to `at`."""

    part: str
    at: int
    partitions: dict[str, PartDigest]


class ShardStatus(Reply, frozen=True, kw_only=True):
    """Where a replica stands. `digest` is a hash over all that it holds, to compare replicas with.

    `skipped` events of the log have no effect: they could not be read, or broke a rule. Nor have those `quarantined`,
    by the site that they came from: they are stamped further ahead of the hub's clock than may be. `stores` tells up to
    where each store has the log, `missing` which of them do not answer: what they hold is not counted. `rebuilds` says
    how far each store is that was to be built anew since the start. `digests` tell
    the same as `digest`, of each part: `attributes`, `edges`, `text`, `vectors`; `index`, where a server has those.
    """

    shard: str
    watermark: Token
    partitions: int
    entities: int
    edges: int
    vectors: int
    skipped: int = 0
    quarantined: dict[str, int] = {}
    stores: dict[str, int] = {}
    missing: list[str] = []
    rebuilds: dict[str, RebuildState] = {}
    digest: str | None = None
    digests: list[StoreDigest] = []


class TakeSnapshot(Request, frozen=True, kw_only=True):
    """Request of `take_snapshot`."""


class Snapshot(Reply, frozen=True, kw_only=True):
    """A snapshot of a shard's embedded stores, as it was read back when it was taken, in `seconds`.

    `files` tells up to where each has the log. `bytes` are those of the files, `stored` what they take at the target.
    `unfit` says why a replica of the shard that answers would not start from it.
    """

    id: str
    shard: str
    taken_at: Time
    seconds: float
    files: dict[str, int]
    bytes: int
    stored: int
    unfit: str | None = None


class ListSnapshots(Request, frozen=True, kw_only=True):
    """Request of `list_snapshots`."""


class Snapshots(Reply, frozen=True, kw_only=True):
    """Reply of `list_snapshots`: those at the `target`, newest first, and what is wrong with each `damaged` one."""

    target: str
    snapshots: list[Snapshot]
    damaged: dict[str, str] = {}
