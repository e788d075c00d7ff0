"""The feed of a device: what it wants of its hub's log, in order and whole.

    open    which entities does it want → of those that it lacks comes the history, up to where it stands
    next    follow the log from there → events of what it wants; whose turn it becomes brings its history along

The device only appends what it is given (`outbox`). What it has of an entity it is told to note: `whole` once all has
come that the hub had when this opened; `begun` where it has all up to its mark, and more of then is to come; `some`
where a batch ended in between. What does not fit any more, or is not wanted any more, it is told to release. What comes
twice has no effect there, for each event says where it was born. Forgets go to whatever device has, or wrote, something
of the entity.

The feed is kept in memory, also for a while that its device does not ask. One that finds it gone opens another, which
goes on from what the device has: up to its mark, all of the entities that are whole or begun there. It must also do so
once much was released: what it had written some of it keeps, and is to hear of its forgets, but only it knows which.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence, Set

import msgspec

from memory_shards.merge import patch_of
from mnemesh import subjects
from mnemesh.asker import Asker
from mnemesh.clock import is_too_far_ahead
from mnemesh.errors import Conflict, MnemeshError
from mnemesh.event import Event, decode_event
from mnemesh.follower import StreamShrank
from mnemesh.ids import partition_of_tokens, to_token
from mnemesh.jetstream import Stored, StreamState, history_of, stream_state
from mnemesh.messages import FeedBatch, Holding
from mnemesh.origin import FORGETS, Place, check_carried, hash_of, is_put_aside, mark_in, place_of
from services.debts import Debts
from services.log_tail import LogTail
from services.outbox import Outbox
from services.roster import Candidate, Key
from services.selection import Selection

MOST_HISTORIES = 16
"""Entities whose history is fetched one by one: in a log of 180,000 messages each takes 3 to 60 ms of the server. For
more the log is read once from its beginning."""

MOST_LET_GO = 20_000
"""Entities that a device is told to release before it must say anew what it has: their names take some 6 MB."""

PAUSE_S = 10.0
"""A device that asks again no sooner was out of reach."""

PROGRESS_S = 1.0
"""How often a device is told how far the log is, where nothing in it is for the device."""


class Feed:
    """What one device is sent of a hub's log. `open` it first; `close` gives back what it has.

    `selection` is this feed's alone; the device `may_have` the memory of a tenant or not. `has` is what it noted,
    `own_log` the incarnation of its log; of the hub's `log` it has all up to `after`, where `last` was. The hub's
    `tail` of that is what it follows.
    """

    def __init__(
        self,
        asker: Asker,
        selection: Selection,
        *,
        site: str,
        device: str,
        may_have: Callable[[str], bool],
        has: Mapping[Key, Holding],
        after: int,
        last: str,
        debts: Debts,
        own_log: str,
        log: StreamState,
        tail: LogTail,
    ) -> None:
        self._asker = asker
        self._tail = tail
        self._selection = selection
        self._roster = selection.roster
        self._site = site
        self._device = device
        self._may_have = may_have
        self._has = has
        self._debts = debts
        self._log = subjects.log_stream(site)
        self._incarnation = log.incarnation
        self._current_at = log.last_sequence
        self._asked_at = asyncio.get_running_loop().time()
        begin = FeedBatch(turn=0, place=after, last=last)
        self._out = Outbox(
            selection, device=device, own_log=own_log, incarnation=log.incarnation, noted=has, begin=begin
        )
        self._known: dict[Key, Candidate] = {}
        """What the shards said of the entities that the device is to have, and what types those were given since."""
        self._to_hold: list[tuple[int, Key]] = []
        """Heap of what the device has not all of, by where that will have come: the entity's last event of then."""
        self._untold: set[Key] = set()
        """Of these, those that the device was not told to have begun."""
        self._let_go = {key for key, holding in has.items() if holding.state == "some"}
        """Entities that the device may still have something of, though it is not to."""
        self._most_let_go = 0
        self._has_upto = after
        """Where the device's mark was when this opened."""
        self._lacking: Set[tuple[str, str]] = frozenset()
        """(tenant, token) of what is read from before that, where the device has the rest."""
        self._position = 0
        """Up to where the log was read."""
        self._wrote: Set[Key] = frozenset()
        """Entities of the batch at hand that the device wrote itself."""
        self._forgotten: Mapping[Key, Candidate] = {}
        """The members that the batch at hand forgets, as the shards had them then: what comes after has other types."""
        self._paying: set[Key] = set()
        """Entities whose owed forgets are among what is to be sent, or are sent and not confirmed."""
        self._batches: AsyncGenerator[list[Stored], None] | None = None
        self._reading: asyncio.Task[list[Stored]] | None = None
        self._at_hand: list[Stored] = []
        """What was read and could not be taken in yet: a shard that is asked about it may be away."""
        self._joined: set[Key] = set()
        """Entities whose history was sent, up to the end of that."""

    @property
    def place(self) -> int:
        """Up to where the device has the log, as far as it said."""
        return self._out.last.place

    async def open(self) -> None:
        """Settle what the device is to hold, and begin after its mark."""
        after, head = self._has_upto, self._current_at
        lacks: list[Key] = []
        sizes = {key: holding.bytes or 0 for key, holding in self._has.items() if holding.state != "some"}
        for want, changed, candidate, size in await self._selection.fitting(sizes, after or head, head):
            key = candidate.key
            self._known[key] = candidate
            if key not in sizes:
                self._untold.add(key)
                if candidate.first <= after:
                    lacks.append(key)
            if key not in sizes or self._has[key].state == "begun":
                self._to_hold.append((max(changed, candidate.first), key))
            self._evict(self._roster.admit(key, want, max(size, sizes[key]) if key in sizes else 0))
        self._evict([key for key in self._has if key not in self._roster])
        self._let_go = {key for key in self._let_go if self._may_have(key[0])}  # it may just say that it has others
        heapq.heapify(self._to_hold)
        begin = await self._bring([key for key in lacks if key in self._roster], after)
        self._settle(begin)
        self._most_let_go = len(self._let_go) + MOST_LET_GO

    async def _bring(self, lacks: Sequence[Key], after: int) -> int:
        """See that the device gets what it lacks up to where it stands. Returns from where on the log is followed."""
        if after and len(lacks) > MOST_HISTORIES:
            self._lacking = {(tenant, to_token(entity_id)) for tenant, entity_id in lacks}
            return 0
        for key in lacks if after else ():
            if key in self._roster:
                size = self._send_history(await self._history(key, after))
                self._evict(self._roster.grow(key, size))
                self._tell_begun({key})
        return after

    async def next(self, turn: int, most_bytes: int, wait_s: float) -> FeedBatch:
        """The batch of this turn. Raises `Conflict` where the device and this feed are not at the same turn."""
        last = self._out.last
        if turn == last.turn and turn:
            return last
        if turn != last.turn + 1:
            raise Conflict(f"turn {turn} does not follow {last.turn}")
        if not self._out and len(self._let_go) > self._most_let_go:
            raise Conflict(f"much was released of what {self._device} had; open another feed")
        now = asyncio.get_running_loop().time
        began = now()
        if began - self._asked_at > PAUSE_S:  # what came meanwhile it must have before it is current again
            self._current_at = (await stream_state(self._asker.inbox, self._log)).last_sequence
        await self._pay()
        while not self._out.has_news:
            left = began + (PROGRESS_S if self._out else wait_s) - now()
            if left <= 0:
                break
            await self._read(left)
        self._asked_at = now()
        return self._out.batch(turn, most_bytes, current=self._position >= self._current_at)

    async def close(self) -> None:
        if (reading := self._reading) is not None:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, MnemeshError, StreamShrank):
                await reading
        if self._batches is not None:
            await self._batches.aclose()

    # ── reading the log ─────────────────────────────────────────────────────────────────────────────────────

    async def _read(self, wait_s: float) -> None:
        """Take in what the log has next, if it has something in time."""
        if not self._at_hand:
            if self._batches is None:
                self._batches = self._tail.batches(self._position, self._incarnation)
            if self._reading is None:
                self._reading = asyncio.ensure_future(anext(self._batches))
            await asyncio.wait([self._reading], timeout=wait_s)
            if not self._reading.done():
                return
            reading, self._reading = self._reading, None
            if reading.cancelled():
                raise Conflict("this feed was closed; open another")
            if reading.exception() is not None:
                self._batches = None  # it gives no more: the next one begins where this one ended
            self._at_hand = reading.result()
        await self._take(self._at_hand)
        self._at_hand = []
        self._joined.clear()

    async def _take(self, batch: Sequence[Stored]) -> None:
        """Add what is for the device, and then how far that is."""
        upto = batch[-1].sequence
        marks: dict[str, bytes] = {}
        events: list[tuple[Stored, Place, Event]] = []
        for stored in batch:
            place = place_of(stored.message.subject)
            if stored.sequence <= self._has_upto and (place.tenant, place.entity) not in self._lacking:
                continue
            if place.is_mark:
                self._take_mark(stored, place, marks)
            elif place.is_event and (event := self._event(stored, place)) is not None:
                events.append((stored, place, event))
        await self._join(events, max(batch[0].sequence, self._has_upto + 1), max(upto, self._has_upto))
        for stored, place, event in events:
            if (event.tenant, event.entity_id) not in self._joined:
                self._take_event(stored, place, event)
        was_behind = self._position < self._has_upto
        self._settle(upto)
        if upto < self._has_upto:
            self._out.reached(self._has_upto, self._out.last.last, marks)
        else:
            self._tell_begun(
                self._untold if was_behind else {(event.tenant, event.entity_id) for _, _, event in events}
            )
            self._out.reached(upto, hash_of(batch[-1].message), marks)

    def _take_event(self, stored: Stored, place: Place, event: Event) -> None:
        key = event.tenant, event.entity_id
        if key in self._roster:
            types = self._known[key].types
            size = self._send(key, stored, place, event)
            if event.op == "forget" and key in self._forgotten:
                now = self._forgotten[key]
                self._known[key] = msgspec.structs.replace(now, types=frozenset()) if now.is_gone else now
            self._evict(self._roster.grow(key, size))
            if key in self._roster and self._known[key].types > types:
                self._let_go_of_shut(key)
        elif event.op == "forget" and (key in self._wrote or key in self._let_go):
            self._out.send(stored, place, event, (), wrote=key in self._wrote)

    def _let_go_of_shut(self, key: Key) -> None:
        """Release an entity of which nothing may come any more: what the device has would grow old unseen."""
        if self._selection.wanted_by(self._known[key]) is None:
            self._roster.drop(key)
            self._evict([key])

    def _send(self, key: Key, stored: Stored, place: Place, event: Event) -> int:
        """Send an event of a member; returns its bytes. What a forget had erased when the shards were asked stays.

        A type that it names adds to those that decide. It takes none away: it may lose to another, or not hold.
        """
        known = self._known[key]
        if stored.sequence < known.first:
            return 0
        if isinstance(told := event.body.get("type"), str):
            known = self._known[key] = msgspec.structs.replace(known, types=known.types | {told})
        return self._out.send(stored, place, event, known.types)

    def _take_mark(self, stored: Stored, place: Place, marks: dict[str, bytes]) -> None:
        """Pass a mark on, without the hash in it, and without its stamp where that is of a clock that is wrong."""
        if place.origin != self._device and (mark := mark_in(stored.message)) is not None:
            hlc = 0 if is_too_far_ahead(mark.hlc, stored.recorded_at) else mark.hlc
            marks[place.origin] = msgspec.structs.replace(mark, by=self._site, last="", hlc=hlc).encode()

    async def _pay(self) -> None:
        """Send the forgets that the device is owed. It has what was sent once it asks for more."""
        owed = self._debts.to(self._device)
        if not self._out:
            for key in list(self._paying):
                await self._debts.settle(self._device, key)
                self._paying.discard(key)
        for key in owed - self._paying:
            await self._send_forgets(key)
            self._paying.add(key)

    async def _send_forgets(self, key: Key) -> None:
        """Where the device has the forget already, it must not erase what came after: so it goes without its rollup."""
        for stored in await self._history(key, max(self._position, self._has_upto)):
            place = place_of(stored.message.subject)
            if FORGETS in stored.message.headers and (event := self._event(stored, place)) is not None:
                self._out.send(stored, place, event, (), erases=False, wrote=True)

    def _event(self, stored: Stored, place: Place) -> Event | None:
        """The event in a message, where it may concern the device."""
        if place.tenant not in self._roster.tenants and FORGETS not in stored.message.headers:
            return None
        try:
            event = decode_event(stored.message.data)
            if place.origin != self._site:
                check_carried(event, place)
                patch_of(event)
        except MnemeshError:
            return None  # the shards count it, and it has no effect anywhere
        if place.origin != self._site and is_put_aside(stored.message, event, stored.recorded_at):
            return None
        return event

    async def _join(self, events: Sequence[tuple[Stored, Place, Event]], since: int, upto: int) -> None:
        """Take in the entities that these events make wanted, with their history.

        Of one that began at `since` or later the log is still to be read. When cut off, do it again.
        """
        if any(self._selection.moves_a_hood(event) for _, _, event in events):
            await self._selection.surround(upto)
        doubtful = self._selection.newcomers | {
            (event.tenant, event.entity_id)
            for _, _, event in events
            if event.op == "forget"
            or ((key := (event.tenant, event.entity_id)) not in self._roster and self._roster.may_want(key))
        }
        described = await self._selection.described(doubtful, upto)
        self._forgotten = {key: candidate for key, candidate in described.items() if key in self._roster}
        self._wrote = {key for key, candidate in described.items() if candidate.is_own}
        for key, candidate in described.items():
            want = self._selection.wanted_by(candidate)
            if want is None or key in self._roster or key in self._joined:
                continue
            history = await self._history(key, upto) if candidate.first < since else []
            size = sum(len(stored.message.data) for stored in history)
            evicted = self._roster.admit(key, want, size)
            self._evict([other for other in evicted if other != key])
            if key in evicted:
                continue
            self._known[key] = candidate
            if candidate.first < since:
                self._send_history(history)
                self._out.hold(key, size, "whole")
                self._joined.add(key)
            else:
                heapq.heappush(self._to_hold, (candidate.first, key))
        self._selection.newcomers.clear()

    # ── what the device has ─────────────────────────────────────────────────────────────────────────────────

    def _settle(self, position: int) -> None:
        """The log was read up to here: what the device lacked it holds once all of then has come."""
        self._position = position
        while self._to_hold and self._to_hold[0][0] <= position:
            _, key = heapq.heappop(self._to_hold)
            self._untold.discard(key)
            if key in self._roster:
                self._out.hold(key, self._roster.size_of(key), "whole")

    def _tell_begun(self, keys: Set[Key]) -> None:
        """Of these the device has all up to the mark that comes next."""
        begun = self._untold & keys
        for key in begun:
            self._out.hold(key, self._roster.size_of(key), "begun")
        self._untold -= begun

    def _evict(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._known.pop(key, None)
            self._untold.discard(key)
            self._let_go.add(key)
            self._out.release(key)

    async def _history(self, key: Key, upto: int) -> list[Stored]:
        """All events of an entity, but those that the device has as its own."""
        tenant, entity_id = key
        token = to_token(entity_id)
        subject = subjects.log_event("*", tenant, partition_of_tokens(tenant, token), token)
        found = await history_of(self._asker.inbox, self._log, subject, upto=upto)
        return [stored for stored in found if not self._out.has_itself(stored, place_of(stored.message.subject))]

    def _send_history(self, history: Sequence[Stored]) -> int:
        size = 0
        for stored in history:
            place = place_of(stored.message.subject)
            if (event := self._event(stored, place)) is not None:
                size += self._send((event.tenant, event.entity_id), stored, place, event)
        return size
