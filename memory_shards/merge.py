"""How concurrent events of one entity become one state, whatever order their sites' logs arrive in.

* **Stamps.** Two gateways of a site may have clocks that differ; the site's log order still wins. So the
  effective stamp of an event is `max(event.hlc, last effective stamp of that entity from that log + 1)`. It
  depends only on the events of its own log, which always arrive in that log's order.
* **Once.** An event that was carried here says where it was born. What a site has had of an origin's log it does not
  take again, in whatever batch it comes (`is_repeated`).
* **Last writer wins**, by the key `(valid_from, stamp, site)`, for each attribute, each edge `(relation, target)`,
  each vector space, the type and the text. A removal keeps its key, so an older write that comes late loses.
* **`forget` wins over every event with a stamp below its own**, whatever their valid times. What a put with a
  later stamp said stays, also where a forgotten put had hidden it: so a forget needs the history (`fold`).
* **Two times.** `fold` takes the events recorded at or before `as_of` whose validity holds at `valid_at`. A
  `State` that took every event equals the fold at `valid_at = now` once now is past its `exact_from`.

Pure functions over plain data: no store, no clock. Looks at `mnemesh` only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import msgspec

from mnemesh import wire
from mnemesh.clock import stamp_ms
from mnemesh.errors import BadRequest
from mnemesh.event import Event, Record
from mnemesh.ids import MAX_ID_BYTES

Mark: TypeAlias = tuple[int, str]
"""(effective stamp, site): the place of an event among all events of its entity."""

Key: TypeAlias = tuple[int, int, str]
"""(valid_from in ms, effective stamp, site): the larger of two writes to one thing wins."""

NEVER = 2**63 - 1
"""`exact_from` of a state that only a fold can answer for, because some validity ends."""

_LARGEST_STAMP = 1 << 62  # the year 4199; leaves room in 64 bits for the stamps that must follow it
_TIMES = range(-62_135_596_800_000, 253_402_300_800_000)  # ms from year 1 to 9999: what a datetime can show


class EdgePut(msgspec.Struct, frozen=True, gc=False):
    relation: str
    target_id: str
    properties: dict[str, Any] = {}


class EdgeKey(msgspec.Struct, frozen=True, gc=False):
    relation: str
    target_id: str


class Patch(msgspec.Struct, frozen=True, gc=False):
    """The body of a put, as far as this version knows it. Of vectors, only the names of spaces matter here."""

    type: str | None = None
    attributes: dict[str, Any] = {}
    edges: list[EdgePut] = []
    remove_edges: list[EdgeKey] = []
    vectors: dict[str, Any] = {}
    remove_vectors: list[str] = []
    text: str | None = None


class Change(msgspec.Struct, frozen=True, gc=False):
    """One event, checked and stamped, ready to merge. `patch` is `None` for a forget.

    `hub` and `saw` are places in the hub's log: the event's own, and up to where its writer had it (`suspects.py`).
    """

    sequence: int
    recorded_at: int
    site: str
    stamp: int
    valid_from: int
    valid_to: int | None
    patch: Patch | None
    hub: int | None = None
    saw: int | None = None

    @property
    def mark(self) -> Mark:
        return self.stamp, self.site

    @property
    def key(self) -> Key:
        return self.valid_from, self.stamp, self.site

    @property
    def since(self) -> int:
        """From when on it is seen: without a time of its own at once, even if the writer's clock runs ahead."""
        implied = self.valid_from == stamp_ms(self.stamp)
        return min(self.valid_from, self.recorded_at) if implied else self.valid_from

    def holds_at(self, moment_ms: int) -> bool:
        return self.since <= moment_ms and (self.valid_to is None or moment_ms < self.valid_to)


