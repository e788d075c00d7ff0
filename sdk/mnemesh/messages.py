"""The request and reply of every operation, as frozen Structs.

A caller's entity document is `Entity`; what a read returns is `Context`. Times are RFC 3339 with a zone (or
MessagePack timestamps); sequences are positions in a site's log; scores are larger for better whatever the metric.
Which operation takes which of these is in `subjects.yaml`. Looks at `wire` only.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mnemesh.wire import Vector

Token = dict[str, int]
"""Site → log sequence: what a write returns, and what a later read may demand to have seen."""

Time = Annotated[datetime, Meta(tz=True)]
Level = Literal["eventual", "session", "bounded", "strong"]
Metric = Literal["cosine", "ip", "l2"]
IndexKind = Literal["auto", "flat", "hnsw"]
Direction = Literal["out", "in", "both"]
Scope = Literal["all", "here"]
"""Which sites a question goes to: also a hub's devices, or a device's hub; or this one alone."""
Count = Annotated[int, Meta(ge=1, le=1000)]
Sequence = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Kind = Annotated[str, Meta(min_length=1, max_length=256)]
Relations = Annotated[list[str], Meta(max_length=1000)]


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of requests: an unknown field is a mistake that gets named."""


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of replies: a newer mesh may say more than this client knows."""


# ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────


class Consistency(Request, frozen=True, kw_only=True):
    """How fresh a read must be. A replica waits within the budget, else answers `stale`.

    `eventual`: answer now. `session`: at least `token`. `bounded`: at most `max_lag_ms` behind the log.
    `strong`: at least the log's head when the request arrived.
    """

    level: Level = "eventual"
    token: Token = {}
    max_lag_ms: Annotated[int, Meta(ge=1, le=86_400_000)] | None = None

    def of_site(self, site: str) -> Consistency:
        """What this demands of one site's own log."""
        if self.level != "session":
            return self
        token = {site: self.token[site]} if site in self.token else {}
        return msgspec.structs.replace(self, token=token)


class Edge(Request, frozen=True, kw_only=True):
    """A relation from the entity that holds it to `target_id`. (relation, target_id) is its key."""

    relation: Kind
    target_id: Annotated[str, Meta(min_length=1)]
    properties: dict[str, Any] = {}


class EdgeKey(Request, frozen=True, kw_only=True):
    """Names one edge to remove."""

    relation: str
    target_id: str


class Entity(Request, frozen=True, kw_only=True):
    """A caller's document: a patch. Attributes merge (null removes); edges and vectors are added or removed.

    A vector in `attributes` (base64 or numbers under `state_vector`, or a MessagePack vector under any name)
    lands in the vector space of that name, as does each entry of `vectors`.
    `valid_from` and `valid_to` say when it was true in the world; they default to now and for ever.
    """

    entity_id: Annotated[str, Meta(min_length=1)]
    type: Kind | None = None
    attributes: dict[str, Any] = {}
    edges: list[Edge] = []
    remove_edges: list[EdgeKey] = []
    vectors: dict[str, Vector] = {}
    remove_vectors: list[str] = []
    text: str | None = None
    valid_from: Time | None = None
    valid_to: Time | None = None
    expected_version: Sequence | None = None


class Missing(Reply, frozen=True, kw_only=True):
    """Part of the data that a reply does not cover, and why."""

    shard: str
    partitions: int
    code: str
    message: str


class SiteCoverage(Reply, frozen=True, kw_only=True):
    """Whether another site speaks in a federated reply: it `answered`, as of its `watermark`; it has been `unreachable`
    for `silent_s`; or its policy `refused`. One that is `restricted` told only what its policy lets out, which it says
    by its rules, whether or not there was more. `complete`: all of its own partitions answered.
    """

    site: str
    state: Literal["answered", "unreachable", "refused"]
    watermark: Token = {}
    silent_s: float | None = None
    restricted: bool = False
    complete: bool = True


class Coverage(Reply, frozen=True, kw_only=True):
    """Which share of the partitions a federated reply speaks for, and which other sites.

    `complete` only if all partitions answered, and all sites that were asked.
    """

    answered: int
    total: int
    missing: list[Missing] = []
    sites: list[SiteCoverage] = []

    @property
    def complete(self) -> bool:
        return self.answered == self.total and all(site.state == "answered" and site.complete for site in self.sites)


# ── writes ──────────────────────────────────────────────────────────────────────────────────────────────────


class SetContext(Entity, frozen=True, kw_only=True):
    """Request of `set_context`. `expected_version` makes it a compare-and-set; 0 means "must not exist"."""


