"""The uplink: what is born on a device goes to its hub, once and in order, however often the link drops.

    ask the hub up to where it has our log → follow our log from there → send it in atomic batches, each with a mark

The hub's stream turns uplink subjects into those of its log. The mark that ends each batch is stored only if the mark
before it is the one that we know, in the same commit as the events: so a batch whose ack was lost is refused when it is
sent again, and a hub that was restored from a backup tells what it lacks. Nothing is kept on the device.

Looks at `mnemesh` only.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from contextlib import aclosing
from itertools import accumulate, takewhile

from mnemesh import subjects
from mnemesh.asker import Asker
from mnemesh.atomic_batch import MOST_BYTES_IN_BATCH, MOST_IN_BATCH, Outgoing, publish_batch
from mnemesh.clock import wall_ms
from mnemesh.errors import Conflict, MnemeshError, NotFound
from mnemesh.event import decode_event
from mnemesh.follower import Follower
from mnemesh.jetstream import Stored, WrongSequence, message_at, stream_state
from mnemesh.log_writer import EXPECTED, ROLLUP
from mnemesh.messages import AskPosition, Position
from mnemesh.origin import ORIGIN_SEQUENCE, Mark, place_of

logger = logging.getLogger("mnemesh.uplink")

ASK_S = 1.0
SEND_S = 5.0
RETRY_S = 0.5
TROUBLE_S = 5.0
CHECK_S = 5.0
BATCH_S = 1.0
"""For how long a batch may keep a line whose rate is known. A hub that hears nothing else for 10 s drops the line."""
FRAMING = 120
"""Bytes on the line for each event, beside its subject and itself: the headers of batch and origin, and NATS's own."""
COMPARED = "Nats-Expected-Last-Subject-Sequence-Subject"


class _Moved(MnemeshError):
    """The hub's position is not the one that we knew: ask it again."""