class Edge(NamedTuple):
    """The last write to one (relation, target)."""

    key: Key
    properties: dict[str, Any]
    removed: bool


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of one entity. Edges are `{relation, target_id, properties?}`, in that order; `None` where the
    store that told the rest does not have them."""

    entity_id: str
    type: str | None
    attributes: dict[str, Any]
    edges: list[dict[str, Any]] | None
    spaces: list[str]
    text: str | None
    version: int


class Ledger(msgspec.Struct, array_like=True, gc=False):
    """What merging must remember beside the values: who wrote each last. Removed things keep their keys."""

    stamps: dict[str, int] = {}
    births: dict[str, int] = {}
    tombstone: Mark | None = None
    type: Key | None = None
    text: Key | None = None
    attributes: dict[str, Key] = {}
    spaces: dict[str, tuple[bool, Key]] = {}
    gone: str | None = None
    """The type that it had when it was forgotten."""
    types: set[str] = set()
    """Every type that it was given since nothing was left of it, valid or not, won or not; of one that is gone, those
    that it had then. For whoever must know what may be told of it: a writer adds to what decides, and takes nothing."""

    @property
    def sites(self) -> list[str]:
        """Who wrote it."""
        return list(dict.fromkeys(log.partition(" ")[0] for log in self.stamps))


class State(msgspec.Struct, gc=False):
    """An entity as far as merged. `alive` is false until a put, and after a forget until the next put."""

    ledger: Ledger = msgspec.field(default_factory=Ledger)
    alive: bool = False
    type: str | None = None
    text: str | None = None
    attributes: dict[str, Any] = {}
    edges: dict[tuple[str, str], Edge] = {}
    exact_from: int = 0

    @property
    def spaces(self) -> list[str]:
        return sorted([name for name, (present, _) in self.ledger.spaces.items() if present])

    def is_forgotten(self, change: Change) -> bool:
        """Whether a forget that is known already wins over this change."""
        return self.ledger.tombstone is not None and change.mark < self.ledger.tombstone

    def put(self, change: Change) -> None:
        """Merge one put that is not forgotten. Putting it again changes nothing."""
        self.put_document(change)
        self.put_edges(change)

    def put_document(self, change: Change) -> None:
        """`put`, of all but the edges."""
        patch, ledger = change.patch, self.ledger
        assert patch is not None, "a forget is folded, not put"
        key = change.key
        if not self.alive:
            ledger.types = set()
        self.alive = True
        if change.valid_to is not None:
            self.exact_from = NEVER
        elif change.since > change.recorded_at:
            self.exact_from = max(self.exact_from, change.since)
        if patch.type is not None:
            ledger.types.add(patch.type)
            if _wins(key, ledger.type):
                ledger.type, self.type = key, patch.type
        if patch.text is not None and _wins(key, ledger.text):
            ledger.text, self.text = key, patch.text or None
        keys, values = ledger.attributes, self.attributes
        for name, value in patch.attributes.items():
            held = keys.get(name)
            if held is None or key >= held:
                keys[name] = key
                if value is None:
                    values.pop(name, None)
                else:
                    values[name] = value
        # An event that both removes and adds a thing adds it: the later call wins among equal keys.
        for name in patch.remove_vectors:
            self._put_space(name, False, key)
        for name in patch.vectors:
            self._put_space(name, True, key)

    def put_edges(self, change: Change) -> None:
        """`put`, of the edges alone."""
        patch, key = change.patch, change.key
        assert patch is not None, "a forget is folded, not put"
        for gone in patch.remove_edges:
            self._put_edge(gone.relation, gone.target_id, Edge(key, {}, removed=True))
        for edge in patch.edges:
            self._put_edge(edge.relation, edge.target_id, Edge(key, edge.properties, removed=False))

    def _put_edge(self, relation: str, target_id: str, edge: Edge) -> None:
        held = self.edges.get((relation, target_id))
        if held is None or edge.key >= held.key:
            self.edges[relation, target_id] = edge

    def _put_space(self, name: str, present: bool, key: Key) -> None:
        held = self.ledger.spaces.get(name)
        if held is None or key >= held[1]:
            self.ledger.spaces[name] = present, key

    def document(self, entity_id: str, version: int) -> Document | None:
        """The state as a reader sees it; `None` where nothing is remembered."""
        if not self.alive:
            return None
        return Document(
            entity_id=entity_id,
            type=self.type,
            attributes=self.attributes,
            edges=[
                edge_view(relation, target_id, edge.properties)
                for (relation, target_id), edge in sorted(self.edges.items())
                if not edge.removed
            ],
            spaces=self.spaces,
            text=self.text,
            version=version,
        )


def edge_view(relation: str, target_id: str, properties: dict[str, Any] | None) -> dict[str, Any]:
    """An edge as readers see it."""
    view: dict[str, Any] = {"relation": relation, "target_id": target_id}
    if properties:
        view["properties"] = properties
    return view


def patch_of(event: Event) -> Patch:
    """The checked body of a put, its vectors as float32 (d,).

    Raises `BadRequest` or `TooLarge` on an event that breaks the layout.
    """
    if not 0 <= event.hlc < _LARGEST_STAMP:
        raise BadRequest(f"hlc {event.hlc} is out of range")
    for moment in (event.valid_from, event.valid_to):
        if moment is not None and moment not in _TIMES:
            raise BadRequest(f"{moment} ms is outside the years 1 to 9999")
    if event.op == "forget":
        return Patch()
    patch = wire.convert(event.body, Patch)
    if patch.edges:
        _check_targets(patch.edges)
    if patch.remove_edges:
        _check_targets(patch.remove_edges)
    for space, vector in patch.vectors.items():
        patch.vectors[space] = wire.as_vector(vector, what=f"vectors.{space}")
    return patch


def _check_targets(edges: Iterable[EdgePut | EdgeKey]) -> None:
    for edge in edges:
        length = len(edge.target_id)
        if not length or (length > MAX_ID_BYTES // 4 and len(edge.target_id.encode()) > MAX_ID_BYTES):
            raise BadRequest(f"an edge must lead to an id of 1 to {MAX_ID_BYTES} bytes")


def stamped(record: Record, patch: Patch, stamps: dict[str, int]) -> Change:
    """The change that a record makes. `stamps`, the entity's last stamp of each log, moves on."""
    event, log = record.event, record.log
    stamp = stamps[log] = max(event.hlc, stamps.get(log, -1) + 1)
    return Change(
        record.sequence,
        record.recorded_at,
        event.site,
        stamp,
        stamp_ms(stamp) if event.valid_from is None else event.valid_from,
        event.valid_to,
        patch if event.op == "put" else None,
        record.hub,
        event.saw,
    )


