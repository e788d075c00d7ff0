"""The event: one write as the log holds it, with every part that any store needs.

A `put` is a patch, a `forget` a tombstone. A device's log also notes of entities that its hub feeds it how much of one
it will `hold` from now on, or that it will `release` it; these stay in that log. The body of a put may hold

    type: text                          attributes: {name: value}, null removes
    edges: [{relation, target_id, properties?}]   remove_edges: [{relation, target_id}]
    vectors: {space: float32 vector}    remove_vectors: [space]      text: text, "" removes

`schema` is the version of this layout. Fields that this version does not know are kept in `extra` and written out
again, so an event survives a passage through older code. Looks at `wire`, `errors` and `clock`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec

from mnemesh import wire
from mnemesh.clock import stamp_ms
from mnemesh.errors import BadRequest, MnemeshError

SCHEMA = 1

LARGEST = 8 * 1024 * 1024 - 64 * 1024
"""Bytes of an event: what a message takes at most, with room for subjects, headers and what frames it on its way."""

Number: TypeAlias = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
"""What a column of SQLite holds: one event with a larger one would keep every store from going on."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One write. Times are milliseconds since 1970; `hlc` is a stamp of `mnemesh.clock`.

    `saw` is up to where a device had its hub's log when it wrote this; a hub has seen all of its own.
    """

    id: str
    tenant: str
    entity_id: str
    op: Literal["put", "forget", "hold", "release"]
    agent: str
    site: str
    hlc: Number
    body: dict[str, Any] = {}
    valid_from: Number | None = None
    valid_to: Number | None = None
    saw: Number | None = None
    schema: int = SCHEMA
    extra: dict[str, Any] = {}

    def encode(self) -> bytes:
        """MessagePack, unknown fields included."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        for name in ("valid_from", "valid_to", "saw"):
            if fields[name] is None:
                del fields[name]
        return wire.encode(fields | self.extra if self.extra else fields)

    @property
    def valid_from_ms(self) -> int:
        """When it began to be true: as said by the writer, else when it was written."""
        return stamp_ms(self.hlc) if self.valid_from is None else self.valid_from


class Birth(NamedTuple):
    """Where an event was born: the log (its site and incarnation, as one text), and the event's sequence there."""

    log: str
    sequence: int

    @property
    def incarnation(self) -> str:
        return self.log.partition(" ")[2]


class Record(NamedTuple):
    """An event at its place in a site's log. `recorded_at` is the log's time, in milliseconds since 1970.

    `birth` is there where the event was carried here; `hub` is its sequence in the hub's log, as far as that is known.
    One that is `quarantined` has no effect: it is stamped too far ahead of the hub's clock. Those of one atomic `write`
    have its id, and have their effects together.
    """

    sequence: int
    recorded_at: int
    partition: int
    event: Event
    birth: Birth | None = None
    hub: int | None = None
    quarantined: bool = False
    write: str = ""

    @property
    def log(self) -> str:
        """The log that has it at its place: one of its site, which may have had several."""
        return self.event.site if self.birth is None else self.birth.log


_FIELDS = tuple(name for name in Event.__struct_fields__ if name != "extra")
_KNOWN = frozenset(_FIELDS)


def decode_event(payload: bytes) -> Event:
    """The event in a log message, which is MessagePack. Raises `BadRequest` if it is none."""
    if wire.is_json(payload):
        raise BadRequest("an event is MessagePack, not JSON")
    fields = wire.decode(payload)
    if isinstance(fields, dict) and not _KNOWN.issuperset(fields):
        unknown = fields.keys() - _KNOWN
        fields = {name: fields[name] for name in fields.keys() & _KNOWN} | {
            "extra": {name: fields[name] for name in unknown}
        }
    return wire.convert(fields, Event)


def event_in(payload: bytes) -> Event | None:
    """The event in a log message; `None` if it is none, of which the shards tell."""
    try:
        return decode_event(payload)
    except MnemeshError:
        return None
