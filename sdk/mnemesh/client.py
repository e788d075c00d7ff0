"""The client: one method an operation.

    async with mnemesh.connect("nats://127.0.0.1:4222", credentials="…/acme.alice.json") as memory:
        await memory.set_context("bus:7", type="bus", attributes={"kv": 20})
        context = await memory.get_context("bus:7")

Every method raises the errors of `mnemesh.errors`. Calls that are safe to repeat are repeated with jittered
backoff while the budget lasts: reads always, writes under one id, so that they happen once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import nats.nuid

from mnemesh import messages, subjects
from mnemesh.asker import Asker
from mnemesh.call import check_message_id
from mnemesh.connection import Link, LinkOptions
from mnemesh.contract import Operation, R
from mnemesh.errors import BadRequest, MnemeshError, Timeout
from mnemesh.ids import check_name, to_token
from mnemesh.wire import Vector, as_vector

FIRST_BACKOFF_S = 0.02
LONGEST_BACKOFF_S = 1.0
SHORTEST_TRY_S = 0.02
"""With less left of the budget none begins: it would only hide what failed before, and a write may have been done."""


@contextlib.asynccontextmanager
async def connect(
    url: str | None = None,
    *,
    tenant: str | None = None,
    agent: str | None = None,
    password: str | None = None,
    credentials: str | Path | None = None,
    connect_timeout_s: float = 5.0,
) -> AsyncIterator[Memory]:
    """A `Memory` for one agent, over a connection that lives as long as the block.

    `credentials` is a file that `mnemesh up` or `mnemesh agent add` wrote; the other arguments override it.
    Raises `Unavailable` if no server answers, `Denied` if it does not know the agent.
    """
    held = read_credentials(credentials) if credentials is not None else {}
    user_tenant, _, user_agent = str(held.get("user", "")).partition(".")
    tenant = check_name("tenant", tenant or user_tenant)
    agent = check_name("agent", agent or user_agent)
    link = await Link.open(
        LinkOptions(
            url=url or held.get("url") or "nats://127.0.0.1:4222",
            user=subjects.agent_user(tenant, agent),
            password=password or held.get("password"),
            inbox_prefix=subjects.agent_inbox(tenant, agent),
            name=f"{tenant}.{agent}",
            connect_timeout_s=connect_timeout_s,
        )
    )
    try:
        yield Memory(await Asker(link).open(), tenant, agent)
    finally:
        await link.close()


class Memory:
    """What one agent can do with the shared memory. Get it from `connect`.

    `budget_ms` of each method bounds the whole call, repeats included; the default is the operation's own. A write that
    is repeated under its `message_id` is stored once: for two minutes at a hub, for 45 s on a device.
    """

    def __init__(self, asker: Asker, tenant: str, agent: str) -> None:
        self._asker = asker
        self.tenant = tenant
        self.agent = agent
        self._nuid = nats.nuid.NUID()

    # ── writes ──────────────────────────────────────────────────────────────────────────────────────────────

    async def set_context(
        self,
        entity_id: str,
        *,
        type: str | None = None,
        attributes: Mapping[str, Any] | None = None,
        edges: Sequence[Mapping[str, Any]] = (),
        remove_edges: Sequence[Mapping[str, Any]] = (),
        vectors: Mapping[str, Vector | Sequence[float] | str] | None = None,
        remove_vectors: Sequence[str] = (),
        text: str | None = None,
        valid_from: datetime | None = None,
        valid_to: datetime | None = None,
        expected_version: int | None = None,
        message_id: str | None = None,
        budget_ms: int | None = None,
    ) -> messages.Written:
        """Patch one entity: attributes merge (`None` removes), edges and vectors are added or removed.

        `expected_version` makes it a compare-and-set (`Conflict` if it fails), `message_id` names the write so that
        a repeat of it, even by another process, happens once.
        """
        document: dict[str, Any] = {
            "entity_id": entity_id,
            "type": type,
            "attributes": dict(attributes or {}),
            "edges": list(edges),
            "remove_edges": list(remove_edges),
            "vectors": {space: as_vector(vector) for space, vector in (vectors or {}).items()},
            "remove_vectors": list(remove_vectors),
            "text": text,
            "valid_from": valid_from,
            "valid_to": valid_to,
            "expected_version": expected_version,
        }
        request = {name: value for name, value in document.items() if value not in (None, [], {})}
        return await self._write(subjects.SET_CONTEXT, subjects.set_context, request, message_id, budget_ms)

    async def upsert_embedding(
        self,
        entity_id: str,
        vector: Vector | Sequence[float] | str,
        *,
        space: str = "default",
        type: str | None = None,
        attributes: Mapping[str, Any] | None = None,
        metric: messages.Metric | None = None,
        index: messages.IndexKind | None = None,
        model: str | None = None,
        expected_version: int | None = None,
        message_id: str | None = None,
        budget_ms: int | None = None,
    ) -> messages.Written:
        """Set one entity's vector, shape (d,), in a space. The first vector settles its dimension, metric and index."""
        request = messages.UpsertEmbedding(
            entity_id=entity_id,
            vector=as_vector(vector),
            space=space,
            type=type,
            attributes=dict(attributes or {}),
            metric=metric,
            index=index,
            model=model,
            expected_version=expected_version,
        )
        return await self._write(subjects.UPSERT_EMBEDDING, subjects.upsert_embedding, request, message_id, budget_ms)

    async def forget(
        self,
        entity_id: str,
        *,
        expected_version: int | None = None,
        message_id: str | None = None,
        budget_ms: int | None = None,
    ) -> messages.Written:
        """Erase one entity: from every store, and its events from the log. A tombstone stays."""
        request = messages.Forget(entity_id=entity_id, expected_version=expected_version)
        return await self._write(subjects.FORGET, subjects.forget, request, message_id, budget_ms)

    async def ingest(
        self,
        entities: Sequence[Mapping[str, Any] | messages.Entity],
        *,
        atomic: bool = False,
        message_id: str | None = None,
        budget_ms: int | None = None,
    ) -> messages.Ingested:
        """Write many documents. Each is accepted or refused on its own; with `atomic` all or none (at most 1,000)."""
        request = {"entities": list(entities), "atomic": atomic}
        return await self._write(subjects.INGEST, subjects.ingest, request, message_id, budget_ms)

    # ── reads ───────────────────────────────────────────────────────────────────────────────────────────────

    async def get_context(
        self,
        entity_id: str,
        *,
        as_of: datetime | None = None,
        valid_at: datetime | None = None,
        include_vectors: bool = False,
        include_suspects: bool = False,
        consistency: messages.Consistency | None = None,
        budget_ms: int | None = None,
    ) -> messages.Context:
        """One entity, now or as of a time. Raises `NotFound`.

        Its suspects are what lost to a write that did not know of it.
        """
        token = to_token(entity_id)
        request = messages.GetContext(
            entity_id=entity_id if token.startswith("==") else None,
            as_of=as_of,
            valid_at=valid_at,
            include_vectors=include_vectors,
            include_suspects=include_suspects,
            consistency=consistency,
        )
        subject = subjects.get_context(self.tenant, self.agent, token)
        return await self._ask(subjects.GET_CONTEXT, subject, request, budget_ms)

    async def timeline(
        self,
        entity_id: str | None = None,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        type: str | None = None,
        after: int = 0,
        limit: int = 100,
        consistency: messages.Consistency | None = None,
        budget_ms: int | None = None,
    ) -> messages.TimelinePage:
        """Events in log order: of one entity, or of all whose valid time starts in [`start`, `end`).

        Resume with `after=page.next_after` until that is `None`.
        """
        if entity_id is None:
            ranged = messages.TimelineRange(
                start=start, end=end, type=type, after=after, limit=limit, consistency=consistency
            )
            subject = subjects.timeline_range(self.tenant, self.agent)
            return await self._ask(subjects.TIMELINE_RANGE, subject, ranged, budget_ms)
        if start or end or type:
            raise BadRequest("a timeline is of one entity or of a time range, not of both")
        request = messages.Timeline(entity_id=entity_id, after=after, limit=limit, consistency=consistency)
        subject = subjects.timeline(self.tenant, self.agent, to_token(entity_id))
        return await self._ask(subjects.TIMELINE, subject, request, budget_ms)

    async def search_embedding(
        self,
        vector: Vector | Sequence[float] | str,
        *,
        space: str = "default",
        k: int = 10,
        type: str | None = None,
        filter: Mapping[str, Any] | None = None,
        output_fields: Sequence[str] = (),
        include_vectors: bool = False,
        scope: messages.Scope = "all",
        consistency: messages.Consistency | None = None,
        budget_ms: int | None = None,
    ) -> messages.Hits:
        """The `k` nearest in a space over all shards, best first. See `messages.SearchEmbedding` for filters."""
        request = messages.SearchEmbedding(
            vector=as_vector(vector),
            space=space,
            k=k,
            type=type,
            filter=dict(filter or {}),
            output_fields=list(output_fields),
            include_vectors=include_vectors,
            scope=scope,
            consistency=consistency,
        )
        subject = subjects.search_embedding(self.tenant, self.agent)
        return await self._ask(subjects.SEARCH_EMBEDDING, subject, request, budget_ms)

    async def search_text(
        self,
        query: str,
        *,
        k: int = 10,
        type: str | None = None,
        scope: messages.Scope = "all",
        consistency: messages.Consistency | None = None,
        budget_ms: int | None = None,
    ) -> messages.Hits:
        """The `k` entities whose text matches the words of `query` best, by BM25."""
        request = messages.SearchText(query=query, k=k, type=type, scope=scope, consistency=consistency)
        subject = subjects.search_text(self.tenant, self.agent)
        return await self._ask(subjects.SEARCH_TEXT, subject, request, budget_ms)

    async def traverse(
        self,
        start: str | Sequence[str],
        *,
        relations: Sequence[str] = (),
        direction: messages.Direction = "out",
        depth: int = 1,
        limit: int = 1000,
        scope: messages.Scope = "all",
        consistency: messages.Consistency | None = None,
        budget_ms: int | None = None,
    ) -> messages.Traversal:
        """Walk the graph breadth first from `start`, across shards, nearest first."""
        request = messages.Traverse(
            start=start if isinstance(start, str) else list(start),
            relations=list(relations),
            direction=direction,
            depth=depth,
            limit=limit,
            scope=scope,
            consistency=consistency,
        )
        subject = subjects.traverse(self.tenant, self.agent)
        return await self._ask(subjects.TRAVERSE, subject, request, budget_ms)

    # ── how they are asked ──────────────────────────────────────────────────────────────────────────────────

    async def _write(
        self,
        operation: Operation[Any, R],
        subject: Callable[[str, str], str],
        request: object,
        message_id: str | None,
        budget_ms: int | None,
    ) -> R:
        message_id = self._nuid.next().decode() if message_id is None else check_message_id(message_id)
        return await self._ask(operation, subject(self.tenant, self.agent), request, budget_ms, message_id=message_id)

    async def _ask(
        self,
        operation: Operation[Any, R],
        subject: str,
        request: object,
        budget_ms: int | None,
        *,
        message_id: str | None = None,
    ) -> R:
        """Ask, and ask again after a failure that may pass, until the budget is spent.

        Raises the failure that tells most: not that the last try had too little time, unless it may have written.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (operation.budget_ms if budget_ms is None else budget_ms) / 1000
        last_start = deadline - SHORTEST_TRY_S
        failures = 0
        told: MnemeshError | None = None
        while True:
            try:
                return await self._asker.ask(
                    operation, subject, request, budget_s=deadline - loop.time(), message_id=message_id
                )
            except MnemeshError as error:
                if told is not None and isinstance(error, Timeout) and operation.idempotent == "always":
                    raise told from error
                failures += 1
                pause = _backoff_s(failures, error)
                if not error.retryable or isinstance(error, Timeout) or loop.time() + pause >= last_start:
                    raise
                told = error
            await asyncio.sleep(pause)
            if loop.time() >= last_start:
                raise told


def read_credentials(credentials: str | Path) -> dict[str, Any]:
    """What a credentials file says: the format of the `nats` command's contexts. Raises `BadRequest`."""
    try:
        held = json.loads(Path(credentials).read_text())
    except OSError as error:
        raise BadRequest(f"cannot read the credentials file {credentials}: {error.strerror}") from error
    except ValueError as error:
        raise BadRequest(f"{credentials} is not a credentials file of Mnemesh") from error
    texts = ("url", "user", "password", "inbox_prefix")
    if not isinstance(held, dict) or not all(isinstance(held.get(each, ""), str) for each in texts):
        raise BadRequest(f"{credentials} is not a credentials file of Mnemesh")
    return held


def _backoff_s(failures: int, error: MnemeshError) -> float:
    """Full jitter over a doubling ceiling, never sooner than the far side asked for."""
    ceiling = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0**failures)
    asked = (error.retry_after_ms or 0) / 1000
    return asked + random.uniform(0, ceiling)
