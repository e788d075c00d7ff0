"""What of a tenant's data may leave the site where it is: the policy, and data cut down to what it lets out.

    version: 3                # a whole number from 1; a newer policy has a larger one
    rules:                    # the first that matches decides
      - {tenant: acme, type: meter, region: north, leaves: nothing}
      - {tenant: acme, type: forecast, leaves: scores}
      - {type: transformer, leaves: {attributes: [kv, name], edges: [feeds], vectors: [shape], text: false}}
    otherwise: all            # what no rule matches; `all` if left out

`tenant`, `type` and `region` of a rule are a name or a list of names; one that is left out matches any. The region is
that of the site where the data was born. Data without a type matches only rules that name no type. Of an entity that
was given several types since it was last forgotten, what the rules of all of them let out may leave. `leaves` is one of

* `nothing`;
* `scores`: a search may tell the entity's id and score, and nothing else;
* a map of the `attributes` (by name), `edges` (by relation; with their properties and the ids of their targets),
  `vectors` (by space) and `text` that may leave beside the id, the type and the times. What it does not name stays,
  and so do vectors that a view made of what stays;
* `all`.

Pure functions over plain data: no NATS, no clock, no files. `sovereignty_text` reads such a text; who knows an entity's
type, and asks, is elsewhere. Looks at `mnemesh` and the merge rules only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property, reduce
from hashlib import blake2b
from operator import and_
from typing import Any, NamedTuple

import msgspec

from memory_shards.merge import edge_view, patch_of
from mnemesh import messages, wire
from mnemesh.errors import MnemeshError
from mnemesh.event import Event

# ── what may leave ──────────────────────────────────────────────────────────────────────────────────────────


class Level(IntEnum):
    """From the strictest on."""

    NOTHING = 0
    SCORES = 1
    FIELDS = 2
    ALL = 3


class Leaves(msgspec.Struct, frozen=True, kw_only=True):
    """What may leave of one kind of data: `NOTHING`, `SCORES`, `ALL`, or fields by name. Only fields have names.

    `one & other` is what both let out. All of them form a meet-semilattice with `ALL` on top, so in whatever order
    sites and policies cut data down, the same is left.
    """

    level: Level = Level.FIELDS
    attributes: frozenset[str] = frozenset()
    edges: frozenset[str] = frozenset()
    vectors: frozenset[str] = frozenset()
    text: bool = False

    def __and__(self, other: Leaves) -> Leaves:
        if self.level is not other.level:
            return min(self, other, key=_level)
        return Leaves(
            level=self.level,
            attributes=self.attributes & other.attributes,
            edges=self.edges & other.edges,
            vectors=self.vectors & other.vectors,
            text=self.text and other.text,
        )

    @property
    def is_all(self) -> bool:
        return self.level is Level.ALL

    @property
    def tells_scores(self) -> bool:
        """Whether a search may tell that it found the entity."""
        return self.level >= Level.SCORES

    @property
    def tells_fields(self) -> bool:
        """Whether the type and the times may leave, and events with them."""
        return self.level >= Level.FIELDS

    def tells_attribute(self, name: str) -> bool:
        return self.is_all or name in self.attributes

    def tells_edges(self, relation: str) -> bool:
        return self.is_all or relation in self.edges

    def tells_vectors(self, space: str) -> bool:
        return self.is_all or space in self.vectors

    @property
    def tells_text(self) -> bool:
        return self.is_all or self.text

    def without_made(self, made_of: Callable[[str], Collection[str]]) -> Leaves:
        """The same but for spaces whose vectors are `made_of` attributes, by name, that may not all leave."""
        if self.level is not Level.FIELDS:
            return self
        vectors = frozenset(space for space in self.vectors if self.attributes.issuperset(made_of(space)))
        return msgspec.structs.replace(self, vectors=vectors)


def _level(leaves: Leaves) -> Level:
    return leaves.level


NOTHING = Leaves(level=Level.NOTHING)
SCORES = Leaves(level=Level.SCORES)
ALL = Leaves(level=Level.ALL)


# ── the policy ──────────────────────────────────────────────────────────────────────────────────────────────


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What leaves of the data of these tenants, types and regions. No names: any."""

    tenants: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    regions: frozenset[str] = frozenset()
    leaves: Leaves

    def is_about(self, tenant: str, region: str) -> bool:
        return (not self.tenants or tenant in self.tenants) and (not self.regions or region in self.regions)

    def takes_all_of(self, other: Rule) -> bool:
        """Whether it matches whatever the other matches."""
        return all(
            not mine or (theirs and theirs <= mine)
            for mine, theirs in (
                (self.tenants, other.tenants),
                (self.types, other.types),
                (self.regions, other.regions),
            )
        )


