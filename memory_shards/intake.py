"""The intake: which messages of the log become records of a shard, and what their marks say of other sites.

What cannot be read, or says another origin than its subject, is counted and skipped. Looks at `origins` and `mnemesh`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from memory_shards.origins import Origins
from mnemesh.atomic_batch import whole_of
from mnemesh.errors import MnemeshError
from mnemesh.event import Record, decode_event
from mnemesh.jetstream import SiteKind, Stored
from mnemesh.origin import (
    Mark,
    Place,
    birth_of,
    check_carried,
    decode_mark,
    hub_sequence_of,
    is_born_here,
    is_put_aside,
    place_of,
)

logger = logging.getLogger("mnemesh.intake")


class Intake:
    """Reads the log of `site` for some partitions, and tells `origins` how far it has those of others."""

    def __init__(self, *, site: str, kind: SiteKind, partitions: Iterable[int], origins: Origins) -> None:
        self._site = site
        self._kind: SiteKind = kind
        self._is_hub = kind == "hub"
        self._partitions = {str(partition): partition for partition in partitions}
        self._origins = origins
        self.undecodable = 0

    def of_one_store(self) -> Intake:
        """One that reads the same for a store that follows the log by itself; what it counts, nobody is told."""
        return Intake(
            site=self._site, kind=self._kind, partitions=self._partitions.values(), origins=Origins(may_go_back=True)
        )

    def records(self, batch: Sequence[Stored]) -> list[Record]:
        """The events of our partitions."""
        records = []
        unmarked: dict[str, Record] = {}
        for stored in batch:
            place = place_of(stored.message.subject)
            partition = self._partitions.get(place.partition)
            if partition is None:
                if place.is_mark:
                    self.note(stored)
                    unmarked.pop(place.origin, None)
                continue
            try:
                record = self._record(stored, place, partition)
            except MnemeshError as error:
                self.undecodable += 1
                logger.error("event %d of the log of %s cannot be taken: %s", stored.sequence, self._site, error)
                continue
            records.append(record)
            if self._is_hub and record.birth is not None:
                unmarked[place.origin] = record
        for origin, record in unmarked.items():  # sent alone: the mark follows, and readers need not wait for it
            if record.birth is not None:
                mark = Mark(incarnation=record.birth.incarnation, sequence=record.birth.sequence)
                self._origins.note(origin, record.sequence, mark)
        return records

    def note(self, stored: Stored) -> None:
        """Take in a mark."""
        try:
            mark = decode_mark(stored.message.data)
        except MnemeshError as error:
            logger.error("mark %d of the log of %s cannot be read: %s", stored.sequence, self._site, error)
        else:
            self._origins.note(place_of(stored.message.subject).origin, stored.sequence, mark)

    def _record(self, stored: Stored, place: Place, partition: int) -> Record:
        event = decode_event(stored.message.data)
        if is_born_here(stored.message, place, self._site):
            hub = stored.sequence if self._is_hub else None
            write = whole_of(stored.message)
            return Record(stored.sequence, stored.recorded_at, partition, event, hub=hub, write=write)
        check_carried(event, place)
        return Record(
            stored.sequence,
            stored.recorded_at,
            partition,
            event,
            birth_of(stored.message, place.origin),
            hub=stored.sequence if self._is_hub else hub_sequence_of(stored.message),
            quarantined=self._is_hub and is_put_aside(stored.message, event, stored.recorded_at),
        )