class UpsertEmbedding(Request, frozen=True, kw_only=True):
    """Request of `upsert_embedding`: one vector of one entity in one space (made on first use)."""

    entity_id: Annotated[str, Meta(min_length=1)]
    vector: Vector
    space: str = "default"
    type: Kind | None = None
    attributes: dict[str, Any] = {}
    metric: Metric | None = None
    index: IndexKind | None = None
    model: str | None = None
    expected_version: Sequence | None = None


class Forget(Request, frozen=True, kw_only=True):
    """Request of `forget`: erase one entity from the log and every store."""

    entity_id: Annotated[str, Meta(min_length=1)]
    expected_version: Sequence | None = None


class Written(Reply, frozen=True, kw_only=True):
    """A write that the log has acknowledged. `version` is the entity's new version for compare-and-set."""

    entity_id: str
    version: int
    token: Token
    duplicate: bool = False


class Ingest(Request, frozen=True, kw_only=True):
    """Request of `ingest`: many documents. `atomic` makes them all or nothing (at most 1,000 then)."""

    entities: list[Any]
    atomic: bool = False


class Outcome(Reply, frozen=True, kw_only=True):
    """Why one document of an `ingest` was refused: an error code and message."""

    entity_id: str
    code: str
    message: str


class Ingested(Reply, frozen=True, kw_only=True):
    """Reply of `ingest`. `versions` and `errors` (by index, as text) are in the order of the request's entities."""

    accepted: int
    refused: int
    token: Token
    versions: list[int | None]
    errors: dict[str, Outcome] = {}


# ── point reads ─────────────────────────────────────────────────────────────────────────────────────────────


class GetContext(Request, frozen=True, kw_only=True):
    """Request of `get_context`. `as_of`: what was known then. `valid_at`: what was true then.

    `entity_id` may be left out where the subject's token already spells it.
    """

    entity_id: str | None = None
    as_of: Time | None = None
    valid_at: Time | None = None
    include_vectors: bool = False
    include_suspects: bool = False
    consistency: Consistency | None = None


class Suspect(Reply, frozen=True, kw_only=True):
    """What a site wrote of one part of an entity, and lost to a write that did not know of it.

    `part` is `type`, `text`, `attribute`, `edge` or `vector`; `name` which attribute or space, or `relation target_id`.
    `value` is `None` where it was removed, and for a vector.
    """

    part: str
    name: str = ""
    value: Any = None
    site: str
    written_at: datetime


class Context(Reply, frozen=True, kw_only=True):
    """What is remembered of one entity. `version` is the log sequence of its last event.

    Not `complete`: this device has what it wrote itself, and its hub, out of reach now, may have more. `suspects` are
    there if asked for.
    """

    entity_id: str
    type: str | None = None
    attributes: dict[str, Any]
    edges: list[dict[str, Any]]
    spaces: list[str]
    text: str | None = None
    version: int
    watermark: Token
    vectors: dict[str, Vector] | None = None
    complete: bool = True
    suspects: list[Suspect] | None = None


class Timeline(Request, frozen=True, kw_only=True):
    """Request of `timeline` of one entity: its events in log order, after sequence `after`."""

    entity_id: str | None = None
    after: Sequence = 0
    limit: Count = 100
    consistency: Consistency | None = None


class TimelineRange(Request, frozen=True, kw_only=True):
    """Request of `timeline_range`: events of all entities whose valid time starts in [`start`, `end`).

    In log order, resumable: pass the last reply's `next_after` as `after`.
    """

    start: Time | None = None
    end: Time | None = None
    type: str | None = None
    after: Sequence = 0
    limit: Count = 100
    consistency: Consistency | None = None


class TimelineEvent(Reply, frozen=True, kw_only=True):
    """One event as the log holds it. `recorded_at` is log time; `valid_from`/`valid_to` are event time."""

    sequence: int
    event_id: str
    entity_id: str
    op: str
    agent: str
    recorded_at: datetime
    valid_from: datetime
    valid_to: datetime | None = None
    body: dict[str, Any] = {}


class TimelinePage(Reply, frozen=True, kw_only=True):
    """Events in log order. `next_after` resumes; `None` when there is no more up to the watermark.

    Not `complete`: this device has what it wrote itself, and its hub may have more.
    """

    events: list[TimelineEvent]
    next_after: int | None = None
    watermark: Token
    complete: bool = True
    coverage: Coverage | None = None


# ── questions over shards ───────────────────────────────────────────────────────────────────────────────────