class Uplink:
    """Sends the events of one device. `run` for ever; the other attributes say how far it is."""

    def __init__(self, asker: Asker, *, site: str, bytes_per_s: float | None = None) -> None:
        self._asker = asker
        self._site = site
        self._bytes_per_s = bytes_per_s
        self._most_bytes = (
            MOST_BYTES_IN_BATCH if bytes_per_s is None else min(MOST_BYTES_IN_BATCH, bytes_per_s * BATCH_S)
        )
        self._log = subjects.log_stream(site)
        self._position: Position | None = None
        self._waiting_since_ms: int | None = None
        self._log_bytes = 0
        self.linked = False
        self.waiting = 0
        self.trouble = ""
        self.sent = 0

    @property
    def position(self) -> Position:
        """Up to where the hub had our log when it last said so."""
        return self._position or Position(hub="")

    @property
    def lag_s(self) -> float:
        """For how long the oldest event that the hub lacks has waited, as far as it was read."""
        return 0.0 if self._waiting_since_ms is None else max(0.0, (wall_ms() - self._waiting_since_ms) / 1000)

    async def run(self) -> None:
        """Send on for ever. What keeps it from that passes, or is `trouble` that somebody must mend."""
        while True:
            try:
                await self._send_on()
            except _Moved as error:
                logger.info("%s", error)
            except Conflict as error:
                if str(error) != self.trouble:
                    logger.error("the uplink stands still: %s", error)
                self.trouble = str(error)
                await asyncio.sleep(TROUBLE_S)
            except MnemeshError as error:
                if self.linked:
                    logger.warning("the uplink is interrupted: %s", error)
                self.linked = False
                await asyncio.sleep(random.uniform(RETRY_S / 2, RETRY_S))

    async def _send_on(self) -> None:
        """Send until something comes in the way: raises what."""
        position = await self._agreed()
        self.trouble = ""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send_from(position))
                tasks.create_task(self._check())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _check(self) -> None:
        """See now and then whether the hub is there, and still has what it had: it may have been restored."""
        while True:
            await asyncio.sleep(random.uniform(CHECK_S / 2, CHECK_S))
            self._log_bytes = (await stream_state(self._asker.inbox, self._log)).bytes
            before = self.position
            if (await self._asked()).place != before.place and before is self._position:
                raise _Moved(f"the hub does not have {self._site} up to where it had it")

    async def _agreed(self) -> Position:
        """Up to where the hub has our log. Raises `Conflict` where what it has is not ours."""
        position = await self._asked()
        state = await stream_state(self._asker.inbox, self._log)
        self.linked = True
        self._position = position
        self._incarnation = state.incarnation
        if position.incarnation != state.incarnation:
            if position.place:
                logger.warning("the hub knew another log of %s; this one is sent from its beginning", self._site)
            self._position = Position(hub=position.hub, place=position.place, incarnation=state.incarnation)
            return self._position
        if position.sequence > state.last_sequence:
            raise Conflict(
                f"the hub has {self._site} up to {position.sequence}, and this log ends at {state.last_sequence}: "
                "its folder was restored from an older copy, or another device has one"
            )
        if not await self._is_ours(position):
            raise Conflict(
                f"the hub has another event as {position.sequence} of {self._site} than this log: "
                "another device sends from a copy of its folder"
            )
        return position

    async def _asked(self) -> Position:
        told = AskPosition(waiting=self.waiting, lag_s=self.lag_s, clock_ms=wall_ms(), log_bytes=self._log_bytes)
        return await self._asker.ask(
            subjects.UPLINK_POSITION, subjects.uplink_position(self._site), told, budget_s=ASK_S
        )

    async def _is_ours(self, position: Position) -> bool:
        """Whether the hub's last event of ours is the one that we have there. It may have been erased since."""
        try:
            held = await message_at(self._asker.inbox, self._log, position.sequence)
        except NotFound:
            return True
        return decode_event(held.message.data).id == position.event_id

    async def _send_from(self, position: Position) -> None:
        """Follow our log from a position and send all of it."""
        inbox = self._asker.inbox
        follower = Follower(self._asker.link, inbox, self._log, after=position.sequence, incarnation=self._incarnation)
        async with aclosing(follower.batches(MOST_IN_BATCH - 1)) as batches:
            async for batch in batches:
                own = [stored for stored in batch if self._is_own(stored)]
                self.waiting = len(own) + batch[-1].following
                while own:
                    self._waiting_since_ms = own[0].recorded_at
                    some = _first_of(own, self._most_bytes)
                    position = await self._send(some, position)
                    own = own[len(some) :]
                    self.waiting -= len(some)
                self._waiting_since_ms = None

    def _is_own(self, stored: Stored) -> bool:
        place = place_of(stored.message.subject)
        return place.origin == self._site and not place.is_mark

    async def _send(self, events: Sequence[Stored], position: Position) -> Position:
        """One batch: events and the mark after them. Returns where the hub then stands."""
        began = asyncio.get_running_loop().time()
        last = events[-1]
        mark = Mark(incarnation=self._incarnation, sequence=last.sequence, event_id=decode_event(last.message.data).id)
        batch = [*map(self._event, events), self._mark(mark, position)]
        try:
            first = await publish_batch(self._asker.link, self._asker.inbox, batch, budget_s=SEND_S)
        except WrongSequence as error:  # a batch whose ack we did not get, or another device in our name
            raise _Moved(f"the hub has more of {self._site} than we knew") from error
        self.sent += len(events)
        self._position = position = Position(
            hub=position.hub,
            place=first + len(events),
            incarnation=mark.incarnation,
            sequence=mark.sequence,
            event_id=mark.event_id,
        )
        if self._bytes_per_s is not None:
            earliest = began + sum(map(_size, events)) / self._bytes_per_s
            await asyncio.sleep(earliest - asyncio.get_running_loop().time())
        return position

    def _event(self, stored: Stored) -> Outgoing:
        place = place_of(stored.message.subject)
        headers = {ORIGIN_SEQUENCE: str(stored.sequence)}
        if (rollup := stored.message.headers.get(ROLLUP)) is not None:
            headers[ROLLUP] = rollup  # a forget erases what the hub has of ours, as it did here
        return Outgoing(subjects.uplink_event(*place), stored.message.data, headers)

    def _mark(self, mark: Mark, position: Position) -> Outgoing:
        headers = {ROLLUP: "sub", EXPECTED: str(position.place), COMPARED: subjects.log_mark(self._site)}
        return Outgoing(subjects.uplink_mark(self._site), mark.encode(), headers)


def _first_of(events: Sequence[Stored], most_bytes: float) -> Sequence[Stored]:
    """As many as fit one batch by their bytes, at least one."""
    sizes = accumulate(map(_size, events))
    return events[: max(1, sum(1 for _ in takewhile(lambda size: size <= most_bytes, sizes)))]


def _size(stored: Stored) -> int:
    """About what an event takes on the line."""
    return len(stored.message.subject) + len(stored.message.data) + FRAMING
