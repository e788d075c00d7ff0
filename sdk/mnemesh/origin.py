"""Where the messages of a log come from: an event's origin, and the mark after each batch of an origin.

An event keeps the subject of the site where it was born, wherever it is carried, and its sequence there in a header.
A mark says up to where the origin's log is in this one, filtered events included. It is the last message of each batch
that a carrier appends, in the same commit, compared with the mark before: so whatever is sent twice is stored once.
Looks at `subjects`, `wire` and `connection`.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from mnemesh import subjects, wire
from mnemesh.connection import Message
from mnemesh.errors import BadRequest
from mnemesh.event import Event
from mnemesh.ids import partition_of_tokens, to_token

ORIGIN_SEQUENCE = "Mnemesh-Origin-Sequence"
"""Header: the event's sequence in the log of its origin. Absent in that log itself."""


class Place(NamedTuple):
    """What the subject of a log's message says. `partition` is a token; a mark has neither that nor what follows it."""

    origin: str
    tenant: str = ""
    partition: str = ""
    entity: str = ""

    @property
    def is_mark(self) -> bool:
        return not self.partition


def place_of(subject: str) -> Place:
    """The place of a message of any log."""
    parts = subject.split(".")
    return Place(parts[-2]) if len(parts) == _MARK_TOKENS else Place(*parts[-4:])


_MARK_TOKENS = subjects.log_mark("").count(".") + 1


def check_carried(event: Event, place: Place) -> None:
    """Raise `BadRequest` where an event says another place than its subject, which is what the broker checked."""
    token = to_token(event.entity_id)
    told = Place(event.site, event.tenant, str(partition_of_tokens(event.tenant, token)), token)
    if told != place:
        raise BadRequest(f"it says to be of {'.'.join(told)[:300]}, and came as {'.'.join(place)[:300]}")


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """Up to where the log of an origin is in this one.

    `incarnation` tells that log from another of the same name made later (its stream's creation time); `event_id` is
    that of the last event, by which a copy of a log that went its own way is known.
    """

    incarnation: str
    sequence: int
    event_id: str = ""

    def encode(self) -> bytes:
        return wire.encode(self)


def decode_mark(payload: bytes) -> Mark:
    """The mark in a message. Raises `BadRequest` if it is none."""
    return wire.decode_as(payload, Mark)


def origin_sequence_of(message: Message) -> int | None:
    """The event's sequence at its origin, where it was carried here."""
    text = message.headers.get(ORIGIN_SEQUENCE, "")
    return int(text) if text.isdecimal() else None