class SearchEmbedding(Request, frozen=True, kw_only=True):
    """Request of `search_embedding`: the `k` nearest of `vector` in `space`.

    `filter` maps attribute names to a value (equality) or to a map of operators:
    `{"weekday": 3, "date": {"lt": "2016-05-01"}, "region": {"in": ["a", "b"]}}`;
    operators: eq ne lt lte gt gte in exists. All must hold. A list attribute is equal to each of its items, unless
    there are fractions among them. `output_fields` names attributes to return.
    """

    vector: Vector
    space: str = "default"
    k: Count = 10
    type: str | None = None
    filter: dict[str, Any] = {}
    output_fields: list[str] = []
    include_vectors: bool = False
    scope: Scope = "all"
    consistency: Consistency | None = None


class SearchText(Request, frozen=True, kw_only=True):
    """Request of `search_text`: the `k` best by BM25 for the words of `query`."""

    query: Annotated[str, Meta(min_length=1, max_length=4096)]
    k: Count = 10
    type: str | None = None
    scope: Scope = "all"
    consistency: Consistency | None = None


class Hit(Reply, frozen=True, kw_only=True):
    """One found entity. `score` is larger for better: cosine, inner product, minus squared L2, or BM25."""

    entity_id: str
    score: float
    attributes: dict[str, Any] | None = None
    vector: Vector | None = None


class Hits(Reply, frozen=True, kw_only=True):
    """Best first. `coverage` is there on a federated reply.

    To another site it says that it is `restricted`, if its policy may have kept something back.
    """

    hits: list[Hit]
    watermark: Token
    coverage: Coverage | None = None
    restricted: bool = False


class Traverse(Request, frozen=True, kw_only=True):
    """Request of `traverse`: breadth first from `start` along `relations` (all if empty) to `depth` hops.

    At most `limit` nodes are returned, nearest first; `truncated` says if that cut anything off.
    """

    start: list[str] | str
    relations: Relations = []
    direction: Direction = "out"
    depth: Annotated[int, Meta(ge=1, le=64)] = 1
    limit: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    scope: Scope = "all"
    consistency: Consistency | None = None


class Node(Reply, frozen=True, kw_only=True):
    """A reached entity, how many hops away, and the edge (`via` entity, `relation`) that reached it first."""

    entity_id: str
    depth: int
    via: str | None = None
    relation: str | None = None


class Traversal(Reply, frozen=True, kw_only=True):
    """Reply of `traverse`, nearest first; the start nodes have depth 0."""

    nodes: list[Node]
    truncated: bool
    watermark: Token
    coverage: Coverage
    restricted: bool = False


# ── between the router and the shards ───────────────────────────────────────────────────────────────────────


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
    that are `lacking` a device's hub may know more.
    """

    edges: list[tuple[str, str, str]]
    truncated: bool
    ahead: list[str] = []
    lacking: list[str] = []
    watermark: Token


class ListEntities(Request, frozen=True, kw_only=True):
    """Request of `shard_list`: a tenant's entities in the order of their ids, after the id `after`.

    Only those of `types`, if there are any; only those that are `held` for this device; `with_sites` tells who wrote.
    """

    types: list[str] = []
    held: bool = False
    with_sites: bool = False
    after: str = ""
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 5_000
    consistency: Consistency | None = None


class ListedEntity(msgspec.Struct, frozen=True, array_like=True):
    """One entity: its type, the log sequence of its last event, and the bytes of its events, vectors left out.

    Of one that is held, `bytes` are those that the hub sent when that began.
    """

    entity_id: str
    type: str | None
    version: int
    bytes: int
    sites: list[str] = []


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

    One that `is_gone` was forgotten, and its type is that of then. `tombstone` is the (stamp, site) of the forget that
    wins over all others, also when it was written again.
    """

    type: str | None = None
    sites: list[str] = []
    is_gone: bool = False
    tombstone: tuple[int, str] | None = None


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
    """Request of `shard_erased`: about the forget at this `sequence` of the site's log."""

    entity_id: Annotated[str, Meta(min_length=1)]
    sequence: Sequence


class Erased(Reply, frozen=True, kw_only=True):
    """Reply of `shard_erased`: how many `events` the forget erased, and the ids of those that are left."""

    events: int
    left: list[str]
    watermark: Token


class Receipt(Reply, frozen=True, kw_only=True):
    """What one site erased for one forget, which is at `sequence` of its log: so many events of its stores.

    `forget` names the forget, the same at every site.
    """

    forget: str
    site: str
    tenant: str
    entity_id: str
    sequence: int
    events: int
    erased_at: Time


class ConfirmErased(Request, frozen=True, kw_only=True):
    """Request of `confirm_erased`."""

    receipts: Annotated[list[Receipt], Meta(max_length=1000)]


