"""The uplink: what is born on a device goes to its hub, once and in order, however often the link drops.

    ask the hub up to where it has our log → follow it from our next event → send in batches, each up to a mark

The hub appends a batch only if the mark before it is the one that we know (`services.uplinks`): so a batch whose answer
was lost is refused when it is sent again, and a hub that was restored from a backup tells what it lacks. A batch may
still be on its way when we ask up to where the hub is, or be stored but for its mark: so we set the mark anew before
we ask, and what comes after that is refused.

What the policy keeps back is left out before anything is sent, and so is what is of tenants that the device was not
enrolled for; the mark passes over it. What decides is all the types that the entity was given, and that which an event
brings.

Looks at `aside`, `sent`, `services.site_policy` and `read_policy`, `router.inventory`, `router.portions` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import aclosing
from functools import reduce
from operator import and_
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from edge.aside import Aside, is_ahead
from edge.sent import Sent
from mnemesh import kv, subjects
from mnemesh.asker import Asker
from mnemesh.clock import wall_ms
from mnemesh.errors import BadRequest, Conflict, Denied, MnemeshError, NotFound, TooLarge
from mnemesh.event import Event, Number, event_in
from mnemesh.follower import Follower
from mnemesh.jetstream import Stored, StreamState, message_at, next_of, stream_state
from mnemesh.messages import AskPosition, Description, OwnEvent, OwnEvents, Position
from mnemesh.origin import Mark, hash_of, is_born_here, place_of
from mnemesh.supervision import first_of
from router.inventory import Inventory
from router.portions import portions
from services.read_policy import SiteReadPolicy
from services.site_policy import SiteEntry, SitePolicy
from services.sovereignty import Leaves, Policy, reduced_event

logger = logging.getLogger("mnemesh.uplink")

ASK_S = 1.0
SEND_S = 5.0
RETRY_S = 0.5
TROUBLE_S = 5.0
CHECK_S = 5.0
STEP_MS = 1_000
"""By how much a clock that is set differs from one that goes on. A device that slept looks the same."""
BATCH_S = 1.0
"""For how long a batch may keep a line whose rate is known. A hub that hears nothing else for 10 s drops the line."""
FRAMING = 16
"""Bytes on the line for each event, beside itself."""
REFUSED = "refused"
"""The key under which the bucket of receipts has how many of our events were refused."""
MOST_SENT = 999
MOST_BYTES_SENT = 1024 * 1024


class _Moved(MnemeshError):
    """The hub's position is not the one that we knew: ask it again."""


class _Leaving(NamedTuple):
    """An event of ours, and its bytes as they may leave; `None`: not at all."""

    stored: Stored
    payload: bytes | None


