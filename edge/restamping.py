"""Stamps anew what a device wrote while its clock was ahead. Its hub puts such events aside, and all that follow them.

For a device that is stopped, once its clock is right. Each event comes again at the end of the log, with its id, in its
order and with a stamp of now; then the first one goes. When interrupted, do it again. Looks at `aside` and `mnemesh`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence, Set

from msgspec.structs import replace

from edge.aside import Aside, is_ahead
from mnemesh import subjects
from mnemesh.asker import Asker
from mnemesh.atomic_batch import Outgoing, publish_all
from mnemesh.clock import HybridClock, wall_ms
from mnemesh.event import decode_event, event_in
from mnemesh.jetstream import Stored, delete_message, last_of_each, next_of
from mnemesh.origin import BORN, FORGETS, mark_in

MOST_AT_ONCE = 200
BUDGET_S = 30.0


class Restamping:
    """For the log of one site: `writer` may append to it, and `eraser` delete from it. `run` once."""

    def __init__(self, writer: Asker, eraser: Asker, *, site: str) -> None:
        self._writer = writer
        self._eraser = eraser
        self._log = subjects.log_stream(site)
        self._own = subjects.log_event(site, "*", "*", "*")
        self._clock = HybridClock()
        self._aside = Aside(eraser.inbox)

    async def run(self) -> int:
        """Returns how many events had a stamp that was ahead."""
        await self._aside.load()
        ahead, again = await self._ahead()
        await self._append({sequence for sequence, event_id in ahead.items() if event_id not in again})
        for sequence in ahead:
            await delete_message(self._eraser.inbox, self._log, sequence)
        await self._aside.clear()
        return len(ahead)

    async def _ahead(self) -> tuple[dict[int, str], set[str]]:
        """Where events are whose stamp is ahead, and their ids; those of events that came after one and are not."""
        ahead: dict[int, str] = {}
        others: set[str] = set()
        now_ms = wall_ms()
        for stored in await last_of_each(self._writer.inbox, self._log, subjects.log_mark("*")):
            mark = mark_in(stored.message)
            if mark is not None and not is_ahead(mark.hlc, now_ms):
                self._clock.observe(mark.hlc)
        async for stored in self._own_events():
            if BORN in stored.message.headers or (event := event_in(stored.message.data)) is None:
                continue
            if stored.sequence in self._aside or is_ahead(event.hlc, now_ms):
                ahead[stored.sequence] = event.id
            else:
                self._clock.observe(event.hlc)
                if ahead:
                    others.add(event.id)
        return ahead, others

    async def _own_events(self) -> AsyncIterator[Stored]:
        after = 0
        while some := await next_of(self._writer.inbox, self._log, self._own, after=after):
            after = some[-1].sequence
            for stored in some:
                yield stored

    async def _append(self, sequences: Set[int]) -> None:
        """What these events say, with new stamps. A forget erased already, and is not to erase what follows it here."""
        last = max(sequences, default=0)
        batch: list[Outgoing] = []
        async for stored in self._own_events():
            if stored.sequence > last:
                break
            if stored.sequence in sequences:
                event = replace(decode_event(stored.message.data), hlc=self._clock.now())
                headers = {FORGETS: "1"} if event.op == "forget" else {}
                batch.append(Outgoing(stored.message.subject, event.encode(), headers))
            if len(batch) == MOST_AT_ONCE:
                await self._publish(batch)
                batch = []
        if batch:
            await self._publish(batch)

    async def _publish(self, batch: Sequence[Outgoing]) -> None:
        await publish_all(self._writer.link, self._writer.inbox, batch, budget_s=BUDGET_S)
