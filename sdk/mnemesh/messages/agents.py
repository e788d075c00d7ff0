"""What agents ask, and what they are told."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from msgspec import Meta

from mnemesh.messages.base import (
    Consistency,
    Count,
    Coverage,
    Direction,
    Entity,
    IndexKind,
    Kind,
    Metric,
    Relations,
    Reply,
    Request,
    Scope,
    Sequence,
    Time,
    Token,
)
from mnemesh.wire import Vector

# ── writes ────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── point reads ───────────────────────────────────────────────────────────────────────────────────────────────


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

    Nothing in it is from after `latest` of the site's log. Not `complete`: this device has what it wrote itself, and
    its hub, out of reach now, may have more. `missing` names what could not be told, for its store is not there:
    `edges`. `suspects` are there if asked for.
    """

    entity_id: str
    type: str | None = None
    attributes: dict[str, Any]
    edges: list[dict[str, Any]]
    spaces: list[str]
    text: str | None = None
    version: int
    watermark: Token
    latest: int = 0
    vectors: dict[str, Vector] | None = None
    complete: bool = True
    missing: list[str] = []
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


# ── questions over shards ─────────────────────────────────────────────────────────────────────────────────────


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

    It saw all up to the watermark, and nothing from after `latest` of the site's log: that is later where not all that
    was asked stood at one place. To another site it says that it is `restricted`, if its policy may have kept something
    back.
    """

    hits: list[Hit]
    watermark: Token
    latest: int = 0
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
    """Reply of `traverse`, nearest first; the start nodes have depth 0. `latest` is as in `Hits`.

    It is `restricted` where other sites were not asked about all that was reached, for this site's policy may keep some
    of it from them. To another site it says so, if the policy may have kept something back.
    """

    nodes: list[Node]
    truncated: bool
    watermark: Token
    latest: int = 0
    coverage: Coverage
    restricted: bool = False