class Uplink:
    """Sends the events of one device. `run` for ever; the other attributes say how far it is.

    `sent` is kept with the log; `says` adds what else the hub is to know of the device.
    """

    def __init__(
        self,
        asker: Asker,
        inventory: Inventory,
        policy: SitePolicy,
        reads: SiteReadPolicy,
        *,
        site: str,
        sent: Sent,
        bytes_per_s: float | None = None,
        says: Callable[[AskPosition], AskPosition] = lambda said: said,
    ) -> None:
        self._asker = asker
        self._inventory = inventory
        self._policy = policy
        self._reads = reads
        self._site = site
        self._bytes_per_s = bytes_per_s
        self._says = says
        self._sent = sent
        self._most_bytes = MOST_BYTES_SENT if bytes_per_s is None else min(MOST_BYTES_SENT, bytes_per_s * BATCH_S)
        self._log = subjects.log_stream(site)
        self._position: Position | None = None
        self._waiting_since_ms: int | None = None
        self._log_bytes = 0
        self._heard_at, self._heard_at_ms = 0.0, 0
        self._linked = asyncio.Event()
        self.hub = ""
        """The hub's name; empty until it was heard of."""
        self.hub_contract = ""
        self.clock_offset_ms = 0
        """How far our clock is ahead of the hub's, as far as the way there and back lets us know."""
        self.waiting = 0
        """How many events the hub lacks, as counted every few seconds."""
        self.trouble = ""
        self.untold: set[str] = set()
        """Tenants of whose events some were passed over since the start: the device was not enrolled for them."""
        self.sent_events = 0
        self.refused = 0
        """Events that the hub did not take, or not with all their vectors."""
        self._aside = Aside(asker.inbox)

    @property
    def position(self) -> Position:
        """Up to where the hub had our log when it last said so."""
        return self._position or Position(hub="")

    @property
    def put_aside(self) -> int:
        """Events that the hub quarantined, as they were stamped ahead of its clock."""
        return len(self._aside)

    @property
    def linked(self) -> bool:
        """Whether the hub answers, and what it says of this device is kept here."""
        return self._linked.is_set()

    async def reaches(self) -> str:
        """The hub's name, once we are linked."""
        await self._linked.wait()
        return self.hub

    @property
    def lag_s(self) -> float:
        """For how long the oldest event that the hub lacks has waited, as far as it was read."""
        return 0.0 if self._waiting_since_ms is None else max(0.0, (wall_ms() - self._waiting_since_ms) / 1000)

    @property
    def silent_s(self) -> float:
        """Since when the hub does not answer, in seconds; 0 while it does, and since the start if it never did."""
        return 0.0 if self.linked else asyncio.get_running_loop().time() - self._heard_at

    async def run(self) -> None:
        """Send on for ever. What keeps it from that passes, or is `trouble` that somebody must mend."""
        self._heard_at = self._heard_at or asyncio.get_running_loop().time()
        while True:
            try:
                await self._send_on()
            except _Moved as error:
                logger.info("%s", error)
            except (Conflict, BadRequest, Denied, TooLarge) as error:
                if str(error) != self.trouble:
                    logger.error("the uplink stands still: %s", error)
                self.trouble = str(error)
                await asyncio.sleep(TROUBLE_S)
            except MnemeshError as error:
                if self.linked:
                    logger.warning("the uplink is interrupted: %s", error)
                self._linked.clear()
                await asyncio.sleep(random.uniform(RETRY_S / 2, RETRY_S))

    async def _send_on(self) -> None:
        """Send until something comes in the way: raises what."""
        position = await self._agreed()
        self.trouble = ""
        await first_of(self._send_from(position), self._check())

    async def _check(self) -> None:
        """See now and then whether the hub is there, and still has what it had: it may have been restored."""
        while True:
            await asyncio.sleep(random.uniform(CHECK_S / 2, CHECK_S))
            self._log_bytes = (await stream_state(self._asker.inbox, self._log)).bytes
            before = self.position
            if (await self._asked()).place != before.place and before is self._position:
                raise _Moved(f"the hub does not have {self._site} up to where it had it")
            _, self.waiting = await self._own_after(self.position.sequence)

    async def _agreed(self) -> Position:
        """Up to where the hub has our log. Raises `Conflict` where what it has is not ours."""
        await self._aside.load()
        self.refused = int(await kv.get(self._asker.inbox, subjects.RECEIPTS.name, REFUSED) or 0)
        state = await stream_state(self._asker.inbox, self._log)
        position = await self._asked()
        self._linked.set()
        await self._check_is_ours(position, state)
        # What is on its way there since before expects the mark of then: set it anew, and that is refused.
        self._incarnation = state.incarnation
        marked = await self._mark_at(position)
        await self._tell(marked, position)
        position = await self._asked(log=state.incarnation)
        await self._check_is_ours(position, state)
        if position.incarnation != state.incarnation:
            logger.warning("the hub knew another log of %s; this one is sent from its beginning", self._site)
            position = Position(hub=position.hub, place=position.place, incarnation=state.incarnation, hlc=position.hlc)
        elif (position.incarnation, position.sequence) != (marked.incarnation, marked.sequence):
            # An event is there whose mark did not come: readers wait for that.
            mark = await self._mark_at(replace(position, hlc=marked.hlc))
            place = await self._tell(mark, position)
            position = replace(position, place=place, last=mark.last, hlc=mark.hlc)
        self._position = position
        return position

    async def _mark_at(self, position: Position) -> Mark:
        """The mark that says of the hub what this position does."""
        incarnation = position.incarnation or self._incarnation
        if incarnation == self._incarnation:
            with contextlib.suppress(NotFound):  # the beginning, or erased since
                return self._mark_of([await message_at(self._asker.inbox, self._log, position.sequence)], position)
        return Mark(incarnation=incarnation, sequence=position.sequence, last=position.last, hlc=position.hlc)

    def _mark_of(self, some: Sequence[Stored], position: Position) -> Mark:
        """The mark after these, which come after a position. Its stamp is one that the hub's clock may follow."""
        hub_ms = self._hub_ms()
        return Mark(
            incarnation=self._incarnation,
            sequence=some[-1].sequence,
            last=hash_of(some[-1].message),
            hlc=max([position.hlc, *(stamp for stamp in map(_stamp_of, some) if not is_ahead(stamp, hub_ms))]),
        )

    async def _check_is_ours(self, position: Position, state: StreamState) -> None:
        """Whether what the hub knows of this log is what we have there. It may have been erased since."""
        if position.incarnation != state.incarnation:
            return
        if position.sequence > state.last_sequence:
            raise Conflict(
                f"the hub has {self._site} up to {position.sequence}, and this log ends at {state.last_sequence}: "
                "its folder was restored from an older copy, or another device has one"
            )
        if not position.last:
            return
        said = Mark(incarnation=position.incarnation, sequence=position.sequence, last=position.last)
        try:
            held = await message_at(self._asker.inbox, self._log, position.sequence)
        except NotFound:  # erased since
            is_ours = self._sent.may_be_ours(said)
        else:
            is_ours = hash_of(held.message) == position.last
        if not is_ours:
            raise Conflict(
                f"the hub has another event as {position.sequence} of {self._site} than this log: "
                "another device sends from a copy of its folder, or it was restored from an older one"
            )
        self._sent.note(said)

    async def _asked(self, *, log: str = "") -> Position:
        told = self._says(
            AskPosition(
                waiting=self.waiting,
                lag_s=self.lag_s,
                clock_ms=wall_ms(),
                log_bytes=self._log_bytes,
                refused=self.refused,
                contract=subjects.CONTRACT,
                policy=self._policy.handed,
                consistency=self._reads.handed,
                log=log,
            )
        )
        position = await self._asker.ask(
            subjects.UPLINK_POSITION, subjects.uplink_position(self._site), told, budget_s=ASK_S
        )
        self._heard_at, self._heard_at_ms = asyncio.get_running_loop().time(), wall_ms()
        self.hub, self.hub_contract = position.hub, position.contract
        self.clock_offset_ms = (told.clock_ms + self._heard_at_ms) // 2 - position.clock_ms
        if is_ahead(position.hlc, self._hub_ms()):  # of a mark that was set while our clock was wrong
            position = replace(position, hlc=0)
        # Before anything is sent that it may keep back.
        entry = SiteEntry(position.region, position.tenants)
        await self._policy.take(self._asker.inbox, position.policy, entry)
        await self._reads.take(self._asker.inbox, position.consistency)
        return position

    async def _send_from(self, position: Position) -> None:
        """Follow our log from a position and send all of it."""
        inbox = self._asker.inbox
        end = (await stream_state(inbox, self._log)).last_sequence
        first, self.waiting = await self._own_after(position.sequence)
        after = first - 1 if first else end
        follower = Follower(self._asker.link, inbox, self._log, after=after, incarnation=self._incarnation)
        async with aclosing(follower.batches(MOST_SENT)) as batches:
            async for batch in batches:
                own = [stored for stored in batch if self._is_own(stored)]
                self.waiting = max(self.waiting, len(own))
                if own:
                    self._waiting_since_ms = own[0].recorded_at
                while own:
                    rules = self._policy.rules
                    for part in portions(
                        await self._leaving(own), most=MOST_SENT, most_bytes=self._most_bytes, size_of=_size
                    ):
                        some = [each.stored for each in part]
                        await self._heed_clocks(some)
                        part = await self._leaving(some)  # as of now: on a slow line those before took long
                        if self._policy.rules != rules:  # what is left must be looked at again
                            break
                        position = await self._send(part, position)
                        own = own[len(some) :]
                        self.waiting = max(len(own), self.waiting - len(some))
                self._waiting_since_ms = None
                if not batch[-1].following:
                    self.waiting = 0

    async def _own_after(self, sequence: int) -> tuple[int, int]:
        """The first of our events after a sequence of our log, 0 if there is none, and how many there are.

        Between them may be any number that came from the hub.
        """
        own = subjects.log_event(self._site, "*", "*", "*")
        some = await next_of(self._asker.inbox, self._log, own, after=sequence)
        return (some[0].sequence, 1 + some[0].following) if some else (0, 0)

    def _is_own(self, stored: Stored) -> bool:
        place = place_of(stored.message.subject)
        return place.is_event and is_born_here(stored.message, place, self._site)

    async def _leaving(self, own: Sequence[Stored]) -> list[_Leaving]:
        """What may leave of each event, by all that is in our log now."""
        policy, regions = self._policy.policy, self._policy.regions_of(self._site)
        tenants = {place_of(stored.message.subject).tenant for stored in own}
        told = {tenant for tenant in tenants if self._policy.tells_hub_of(tenant)}
        if unheard := tenants - told - self.untold:
            logger.warning("this device was not enrolled for %s: what is theirs stays here", ", ".join(sorted(unheard)))
            self.untold |= unheard
        restricted = {tenant for tenant in told if any(policy.restricts(tenant, region) for region in regions)}
        if told == tenants and not restricted:
            return [_Leaving(stored, stored.message.data) for stored in own]
        events = [event_in(stored.message.data) for stored in own]
        end = (await stream_state(self._asker.inbox, self._log)).last_sequence
        known = {tenant: await self._described(tenant, events, end) for tenant in restricted}
        leaving = []
        for stored, event in zip(own, events, strict=True):
            payload: bytes | None = stored.message.data
            tenant = place_of(stored.message.subject).tenant
            if tenant not in told:
                payload = None  # the hub's server would refuse it
            elif tenant not in restricted:
                pass
            elif event is None:
                payload = None  # nobody can say what of it may leave
            else:
                payload = _reduced(stored, event, known[event.tenant][event.entity_id], policy, regions)
            leaving.append(_Leaving(stored, payload))
        return leaving

    async def _described(self, tenant: str, events: Sequence[Event | None], upto: int) -> dict[str, Description]:
        ids = {event.entity_id for event in events if event is not None and event.tenant == tenant}
        return await self._inventory.describe(tenant, sorted(ids), upto=upto)

    async def _send(self, some: Sequence[_Leaving], position: Position) -> Position:
        """One batch: events and the mark after them. Returns where the hub then stands."""
        began = asyncio.get_running_loop().time()
        mark = self._mark_of([each.stored for each in some], position)
        events = [
            OwnEvent(stored.sequence, payload, stored.sequence in self._aside)
            for stored, payload in some
            if payload is not None
        ]
        self._sent.note(mark)
        place = await self._tell(mark, position, events)
        self.sent_events += len(events)
        self._position = position = Position(
            hub=position.hub,
            place=place,
            incarnation=mark.incarnation,
            sequence=mark.sequence,
            last=mark.last,
            hlc=mark.hlc,
        )
        if self._bytes_per_s is not None:
            earliest = began + sum(map(_size, some)) / self._bytes_per_s
            await asyncio.sleep(earliest - asyncio.get_running_loop().time())
        return position

    async def _tell(self, mark: Mark, position: Position, events: Sequence[OwnEvent] = ()) -> int:
        """Send events and the mark after them; returns where in the hub's log that is."""
        told = OwnEvents(
            events=list(events),
            place=position.place,
            incarnation=mark.incarnation,
            sequence=mark.sequence,
            last=mark.last,
            hlc=mark.hlc,
        )
        try:
            answer = await self._asker.ask(subjects.UPLINK, subjects.uplink(self._site), told, budget_s=SEND_S)
        except Conflict as error:  # a batch whose answer we did not get, or another device in our name
            raise _Moved(f"the hub has more of {self._site} than we knew, or another clock: {error}") from error
        for refused in answer.refused:
            logger.error("the hub refused event %d of this device: %s", refused.sequence, refused.reason)
        if answer.refused:
            self.refused += len(answer.refused)
            await kv.put(self._asker.inbox, subjects.RECEIPTS.name, REFUSED, str(self.refused).encode())
        return answer.place

    async def _heed_clocks(self, some: Sequence[Stored]) -> None:
        """See that the hub quarantines what of these its clock says to. It may hand us another policy by that."""
        if self._clock_was_set():
            await self._asked()
        if is_ahead(max(map(_stamp_of, some)), self._hub_ms()):
            await self._put_aside(some)

    async def _put_aside(self, some: Sequence[Stored]) -> None:
        """Have the hub quarantine those whose stamps are ahead, and know that before it does."""
        hub_ms = self._hub_ms()
        events = [(stored.sequence, event_in(stored.message.data)) for stored in some]
        await self._aside.add([sequence for sequence, event in events if event and is_ahead(event.hlc, hub_ms)])

    def _hub_ms(self) -> int:
        """What the hub's clock shows."""
        return wall_ms() - self.clock_offset_ms

    def _clock_was_set(self) -> bool:
        """Whether our clock did not just go on since the hub told what its own shows."""
        went_on_ms = (asyncio.get_running_loop().time() - self._heard_at) * 1000
        return abs(wall_ms() - self._heard_at_ms - went_on_ms) > STEP_MS


