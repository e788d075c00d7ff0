"""Keeping one view up to date: bring the vector of each entity that changed to what its text is now.

    the log, and at first a listing → backlog → read the entities → render → embed → write, if the version still holds

A vector is written only where the entity is at the very version that its text was read from (compare-and-set). So for
one entity vectors come in the order of its texts, whoever writes them, and a vector in the log says that all before it
is dealt with: what was done before a crash is not done again, although the place that was kept is older.
Looks at `view`, `view_backlog`, `log_tail`, `router.inventory` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from hashlib import blake2b
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from mnemesh import kv, subjects
from mnemesh.asker import Asker
from mnemesh.clock import wall_ms
from mnemesh.embedding import embedder
from mnemesh.errors import BadRequest, Conflict, Denied, Internal, MnemeshError, NotFound, TooLarge, Unavailable
from mnemesh.event import event_in
from mnemesh.follower import StreamShrank
from mnemesh.ids import to_token
from mnemesh.jetstream import Stored, StreamState, stream_state
from mnemesh.messages import Consistency, Context, Derivation, Derive, GetContext
from mnemesh.origin import is_born_here, place_of
from mnemesh.stats import Gauge
from mnemesh.supervision import first_of
from router.inventory import Inventory
from services.log_tail import LogTail
from services.view import View
from services.view_backlog import MOST, Backlog, Change

logger = logging.getLogger("mnemesh.views")

MOST_AT_ONCE = 128
"""Entities that are read, embedded and written together."""
MOST_REMEMBERED = 100_000
"""Entities of which it is known what text their vector is of, at some 250 bytes each."""
SAVE_S = 1.0
FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 5.0

Asked = TypeVar("Asked")
Told = TypeVar("Told")


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Up to where a view, by this `definition`, has the log of an incarnation; `filled` once it has what was before.

    It began at `since_ms`. `refused` and `trouble` are as in `ViewSeen`.
    """

    definition: str
    incarnation: str
    sequence: int
    filled: bool
    since_ms: int
    refused: int = 0
    trouble: str = ""


class _Due(NamedTuple):
    """An entity as it was read: its text, and whether it has a vector."""

    context: Context
    text: str | None

    @property
    def digest(self) -> bytes:
        return b"" if self.text is None else blake2b(self.text.encode(errors="surrogatepass"), digest_size=16).digest()


class _Done(NamedTuple):
    """The text that an entity's vector is of, by a hash, and where that vector is in the log."""

    digest: bytes
    sequence: int


