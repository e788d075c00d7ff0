"""The downlink: what a device wants of its hub's log comes into its own, once and whole.

    say what we want and what we hold → get a batch → append it with a mark of the hub's log, all or nothing → the next

The mark says which batch of which feed it ends: after an interruption the feed goes on there, if the hub still has it.
The hub chooses (`services/feed.py`); here a batch is only kept. Its mark is stored only if the mark before it is the
one that we know, so a batch whose ack was lost is not kept twice. What we have of an entity is noted beside its events.
What the hub has us release goes from the log, too, unless this device had written some of it itself.

Looks at `router.inventory` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import nats.nuid

from mnemesh import kv, subjects, wire
from mnemesh.asker import Asker
from mnemesh.atomic_batch import MOST_IN_BATCH, ROLLUP, Outgoing, publish_all, without_erased
from mnemesh.errors import BadRequest, Conflict, Denied, MnemeshError, NotFound, Timeout, TooLarge
from mnemesh.event import Event, decode_event
from mnemesh.ids import partition_of_tokens, to_token
from mnemesh.jetstream import Stored, api, last_of, next_of, stream_state
from mnemesh.log_writer import EXPECTED
from mnemesh.messages import Carried, FeedBatch, HeldState, Holding, Interest, NextFeed, OpenFeed
from mnemesh.origin import BORN, HUB_SEQUENCE, Mark, decode_mark
from router.inventory import Inventory
from router.portions import bytes_of, portions

logger = logging.getLogger("mnemesh.downlink")

RETRY_S = 0.5
TROUBLE_S = 10.0
APPEND_S = 5.0
OPEN_S = 5.0
"""How long a hub may take to open a feed at first. Each time that it takes longer it may twice as long the next time:
much to choose from takes long, but with a line that was cut meanwhile the answer never comes."""
HELD_A_PAGE = 20_000
HELD_BYTES_A_PAGE = 4 * 1024 * 1024


KEPT = "Mnemesh-Kept"
"""Header of the hub's mark here: the feed's session and turn that it ends, and a hash of what was wanted."""


class _Kept(NamedTuple):
    """The last batch of a feed that is in our log."""

    session: str
    turn: int


NO_FEED = _Kept("", 0)


class Downlink:
    """Keeps what one device wants. `run` for ever; the other attributes say how far it is.

    `hub` returns the hub's name once that is in reach.
    """

    def __init__(
        self,
        asker: Asker,
        inventory: Inventory,
        *,
        site: str,
        interest: Interest,
        hub: Callable[[], Awaitable[str]],
    ) -> None:
        self._asker = asker
        self._reaches = hub
        self._inventory = inventory
        self._site = site
        self._interest = interest
        self._digest = hashlib.blake2b(wire.encode(interest), digest_size=8).hexdigest()
        self._kept = NO_FEED
        self._log = subjects.log_stream(site)
        self._hub = ""
        self.incarnation = ""
        """The hub's log that this follows."""
        self._open_s = OPEN_S
        self._place = 0
        """Where in our log the hub's last mark is; 0: there is none."""
        self._purged = 0
        """Where it was when all that had been released was purged."""
        self._hlc = 0
        """The newest stamp that ever came from the hub: our clock never falls behind it."""
        self.sequence = 0
        self.received = 0
        self.current = asyncio.Event()
        """Set while all that the hub has for us is here."""
        self.trouble = ""
        """What somebody must mend before more can come: the hub refuses what is wanted."""
        self.current_from = 0
        """Up to where we had the hub's log when that began."""

    async def run(self) -> None:
        """Keep on for ever. What keeps it from that passes, or is `trouble` that somebody must mend."""
        said = ""
        while True:
            pause_s = RETRY_S
            try:
                await self._keep_on()
            except Conflict as error:
                logger.info("the downlink begins anew: %s", error)
            except (Denied, BadRequest, TooLarge) as error:
                self.trouble, pause_s = f"the hub refuses what this device wants: {error.message}", TROUBLE_S
                logger.error("the downlink stands still: %s", error)
            except MnemeshError as error:
                if self.current.is_set() or str(error) != said:
                    logger.warning("the downlink is interrupted: %s", error)
                said = str(error)
            self.current.clear()
            await asyncio.sleep(random.uniform(pause_s / 2, pause_s))

    async def _keep_on(self) -> None:
        self._hub = await self._reaches()
        mark = await self._mark()
        if self._purged != self._place:
            await self._purge_again()
        try:
            batch = await self._resumed(mark)
        except Conflict:
            self._kept = _Kept(await self._open(mark), 0)
            batch = await self._next()
        self.trouble = ""
        while True:
            await self._keep(batch)
            if batch.current and not self.current.is_set():
                self.current_from = batch.place
                self.current.set()
            batch = await self._next()

    async def _next(self) -> FeedBatch:
        session, turn = self._kept
        wanted = NextFeed(session=session, turn=turn + 1)
        return await self._asker.ask(subjects.NEXT_FEED, subjects.next_feed(self._site), wanted)

    async def _resumed(self, mark: Mark) -> FeedBatch:
        """What follows in the feed of before. Raises `Conflict` where that is gone, or was for another interest."""
        if self._kept == NO_FEED:
            raise Conflict("there is no feed to go on with")
        batch = await self._next()
        self.incarnation = mark.incarnation
        self.sequence = mark.sequence
        return batch

    # ── opening ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _open(self, mark: Mark) -> str:
        """Have the hub feed us from where we stand; returns the session."""
        session = nats.nuid.NUID().next().decode()
        log = await stream_state(self._asker.inbox, self._log)
        held = await self._held(log.last_sequence)
        fitting = portions(held, most=HELD_A_PAGE, most_bytes=HELD_BYTES_A_PAGE, size_of=lambda each: bytes_of(each[1]))
        pages = list(fitting) or [[]]
        for number, page in enumerate(pages, 1):
            opening = OpenFeed(
                session=session,
                interest=self._interest,
                held=list(page),
                more=number < len(pages),
                incarnation=mark.incarnation,
                after=mark.sequence,
                last=mark.last,
                log=log.incarnation,
            )
            try:
                opened = await self._asker.ask(
                    subjects.OPEN_FEED, subjects.open_feed(self._site), opening, budget_s=self._open_s
                )
            except Timeout:
                self._open_s = min(2 * self._open_s, subjects.OPEN_FEED.budget_ms / 1000)
                raise
        self._open_s = OPEN_S
        self.incarnation = opened.incarnation
        self.sequence = mark.sequence if mark.incarnation == opened.incarnation else 0
        return session

    async def _mark(self) -> Mark:
        """Up to where the hub's log is in ours, and what of its feed was kept last."""
        try:
            stored = await last_of(self._asker.inbox, self._log, subjects.log_mark(self._hub))
        except NotFound:
            self._place = 0
            return Mark(incarnation="", sequence=0)
        self._place = stored.sequence
        session, turn, wanted = stored.message.headers.get(KEPT, f"{NO_FEED.session} 0 -").split(" ")
        kept = _Kept(session, int(turn)) if wanted == self._digest else NO_FEED
        if kept.session != self._kept.session or kept.turn > self._kept.turn:
            self._kept = kept
        mark = decode_mark(stored.message.data)
        self._hlc = max(self._hlc, mark.hlc)
        return mark

    async def _held(self, head: int) -> list[tuple[str, str, int, HeldState]]:
        return [
            (tenant, entity.entity_id, entity.bytes, entity.state or "whole")
            for tenant in await kv.keys(self._asker.inbox, subjects.TENANTS.name)
            async for entity in self._inventory.entities(tenant, upto=head, held=True)
        ]

    # ── keeping ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep(self, batch: FeedBatch) -> None:
        kept = self._kept._replace(turn=batch.turn)
        if not batch.items and batch.place == self.sequence:
            self._kept = kept
            return
        self._hlc = max(self._hlc, batch.hlc)
        mark = Mark(incarnation=self.incarnation, sequence=batch.place, last=batch.last, hlc=self._hlc)
        messages = without_erased([*map(self._message, batch.items)])
        messages += [Outgoing(subjects.log_mark(origin), data, {ROLLUP: "sub"}) for origin, data in batch.marks.items()]
        headers = {ROLLUP: "sub", EXPECTED: str(self._place), KEPT: f"{kept.session} {kept.turn} {self._digest}"}
        messages.append(Outgoing(subjects.log_mark(self._hub), mark.encode(), headers))
        self._place = await publish_all(self._asker.link, self._asker.inbox, messages, budget_s=APPEND_S)
        self._kept = kept
        self.sequence = batch.place
        self.received += sum(isinstance(item, Carried) for item in batch.items)
        await self._purge(
            {
                (item.tenant, item.entity_id): self._place
                for item in batch.items
                if isinstance(item, Holding) and item.bytes is None
            }
        )

    def _message(self, item: Carried | Holding) -> Outgoing:
        if isinstance(item, Carried):
            headers = {BORN: item.born, HUB_SEQUENCE: str(item.hub)} | ({ROLLUP: "sub"} if item.rollup else {})
            subject = subjects.log_event(item.origin, item.tenant, item.partition, item.entity)
            return Outgoing(subject, item.payload, headers)
        note = Event(
            id="",
            tenant=item.tenant,
            entity_id=item.entity_id,
            op="release" if item.bytes is None else "hold",
            agent="",
            site=self._site,
            hlc=0,
            body={} if item.bytes is None else {"bytes": item.bytes, "state": item.state},
        )
        token = to_token(item.entity_id)
        subject = subjects.log_holding(self._site, item.tenant, partition_of_tokens(item.tenant, token), token)
        return Outgoing(subject, note.encode(), {ROLLUP: "sub"})

    async def _purge_again(self) -> None:
        """Purge what the last batch released: whoever was interrupted after it kept that may not have."""
        notes = subjects.log_holding(self._site, "*", "*", "*")
        after = max(0, self._place - MOST_IN_BATCH)
        released: dict[tuple[str, str], int] = {}
        while some := await next_of(self._asker.inbox, self._log, notes, after=after):
            after = some[-1].sequence
            for stored in some:
                note = _note_in(stored)
                if note is not None and note.op == "release":
                    released[note.tenant, note.entity_id] = stored.sequence
        await self._purge(released)

    async def _purge(self, released: Mapping[tuple[str, str], int]) -> None:
        """Take the events of entities, each up to its place, out of our log where the stores dropped them.

        They keep what this device had written some of.
        """
        for tenant in sorted({tenant for tenant, _ in released}):
            places = {entity_id: place for (owner, entity_id), place in released.items() if owner == tenant}
            told = await self._inventory.describe(tenant, list(places), upto=self._place)
            for entity_id, place in places.items():
                if 0 < told[entity_id].first <= place:
                    continue
                token = to_token(entity_id)
                anywhere = subjects.log_event("*", tenant, partition_of_tokens(tenant, token), token)
                await api(self._asker.inbox, f"STREAM.PURGE.{self._log}", {"filter": anywhere, "seq": place})
        self._purged = self._place


def _note_in(stored: Stored) -> Event | None:
    try:
        return decode_event(stored.message.data)
    except MnemeshError:
        return None
