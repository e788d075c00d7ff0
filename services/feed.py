"""The feed of a device: what it wants of its hub's log, in order and whole.

    open    which entities does it want → of those that it lacks comes the history, up to where it stands
    next    follow the log from there → events of what it wants; whose turn it becomes brings its history along

The device only appends what it is given. An entity counts as held there once all that the hub had of it has come; of
one whose events lie far apart it is told that it has begun to. What does not fit any more, or is not wanted any more,
it is told to release. What comes twice has no effect there, for each event says where it was born. Forgets go also to
a device that wrote the entity, whatever it holds.

The feed is kept in memory, also for a while that its device does not ask. One that finds it gone opens another, which
goes on from what the device has: up to its mark, all of the entities that it holds or has begun to.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence, Set
from typing import NamedTuple, TypeAlias

import msgspec

from mnemesh import subjects
from mnemesh.asker import Asker
from mnemesh.atomic_batch import ROLLUP
from mnemesh.clock import is_too_far_ahead
from mnemesh.errors import Conflict, MnemeshError
from mnemesh.event import Event, decode_event
from mnemesh.follower import Follower
from mnemesh.ids import partition_of_tokens, to_token
from mnemesh.jetstream import Stored, StreamState, history_of
from mnemesh.messages import Carried, FeedBatch, Holding
from mnemesh.origin import BORN, Place, born, check_carried, hash_of, is_put_aside, mark_in, place_of
from services.debts import Debts
from services.roster import Key
from services.selection import Selection

MOST_READ = 500
MOST_HISTORIES = 16
"""Entities whose history is fetched one by one: in a log of 180,000 messages each takes 3 to 60 ms of the server. For
more the log is read once from its beginning."""

MOST_ITEMS = 900
"""Messages in one batch: with its marks it is one atomic batch in the device's log."""

PROGRESS_S = 1.0
"""How often a device is told how far the log is, where nothing in it is for the device."""


class Reached(NamedTuple):
    """Up to here the log has been gone through, where `last` is a hash of the message; the marks on the way."""

    place: int
    last: str
    marks: Mapping[str, bytes]


Item: TypeAlias = Carried | Holding | Reached