class _Stamped(msgspec.Struct):
    """Of an event no more than its stamp, which takes a tenth of the time."""

    hlc: Number


_stamped = msgspec.msgpack.Decoder(_Stamped)


def _stamp_of(stored: Stored) -> int:
    """The stamp of an event of ours; 0 where it cannot be read."""
    try:
        return _stamped.decode(stored.message.data).hlc
    except msgspec.MsgspecError:
        return 0


def _reduced(
    stored: Stored, event: Event, entity: Description, policy: Policy, regions: Collection[str]
) -> bytes | None:
    """The bytes of an event as they may leave."""
    if event.op == "put" and (entity.is_gone or stored.sequence < entity.first):
        return None  # a forget that comes after it erases it, and nobody can say any more what may leave of it
    leaves = [policy.leaves_under(event.tenant, entity.types, region) for region in regions]
    if isinstance(told := event.body.get("type"), str):
        leaves += [policy.leaves(event.tenant, told, region) for region in regions]
    may = reduce(and_, leaves)
    if event.op == "forget" and not may.tells_fields and any(site != event.site for site in entity.sites):
        may = Leaves()  # what others wrote came by the hub, so it knows the id and is to erase that
    reduced = reduced_event(event, may)
    if reduced is None:
        return None
    return stored.message.data if reduced is event else reduced.encode()


def _size(leaving: _Leaving) -> int:
    """About what an event takes on the line."""
    if leaving.payload is None:
        return 0
    return len(leaving.payload) + FRAMING
