"""What requests and replies are made of."""

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
HeldState = Literal["whole", "begun", "some"]
"""What a device has of an entity. `whole`: all that the hub has; `begun`: all of that up to its mark of the hub's log,
and some of what the hub had then is still to come; `some`: any of it."""
Count = Annotated[int, Meta(ge=1, le=1000)]
Sequence = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Kind = Annotated[str, Meta(min_length=1, max_length=256)]
Relations = Annotated[list[str], Meta(max_length=1000)]


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of requests: an unknown field is a mistake that gets named."""


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of replies: a newer mesh may say more than this client knows."""


class Consistency(Request, frozen=True, kw_only=True):
    """How fresh a read must be. A replica waits within the budget, else answers `stale`.

    `eventual`: answer now. `session`: at least `token`. `bounded`: at most `max_lag_ms` behind the log, and at least
    `token`. `strong`: at least the log's head when the request arrived, and `token`. A request that has none gets what
    the site's policy says of its tenant and type, and what is about access control is `strong` whatever it says.
    """

    level: Level = "eventual"
    token: Token = {}
    max_lag_ms: Annotated[int, Meta(ge=1, le=86_400_000)] | None = None

    def of_site(self, site: str) -> Consistency:
        """What this demands of one site's own log."""
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
    by its rules, whether or not there was more. `complete`: all of its own partitions answered. `code` is the error
    that it answered with, if it did.
    """

    site: str
    state: Literal["answered", "unreachable", "refused"]
    watermark: Token = {}
    silent_s: float | None = None
    restricted: bool = False
    complete: bool = True
    code: str = ""


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
