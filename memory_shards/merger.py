"""The merger: what one transaction's worth of records comes to, whatever store they are for.

    the entities that they name, as the store has them → take each record, in log order → what is to be written

A store loads a `Touched` for each entity, hands over the records, and writes what the touched ones and the lists of the
merger then say. Only a forget reads more, for it needs the history that it leaves. A store may keep only some parts of
what is remembered (`parts`), and its merger leaves the others out. Looks at `merge` and `mnemesh`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from memory_shards import merge
from memory_shards.merge import Change, Ledger, Mark, Patch, State
from mnemesh import wire
from mnemesh.event import Event, Record
from mnemesh.messages import HeldState

log = logging.getLogger(__name__)

Name: TypeAlias = tuple[str, str]
"""(tenant, entity_id)."""

Part: TypeAlias = Literal["attributes", "edges", "text"]
"""What a store may keep of an entity. With its attributes go its type, its history and the names of its spaces."""

ALL_PARTS: frozenset[Part] = frozenset(("attributes", "edges", "text"))


class Kept(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An event that had an effect, as a history keeps it. `stamp` is the effective one; `body` is MessagePack.

    Garbage collection leaves it out: there are many, and they refer to nothing that refers back.
    """

    sequence: int
    event_id: str
    op: str
    agent: str
    site: str
    stamp: int
    recorded_at: int
    valid_from: int
    valid_to: int | None
    body: bytes
    hub: int | None
    saw: int | None

    @property
    def mark(self) -> Mark:
        return self.stamp, self.site

    def change(self) -> Change:
        """What merging needs of it."""
        return Change(
            self.sequence,
            self.recorded_at,
            self.site,
            self.stamp,
            self.valid_from,
            self.valid_to,
            wire.decode_as(self.body, Patch) if self.op == "put" else None,
            self.hub,
            self.saw,
        )


class Quarantined(NamedTuple):
    """An event that is stamped too far ahead: it is in the log and has no effect."""

    sequence: int
    tenant: str
    entity_id: str
    event_id: str
    site: str
    hlc: int


class Stored(msgspec.Struct, array_like=True, gc=False):
    """What a store that is outside keeps for merging, beside an entity's history."""

    ledger: Ledger
    alive: bool
    type: str | None
    exact_from: int
    version: int
    size: int
    ends: int
    """When the last of its puts ends, in ms; `NEVER` where one does not."""


class Touched(msgspec.Struct, gc=False):
    """An entity that records are merged into. A new one has the defaults.

    To write it: where it is `cleared`, drop all that the store has of it. Where a forget `erases`, drop the events with
    marks before that, and all edges. Then put in place what it is now: `state`, of whose edges only those are there
    that the store lacks (put them in where their keys win), and the events that were `added`.
    """

    state: State = msgspec.field(default_factory=State)
    version: int = 0
    partition: int = 0
    size: int = 0
    ends: int = 0
    held: int | None = None
    held_state: HeldState | None = None
    text_before: str | None = None
    """The text that the store has of it."""
    history: list[Kept] | None = None
    """The events that the store has, and that are left; `None` while nobody asked for them."""
    added: list[Kept] = []
    cleared: bool = False
    erases: Mark | None = None

    def __post_init__(self) -> None:
        self.text_before = self.state.text

    @classmethod
    def of(cls, stored: Stored) -> Touched:
        """One that was stored before; of its attributes, text and edges only what changes will be there."""
        state = State(stored.ledger, stored.alive, stored.type, None, {}, {}, stored.exact_from)
        return cls(state, version=stored.version, size=stored.size, ends=stored.ends)

    def stored(self) -> Stored:
        """What to store of it."""
        state = self.state
        kept = state.ledger, state.alive, state.type, state.exact_from
        return Stored(*kept, self.version, self.size, self.ends)

    @property
    def is_gone(self) -> bool:
        """Whether nothing is to be kept of it, not even that it was."""
        return self.cleared and not self.version and self.held_state is None


History: TypeAlias = Callable[[Name], Iterable[Kept]]
"""Reads the events that the store has of an entity."""


