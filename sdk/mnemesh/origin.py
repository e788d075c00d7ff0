"""Where the messages of a log come from: an event's origin, and the mark after each batch of an origin.

An event keeps the subject of the site where it was born, wherever it is carried, and its birth in a header.
A mark says up to where the origin's log is in this one, filtered events included. It is the last message of each batch
that a carrier appends, in the same commit, compared with the mark before: so whatever is sent twice is stored once. An
event that an uplink sends alone comes before its mark (`services.uplinks`).
Looks at `subjects`, `wire`, `clock`, `event` and `connection`.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, NamedTuple, TypeAlias

import msgspec

from mnemesh import subjects, wire
from mnemesh.clock import is_too_far_ahead
from mnemesh.connection import Message
from mnemesh.errors import BadRequest, MnemeshError
from mnemesh.event import Birth, Event, Number
from mnemesh.ids import partition_of_tokens, to_token

BORN = "Mnemesh-Born"
"""Header: the event's sequence in the log of its origin, and that log's incarnation. Absent in that log itself."""

HUB_SEQUENCE = "Mnemesh-Hub-Sequence"
"""Header: the event's sequence in the hub's log, on what a hub sends its devices."""


FORGETS = "Mnemesh-Forgets"
"""Header: the event is a forget. By a rollup it also erases what its site wrote before, unless it was stamped anew."""

ASIDE = "Mnemesh-Aside"
"""Header: the event is to have no effect, says the device that wrote it: it was stamped while its clock was ahead."""


class Place(NamedTuple):
    """What the subject of a log's message says. `partition` is a token; a mark has neither that nor what follows it."""

    origin: str
    tenant: str = ""
    partition: str = ""
    entity: str = ""
    is_holding: bool = False

    @property
    def is_mark(self) -> bool:
        return not self.partition

    @property
    def is_event(self) -> bool:
        return not (self.is_mark or self.is_holding)


def place_of(subject: str) -> Place:
    """The place of a message of any log."""
    parts = subject.split(".")
    if len(parts) == _MARK_TOKENS:
        return Place(parts[-2])
    return Place(parts[_ORIGIN], parts[-3], parts[-2], parts[-1], len(parts) == _HOLDING_TOKENS)


_MARK_TOKENS = subjects.log_mark("").count(".") + 1
_HOLDING_TOKENS = subjects.log_holding("", "", "", "").count(".") + 1
_ORIGIN = subjects.log_mark("*").split(".").index("*")


def is_born_here(message: Message, place: Place, site: str) -> bool:
    """Whether a message was written to this log of a site first. What came back from an earlier log of it was not."""
    return place.origin == site and BORN not in message.headers


def is_put_aside(message: Message, event: Event, recorded_at: int) -> bool:
    """Whether an event that a hub recorded then is quarantined there."""
    return ASIDE in message.headers or is_too_far_ahead(event.hlc, recorded_at)


def check_carried(event: Event, place: Place) -> None:
    """Raise `BadRequest` where an event says another place than its subject, which is what the broker checked.

    Notes of what a device holds are for its own log alone.
    """
    token = to_token(event.entity_id)
    is_note = event.op in ("hold", "release")
    told = Place(event.site, event.tenant, str(partition_of_tokens(event.tenant, token)), token, is_note)
    if is_note and place.is_event:
        raise BadRequest(f"a note of what is held came as an event of {place.origin}")
    if told != place:
        raise BadRequest(f"it says to be of {'.'.join(told[:4])[:300]}, and came as {'.'.join(place[:4])[:300]}")


Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=255)]
"""Bounded, for the mark of one device goes to all the others."""


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """Up to where the log of an origin is in this one.

    `incarnation` tells that log from another of the same name made later (its stream's creation time); `last` is a hash
    of the last message, by which a copy of a log that went its own way is known. `hlc` is the newest stamp that came.
    `by` is the site by way of which this came here, where that is not the origin.
    """

    incarnation: Name
    sequence: Number
    last: Name = ""
    hlc: Number = 0
    by: Name = ""

    def encode(self) -> bytes:
        return wire.encode(self)


def decode_mark(payload: bytes) -> Mark:
    """The mark in a message. Raises `BadRequest` if it is none."""
    return wire.decode_as(payload, Mark)


def mark_in(message: Message) -> Mark | None:
    """The mark in a message; `None` if it is none."""
    try:
        return decode_mark(message.data)
    except MnemeshError:
        return None


def hash_of(message: Message) -> str:
    """What a mark says of a message, whose content may not be for others to read."""
    return hashlib.blake2b(message.data, digest_size=8).hexdigest()


def born(sequence: int, incarnation: str) -> str:
    """The value of the header `BORN`."""
    return f"{sequence} {incarnation}"


def birth_of(message: Message, origin: str) -> Birth | None:
    """Where an event was born, if it says so. Raises `BadRequest` where it says nonsense."""
    text = message.headers.get(BORN)
    if text is None:
        return None
    sequence, _, incarnation = text.partition(" ")
    if not sequence.isdecimal() or len(text) > _LONGEST_BORN or int(sequence) > _LARGEST:
        raise BadRequest(f"{BORN} must be a sequence and an incarnation, not {text[:80]!r}")
    return Birth(f"{origin} {incarnation}", int(sequence))


def hub_sequence_of(message: Message) -> int | None:
    """The event's place in the hub's log, if it says so."""
    text = message.headers.get(HUB_SEQUENCE, "")
    return int(text) if text.isdecimal() else None


_LONGEST_BORN = 80
_LARGEST = (1 << 63) - 1