def is_repeated(record: Record, births: dict[str, int], stamps: dict[str, int]) -> bool:
    """Whether this event was here before. `births`, the entity's last sequence of each origin's log, moves on.

    Events of one log come in its order; those that were born here come once, by the store's watermark. A log that was
    restored from an older copy gives a sequence to another event, whose stamp is then newer than all that came before.
    """
    if record.birth is None:
        return False
    log, sequence = record.birth
    if sequence <= births.get(log, 0) and record.event.hlc <= stamps.get(log, -1):
        return True
    births[log] = max(sequence, births.get(log, 0))
    return False


def fold(changes: Iterable[Change], as_of_ms: int | None = None, valid_at_ms: int | None = None) -> State:
    """The state that an entity's changes come to, in whatever order they are given.

    `as_of_ms`: only what was recorded by then. `valid_at_ms`: only what holds then; `None`: all.
    The stamps of sites are not part of it: they belong to whoever stamps.
    """
    known = [change for change in changes if as_of_ms is None or change.recorded_at <= as_of_ms]
    tombstone = max((change.mark for change in known if change.patch is None), default=None)
    state = State(ledger=Ledger(tombstone=tombstone))
    for change in known:
        if change.patch is None or state.is_forgotten(change):
            continue
        if valid_at_ms is None or change.holds_at(valid_at_ms):
            state.put(change)
    return state


def _wins(key: Key, held: Key | None) -> bool:
    return held is None or key >= held