class Merger:
    """Takes records in log order. Used for one transaction.

    `loaded` holds every entity that they name. `site` is where the log is; `put_aside` how many events of each site are
    quarantined.
    """

    def __init__(
        self,
        loaded: dict[Name, Touched],
        *,
        site: str,
        put_aside: Mapping[str, int],
        parts: frozenset[Part] = ALL_PARTS,
    ) -> None:
        self._loaded = loaded
        self._site = site
        self._put_aside = put_aside
        self._parts = parts
        self._is_partial = "attributes" not in parts
        self._has_edges = "edges" in parts
        self.dirty: dict[Name, Touched] = {}
        self.rejected = 0
        self.erasures: list[tuple[int, int]] = []
        """The sequence of each forget and how many events it erased; with 0 of what came after the forget that wins."""
        self.quarantined: dict[int, Quarantined] = {}
        """Events to note as put aside, by sequence; after those of `restamped` were taken off."""
        self.restamped: list[tuple[str, str]] = []
        """(site, event id) of events that may have been put aside before, and came again."""
        self.uncounted: Counter[str] = Counter()
        """How many events of each site were put aside by these records."""

    def take(self, records: Iterable[Record], history: History) -> None:
        """Merge records. One that breaks a rule changes only the entity's version, and is counted.

        `history` is not kept: a batch whose merger kept one of its methods was left to the garbage collector, with all
        that it had read.
        """
        for record in records:
            self._take(record, history)

    def _take(self, record: Record, history: History) -> None:
        event = record.event
        name = event.tenant, event.entity_id
        entity = self.dirty[name] = self._loaded[name]
        entity.partition = record.partition
        if event.op == "hold":
            entity.held = event.body.get("bytes", 0)
            entity.held_state = event.body.get("state", "whole")
            return
        if event.op == "release":
            self._release(entity)
            return
        entity.version = record.sequence
        if record.quarantined:
            self._quarantine(record)
            return
        if self._put_aside.get(event.site) or self.uncounted.get(event.site):  # it may have been stamped anew
            self._restamp(event)
        if not self._merge(name, entity, record, history):
            tombstone = entity.state.ledger.tombstone
            if event.op == "forget" or (tombstone is not None and (event.hlc, event.site) < tombstone):
                self.erasures.append((record.sequence, 0))

    def _merge(self, name: Name, entity: Touched, record: Record, history: History) -> bool:
        """Merge one event; whether it has an effect."""
        event = record.event
        ledger = entity.state.ledger
        try:
            patch = merge.patch_of(event)
            if self._is_partial:
                patch = parts_of(patch, self._parts)
            body = body_of(event, patch, whole=not self._is_partial)
        except (ValueError, OverflowError, RecursionError) as error:
            self.rejected += 1
            log.warning("event %d of the log is skipped: %s", record.sequence, error)
            return False
        if merge.is_repeated(record, ledger.births, ledger.stamps):
            return False
        change = merge.stamped(record, patch, ledger.stamps)
        if entity.state.is_forgotten(change):
            return False
        if change.patch is None:
            self._forget(name, entity, change, history)
        else:
            entity.state.put_document(change)
            if self._has_edges:
                entity.state.put_edges(change)
            entity.ends = max(entity.ends, _end_of(change))
            if self._is_partial and not says_anything(patch):
                return True
        entity.size += len(body)
        entity.added.append(
            Kept(
                record.sequence,
                event.id,
                event.op,
                event.agent,
                event.site,
                change.stamp,
                record.recorded_at,
                change.valid_from,
                change.valid_to,
                body,
                change.hub,
                change.saw,
            )
        )
        return True

    def _quarantine(self, record: Record) -> None:
        event = record.event
        told = Quarantined(record.sequence, event.tenant, event.entity_id, event.id, event.site, event.hlc)
        self.quarantined[record.sequence] = told
        self.uncounted[event.site] += 1

    def _restamp(self, event: Event) -> None:
        for sequence, told in list(self.quarantined.items()):
            if (told.site, told.event_id) == (event.site, event.id):
                del self.quarantined[sequence]
                self.uncounted[event.site] -= 1
        self.restamped.append((event.site, event.id))

    def _release(self, entity: Touched) -> None:
        """Hold it no more: all of it goes, but what this site wrote itself, and what that was merged with.

        That is noted: where the entity is forgotten, the device must hear of it.
        """
        if self._site in entity.state.ledger.stamps:
            entity.held, entity.held_state = 0, "some"
            return
        entity.state = State()
        entity.version = entity.size = entity.ends = 0
        entity.held = entity.held_state = None
        entity.history, entity.added, entity.cleared, entity.erases = [], [], True, None

    def _forget(self, name: Name, entity: Touched, change: Change, history: History) -> None:
        """Erase what the forget wins over, and bring up what is left."""
        if entity.history is None:
            entity.history = list(history(name))
        had = len(entity.history) + len(entity.added)
        entity.history = [kept for kept in entity.history if kept.mark >= change.mark]
        entity.added = [kept for kept in entity.added if kept.mark >= change.mark]
        left = [*entity.history, *entity.added]
        self.erasures.append((change.sequence, had - len(left)))
        entity.erases = change.mark if entity.erases is None else max(entity.erases, change.mark)
        entity.size = sum(len(kept.body) for kept in left)
        before, kind = entity.state.ledger, entity.state.type
        changes = [kept.change() for kept in left]
        entity.ends = max((_end_of(each) for each in changes if each.patch is not None), default=0)
        entity.state = merge.fold([*changes, change])
        ledger = entity.state.ledger
        ledger.stamps, ledger.births, ledger.gone = before.stamps, before.births, kind or before.gone
        ledger.types |= before.types  # also where something is left: it was written under them


def _end_of(change: Change) -> int:
    return merge.NEVER if change.valid_to is None else change.valid_to


def parts_of(patch: Patch, parts: frozenset[Part]) -> Patch:
    """What a patch says of these parts, which are not the attributes, and of the type."""
    with_edges = "edges" in parts
    return Patch(
        type=patch.type,
        edges=patch.edges if with_edges else [],
        remove_edges=patch.remove_edges if with_edges else [],
        text=patch.text if "text" in parts else None,
    )


def says_anything(patch: Patch) -> bool:
    """Whether a patch says more than a type, where attributes and vectors are left out."""
    return bool(patch.edges or patch.remove_edges) or patch.text is not None


def body_of(event: Event, patch: Patch, *, whole: bool) -> bytes:
    """The body as a history keeps it: as it came with fields unknown to this version (those of the event are its
    `extra`), and of vectors only the dimensions; or where it is not `whole`, what the patch says.

    Raises `ValueError` or `OverflowError` where the body cannot be encoded.
    """
    if event.op == "forget":
        return b"\x80"  # an empty map
    if not whole:
        return wire.encode(patch)
    body: dict[str, Any] = event.body
    if patch.vectors:
        body = body | {"vectors": {name: {"dimension": len(v)} for name, v in patch.vectors.items()}}
    return wire.encode({"extra": event.extra} | body if event.extra else body)