class Confirmed(Reply, frozen=True, kw_only=True):
    """Reply of `confirm_erased`: the hub keeps the receipts."""


class AskErasures(Request, frozen=True, kw_only=True):
    """Request of `erasures`: the latest, of one tenant or entity if named."""

    tenant: str | None = None
    entity_id: str | None = None
    limit: Count = 100


class PendingSite(Reply, frozen=True, kw_only=True):
    """A device that has still to hear of a forget, and how long it has been silent; `None`: since the hub started."""

    site: str
    silent_s: float | None


class Erasure(Reply, frozen=True, kw_only=True):
    """One forget: the receipts of those who erased something, the sites that had nothing of it, and those who wait."""

    tenant: str
    entity_id: str
    sequence: int
    receipts: list[Receipt]
    nothing: list[str]
    pending: list[PendingSite]


class Erasures(Reply, frozen=True, kw_only=True):
    """Reply of `erasures`, the latest first."""

    erasures: list[Erasure]


class Status(Request, frozen=True, kw_only=True):
    """Request of `shard_status`."""

    digest: bool = False


class ShardStatus(Reply, frozen=True, kw_only=True):
    """Where a replica stands. `digest` is a hash over all that it holds, to compare replicas with.

    `skipped` events of the log have no effect: they could not be read, or broke a rule. Nor have those `quarantined`,
    by the site that they came from: they are stamped further ahead of the hub's clock than may be.
    """

    shard: str
    watermark: Token
    partitions: int
    entities: int
    edges: int
    vectors: int
    skipped: int = 0
    quarantined: dict[str, int] = {}
    digest: str | None = None


# ── between a device and its hub ────────────────────────────────────────────────────────────────────────────


class AskPosition(Request, frozen=True, kw_only=True):
    """Request of `uplink_position`, with what a device says of itself every few seconds.

    `waiting` events are still to be sent, the oldest for `lag_s`; it has the hub's log up to `downlinked`, of what it
    wants, and has erased what was forgotten there up to `erased`. `clock_ms` is the device's time, in milliseconds
    since 1970, and `log_bytes` the size of its log. It holds so many entities and bytes of the hub's. `policy` is the
    version of the policy that it was handed. One that names the incarnation of its
    `log` asks for an event beyond its mark, too.
    """

    waiting: Annotated[int, Meta(ge=0)] = 0
    lag_s: Annotated[float, Meta(ge=0)] = 0.0
    downlinked: Annotated[int, Meta(ge=0)] = 0
    erased: Annotated[int, Meta(ge=0)] = 0
    held: Annotated[int, Meta(ge=0)] = 0
    held_bytes: Annotated[int, Meta(ge=0)] = 0
    contract: str = ""
    clock_ms: int = 0
    log_bytes: Annotated[int, Meta(ge=0)] = 0
    policy: int = 0
    log: Annotated[str, Meta(max_length=255)] = ""


class Position(Reply, frozen=True, kw_only=True):
    """Up to where a hub has a device's log. The device's last mark is at `place` of the hub's log; 0: there is none.

    `incarnation` tells the device's log from another of the same name made later; `last` is a hash of the last message,
    empty where it is not known, and `hlc` the newest stamp that came.
    `clock_ms` is the hub's time, in milliseconds since 1970. `policy` is there where the device has an older one.
    """

    hub: str
    place: int = 0
    incarnation: str = ""
    sequence: int = 0
    last: str = ""
    hlc: int = 0
    clock_ms: int = 0
    contract: str = ""
    policy: str = ""


class Want(Request, frozen=True, kw_only=True):
    """Entities of one tenant that a device is to hold: those of all that is named here.

    Of `types`, with an event born in one of `regions`, one of `entities` or up to `hops` edges away from one. What is
    empty does not matter.
    """

    tenant: Annotated[str, Meta(min_length=1)]
    types: list[Kind] = []
    regions: list[str] = []
    entities: list[Annotated[str, Meta(min_length=1)]] = []
    hops: Annotated[int, Meta(ge=0, le=8)] = 0


class Interest(Request, frozen=True, kw_only=True):
    """What a device wants to hold of what was written elsewhere, and how much of that it may.

    Wants come in the order of their weight. Where not all fits, what is evicted is of the last want, and in it the
    entity that has not changed for longest. What was written on the device itself is always held, and does not count.
    """

    wants: list[Want] = []
    most_entities: Annotated[int, Meta(ge=0)] = 100_000
    most_bytes: Annotated[int, Meta(ge=0)] = 256 * 1024 * 1024


