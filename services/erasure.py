"""Erasure at one site: what a forget leaves behind in the log is purged, and a receipt says so.

    follow the log → ask the shards for forgets in it → wait until every store has that → purge what it erased → receipt

A forget wins over what was written before it, at whatever site: the stores know which that is. Of each origin, under
whose subject they are, the erased events are the first ones, so one purge a subject takes them out. How far this has
come is kept in the receipts' bucket, so a site that was away erases what it missed, and one that was killed does it
again. What only a message that goes can tell is therefore told first.

Looks at `router.inventory` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from mnemesh import kv, subjects
from mnemesh.asker import Asker
from mnemesh.errors import Conflict, MnemeshError
from mnemesh.event import Event, decode_event
from mnemesh.follower import StreamShrank
from mnemesh.inbox import Inbox
from mnemesh.jetstream import (
    ALL,
    Stored,
    StreamState,
    api,
    counts_of,
    delete_message,
    last_of_each,
    next_of,
    stream_state,
)
from mnemesh.messages import Left, Receipt
from mnemesh.origin import Mark, birth_of, mark_in, place_of
from mnemesh.stats import Gauge
from router.inventory import Inventory

logger = logging.getLogger("mnemesh.erasure")

LOOK_S = 0.5
"""How often the log is read on. What is forgotten is gone from the stores at once; its log may wait so long."""

CHECK_S = 30.0
"""How often it is made sure, where nothing comes, that the log is the one that was read, and was not restored."""

TOLD_AFTER = 20
"""Failures in a row after which an operator is told. A shard that starts again is no failure to speak of."""

SAVE_AFTER = 5_000
"""Messages after which the place is kept although nothing was forgotten, so that a start need not read them again."""

AT_ONCE = 16
"""Entities of which something is erased at the same time."""

DELETED_AT_ONCE = 64

PLACE = "place"
"""The key under which the bucket holds up to where the log was gone through."""


class _Due(NamedTuple):
    """A forget, or what came after the forget that wins over it."""

    stored: Stored
    event: Event


class Eraser:
    """Erases at one site. `run` for ever.

    `on_late` hears of what other sites wrote and came after the forget that wins over it. `next_after` reads the log
    of an incarnation on from a sequence.
    """

    def __init__(
        self,
        asker: Asker,
        inventory: Inventory,
        *,
        site: str,
        on_late: Callable[[Event], Awaitable[None]] | None = None,
        next_after: Callable[[int, str], Awaitable[list[Stored]]] | None = None,
    ) -> None:
        self._on_late = on_late
        self._next_after = next_after or self._got_after
        self._asker = asker
        self._inventory = inventory
        self._site = site
        self._log = subjects.log_stream(site)
        self.place = 0
        """Up to where all that was forgotten is erased."""
        self._upto: dict[str, Mark] = {}
        """The same in the logs of other sites, as far as theirs are in this one."""
        self.erased = 0
        self._saved = self._read = 0
        self._unsaved = False

    def upto(self, origin: str, incarnation: str) -> int:
        """Up to where all is erased that was forgotten in the log of another site; 0 if that is another log."""
        mark = self._upto.get(origin)
        return mark.sequence if mark is not None and mark.incarnation == incarnation else 0

    def gauges(self) -> list[Gauge]:
        return [
            Gauge("erased", "Forgets that were carried out since the start", lambda: self.erased),
            Gauge("erasure_place", "Up to where what the log forgets is erased from it", lambda: self.place),
        ]

    async def run(self) -> None:
        """Erase for ever. Raises `StreamShrank` where the log is not the one that was read; run it again then."""
        await self._begin()
        failures = 0
        while True:
            try:
                more = await self._go_on()
                failures = 0
            except MnemeshError as error:  # mostly of a shard that is away
                more = False
                failures += 1
                if failures == TOLD_AFTER:
                    logger.error("nothing more is erased from the log of %s for now: %s", self._site, error)
            if not more:
                await asyncio.sleep(LOOK_S)

    async def _begin(self) -> None:
        inbox = self._asker.inbox
        state = await stream_state(inbox, self._log)
        self._incarnation = state.incarnation
        self._checked_at = asyncio.get_running_loop().time()
        self.place = self._saved = self._read = await erased_upto(inbox, state)
        for stored in await last_of_each(inbox, self._log, subjects.log_mark("*")):
            if stored.sequence <= self.place:
                self._note(stored)

    async def _go_on(self) -> bool:
        """Go through what the log has next. Returns whether it has more."""
        some = await self._next_after(self._read, self._incarnation)
        if some:
            await self._take(some)
        else:
            await self._check_log()
        await self._keep_place()
        return bool(some) and some[-1].following > 0

    async def _got_after(self, sequence: int, _incarnation: str) -> list[Stored]:
        return await next_of(self._asker.inbox, self._log, ALL, after=sequence)

    async def _check_log(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._checked_at > CHECK_S:
            self._checked_at = now
            state = await stream_state(self._asker.inbox, self._log)
            if state.incarnation != self._incarnation or state.last_sequence < self._read:
                raise StreamShrank(f"{self._log} is not the one that was read up to {self._read}")

    async def _take(self, some: Sequence[Stored]) -> None:
        """Erase what the next messages of the log forget, and those among them that came too late."""
        forgotten = set(await self._inventory.forgotten([stored.sequence for stored in some]))
        due: dict[tuple[str, str], list[_Due]] = defaultdict(list)
        for stored in some:
            if stored.sequence in forgotten:
                event = decode_event(stored.message.data)
                due[event.tenant, event.entity_id].append(_Due(stored, event))
        entities = list(due.values())
        for start in range(0, len(entities), AT_ONCE):
            outcomes = await asyncio.gather(
                *map(self._erase, entities[start : start + AT_ONCE]), return_exceptions=True
            )
            if failures := [outcome for outcome in outcomes if outcome is not None]:
                raise failures[0]
        for stored in some:
            self._note(stored)
        self._read = some[-1].sequence
        self._unsaved |= bool(due)

    async def _keep_place(self) -> None:
        if self._unsaved or self._read - self._saved > SAVE_AFTER:
            place = f"{self._incarnation} {self._read}".encode()
            await kv.put(self._asker.inbox, subjects.RECEIPTS.name, PLACE, place)
            self._saved, self._unsaved = self._read, False
        self.place = self._read

    def _note(self, stored: Stored) -> None:
        """Note how far it is with another site's log, if this is a mark that tells."""
        place = place_of(stored.message.subject)
        if place.is_mark and (mark := mark_in(stored.message)) is not None:
            self._upto[place.origin] = mark

    async def _erase(self, due: Sequence[_Due]) -> None:
        """Erase what is due of one entity. Can be done again."""
        (first, event), (last, _) = due[0], due[-1]
        told = await self._inventory.erased(event.tenant, event.entity_id, [each.stored.sequence for each in due])
        outcomes = list(zip(due, told.events, strict=True))
        for each, events in outcomes:
            if each.stored.sequence not in told.has:
                await self._tell(each, events)
        left = {each.site: each for each in told.left}
        for subject, count in (await counts_of(self._asker.inbox, self._log, _anywhere(first))).items():
            await self._purge(subject, count, left.get(place_of(subject).origin), event, last.sequence)
        for each, events in outcomes:
            if each.stored.sequence in told.has:
                await self._tell(each, events)

    async def _tell(self, due: _Due, events: int) -> None:
        """Keep the receipt of a forget; of what came too late, tell whoever wants to hear of it."""
        stored, event = due
        if event.op == "forget":
            await keep(self._asker, self._receipt(stored, event, events))
            self.erased += 1
        elif self._on_late is not None and event.site != self._site:
            await self._on_late(event)

    def _receipt(self, stored: Stored, event: Event, events: int) -> Receipt:
        return Receipt(
            forget=self._name_of(stored, event),
            site=self._site,
            tenant=event.tenant,
            entity_id=event.entity_id,
            sequence=stored.sequence,
            events=events,
            erased_at=datetime.now(UTC),
        )

    async def _purge(self, subject: str, count: int, left: Left | None, event: Event, upto: int) -> None:
        """Take out of the log, up to a sequence, what the stores have no more of the `count` events of a subject.

        What comes before the first that is left need not be read for that, and mostly nothing else is to go.
        """
        before = upto + 1 if left is None else min(upto + 1, left.first)
        purged = 0
        if before > 1:  # nats-server 2.12.0 takes 1 for all
            purged = (await self._api("STREAM.PURGE", {"filter": subject, "seq": before}))["purged"]
        if count - purged > (left.count if left else 0):
            await self._purge_around(subject, event, upto)

    async def _purge_around(self, subject: str, event: Event, upto: int) -> None:
        """The same, message by message: also what came here a second time, or cannot be read."""
        inbox, after = self._asker.inbox, 0
        while sequences := [
            stored.sequence
            for stored in await next_of(inbox, self._log, subject, after=after)
            if stored.sequence <= upto
        ]:
            told = await self._inventory.erased(event.tenant, event.entity_id, sequences)
            gone = sorted(set(sequences).difference(told.has))
            for start in range(0, len(gone), DELETED_AT_ONCE):
                some = gone[start : start + DELETED_AT_ONCE]
                await asyncio.gather(*(delete_message(inbox, self._log, sequence) for sequence in some))
            after = sequences[-1]

    async def _api(self, verb: str, body: dict[str, object]) -> dict[str, Any]:
        return await api(self._asker.inbox, f"{verb}.{self._log}", body)

    def _name_of(self, stored: Stored, event: Event) -> str:
        """The same at every site: where the forget was born."""
        birth = birth_of(stored.message, event.site)
        log, sequence = birth or (f"{self._site} {self._incarnation}", stored.sequence)
        return f"{event.site}-{hashlib.blake2b(log.encode(), digest_size=4).hexdigest()}-{sequence}"


def _anywhere(stored: Stored) -> str:
    """The subjects of an entity's events, wherever they were born."""
    place = place_of(stored.message.subject)
    return subjects.log_event("*", place.tenant, place.partition, place.entity)


async def erased_upto(inbox: Inbox, log: StreamState) -> int:
    """Up to where the log of a site was gone through, and maybe `SAVE_AFTER` messages further.

    A log that was restored from an older copy may end before that.
    """
    held = await kv.get(inbox, subjects.RECEIPTS.name, PLACE)
    incarnation, _, place = (held or b"").decode().rpartition(" ")
    return min(int(place), log.last_sequence) if incarnation == log.incarnation else 0


async def keep(asker: Asker, receipt: Receipt) -> None:
    """Keep a receipt at this site, whoever's it is. Of a forget that came a second time the first one counts."""
    key = f"{receipt.forget}.{receipt.site}"
    with contextlib.suppress(Conflict):
        await kv.create(asker.inbox, subjects.RECEIPTS.name, key, msgspec.json.encode(receipt))
