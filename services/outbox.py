"""The outbox of a feed: what waits to be sent to its device, and how it is cut into batches.

Every batch is stored on the device as one. Where one ends before it was said what the device has of an entity, it ends
with that: some of it. So whatever of a hub's memory is on a device is noted there, and will be released and forgotten.
Looks at `selection`, `roster` and `mnemesh`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, TypeAlias

from mnemesh.atomic_batch import MOST_IN_BATCH
from mnemesh.event import Event
from mnemesh.jetstream import Stored
from mnemesh.messages import Carried, FeedBatch, HeldState, Holding
from mnemesh.origin import BORN, FORGETS, Place, born
from services.roster import Key
from services.selection import Selection

MOST_MESSAGES = MOST_IN_BATCH - 1
"""What one batch has: with the mark of the hub it is one atomic batch in the device's log."""


class _Sent(NamedTuple):
    """An event of an entity. Of one that the device `wrote`, too, the hub knows that without a note."""

    key: Key
    carried: Carried
    wrote: bool


class _Reached(NamedTuple):
    """Up to here the log has been gone through, where `last` is a hash of the message; the marks on the way."""

    place: int
    last: str
    marks: Mapping[str, bytes]


_Item: TypeAlias = _Sent | Holding | _Reached


class Outbox:
    """What waits for one device, in order. `noted` are the entities of which it noted that it has some.

    `own_log` is the incarnation of the device's log, `incarnation` that of the hub's; up to where the device has that,
    `begin` says.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        device: str,
        own_log: str,
        incarnation: str,
        noted: Iterable[Key],
        begin: FeedBatch,
    ) -> None:
        self.last = begin
        """The batch that was sent last."""
        self._selection = selection
        self._device = device
        self._own_log = own_log
        self._incarnation = incarnation
        self._noted = set(noted)
        self._items: deque[_Item] = deque()
        self._hlc = 0

    def __bool__(self) -> bool:
        return bool(self._items)

    @property
    def has_news(self) -> bool:
        """Whether there is more than how far the log is, or more of that than one batch takes."""
        return len(self._items) > 1 or (bool(self._items) and not isinstance(self._items[0], _Reached))

    # ── filling ─────────────────────────────────────────────────────────────────────────────────────────────

    def send(
        self,
        stored: Stored,
        place: Place,
        event: Event,
        types: Collection[str],
        *,
        erases: bool = True,
        wrote: bool = False,
    ) -> int:
        """Add an event of an entity of these types, as far as it may leave; returns its bytes."""
        if self.has_itself(stored, place):
            return 0
        may_leave = self._selection.reduced(event, place.origin, types)
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
            erases and FORGETS in headers and place.origin != self._device,  # there, its own of now have this subject
        )
        self._items.append(_Sent((event.tenant, event.entity_id), carried, wrote))
        self._hlc = max(self._hlc, event.hlc)
        return len(payload)

    def has_itself(self, stored: Stored, place: Place) -> bool:
        """Whether the device has an event as one of its own: not where it wrote it in a log that it lost since."""
        if place.origin != self._device:
            return False
        return not self._own_log or stored.message.headers.get(BORN, "").partition(" ")[2] in ("", self._own_log)

    def hold(self, key: Key, size: int, state: HeldState) -> None:
        self._items.append(Holding(*key, size, state))

    def release(self, key: Key) -> None:
        self._items.append(Holding(*key, None))

    def reached(self, place: int, last: str, marks: Mapping[str, bytes]) -> None:
        """All that the log has for the device up to here was added. The marks fit one batch."""
        if self._items and isinstance(before := self._items[-1], _Reached):
            all_marks = {**before.marks, **marks}
            if len(all_marks) <= MOST_MESSAGES:
                self._items.pop()
                marks = all_marks
        self._items.append(_Reached(place, last, marks))

    # ── sending ─────────────────────────────────────────────────────────────────────────────────────────────

    def batch(self, turn: int, most_bytes: int, *, current: bool) -> FeedBatch:
        """As many of the items as fit one batch of the device's log, at least one. `current`: the log has no more."""
        place, last = self.last.place, self.last.last
        items: list[Carried | Holding] = []
        marks: dict[str, bytes] = {}
        unnoted: dict[Key, int] = {}
        size = 0
        while self._items and size < most_bytes:
            if len(items) + len(unnoted) + len(marks) + _messages_of(self._items[0]) > MOST_MESSAGES:
                break
            if items and isinstance(first := self._items[0], _Sent) and size + len(first.carried.payload) > most_bytes:
                break
            match self._items.popleft():
                case _Reached() as item:
                    place, last = item.place, item.last
                    marks |= item.marks
                case Holding() as item:
                    items.append(item)
                    size += len(item.entity_id)
                    self._note(item)
                    unnoted.pop((item.tenant, item.entity_id), None)
                case _Sent(key, carried, wrote):
                    items.append(carried)
                    size += len(carried.payload)
                    if not wrote and key not in self._noted:
                        unnoted[key] = unnoted.get(key, 0) + len(carried.payload)
        for key, bytes_sent in unnoted.items():
            note = Holding(*key, bytes_sent, "some")
            items.append(note)
            self._note(note)
        self.last = FeedBatch(
            turn=turn,
            place=place,
            items=items,
            marks=marks,
            hlc=self._hlc,
            last=last,
            current=current and not self._items,
        )
        return self.last

    def _note(self, holding: Holding) -> None:
        key = holding.tenant, holding.entity_id
        if holding.bytes is None:
            self._noted.discard(key)
        else:
            self._noted.add(key)


def _messages_of(item: _Item) -> int:
    """How many messages an item takes at most: an event may want a note."""
    match item:
        case _Reached():
            return len(item.marks)
        case _Sent():
            return 2
        case Holding():
            return 1