class Upkeep:
    """Keeps one view. `run` for ever, in one place at a time; elsewhere at once it is in vain, but does no harm."""

    def __init__(
        self, view: View, asker: Asker, inventory: Inventory, tail: LogTail, executor: Executor, *, site: str
    ) -> None:
        self.view = view
        self.embedded = 0
        """Texts that were embedded since the start."""
        self._asker = asker
        self._inventory = inventory
        self._tail = tail
        self._executor = executor
        self._site = site
        self._log = subjects.log_stream(site)
        self._embedder = embedder(view.embedder)
        self._known: OrderedDict[str, _Done] = OrderedDict()
        self._place: Place | None = None
        self._backlog = Backlog(0)
        self._listed = False
        self._refused: set[str] = set()
        self._trouble = ""

    # ── what operators see ──────────────────────────────────────────────────────────────────────────────────

    def gauges(self) -> list[Gauge]:
        labels = {"view": self.view.name}
        return [
            Gauge("view_lag_events", "Log sequences that a view is behind the log's head", self._lag_events, labels),
            Gauge("view_lag_seconds", "Age of the oldest change that is not embedded yet", self._lag_s, labels),
            Gauge("view_embedded", "Texts that were embedded since the start", lambda: self.embedded, labels),
            Gauge("view_refused", "Entities without the vector they ought to have", lambda: len(self._refused), labels),
        ]

    def _lag_events(self) -> float:
        place = self._current()
        return 0 if place is None else max(0, self._tail.head - place.sequence)

    def _lag_s(self) -> float:
        place = self._current()
        since = None if place is None else place.since_ms if not place.filled else self._backlog.since_ms
        return 0.0 if since is None else max(0, wall_ms() - since) / 1000

    def _current(self) -> Place | None:
        """Where it stands now. As long as it is not filled, it stands where it began."""
        place = self._place
        if place is None:
            return None
        filled = place.filled or (self._listed and self._backlog.place >= place.sequence)
        return msgspec.structs.replace(
            place,
            sequence=self._backlog.place if filled else place.sequence,
            filled=filled,
            refused=len(self._refused),
            trouble=self._trouble,
        )

    # ── its life ────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Keep it for ever; from the beginning where the log is another one than before."""
        backoff = FIRST_BACKOFF_S
        while True:
            try:
                await self._run()
            except StreamShrank as error:
                logger.warning("%s; view %s begins anew", error, self.view.name)
            except MnemeshError as error:
                self._trouble = str(error)[:300]
                logger.warning("view %s goes on in %.2f s: %s", self.view.name, backoff, error)
                await asyncio.sleep(backoff)
                backoff = min(LONGEST_BACKOFF_S, backoff * 2)

    async def _run(self) -> None:
        self._known.clear()
        state = await stream_state(self._asker.inbox, self._log)
        place = self._place = await self._begin(state)
        self._backlog = Backlog(place.sequence)
        self._listed = place.filled
        caught_up = asyncio.Event()
        made: set[str] = set()
        await first_of(
            self._follow(place, state.last_sequence, caught_up, made),
            self._work(place, caught_up, made),
            self._save(place),
        )

    async def _begin(self, state: StreamState) -> Place:
        """Where to go on; where nothing of this definition and log is kept, it is to be filled first."""
        held = await kv.get(self._asker.inbox, subjects.VIEW_PLACES.name, self.view.name)
        place = None if not held else msgspec.json.decode(held, type=Place)
        if (
            place is not None
            and (place.definition, place.incarnation) == (self.view.definition, state.incarnation)
            and place.sequence <= state.last_sequence
        ):
            return place
        place = Place(
            definition=self.view.definition,
            incarnation=state.incarnation,
            sequence=state.last_sequence,
            filled=False,
            since_ms=wall_ms(),
        )
        await self._keep(place)
        return place

    async def _keep(self, place: Place) -> None:
        await kv.put(self._asker.inbox, subjects.VIEW_PLACES.name, self.view.name, msgspec.json.encode(place))

    async def _save(self, kept: Place) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            place = self._current()
            if place is not None and place != kept:
                await self._keep(place)
                kept = place

    # ── what is to be looked at ─────────────────────────────────────────────────────────────────────────────

    async def _follow(self, place: Place, head: int, caught_up: asyncio.Event, made: set[str]) -> None:
        """Put into the backlog what the log says, for ever. `made` gets what has its vector since the place."""
        if not await self._tail.next(place.sequence, place.incarnation):
            self._backlog.read(head)
            caught_up.set()
        async with aclosing(self._tail.batches(place.sequence, place.incarnation)) as batches:
            async for batch in batches:
                for stored in batch:
                    entity_id = self._take(stored)
                    if entity_id is not None and not caught_up.is_set():
                        made.add(entity_id)
                self._backlog.read(batch[-1].sequence)
                if batch[-1].sequence >= head or not batch[-1].following or len(self._backlog) >= MOST:
                    caught_up.set()
                await self._backlog.below(MOST)

    def _take(self, stored: Stored) -> str | None:
        """Take in one message of the log. The entity whose vector this view made, if it is such."""
        message = stored.message
        place = place_of(message.subject)
        if place.tenant != self.view.tenant or not place.is_event:
            return None
        event = event_in(message.data)
        if event is None or not self.view.is_moved_by(event):
            return None
        entity_id = event.entity_id
        known = self._known.get(entity_id)
        if known is not None and known.sequence < stored.sequence and self.view.is_written_by(event):
            del self._known[entity_id]  # somebody else did, which may be another replica
        if event.agent == self.view.agent and is_born_here(message, place, self._site):
            derived = event.body.get("derived")
            if isinstance(derived, dict) and derived.get("definition") == self.view.definition:
                self._backlog.settle(entity_id)
                return entity_id
        self._backlog.add(entity_id, Change(stored.sequence, stored.sequence, stored.recorded_at))
        return None

    async def _listing(self, place: Place, made: Collection[str]) -> AsyncIterator[str]:
        """The entities that were there before the log is followed, but for those that were `made` since."""
        view = self.view
        async for entity in self._inventory.entities(view.tenant, upto=place.sequence, types=[view.type]):
            if entity.entity_id not in made:
                yield entity.entity_id

    async def _add_listed(self, place: Place, listing: AsyncIterator[str]) -> None:
        """Fill the backlog up with what was there before."""
        async for entity_id in listing:
            self._backlog.add(entity_id, Change(place.sequence, place.sequence, place.since_ms))
            if len(self._backlog) >= MOST_AT_ONCE:
                return
        self._listed = True

    # ── bringing vectors up to date ─────────────────────────────────────────────────────────────────────────

    async def _work(self, place: Place, caught_up: asyncio.Event, made: Collection[str]) -> None:
        """Deal with what waits, for ever. What cannot be done now is done again, after a while."""
        await caught_up.wait()
        listing = self._listing(place, made)
        backoff = FIRST_BACKOFF_S
        while True:
            if not self._listed and len(self._backlog) < MOST_AT_ONCE:
                await self._add_listed(place, listing)
            changes = await self._backlog.take(MOST_AT_ONCE)
            try:
                again, failed = await self._bring_up_to_date(changes)
            except MnemeshError as error:
                again, failed = dict(changes), error
            self._backlog.done(again)
            self._trouble = "" if failed is None else str(failed)[:300]
            if failed is None:
                backoff = FIRST_BACKOFF_S
                continue
            logger.warning("view %s: %d entities are tried again: %s", self.view.name, len(again), failed)
            await asyncio.sleep(backoff)
            backoff = min(LONGEST_BACKOFF_S, backoff * 2)

    async def _bring_up_to_date(self, changes: Mapping[str, Change]) -> tuple[dict[str, Change], MnemeshError | None]:
        """What is to be done again, and what went wrong if anything did."""
        upto = max(change.last for change in changes.values())
        described = await self._inventory.describe(self.view.tenant, list(changes), upto=upto)
        mine = [entity_id for entity_id in changes if self.view.type in described[entity_id].types]
        again: dict[str, Change] = {}
        failed: MnemeshError | None = None
        due: dict[str, _Due] = {}
        for entity_id, read in zip(mine, await _each(mine, lambda one: self._read(one, changes[one])), strict=True):
            if isinstance(read, MnemeshError):
                again[entity_id], failed = changes[entity_id], read
            elif read is not None and self._is_due(read):
                due[entity_id] = read
        written = await self._write_all(due) if due else {}
        for entity_id, outcome in written.items():
            self._refused.discard(entity_id)
            if isinstance(outcome, Conflict):
                again[entity_id] = changes[entity_id]._replace(contested=True)
            elif isinstance(outcome, BadRequest | TooLarge | Denied):
                self._refused.add(entity_id)
                logger.error("view %s makes no vector of %.200r: %s", self.view.name, entity_id, outcome)
            elif isinstance(outcome, MnemeshError):
                again[entity_id], failed = changes[entity_id], outcome
            else:
                self._remember(entity_id, _Done(due[entity_id].digest, outcome))
        return again, failed

    def _is_due(self, read: _Due) -> bool:
        has_one = self.view.space in read.context.spaces
        if read.text is None or not has_one:
            return has_one or read.text is not None
        known = self._known.get(read.context.entity_id)
        return known is None or known.digest != read.digest

    def _remember(self, entity_id: str, done: _Done) -> None:
        self._known[entity_id] = done
        self._known.move_to_end(entity_id)
        if len(self._known) > MOST_REMEMBERED:
            self._known.popitem(last=False)

    async def _read(self, entity_id: str, change: Change) -> _Due | None:
        """The entity as of its last change or later; `None` where there is none."""
        seen = Consistency(level="session", token={self._site: change.last})
        wanted = GetContext(entity_id=entity_id, consistency=Consistency(level="strong") if change.contested else seen)
        subject = subjects.get_context(self.view.tenant, subjects.views_user(), to_token(entity_id))
        try:
            context = await self._asker.ask(subjects.GET_CONTEXT, subject, wanted)
        except NotFound:
            return None
        return _Due(context, self.view.text_of(context))

    async def _write_all(self, due: Mapping[str, _Due]) -> dict[str, int | MnemeshError]:
        """Where the vector of each is in the log, or its removal; else why there is none."""
        seen = max(each.context.latest or each.context.version for each in due.values())
        # Once more, for a device's event may have come between the first time and the read.
        described = await self._inventory.describe(self.view.tenant, list(due), upto=seen)
        texts = sorted({each.text for each in due.values() if each.text is not None})
        vectors = dict(zip(texts, await self._embed(texts), strict=True)) if texts else {}

        async def write(entity_id: str) -> int:
            each = due[entity_id]
            vector = None if each.text is None else vectors[each.text]
            return await self._write(each.context, vector, described[entity_id].sites)

        return dict(zip(due, await _each(list(due), write), strict=True))

    async def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._executor, self._embedder.embed, texts)
        except Exception as error:  # whatever an embedder raises: its view waits, and others go on
            raise Unavailable(f"the embedder {self._embedder.name} failed: {type(error).__name__}: {error}") from error
        expected = len(texts), self._embedder.dimension
        if found.shape != expected:
            raise Internal(f"the embedder {self._embedder.name} made {found.shape}, not {expected}")
        self.embedded += len(texts)
        return found

    async def _write(self, context: Context, vector: NDArray[np.float32] | None, sites: Sequence[str]) -> int:
        view = self.view
        wanted = Derive(
            entity_id=context.entity_id,
            space=view.space,
            vector=vector,
            model=self._embedder.name,
            derived=Derivation(definition=view.definition, attributes=view.attributes, sites=list(sites)),
            expected_version=context.version,
        )
        named = f"{view.definition} {context.entity_id} {context.version}"
        written = await self._asker.ask(
            subjects.DERIVE,
            subjects.derive(view.tenant, view.name),
            wanted,
            message_id=blake2b(named.encode(), digest_size=16).hexdigest(),
        )
        return written.version


async def _each(things: Sequence[Asked], do: Callable[[Asked], Awaitable[Told]]) -> list[Told | MnemeshError]:
    """What is told of each, all asked at once; or the error that it is answered with."""

    async def settled(thing: Asked) -> Told | MnemeshError:
        try:
            return await do(thing)
        except MnemeshError as error:
            return error

    return await asyncio.gather(*map(settled, things))
