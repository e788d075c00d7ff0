"""The gateway: takes writes, turns each into one event, and answers when the log has acknowledged it.

    check the document → settle its spaces → stamp the event → append (group commit) → version and token

It holds no state but its clock, so any number of gateways serve one site.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import nats.nuid
from msgspec.structs import asdict, replace

from mnemesh import messages, subjects, wire
from mnemesh.actor import Actor, handles
from mnemesh.atomic_batch import MOST_IN_BATCH, ROLLUP
from mnemesh.call import MESSAGE_ID, Call, Caller, check_message_id
from mnemesh.clock import HybridClock, is_too_far_ahead, to_ms
from mnemesh.connection import Link
from mnemesh.errors import BY_CODE, BadRequest, Conflict, MnemeshError, NotFound, TooLarge
from mnemesh.event import LARGEST, Event, decode_event, event_in
from mnemesh.follower import Follower
from mnemesh.guard import Guard
from mnemesh.ids import partition_of_tokens, to_token
from mnemesh.jetstream import (
    SiteKind,
    Stored,
    WrongSequence,
    history_of,
    last_of,
    last_of_each,
    message_at,
    message_id_key,
    stream_state,
)
from mnemesh.log_writer import Append, LogWriter, Position
from mnemesh.origin import FORGETS, decode_mark
from mnemesh.stats import Gauge
from services.documents import body_of
from services.spaces import Spaces

logger = logging.getLogger("mnemesh.gateway")

MOST_ENTITIES = 10_000
DOCUMENTS_A_SLICE = 64
"""How many documents of an ingest are prepared before other requests get their turn: about 2 ms."""


class Gateway(Actor):
    """Takes writes and commits them to the log."""

    role = "gateway"

    def __init__(
        self,
        link: Link,
        *,
        site: str,
        kind: SiteKind = "hub",
        guard: Guard | None = None,
        clock: HybridClock | None = None,
    ) -> None:
        super().__init__(link, guard=guard)
        self.site = site
        self._saw = None if kind == "hub" else 0
        self._clock = clock or HybridClock()
        self._spaces = Spaces()
        self._log = LogWriter(link, self.asker.inbox)
        self._nuid = nats.nuid.NUID()

    def metadata(self) -> dict[str, str]:
        return {"site": self.site}

    def gauges(self) -> list[Gauge]:
        return [
            Gauge("log_waiting", "Writes that wait for the next commit", lambda: self._log.waiting),
            Gauge("log_commits", "Commits to the log", lambda: self._log.commits),
            Gauge("log_appended", "Events appended to the log", lambda: self._log.appended),
        ]

    def background(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        return {
            "log": self._log.run,
            "spaces": partial(self._spaces.follow, self.link, self.asker.inbox),
            "marks": self._follow_marks,
        }

    async def prepare(self) -> None:
        """Start the clock no earlier than the newest stamp in the log, whatever the machine's clock says."""
        self._message_key = await message_id_key(self.asker.inbox, self.site)
        log = subjects.log_stream(self.site)
        for stored in await last_of_each(self.asker.inbox, log, subjects.log_mark("*")):
            self._note(stored)
        with contextlib.suppress(NotFound):
            newest = await last_of(self.asker.inbox, log, subjects.log_event(self.site, "*", "*", "*"))
            self._clock.observe(decode_event(newest.message.data).hlc)

    async def _follow_marks(self) -> None:
        """Never stamp a write earlier than what has come here from other sites."""
        log = subjects.log_stream(self.site)
        state = await stream_state(self.asker.inbox, log)
        follower = Follower(
            self.link, self.asker.inbox, log, incarnation=state.incarnation, subject=subjects.log_mark("*")
        )
        async for batch in follower.batches(1000):
            for stored in batch:
                self._note(stored)

    def _note(self, stored: Stored) -> None:
        try:
            mark = decode_mark(stored.message.data)
        except MnemeshError as error:
            logger.error("mark %d of %s cannot be read: %s", stored.sequence, self.site, error)
            return
        if self._saw is not None and not mark.by:
            self._saw = mark.sequence
        if self._saw is not None or not is_too_far_ahead(mark.hlc, stored.recorded_at):
            self._clock.observe(mark.hlc)

    async def ready(self) -> None:
        await self._spaces.ready.wait()

    # ── operations ──────────────────────────────────────────────────────────────────────────────────────────

    @handles(subjects.SET_CONTEXT)
    async def set_context(self, request: messages.SetContext, call: Call) -> messages.Written:
        return await self._commit(request.entity_id, await self._put(request, call, self._event_id(call)))

    @handles(subjects.UPSERT_EMBEDDING)
    async def upsert_embedding(self, request: messages.UpsertEmbedding, call: Call) -> messages.Written:
        wanted = {name: value for name in ("metric", "index", "model") if (value := getattr(request, name)) is not None}
        entity = messages.Entity(
            entity_id=request.entity_id,
            type=request.type,
            attributes=request.attributes,
            vectors={request.space: request.vector},
            expected_version=request.expected_version,
        )
        append = await self._put(entity, call, self._event_id(call), wanted={request.space: wanted})
        return await self._commit(request.entity_id, append)

    @handles(subjects.FORGET)
    async def forget(self, request: messages.Forget, call: Call) -> messages.Written:
        append = self._append(request.entity_id, "forget", {}, call, self._event_id(call), request.expected_version)
        return await self._commit(request.entity_id, append)

    @handles(subjects.INGEST)
    async def ingest(self, request: messages.Ingest, call: Call) -> messages.Ingested:
        if not request.entities:
            raise BadRequest("ingest needs at least one entity")
        most = MOST_IN_BATCH if request.atomic else MOST_ENTITIES
        if len(request.entities) > most:
            raise TooLarge(f"ingest takes at most {most} entities here; this request has {len(request.entities)}")
        event_id = self._event_id(call)
        appends: list[Append | MnemeshError] = []
        for index, document in enumerate(request.entities):
            if index % DOCUMENTS_A_SLICE == DOCUMENTS_A_SLICE - 1:
                await asyncio.sleep(0)
            try:
                entity = wire.convert(document, messages.Entity)
                appends.append(await self._put(entity, call, f"{event_id}.{index}"))
            except MnemeshError as error:
                if request.atomic:
                    kind = BY_CODE[error.code]
                    raise kind(f"entity {index}: {error.message}", retry_after_ms=error.retry_after_ms) from error
                appends.append(error)
        good = [append for append in appends if isinstance(append, Append)]
        if request.atomic:
            return self._ingested(request, await self._commit_all(request, good))
        written = iter(await self._append_each(good))
        outcomes = [
            _named_conflict(_named(document), append, next(written)) if isinstance(append, Append) else append
            for document, append in zip(request.entities, appends, strict=True)
        ]
        return self._ingested(request, outcomes)

    @handles(subjects.DERIVE)
    async def derive(self, request: messages.Derive, call: Call) -> messages.Written:
        view = f"view:{call.tokens['view']}"  # no agent can be called so
        entity = messages.Entity(
            entity_id=request.entity_id,
            vectors={} if request.vector is None else {request.space: request.vector},
            remove_vectors=[request.space] if request.vector is None else [],
            expected_version=request.expected_version,
        )
        call = replace(call, caller=Caller(call.caller.tenant, view))
        append = await self._put(
            entity,
            call,
            self._event_id(call),
            wanted={request.space: {"model": request.model}},
            derived=request.derived,
        )
        return await self._commit(request.entity_id, append)

    # ── from event to log ───────────────────────────────────────────────────────────────────────────────────

    async def _commit(self, entity_id: str, append: Append) -> messages.Written:
        (position,) = await self._append_each([append])
        if isinstance(position, WrongSequence):
            raise _not_at(entity_id, append) from position
        if isinstance(position, MnemeshError):
            raise position
        return messages.Written(
            entity_id=entity_id,
            version=position.sequence,
            token={self.site: position.sequence},
            duplicate=position.duplicate,
        )

    async def _append_each(self, appends: Sequence[Append]) -> list[Position | MnemeshError]:
        outcomes = await self._log.append_each(appends)
        for index, (append, outcome) in enumerate(zip(appends, outcomes, strict=True)):
            if isinstance(outcome, WrongSequence) and (again := await self._after_erasure(append)) is not append:
                (outcomes[index],) = await self._log.append_each([again])
        return outcomes

    async def _after_erasure(self, append: Append) -> Append:
        """A write that expects what the log does not have any more compares with what is last there instead.

        What was forgotten does not exist: that is the tombstone. And of what came too late to have an effect a reader
        still sees the version, but nothing is left.
        """
        if append.expected is None:
            return append
        log = subjects.log_stream(self.site)
        try:
            last = await last_of(self.asker.inbox, log, append.compared or append.subject)
        except NotFound:
            last = None
        place = 0 if last is None else last.sequence
        if append.expected == 0:
            stands = last is None or not await self._is_gone(last, append.compared or append.subject)
        else:
            stands = append.expected <= place or not await self._is_erased(append.expected)
        return append if stands else append._replace(expected=place)

    async def _is_gone(self, last: Stored, subject: str) -> bool:
        """Whether the last message of an entity is a forget, and no put that came before it has a later stamp."""
        forget = event_in(last.message.data)
        if forget is None or forget.op != "forget":
            return False
        log = subjects.log_stream(self.site)
        history = await history_of(self.asker.inbox, log, subject, upto=last.sequence)
        events = filter(None, (event_in(stored.message.data) for stored in history))
        return not any(event.op == "put" and (event.hlc, event.site) > (forget.hlc, forget.site) for event in events)

    async def _is_erased(self, sequence: int) -> bool:
        """Whether there was a message at this place of the log."""
        log = subjects.log_stream(self.site)
        try:
            await message_at(self.asker.inbox, log, sequence)
        except NotFound:
            return sequence <= (await stream_state(self.asker.inbox, log)).last_sequence
        return False

    async def _commit_all(self, request: messages.Ingest, appends: Sequence[Append]) -> list[Position]:
        """All or nothing; the server does not say whose version was another."""
        try:
            try:
                return await self._log.append_all(appends)
            except WrongSequence:
                return await self._log.append_all([await self._after_erasure(append) for append in appends])
        except WrongSequence as error:
            suspects = [
                _not_at(_named(document), append).message
                for document, append in zip(request.entities, appends, strict=True)
                if append.expected is not None
            ]
            raise Conflict(f"nothing was written: {' or '.join(suspects)}") from error

    # ── from request to event ───────────────────────────────────────────────────────────────────────────────

    async def _put(
        self,
        entity: messages.Entity,
        call: Call,
        event_id: str,
        wanted: Mapping[str, dict[str, Any]] | None = None,
        derived: messages.Derivation | None = None,
    ) -> Append:
        body = body_of(entity)
        if derived is not None:
            body["derived"] = asdict(derived)
        made_of = derived.attributes if derived is not None else ()
        settings = {}
        for name, vector in body.get("vectors", {}).items():
            space = await self._spaces.settle(
                self.asker.inbox, call.caller.tenant, name, vector, (wanted or {}).get(name), made_of=made_of
            )
            if beyond := space.settings():
                settings[name] = beyond
        if settings:
            body["spaces"] = settings
        return self._append(
            entity.entity_id,
            "put",
            body,
            call,
            event_id,
            entity.expected_version,
            valid_from=to_ms(entity.valid_from) if entity.valid_from else None,
            valid_to=to_ms(entity.valid_to) if entity.valid_to else None,
        )

    def _append(
        self,
        entity_id: str,
        op: Any,
        body: dict[str, Any],
        call: Call,
        event_id: str,
        expected: int | None,
        *,
        valid_from: int | None = None,
        valid_to: int | None = None,
    ) -> Append:
        tenant = call.caller.tenant
        token = to_token(entity_id)
        event = Event(
            id=event_id,
            tenant=tenant,
            entity_id=entity_id,
            op=op,
            agent=call.caller.agent,
            site=self.site,
            hlc=self._clock.now(),
            body=body,
            valid_from=valid_from,
            valid_to=valid_to,
            saw=self._saw,
        )
        place = tenant, partition_of_tokens(tenant, token), token
        subject, of_any_site = subjects.log_event(self.site, *place), subjects.log_event("*", *place)
        headers = {}
        if op == "forget":
            headers = {FORGETS: "1", ROLLUP: "sub"}
        payload = event.encode()
        if len(payload) > LARGEST:
            raise TooLarge(f"{entity_id[:200]!r} is an event of {len(payload)} bytes; it may have {LARGEST}")
        return Append(subject, payload, self._message_id(event_id), expected, headers, of_any_site)

    def _message_id(self, event_id: str) -> str:
        return hashlib.blake2b(event_id.encode(), key=self._message_key, digest_size=16).hexdigest()

    def _event_id(self, call: Call) -> str:
        """The caller's own id for the write, scoped to the caller so that nobody can take another's; else a new one."""
        named = call.headers.get(MESSAGE_ID)
        named = self._nuid.next().decode() if named is None else check_message_id(named)
        return f"{call.caller.tenant}.{call.caller.agent}.{named}"

    def _ingested(self, request: messages.Ingest, outcomes: Sequence[Position | MnemeshError]) -> messages.Ingested:
        errors = {
            str(index): messages.Outcome(
                entity_id=_named(request.entities[index])[:256],
                code=outcome.code,
                message=outcome.message,
            )
            for index, outcome in enumerate(outcomes)
            if isinstance(outcome, MnemeshError)
        }
        versions = [None if isinstance(outcome, MnemeshError) else outcome.sequence for outcome in outcomes]
        last = max((version for version in versions if version is not None), default=0)
        return messages.Ingested(
            accepted=len(outcomes) - len(errors),
            refused=len(errors),
            token={self.site: last} if last else {},
            versions=versions,
            errors=errors,
        )


def _not_at(entity_id: str, append: Append) -> Conflict:
    """What a compare-and-set that failed is told, in the caller's words rather than the log's."""
    return Conflict(f"{entity_id[:200]!r} is not at version {append.expected}; read it again and decide anew")


def _named_conflict(entity_id: str, append: Append, outcome: Position | MnemeshError) -> Position | MnemeshError:
    return _not_at(entity_id, append) if isinstance(outcome, WrongSequence) else outcome


def _named(document: object) -> str:
    """The id in a document that may be anything."""
    return str(document.get("entity_id", "")) if isinstance(document, dict) else ""
