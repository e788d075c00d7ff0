"""Who writes at the sites, and the ledger of what they were told.

What a write says follows from its id and the seed (`said`), so the ledger of a million writes needs only their places.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from memory_shards.watermark import Watermark
from mnemesh import Memory
from mnemesh.errors import BY_CODE, Busy, Conflict, MnemeshError, Stale, Timeout, Unavailable

SPACE = "site-ledger"
DIMENSION = 8
OWN, SHARED = 8, 24
"""How many entities a writer has of its own at a time, and how many all writers share."""
OWN_FOR, SHARED_FOR = 1000, 8000
"""After so many writes come others: memory grows, and entities are new to devices all the time."""
MOST_DOCUMENTS = 120
BUDGET_MS = 4000
NEVER = 2**62
"""A version that nothing ever has."""
EMBEDDING = "-v"
"""Ends the ids of writes by `upsert_embedding`, which say only a vector and attributes."""

T = TypeVar("T")


class Entry(NamedTuple):
    """One acknowledged write: where it is in the log of its site, and between which times it was stamped."""

    event_id: str
    entity_id: str
    sequence: int
    is_forget: bool
    begun: float
    done: float


@dataclass
class Ledger:
    """What the writers know. `acknowledged` has the entries of each (site, agent) in the order in which it made them.

    `refused` are the ids of writes that were, as they should; `findings` are answers that should never be.
    """

    seed: int
    acknowledged: dict[tuple[str, str], list[Entry]] = field(default_factory=lambda: defaultdict(list))
    refused: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    written: Watermark = field(default_factory=Watermark)


def said(event_id: str, seed: int) -> dict[str, Any]:
    """What a put said, as fields of an entity document: parts that add, replace and remove."""
    pick = random.Random(f"{seed} {event_id}")
    if event_id.endswith(EMBEDDING):
        return {"attributes": {"by": event_id}, "vectors": {SPACE: [pick.gauss(0, 1) for _ in range(DIMENSION)]}}
    patch: dict[str, Any] = {"attributes": {"by": event_id, f"a{pick.randrange(4)}": pick.choice((None, event_id))}}
    if pick.random() < 0.3:
        patch["type"] = pick.choice(("pump", "valve", "tank"))
    if pick.random() < 0.3:
        patch["text"] = f"{pick.choice(('rust', 'leak', 'noise'))} seen by {event_id}"
    for name, odds in (("remove_edges", 0.1), ("edges", 0.3)):
        if pick.random() < odds:
            edge = {"relation": pick.choice(("near", "feeds")), "target_id": f"shared:0:{pick.randrange(SHARED)}"}
            patch[name] = [edge | {"properties": {"by": event_id}} if name == "edges" else edge]
    if (roll := pick.random()) < 0.2:
        patch["vectors"] = {SPACE: [pick.gauss(0, 1) for _ in range(DIMENSION)]}
    elif roll < 0.25:
        patch["remove_vectors"] = [SPACE]
    return patch


class Writer:
    """One agent at a site that writes, one request after the other, and asks until each is answered."""

    def __init__(self, memory: Memory, ledger: Ledger, *, site: str) -> None:
        self._memory = memory
        self._ledger = ledger
        self._entries = ledger.acknowledged[site, memory.agent]
        self._random = random.Random(f"{ledger.seed} {memory.agent}")
        self._requests = 0
        self._begun = 0.0

    async def run(self, writes: int) -> None:
        """Write until all writers together have written so much."""
        verbs = (self._ingest, self._patch, self._embed, self._forget, self._overreach)
        while self._ledger.written.value < writes:
            (verb,) = self._random.choices(verbs, weights=(8, 2, 1, 3, 1))
            self._requests += 1
            self._begun = time.monotonic()
            try:
                await verb(str(self._requests))
            except MnemeshError as error:
                self._ledger.findings.append(f"{self._event_id(str(self._requests))} was refused: {error!r}")

    async def _ingest(self, message_id: str) -> None:
        """Many documents; all or nothing now and then, else now and then with one among them that cannot be."""
        atomic = self._random.random() < 0.3
        count = self._random.randint(1, MOST_DOCUMENTS)
        names = [self._entity() for _ in range(count)]
        if not atomic:  # of those that are each on their own, a repeat may change the order
            names = list(dict.fromkeys(names))
        ids = [self._event_id(f"{message_id}.{index}") for index in range(len(names))]
        wrong = None if atomic or self._random.random() < 0.8 else self._random.randrange(len(names))
        documents = [
            {"entity_id": "" if index == wrong else name, **said(event_id, self._ledger.seed)}
            for index, (name, event_id) in enumerate(zip(names, ids, strict=True))
        ]

        async def ask() -> list[int | None]:
            reply = await self._memory.ingest(documents, atomic=atomic, message_id=message_id, budget_ms=BUDGET_MS)
            for index, outcome in reply.errors.items():  # of one that may pass, all is repeated under the same id
                if index != str(wrong):
                    raise BY_CODE[outcome.code](outcome.message)
            return reply.versions

        versions = await self._settled(ask)
        for index, (name, event_id, version) in enumerate(zip(names, ids, versions, strict=True)):
            if index == wrong:
                self._refuse(event_id)
            else:
                assert version is not None
                self._enter(event_id, name, version)

    async def _patch(self, message_id: str) -> None:
        entity_id, event_id = self._entity(), self._event_id(message_id)
        patch = said(event_id, self._ledger.seed)
        written = await self._settled(
            lambda: self._memory.set_context(entity_id, **patch, message_id=message_id, budget_ms=BUDGET_MS)
        )
        self._enter(event_id, entity_id, written.version)

    async def _embed(self, message_id: str) -> None:
        message_id += EMBEDDING
        entity_id, event_id = self._entity(), self._event_id(message_id)
        patch = said(event_id, self._ledger.seed)
        vector, attributes = patch["vectors"][SPACE], patch["attributes"]
        written = await self._settled(
            lambda: self._memory.upsert_embedding(
                entity_id, vector, space=SPACE, attributes=attributes, message_id=message_id, budget_ms=BUDGET_MS
            )
        )
        self._enter(event_id, entity_id, written.version)

    async def _forget(self, message_id: str) -> None:
        entity_id = self._entity()
        written = await self._settled(
            lambda: self._memory.forget(entity_id, message_id=message_id, budget_ms=BUDGET_MS)
        )
        self._enter(self._event_id(message_id), entity_id, written.version, is_forget=True)

    async def _overreach(self, message_id: str) -> None:
        """A write that must be refused, for it expects what never was."""
        entity_id, event_id = self._entity(), self._event_id(message_id)
        self._refuse(event_id)
        try:
            await self._settled(
                lambda: self._memory.set_context(
                    entity_id,
                    **said(event_id, self._ledger.seed),
                    expected_version=NEVER,
                    message_id=message_id,
                    budget_ms=BUDGET_MS,
                )
            )
        except Conflict:
            return
        self._ledger.findings.append(f"{event_id} of {entity_id} was taken at version {NEVER}")

    async def _settled(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until the answer is known."""
        while True:
            try:
                return await ask()
            except (Timeout, Unavailable, Busy, Stale) as error:
                self._ledger.outcomes[f"repeated after {error.code}"] += 1

    def _entity(self) -> str:
        """One of the writer's own or a shared one, mostly of the latest."""
        pick = self._random
        if pick.random() < 0.6:
            owner, count, latest = self._memory.agent, OWN, len(self._entries) // OWN_FOR
        else:
            owner, count, latest = "shared", SHARED, self._ledger.written.value // SHARED_FOR
        age = latest if pick.random() < 0.9 else pick.randint(0, latest)
        return f"{owner}:{age}:{pick.randrange(count)}"

    def _event_id(self, message_id: str) -> str:
        return f"{self._memory.tenant}.{self._memory.agent}.{message_id}"

    def _enter(self, event_id: str, entity_id: str, sequence: int, *, is_forget: bool = False) -> None:
        self._entries.append(Entry(event_id, entity_id, sequence, is_forget, self._begun, time.monotonic()))
        self._ledger.outcomes["forgets" if is_forget else "puts"] += 1
        self._ledger.written.advance(self._ledger.written.value + 1)

    def _refuse(self, event_id: str) -> None:
        self._ledger.refused.add(event_id)
        self._ledger.outcomes["refused"] += 1
