"""The uplinks of a hub: what its devices send is looked at, and appended to the log under their names.

    a batch: the next events of a device, and up to where that is → check each event → events and mark in one commit

The mark is stored only if the mark before it is the one that the device knows: so what is sent twice is stored once. An
event that comes alone is stored without a batch, which would cost the disk several times as much: first itself, stored
only if the mark is the one that the device knows, and then the mark. Where that did not come, the hub looks for it.

A device says nothing of subjects and headers: all that it sends is a payload. Its vectors are settled in the spaces of
this site as a gateway's are; one that does not fit is left out, and the rest of its event is taken. Looks at
`documents`, `spaces`, `memory_shards.merge` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from memory_shards.merge import Patch, patch_of
from mnemesh import subjects, wire
from mnemesh.atomic_batch import ROLLUP, Outgoing, publish_all, without_erased
from mnemesh.clock import is_too_far_ahead, wall_ms
from mnemesh.connection import Link
from mnemesh.errors import BadRequest, Conflict, Denied, MnemeshError, TooLarge
from mnemesh.event import LARGEST, Event, decode_event
from mnemesh.ids import check_name, partition_of_tokens, to_token
from mnemesh.inbox import Inbox
from mnemesh.log_writer import COMPARED, EXPECTED
from mnemesh.messages import IndexKind, Metric, OwnEvent, OwnEvents, Refused, Uplinked
from mnemesh.origin import ASIDE, BORN, FORGETS, Mark, born
from mnemesh.stats import Gauge
from services.documents import check_plain
from services.spaces import Spaces

logger = logging.getLogger("mnemesh.uplinks")

COMMIT_S = 5.0
A_SLICE = 16 * 1024
"""Bytes of a batch that are looked at before others get their turn: about 2 ms. A larger event, a thread looks at."""
LONGEST_ID = 300
"""Characters of an event's id: names of tenant and agent, the caller's name for the write, its place in a request."""


class _Settings(msgspec.Struct, frozen=True):
    """What an event says of the space of one of its vectors, where it is not as usual."""

    metric: Metric = "cosine"
    index: IndexKind = "auto"
    model: str | None = None


class _Checked(NamedTuple):
    """An event that a device may bring, with its body and the spaces of its vectors as this version knows them."""

    event: Event
    patch: Patch
    spaces: dict[str, _Settings]


_AS_USUAL = _Settings()


class Uplinks:
    """Takes what devices send. The owner follows `spaces`. `refused` is what came of each device since the start."""

    def __init__(self, link: Link, inbox: Inbox) -> None:
        self._link = link
        self._inbox = inbox
        self.spaces = Spaces()
        self.refused: Counter[str] = Counter()

    def gauges(self) -> list[Gauge]:
        return [
            Gauge(
                "uplink_refused_events",
                "Events of a device that its hub refused since it started",
                lambda count=count: count,  # type: ignore[misc]
                {"site": device},
            )
            for device, count in self.refused.items()
        ]

    async def take(self, device: str, batch: OwnEvents, tenants: Collection[str]) -> Uplinked:
        """Append a device's next events, those that are in order. It may have these `tenants`, or all if empty.

        Raises `Conflict` where its mark is not at the place that it knows, or it does not put aside what the hub's
        clock says to, and what `publish_all` does.
        """
        places = [0, *(event.sequence for event in batch.events), batch.sequence + 1]
        if any(before >= after for before, after in pairwise(places)):
            raise BadRequest("the sequences of a device's events grow, up to that of the mark")
        events, refused = await self._look_at(device, batch, tenants)
        place = await self._append(device, batch, events)
        self.refused[device] += len(refused)
        return Uplinked(place=place, refused=refused)

    async def _look_at(
        self, device: str, batch: OwnEvents, tenants: Collection[str]
    ) -> tuple[list[Outgoing], list[Refused]]:
        """The messages for those that are taken, and why the others are not, or not as they came."""
        events: list[Outgoing] = []
        refused: list[Refused] = []
        looked_at = 0
        for own in batch.events:
            looked_at += len(own.payload)
            try:
                if len(own.payload) > A_SLICE:
                    found = await asyncio.to_thread(checked, own.payload, device, tenants)
                else:
                    found = checked(own.payload, device, tenants)
            except (MnemeshError, ValueError, OverflowError, RecursionError) as error:
                refused.append(Refused(sequence=own.sequence, reason=str(error)[:300]))
                continue
            event, misfit = await self._fitted(found) if found.patch.vectors else (found.event, "")
            if not own.aside and is_too_far_ahead(event.hlc, wall_ms()):
                raise Conflict(f"event {own.sequence} is stamped ahead of the hub's clock, and not put aside")
            if misfit:
                refused.append(Refused(sequence=own.sequence, reason=misfit))
                own = OwnEvent(own.sequence, event.encode(), own.aside)
            events.append(_message(own, event, batch.incarnation))
            if looked_at > A_SLICE:
                looked_at = 0
                await asyncio.sleep(0)
        for each in refused:
            logger.error("event %d of %s is refused: %s", each.sequence, device, each.reason)
        return events, refused

    async def _append(self, device: str, batch: OwnEvents, events: list[Outgoing]) -> int:
        """Events and mark; returns where the mark is."""
        after = {EXPECTED: str(batch.place), COMPARED: subjects.log_mark(device)}
        said = Mark(incarnation=batch.incarnation, sequence=batch.sequence, last=batch.last, hlc=batch.hlc)
        mark = Outgoing(subjects.log_mark(device), said.encode(), {**after, ROLLUP: "sub"})
        if len(events) != 1:
            return await self._publish(without_erased([*events, mark]))
        (alone,) = events
        await self._publish([alone._replace(headers={**alone.headers, **after})])
        return await self._publish([mark])

    async def _fitted(self, found: _Checked) -> tuple[Event, str]:
        """An event without the vectors that their spaces here cannot hold, and why; else as it is."""
        event = found.event
        misfits: dict[str, BadRequest] = {}
        for name, vector in found.patch.vectors.items():
            settings = found.spaces.get(name, _AS_USUAL)
            wanted = {"metric": settings.metric} | ({"model": settings.model} if settings.model else {})
            try:
                await self.spaces.settle(
                    self._inbox, event.tenant, name, wire.as_vector(vector), wanted, {"index": settings.index}
                )
            except BadRequest as error:
                misfits[name] = error
        if not misfits:
            return event, ""
        vectors = {name: vector for name, vector in event.body["vectors"].items() if name not in misfits}
        kept = replace(event, body={**event.body, "vectors": vectors})
        return kept, f"it is taken but for vectors: {'; '.join(map(str, misfits.values()))}"[:300]

    async def _publish(self, messages: list[Outgoing]) -> int:
        return await publish_all(self._link, self._inbox, messages, budget_s=COMMIT_S)


def checked(payload: bytes, device: str, tenants: Collection[str]) -> _Checked:
    """An event that a device may bring, and every store can hold. Raises `BadRequest`, `Denied`, `TooLarge`."""
    if len(payload) > LARGEST:
        raise TooLarge(f"it has {len(payload)} bytes; an event has at most {LARGEST}")
    event = decode_event(payload)
    check_name("tenant", event.tenant)
    check_name("agent", event.agent)
    if event.site != device:
        raise Denied(f"it was born at {event.site[:64]!r}")
    if tenants and event.tenant not in tenants:
        raise Denied(f"{device} was not enrolled for tenant {event.tenant!r}")
    if event.op not in ("put", "forget"):
        raise BadRequest(f"a device keeps what it does not say of itself: {event.op}")
    if not 0 < len(event.id) <= LONGEST_ID:
        raise BadRequest(f"its id has {len(event.id)} characters; it must have 1 to {LONGEST_ID}")
    patch = patch_of(event)
    for entity_id in (event.entity_id, *(edge.target_id for edge in patch.edges)):
        to_token(entity_id)
    for space in patch.vectors:
        check_name("space", space)
    check_plain({name: part for name, part in event.body.items() if name != "vectors"}, "body")
    check_plain(event.extra, "the event")
    spaces = wire.convert(event.body["spaces"], dict[str, _Settings]) if "spaces" in event.body else {}
    return _Checked(event, patch, spaces)


def _message(own: OwnEvent, event: Event, incarnation: str) -> Outgoing:
    token = to_token(event.entity_id)
    place = event.tenant, partition_of_tokens(event.tenant, token), token
    headers = {BORN: born(own.sequence, incarnation)}
    if own.aside:
        headers[ASIDE] = "1"
    elif event.op == "forget":
        headers |= {FORGETS: "1", ROLLUP: "sub"}
    return Outgoing(subjects.log_event(event.site, *place), own.payload, headers)