class Feed:
    """What one device is sent. `open` it first; `close` gives back what it has.

    `held` are the bytes of what the device holds or has `begun` to; `own_log` is the incarnation of its log.
    """

    def __init__(
        self,
        asker: Asker,
        selection: Selection,
        *,
        site: str,
        device: str,
        held: Mapping[Key, int],
        begun: Set[Key],
        debts: Debts,
        own_log: str,
    ) -> None:
        self._asker = asker
        self._selection = selection
        self._roster = selection.roster
        self._site = site
        self._device = device
        self._held = held
        self._begun = begun
        self._debts = debts
        self._own_log = own_log
        self._log = subjects.log_stream(site)
        self._items: deque[Item] = deque()
        self._types: dict[Key, str | None] = {}
        self._to_hold: deque[tuple[int, Key]] = deque()
        """What the device has not all of, by where that will have come: the entity's last event when this opened."""
        self._untold: set[Key] = set()
        """Of these, those that the device was not told to have begun."""
        self._has_upto = 0
        self._lacking: Set[tuple[str, str]] = frozenset()
        """(tenant, token) of what is read from before that, where the device has the rest."""
        self._position = 0
        self._wrote: set[Key] = set()
        """Entities of the batch at hand that the device wrote itself."""
        self._paying: set[Key] = set()
        """Entities whose owed forgets are among what is to be sent, or are sent and not confirmed."""
        self._hlc = 0
        self._last = FeedBatch(turn=0, place=0)
        self._batches: AsyncGenerator[list[Stored], None] | None = None
        self._reading: asyncio.Task[list[Stored]] | None = None
        self._at_hand: list[Stored] = []
        """What was read and could not be taken in yet: a shard that is asked about it may be away."""

    @property
    def place(self) -> int:
        """Up to where the device has the log, as far as it said."""
        return self._last.place

    async def open(self, after: int, last: str, state: StreamState) -> None:
        """Settle what the device is to hold, and begin after this place of the log, where `last` was."""
        self._incarnation = state.incarnation
        self._last = FeedBatch(turn=0, place=after, last=last)
        self._current_at = state.last_sequence
        self._has_upto = after
        lacks: set[Key] = set()
        to_hold: list[tuple[int, Key]] = []
        head = state.last_sequence
        for want, changed, candidate, _ in await self._selection.fitting(self._held, after or head, head):
            key = candidate.key
            self._types[key] = candidate.type
            if key not in self._held or key in self._begun:
                to_hold.append((changed, key))
            if key not in self._held:
                self._untold.add(key)
                if candidate.first <= after:
                    lacks.add(key)
            self._evict(self._roster.admit(key, want, self._held.get(key, 0)))
        self._evict([key for key in self._held if key not in self._roster])
        self._to_hold.extend(sorted(to_hold))
        begin = await self._bring(lacks & self._untold, after)
        follower = Follower(self._asker.link, self._asker.inbox, self._log, after=begin, incarnation=state.incarnation)
        self._batches = follower.batches(MOST_READ)
        self._settle(begin)

    async def _bring(self, lacks: Set[Key], after: int) -> int:
        """See that the device gets what it lacks up to where it stands. Returns from where on the log is followed."""
        if after and len(lacks) > MOST_HISTORIES:
            self._lacking = {(tenant, to_token(entity_id)) for tenant, entity_id in lacks}
            return 0
        if after:
            for key in lacks:
                size = self._send_history(await self._history(key, after))
                if key in self._roster:
                    self._evict(self._roster.grow(key, size))
            self._tell_begun(lacks)
        return after

    async def next(self, turn: int, most_bytes: int, wait_s: float) -> FeedBatch:
        """The batch of this turn. Raises `Conflict` where the device and this feed are not at the same turn."""
        if turn == self._last.turn and turn:
            return self._last
        if turn != self._last.turn + 1:
            raise Conflict(f"turn {turn} does not follow {self._last.turn}")
        now = asyncio.get_running_loop().time
        began = now()
        await self._pay()
        while not any(not isinstance(item, Reached) for item in self._items):
            left = began + (PROGRESS_S if self._items else wait_s) - now()
            if left <= 0:
                break
            await self._read(left)
        self._last = self._batch(turn, most_bytes)
        return self._last

    async def close(self) -> None:
        if (reading := self._reading) is not None:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, MnemeshError):
                await reading
        if self._batches is not None:
            await self._batches.aclose()

    # ── reading the log ─────────────────────────────────────────────────────────────────────────────────────

    async def _read(self, wait_s: float) -> None:
        """Take in what the log has next, if it has something in time."""
        assert self._batches is not None, "a feed is opened first"
        if not self._at_hand:
            if self._reading is None:
                self._reading = asyncio.ensure_future(anext(self._batches))
            await asyncio.wait([self._reading], timeout=wait_s)
            if not self._reading.done():
                return
            reading, self._reading = self._reading, None
            if reading.cancelled():
                raise Conflict("this feed was closed; open another")
            self._at_hand = reading.result()
        await self._take(self._at_hand)
        self._at_hand = []

    async def _take(self, batch: Sequence[Stored]) -> None:
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
        joined = await self._join(events, max(batch[0].sequence, self._has_upto + 1), max(upto, self._has_upto))
        for stored, place, event in events:
            key = event.tenant, event.entity_id
            if key in joined:
                continue
            if key in self._roster:
                if isinstance(told := event.body.get("type"), str):
                    self._types[key] = told
                self._evict(self._roster.grow(key, self._send(stored, place, event)))
            elif event.op == "forget" and key in self._wrote:
                self._send(stored, place, event)
        if self._items and isinstance(last := self._items[-1], Reached):
            self._items.pop()
            marks = {**last.marks, **marks}
        begun = {(event.tenant, event.entity_id) for _, _, event in events}
        if self._position < self._has_upto:
            begun = set(self._untold)
        self._settle(upto)
        if upto < self._has_upto:
            self._items.append(Reached(self._has_upto, self._last.last, marks))
        else:
            self._tell_begun(begun)
            self._items.append(Reached(upto, hash_of(batch[-1].message), marks))

    def _take_mark(self, stored: Stored, place: Place, marks: dict[str, bytes]) -> None:
        """Pass a mark on; the stamp in it is not, where it is of a clock that is wrong."""
        if place.origin != self._device and (mark := mark_in(stored.message)) is not None:
            hlc = 0 if is_too_far_ahead(mark.hlc, stored.recorded_at) else mark.hlc
            marks[place.origin] = msgspec.structs.replace(mark, by=self._site, hlc=hlc).encode()

    async def _pay(self) -> None:
        """Send the forgets that the device is owed. It has what was sent once it asks for more."""
        owed = self._debts.to(self._device)
        if not self._items:
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
            if ROLLUP in stored.message.headers and (event := self._event(stored, place)) is not None:
                self._send(stored, place, event, erases=False)

    def _event(self, stored: Stored, place: Place) -> Event | None:
        """The event in a message, where it may concern the device."""
        if place.tenant not in self._roster.tenants and ROLLUP not in stored.message.headers:
            return None
        try:
            event = decode_event(stored.message.data)
            if place.origin != self._site:
                check_carried(event, place)
        except MnemeshError:
            return None  # the shards count it
        if place.origin != self._site and is_put_aside(stored.message, event, stored.recorded_at):
            return None
        return event

    async def _join(self, events: Sequence[tuple[Stored, Place, Event]], since: int, upto: int) -> set[Key]:
        """Take in the entities that these events make wanted. Returns those whose history was sent with that.

        Of one that began at `since` or later these events are all there is.
        """
        doubtful = {
            (event.tenant, event.entity_id)
            for _, _, event in events
            if (key := (event.tenant, event.entity_id)) not in self._roster
            and (event.op == "forget" or self._roster.may_want(key))
        }
        if any(self._selection.moves_a_hood(event) for _, _, event in events):
            doubtful |= await self._selection.surround(upto)
        described = await self._selection.described(doubtful, upto)
        self._wrote = {key for key, candidate in described.items() if candidate.is_own}
        joined = set()
        for key, candidate in described.items():
            want = self._selection.wanted_by(candidate)
            if want is None or key in self._roster:
                continue
            self._types[key] = candidate.type
            history = await self._history(key, upto) if candidate.first < since else []
            size = sum(len(stored.message.data) for stored in history)
            evicted = self._roster.admit(key, want, size)
            self._evict([other for other in evicted if other != key])
            if key in evicted:
                continue
            if candidate.first < since:
                self._send_history(history)
                self._items.append(Holding(*key, size))
                joined.add(key)
            else:
                self._to_hold.appendleft((0, key))
        return joined

    def _settle(self, position: int) -> None:
        """The log was read up to here: what the device lacked it holds once all of then has come."""
        self._position = position
        while self._to_hold and self._to_hold[0][0] <= position:
            _, key = self._to_hold.popleft()
            self._untold.discard(key)
            if key in self._roster:
                self._items.append(Holding(*key, self._roster.size_of(key)))

    def _tell_begun(self, keys: Set[Key]) -> None:
        """Of these the device has all up to the mark that comes next."""
        begun = self._untold & keys
        self._items.extend(Holding(*key, self._roster.size_of(key), whole=False) for key in begun)
        self._untold -= begun

    def _evict(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._types.pop(key, None)
            self._untold.discard(key)
            self._items.append(Holding(*key, None))

    # ── sending ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _history(self, key: Key, upto: int) -> list[Stored]:
        """All events of an entity, but those that the device has as its own."""
        tenant, entity_id = key
        token = to_token(entity_id)
        subject = subjects.log_event("*", tenant, partition_of_tokens(tenant, token), token)
        found = await history_of(self._asker.inbox, self._log, subject, upto=upto)
        return [stored for stored in found if not self._is_in_own_log(stored)]

    def _is_in_own_log(self, stored: Stored) -> bool:
        """Whether the device has an event as one of its own: not where it wrote it in a log that it lost since."""
        if place_of(stored.message.subject).origin != self._device:
            return False
        return not self._own_log or stored.message.headers.get(BORN, "").partition(" ")[2] in ("", self._own_log)

    def _send_history(self, history: Sequence[Stored]) -> int:
        size = 0
        for stored in history:
            place = place_of(stored.message.subject)
            if (event := self._event(stored, place)) is not None:
                size += self._send(stored, place, event)
        return size

    def _send(self, stored: Stored, place: Place, event: Event, *, erases: bool = True) -> int:
        """Put an event among what is to be sent, as far as it may leave; returns its bytes."""
        if self._is_in_own_log(stored):
            return 0
        kind = self._types.get((event.tenant, event.entity_id))
        may_leave = self._selection.reduced(event, place.origin, kind)
        if may_leave is None:
            return 0
        payload = stored.message.data if may_leave is event else may_leave.encode()
        headers = stored.message.headers
        carried = Carried(
            place.origin,
            place.tenant,
            place.partition,
            place.entity,
            payload,
            headers.get(BORN) or born(stored.sequence, self._incarnation),
            stored.sequence,
            erases and ROLLUP in headers and place.origin != self._device,  # there, its own of now have this subject
        )
        self._items.append(carried)
        self._hlc = max(self._hlc, event.hlc)
        return len(payload)

    def _batch(self, turn: int, most_bytes: int) -> FeedBatch:
        """As many of the items as fit one batch of the device's log, at least one."""
        place, last = self._last.place, self._last.last
        items: list[Carried | Holding] = []
        marks: dict[str, bytes] = {}
        size = 0
        while self._items and size < most_bytes and len(items) + len(marks) < MOST_ITEMS:
            item = self._items.popleft()
            if isinstance(item, Reached):
                place, last = item.place, item.last
                marks |= item.marks
            else:
                items.append(item)
                size += len(item.payload) if isinstance(item, Carried) else len(item.entity_id)
        current = not self._items and self._position >= self._current_at
        return FeedBatch(turn=turn, place=place, items=items, marks=marks, hlc=self._hlc, last=last, current=current)