class _Table(NamedTuple):
    """The rules for one tenant and region: what leaves by type, and of every other type and of none."""

    by_type: dict[str | None, Leaves]
    others: Leaves


@dataclass(frozen=True)
class Policy:
    """Rules, of which the first that matches decides.

    An event is a patch and need not say its entity's type, so whoever asks must know that from the entity. Of one that
    was given several types, what all of them let out may leave: else whoever may write it could lift what holds for it.
    """

    version: int
    rules: tuple[Rule, ...] = ()
    otherwise: Leaves = ALL
    _tables: dict[tuple[str, str], _Table] = field(default_factory=dict, init=False, repr=False, compare=False)

    def leaves(self, tenant: str, type: str | None, region: str) -> Leaves:
        """What may leave of this tenant's data of this type that was born in this region."""
        table = self._table(tenant, region)
        return table.by_type.get(type, table.others)

    def leaves_under(self, tenant: str, types: Collection[str], region: str) -> Leaves:
        """What may leave of an entity that was given these types: what all of them let out. No types: it has none."""
        return reduce(and_, (self.leaves(tenant, type, region) for type in types or (None,)))

    def restricts(self, tenant: str, region: str) -> bool:
        """Whether the rules could keep back any of the tenant's data born in this region. Says nothing of the data."""
        table = self._table(tenant, region)
        return not (table.others.is_all and all(leaves.is_all for leaves in table.by_type.values()))

    def refuses(self, tenant: str, region: str) -> bool:
        """Whether nothing of the tenant's data born in this region may leave, whatever its type."""
        table = self._table(tenant, region)
        return table.others == NOTHING and all(leaves == NOTHING for leaves in table.by_type.values())

    def _table(self, tenant: str, region: str) -> _Table:
        # Those that no rule names are all alike, so there are never more tables than the rules make different.
        place = (tenant if tenant in self._tenants else "", region if region in self._regions else "")
        table = self._tables.get(place)
        if table is None:
            table = self._tables[place] = self._table_of(*place)
        return table

    def _table_of(self, tenant: str, region: str) -> _Table:
        by_type: dict[str | None, Leaves] = {}
        for rule in self.rules:
            if rule.is_about(tenant, region):
                if not rule.types:
                    return _Table(by_type, rule.leaves)
                for name in rule.types:
                    by_type.setdefault(name, rule.leaves)
        return _Table(by_type, self.otherwise)

    @cached_property
    def _tenants(self) -> frozenset[str]:
        return frozenset().union(*(rule.tenants for rule in self.rules))

    @cached_property
    def _regions(self) -> frozenset[str]:
        return frozenset().union(*(rule.regions for rule in self.rules))


OPEN = Policy(version=0)
"""What holds where there is no policy: all may leave."""


# ── data cut down ───────────────────────────────────────────────────────────────────────────────────────────