class OpenFeed(Request, frozen=True, kw_only=True):
    """Request of `open_feed`. `held` are the (tenant, entity, bytes) that the device holds, in as many requests as it
    takes, all but the last with `more`. It has the hub's log `incarnation` up to `after`, where `last` is a hash of
    what stood there: in a log that was restored from an older copy, something else does. `log` is the incarnation of
    the device's own: what it wrote in an earlier one comes back.
    """

    session: Annotated[str, Meta(min_length=1, max_length=64)]
    interest: Interest
    region: str = ""
    held: list[tuple[str, str, int]] = []
    more: bool = False
    incarnation: str = ""
    after: Sequence = 0
    last: str = ""
    log: Annotated[str, Meta(max_length=255)] = ""


class FeedOpened(Reply, frozen=True, kw_only=True):
    """Reply of `open_feed`: the hub's name and the incarnation of its log."""

    hub: str
    incarnation: str


class NextFeed(Request, frozen=True, kw_only=True):
    """Request of `next_feed`. The same `turn` again gives the same again; the next one says that the last was kept."""

    session: str
    turn: Annotated[int, Meta(ge=1)]
    most_bytes: Annotated[int, Meta(ge=1_024, le=4_194_304)] = 524_288


class Carried(msgspec.Struct, frozen=True, array_like=True, tag="event"):
    """One event on its way to a device: where it stands in the log of its origin, its bytes, and its headers."""

    origin: str
    tenant: str
    partition: str
    entity: str
    payload: bytes
    born: str
    hub: int
    rollup: bool


class Holding(msgspec.Struct, frozen=True, array_like=True, tag="holding"):
    """From here on the device has all that the hub has of an entity, by so many `bytes`; `None`: it is to drop it."""

    tenant: str
    entity_id: str
    bytes: int | None


class FeedBatch(Reply, frozen=True, kw_only=True):
    """What a device appends to its log, all at once and in this order: events and holdings, then the marks.

    `place` is up to where the hub's log then is in the device's; `marks` of other origins as they are in the hub's log.
    `hlc` is the newest stamp among the events, `last` a hash of the message at `place`. `current`: there was no more.
    """

    turn: int
    place: int
    items: list[Carried | Holding] = []
    marks: dict[str, bytes] = {}
    hlc: int = 0
    last: str = ""
    current: bool = False


class EdgeStatus(Reply, frozen=True, kw_only=True):
    """Where a device stands with its hub.

    `linked` while its hub answers; `silent_s` is since when it does not. `waiting` is how many of its events the hub
    lacks, and `lag_s` for how long the oldest of them has waited. `downlinked` is up to where it has the hub's log of
    what it wants, and `current` whether there was no more. `put_aside` is how many of its events the hub quarantined
    since this started. `trouble` says, in words, what an operator must mend.
    """

    site: str
    hub: str
    linked: bool
    silent_s: float
    uplinked: int
    waiting: int
    lag_s: float
    downlinked: int = 0
    current: bool = False
    clock_offset_ms: int = 0
    hub_contract: str = ""
    put_aside: int = 0
    trouble: str = ""


class AskDevices(Request, frozen=True, kw_only=True):
    """Request of `devices`. Their `quarantined` events are counted only if asked for."""

    quarantined: bool = False


class DeviceSeen(Reply, frozen=True, kw_only=True):
    """What a hub knows of one device: up to where it has its log, and what the device last said of itself.

    `silent_s` is how long ago that was, in seconds; after a restart of the hub it is when the last events came, and
    the rest is unknown. `clock_offset_ms` is how far the device's clock is ahead of the hub's; `downlinked` up to where
    it has the hub's log, of what it wants, `downlink_waiting` how many messages of that log are beyond, and
    `downlink_lag_s` how old the first of them is; up to `erased` it has erased what was forgotten. It holds so much of
    the hub's. Of no `tenants`: it may have the memory of all.
    """

    site: str
    linked: bool
    silent_s: float
    uplinked: int
    region: str = ""
    tenants: list[str] = []
    contract: str | None = None
    downlinked: int | None = None
    downlink_waiting: int | None = None
    downlink_lag_s: float | None = None
    erased: int | None = None
    held: int | None = None
    held_bytes: int | None = None
    quarantined: int = 0
    waiting: int | None = None
    lag_s: float | None = None
    clock_offset_ms: int | None = None
    log_bytes: int | None = None


class DevicesSeen(Reply, frozen=True, kw_only=True):
    """Reply of `devices`, by name. Devices that never sent anything are not in it."""

    devices: list[DeviceSeen]
