"""The audit of the sites ledger: what the writers were told against what every site has.

    wait      every site reads with everybody's last tokens, and has erased what was forgotten, but maybe the last of it
    logs      each site's own log is the ledger, but for what was forgotten; each other site has the same of it
    memory    each site's timeline is what is in the logs; reads are its fold; the stores hash alike

What a forget erases: at its own site all that is before it in the log, and everywhere all with a smaller mark, which is
(stamp, site), from stores and logs. What is erased is in no log any more to tell its mark; but what was begun after all
forgets of its entity had been answered has the larger stamp, as the sites share a clock, and must be there.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from memory_shards.digests import ordered
from memory_shards.merger import ALL_PARTS
from memory_shards.stores.sqlite import facts_in
from mnemesh import Consistency, Memory, messages, subjects
from mnemesh.asker import Asker
from mnemesh.connection import Link
from mnemesh.errors import NotFound, Stale, Timeout, Unavailable
from mnemesh.event import Event, decode_event
from mnemesh.jetstream import ALL, Stored, next_of, stream_state
from mnemesh.origin import birth_of, hash_of, place_of
from services.erasure import SAVE_AFTER, erased_upto
from tests.fleet import HUB, Fleet
from tests.ledger import fold, statuses
from tests.site_writers import Entry, Ledger, said

READ_MS = 10_000
PAGE = 1000
READERS = 16
ERASED_S, AGAIN_S = 60.0, 3.0
"""How long sites may take to erase what was forgotten, and how often that is looked at."""
CLOSE_S = 0.1
"""Of two writes that are closer than that, either may have the larger stamp."""
MOST_TOLD = 10
"""Findings of one kind that are told in full; the others are counted."""

Mark = tuple[int, str]
"""(stamp, site)"""

T = TypeVar("T")


class Born(NamedTuple):
    """An event as the log of its own site has it."""

    event_id: str
    entity_id: str
    is_forget: bool
    mark: Mark
    hash: str


Births = Mapping[tuple[str, int], Born]
"""By (site, sequence) where they were born."""


class Findings:
    """What does not agree, by kinds."""

    def __init__(self) -> None:
        self._told: dict[str, list[str]] = defaultdict(list)
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, *facts: object) -> None:
        self._counts[kind] += 1
        if self._counts[kind] <= MOST_TOLD:
            self._told[kind].append(f"{kind}: {'; '.join(map(str, facts))}")

    def all(self) -> list[str]:
        lines = []
        for kind, told in self._told.items():
            lines += told
            if self._counts[kind] > len(told):
                lines.append(f"{kind}: {self._counts[kind] - len(told)} more")
        return lines


class Audit:
    """Compares the ledger with every site. `findings` is what does not agree; `facts` are its counts."""

    def __init__(self, fleet: Fleet, ledger: Ledger, memories: Mapping[str, Memory]) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._memories = memories
        self._found = Findings()
        self._forgets: dict[str, list[Entry]] = defaultdict(list)
        for entries in ledger.acknowledged.values():
            for entry in entries:
                if entry.is_forget:
                    self._forgets[entry.entity_id].append(entry)
        self.facts: Counter[str] = Counter()
        self.digest: str | None = None

    @property
    def findings(self) -> list[str]:
        return [*self._ledger.findings, *self._found.all()]

    async def run(self) -> None:
        births = await self._logs()
        seen = _unforgotten(births)
        self.facts["events in every timeline"] = len(seen)
        for site in self._fleet.sites:
            await self._timeline(site, births, seen)
        await self._reads(births, seen)
        await self._stores_are_alike()

    async def _logs(self) -> Births:
        """What the logs say, once every site has taken out of its own what was forgotten."""
        until = asyncio.get_running_loop().time() + ERASED_S
        while True:
            self._found = Findings()
            self.facts.clear()
            births = await self._own_logs()
            for site in self._fleet.sites:
                await self._carried(site, births)
            if not self._found.all() or asyncio.get_running_loop().time() > until:
                return births
            await asyncio.sleep(AGAIN_S)

    # ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────

    async def wait(self) -> None:
        """Until every site reads with everybody's last tokens, and has all but caught up with erasing."""
        token: dict[str, int] = defaultdict(int)
        for (written_at, _), entries in self._ledger.acknowledged.items():
            token[written_at] = max(token[written_at], *(entry.sequence for entry in entries))
        wanted = Consistency(level="session", token=dict(token))
        for memory in self._memories.values():
            await answered(partial(memory.timeline, limit=1, consistency=wanted, budget_ms=READ_MS))
        for site in self._fleet.sites:
            await self._erased(site)

    async def _erased(self, site: str) -> None:
        async with self._asking(site, "operator") as asker:
            log = await stream_state(asker.inbox, subjects.log_stream(site))
            while True:
                if log.last_sequence - await erased_upto(asker.inbox, log) <= SAVE_AFTER:
                    return
                await asyncio.sleep(AGAIN_S)

    # ── logs ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _own_logs(self) -> Births:
        """Every site's own log is what was acknowledged there; returns all that is in them."""
        births: dict[tuple[str, int], Born] = {}
        for site in self._fleet.sites:
            stamps: dict[str, int] = {}
            ids: Counter[str] = Counter()
            async for stored in self._log(site, subjects.log_event(site, "*", "*", "*")):
                event = decode_event(stored.message.data)
                stamp = stamps[event.entity_id] = max(event.hlc, stamps.get(event.entity_id, -1) + 1)
                born = Born(event.id, event.entity_id, event.op == "forget", (stamp, site), hash_of(stored.message))
                births[site, stored.sequence] = born
                ids[event.id] += 1
                self._says_what_was_said(site, stored.sequence, event)
            self._is_the_ledger(site, births, ids)
        self.facts["events in the logs"] = len(births)
        return births

    def _is_the_ledger(self, site: str, births: Births, ids: Mapping[str, int]) -> None:
        for event_id, count in ids.items():
            if count > 1:
                self._found.add("twice in its own log", event_id, f"{count} times at {site}")
        entries = {agent: own for (at, agent), own in self._ledger.acknowledged.items() if at == site}
        forgotten: dict[str, int] = {}
        for own in entries.values():
            for entry in own:
                if entry.is_forget:
                    forgotten[entry.entity_id] = max(entry.sequence, forgotten.get(entry.entity_id, 0))
        known: set[str] = set()
        for agent, own in entries.items():
            last: dict[str, int] = {}
            for entry in own:
                known.add(entry.event_id)
                erased_at = forgotten.get(entry.entity_id, 0)
                there = births.get((site, entry.sequence))
                self._is_where_it_was_acknowledged(site, entry, there, erased_at, ids)
                before, last[entry.entity_id] = last.get(entry.entity_id, 0), entry.sequence
                if entry.sequence <= before:
                    self._found.add("out of a writer's order", f"{agent} at {site} wrote {entry} after {before}")
        for event_id in ids.keys() - known:
            how = "was refused" if event_id in self._ledger.refused else "was never acknowledged"
            self._found.add(f"in a log though it {how}", event_id, site)

    def _is_where_it_was_acknowledged(
        self, site: str, entry: Entry, there: Born | None, erased_at: int, ids: Mapping[str, int]
    ) -> None:
        if entry.sequence < erased_at:
            if entry.event_id in ids:
                self._found.add("not erased by its own site's forget", site, entry, f"forgotten at {erased_at}")
        elif there is None and self._may_be_erased(entry):
            self.facts["erased"] += 1
        elif there is None or there[:3] != (entry.event_id, entry.entity_id, entry.is_forget):
            times = f"its id {ids.get(entry.event_id, 0)} times"
            self._found.add("lost from its own log", site, entry, f"there is {there}", times)

    def _may_be_erased(self, entry: Entry) -> bool:
        """Whether some other forget of the entity may have the larger stamp."""
        return any(
            other.event_id != entry.event_id and other.done >= entry.begun - CLOSE_S
            for other in self._forgets[entry.entity_id]
        )

    def _says_what_was_said(self, site: str, sequence: int, event: Event) -> None:
        if event.op == "forget" or event.id in self._ledger.refused:
            return
        wanted = said(event.id, self._ledger.seed)
        told = dict(event.body)
        if not _are_close(told.pop("vectors", {}), wanted.pop("vectors", {})) or told != wanted:
            self._found.add("says something else", f"{sequence} of {site}", event, wanted)

    async def _carried(self, site: str, births: Births) -> None:
        """Of every other site's log, this one has the same events as that, in its order for each entity, once.

        A device's log may have an event again that was on its way when its process died. It says where it was born
        then as before, so it has no effect again, which is for the timeline to show.
        """
        has: Counter[tuple[str, int]] = Counter()
        last: dict[tuple[str, str], int] = {}
        async for stored in self._log(site):
            place = place_of(stored.message.subject)
            if not place.is_event:
                continue
            if place.origin == site:
                has[site, stored.sequence] += 1
                continue
            birth = birth_of(stored.message, place.origin)
            key = place.origin, birth.sequence if birth else 0
            has[key] += 1
            born = births.get(key)
            if born is None or born.hash != hash_of(stored.message):
                self._found.add("carried otherwise than it was born", site, key, stored, f"in its own log: {born}")
                continue
            if has[key] > 1:
                if site == HUB:
                    self._found.add("twice in the hub's log", key, born)
                continue
            before = last.get((place.origin, born.entity_id), 0)
            last[place.origin, born.entity_id] = key[1]
            if key[1] < before:
                self._found.add("carried out of order", site, key, born, f"after {before}")
        for key in births.keys() - has.keys():
            self._found.add("lost on its way", f"not in the log of {site}", key, births[key])
        self.facts["carried again to devices"] += has.total() - len(has)

    async def _log(self, site: str, subject: str = ALL) -> AsyncIterator[Stored]:
        """A site's log from its beginning. What it still has is erased meanwhile, so this does not count on it."""
        async with self._asking(site, "shard") as asker:
            stream = subjects.log_stream(site)
            after = 0
            while some := await next_of(asker.inbox, stream, subject, after=after):
                for stored in some:
                    yield stored
                after = some[-1].sequence

    @contextlib.asynccontextmanager
    async def _asking(self, site: str, role: str) -> AsyncIterator[Asker]:
        link = await Link.open(self._fleet.credential(site, role).link_options("audit"))
        try:
            yield await Asker(link).open()
        finally:
            await link.close()

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _timeline(self, site: str, births: Births, wanted: set[str]) -> None:
        places = {born.event_id: place for place, born in births.items()}
        told: Counter[str] = Counter()
        last: dict[tuple[str, str], int] = {}
        async for event in self._told(site):
            told[event.event_id] += 1
            if event.event_id not in wanted:
                self._found.add("in a timeline though it is not to be", site, event, places.get(event.event_id))
                continue
            origin, sequence = places[event.event_id]
            before = last.get((origin, event.entity_id), 0)
            last[origin, event.entity_id] = sequence
            if sequence < before:
                self._found.add("out of order in a timeline", site, event, (origin, sequence), f"after {before}")
        for event_id, count in told.items():
            if count > 1:
                self._found.add("twice in a timeline", event_id, f"{count} times at {site}")
        for event_id in wanted - told.keys():
            self._found.add("lost from a timeline", site, places[event_id], births[places[event_id]])

    async def _told(self, site: str) -> AsyncIterator[messages.TimelineEvent]:
        """A site's timeline from its beginning."""
        page = messages.TimelinePage(events=[], next_after=0, watermark={})
        while (after := page.next_after) is not None:
            page = await answered(partial(self._memories[site].timeline, after=after, limit=PAGE, budget_ms=READ_MS))
            for event in page.events:
                yield event

    async def _reads(self, births: Births, seen: set[str]) -> None:
        """What each entity reads as, each at another site, is the plain fold of what no forget erased."""
        history: dict[str, list[Born]] = defaultdict(list)
        for born in births.values():
            if born.event_id in seen:
                history[born.entity_id].append(born)
        sites = list(self._fleet.sites)
        questions = iter([(sites[index % len(sites)], name) for index, name in enumerate(sorted(history))])

        async def read() -> None:
            for site, name in questions:
                await self._reads_as(site, name, sorted(history[name], key=lambda born: born.mark))

        async with asyncio.TaskGroup() as readers:
            for _ in range(READERS):
                readers.create_task(read())
        self.facts["entities"] = len(history)

    async def _reads_as(self, site: str, entity_id: str, history: Sequence[Born]) -> None:
        patches = [said(born.event_id, self._ledger.seed) for born in history if not born.is_forget]
        try:
            context = await answered(
                lambda: self._memories[site].get_context(entity_id, include_vectors=True, budget_ms=READ_MS)
            )
        except NotFound:
            if patches:
                self._found.add("not found", site, entity_id, history)
            return
        wanted = fold(entity_id, patches)
        told = context.type, context.text, context.attributes, context.edges
        if not patches or told != wanted[:4] or not _are_close(context.vectors or {}, wanted.vectors):
            self._found.add("reads as something else", site, context, f"wanted {wanted}", history)
        if not context.complete:
            self._found.add("not held", site, entity_id)

    async def _stores_are_alike(self) -> None:
        told = {site: await self._status(site) for site in self._fleet.sites}
        for site, status in told.items():
            if status.skipped or status.quarantined:
                self._found.add("skipped or put aside", site, status)
        says = {(status.digest, status.entities, status.edges, status.vectors) for status in told.values()}
        if len(says) > 1:
            self._found.add("the stores differ", told, self._difference())
        self.digest = told[HUB].digest

    async def _status(self, site: str) -> messages.ShardStatus:
        async with self._asking(site, "operator") as asker:
            head = (await stream_state(asker.inbox, subjects.log_stream(site))).last_sequence
            (status,) = await statuses(asker, self._fleet.shard_of(site)[0], 1, head)
            return status

    def _difference(self) -> str:
        """The first entities whose documents differ between the hub and a device."""
        rows = {site: self._documents(site) for site in self._fleet.sites}
        for site, documents in rows.items():
            keys = sorted(documents.keys() | rows[HUB].keys())
            differing = [key for key in keys if documents.get(key) != rows[HUB].get(key)]
            if differing:
                shown = [(key, documents.get(key), rows[HUB].get(key)) for key in differing[:2]]
                return f"{len(differing)} documents differ between {site} and {HUB}, first {shown}"
        return "no document differs, so vectors do"

    def _documents(self, site: str) -> dict[Any, list[object]]:
        file = self._fleet.shard_of(site)[1] / "memory.db"
        documents: dict[Any, list[object]] = defaultdict(list)
        with closing(sqlite3.connect(file)) as connection:
            for part, tenant, entity_id, facts in facts_in(connection, ALL_PARTS):
                documents[tenant, entity_id].append((part, ordered(facts)))
        return documents


def _unforgotten(births: Births) -> set[str]:
    """The ids of the events that no forget wins over; the forget that wins over all others is one of them."""
    forgets: dict[str, Mark] = {}
    for born in births.values():
        if born.is_forget:
            forgets[born.entity_id] = max(born.mark, forgets.get(born.entity_id, born.mark))
    return {born.event_id for born in births.values() if born.mark >= forgets.get(born.entity_id, born.mark)}


def _are_close(told: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether these are the same vectors, as float16 keeps them."""
    return told.keys() == wanted.keys() and all(
        np.allclose(told[space], wanted[space], rtol=1e-2, atol=1e-2) for space in told
    )


async def answered(ask: Callable[[], Awaitable[T]]) -> T:
    """Ask until there is an answer."""
    while True:
        try:
            return await ask()
        except (Stale, Timeout, Unavailable):
            continue