def reduced_event(event: Event, leaves: Leaves) -> Event | None:
    """The event as it may leave: the same object under `ALL`, `None` where it must stay.

    With fields by name, every put leaves, if only as the entity's id and type: elsewhere, too, the entity must be there
    again after a forget, end when it ends, and get the same stamps from its site, or sites would not converge on the
    fields that they share. Where nobody may know that an entity was written, use `scores` or `nothing`. A forget
    leaves, too.

    Unknown fields stay, for they may hold anything; so does an event that breaks the layout, which no store takes.
    """
    if leaves.is_all:
        return event
    if not leaves.tells_fields:
        return None
    try:
        patch = patch_of(event)
    except MnemeshError:
        return None
    derived = derivation_of(event)
    if derived is not None:
        leaves = leaves.without_made(lambda space: derived.attributes)
    settings = event.body.get("spaces")
    parts: dict[str, Any] = {
        "attributes": {name: value for name, value in patch.attributes.items() if leaves.tells_attribute(name)},
        "edges": [
            edge_view(edge.relation, edge.target_id, edge.properties)
            for edge in patch.edges
            if leaves.tells_edges(edge.relation)
        ],
        "remove_edges": [
            edge_view(edge.relation, edge.target_id, None)
            for edge in patch.remove_edges
            if leaves.tells_edges(edge.relation)
        ],
        "vectors": {space: vector for space, vector in patch.vectors.items() if leaves.tells_vectors(space)},
        "remove_vectors": [space for space in patch.remove_vectors if leaves.tells_vectors(space)],
        "spaces": {
            space: _known_settings(given)
            for space, given in (settings.items() if isinstance(settings, dict) else ())
            if leaves.tells_vectors(space)
        },
    }
    body = {name: part for name, part in parts.items() if part}
    if patch.type is not None:
        body["type"] = patch.type
    if patch.text is not None and leaves.tells_text:
        body["text"] = patch.text
    if derived is not None and leaves.attributes.issuperset(derived.attributes):
        body["derived"] = msgspec.structs.asdict(derived)
    return msgspec.structs.replace(event, id=opaque_id(event), body=body, extra={})


def derivation_of(event: Event) -> messages.Derivation | None:
    """What the vectors of an event were made of, where a view made them."""
    said = event.body.get("derived")
    if said is None:
        return None
    try:
        return wire.convert(said, messages.Derivation)
    except MnemeshError:
        return _OF_UNKNOWN


_OF_UNKNOWN = messages.Derivation(definition="", attributes=[""], sites=[])
"""Of what no rule can name."""


def opaque_id(event: Event) -> str:
    """An id for the event that tells nothing of the name that its writer gave it, which may be anything.

    The same for the same event wherever it is asked for. A name that can be guessed can be confirmed.
    """
    return f"{event.tenant}.{event.agent}.{blake2b(event.id.encode(), digest_size=16).hexdigest()}"


def _known_settings(given: object) -> dict[str, str]:
    if not isinstance(given, dict):
        return {}
    return {name: given[name] for name in ("metric", "index", "model") if isinstance(given.get(name), str)}


def reduced_context(context: messages.Context, leaves: Leaves) -> messages.Context | None:
    """A reply's entity as it may leave: the same object under `ALL`, `None` where it must stay."""
    if leaves.is_all:
        return context
    if not leaves.tells_fields:
        return None
    vectors = context.vectors
    return messages.Context(
        entity_id=context.entity_id,
        type=context.type,
        attributes=_told(context.attributes, leaves),
        edges=[
            edge_view(edge["relation"], edge["target_id"], edge.get("properties"))
            for edge in context.edges
            if leaves.tells_edges(edge["relation"])
        ],
        spaces=[space for space in context.spaces if leaves.tells_vectors(space)],
        text=context.text if leaves.tells_text else None,
        version=context.version,
        watermark=context.watermark,
        missing=context.missing,
        vectors=vectors and {space: vector for space, vector in vectors.items() if leaves.tells_vectors(space)},
    )


def reduced_hit(hit: messages.Hit, leaves: Leaves, space: str | None) -> messages.Hit | None:
    """A found entity as it may leave: the same object under `ALL`, `None` where it must stay.

    `space` is the one that was searched, to which a vector in the hit belongs.
    """
    if leaves.is_all:
        return hit
    if not leaves.tells_scores:
        return None
    if not leaves.tells_fields:
        return messages.Hit(entity_id=hit.entity_id, score=hit.score)
    return messages.Hit(
        entity_id=hit.entity_id,
        score=hit.score,
        attributes=None if hit.attributes is None else _told(hit.attributes, leaves),
        vector=hit.vector if space is not None and leaves.tells_vectors(space) else None,
    )


def allows_search(leaves: Leaves, type: str | None, filtered: Iterable[str]) -> bool:
    """Whether a search for this type (`None`: any) with a filter on these attributes may consider the data.

    What a search asks for it also tells, by finding or not: so all of that must be free to leave.
    """
    return (
        leaves.tells_scores
        and (type is None or leaves.tells_fields)
        and all(leaves.tells_attribute(name) for name in filtered)
    )


def _told(attributes: dict[str, Any], leaves: Leaves) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if leaves.tells_attribute(name)}
