"""A gateway that does what a test says, and ways to ask it: what the tests of the runtime stand on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from mnemesh import subjects
from mnemesh.actor import Actor, handles
from mnemesh.asker import Asker
from mnemesh.call import Call
from mnemesh.connection import Link
from mnemesh.contract import AnyOperation
from mnemesh.guard import Guard
from mnemesh.messages import Derive, Forget, Ingest, Ingested, SetContext, UpsertEmbedding, Written

Work = Callable[[Any, Call], Awaitable[Any]]


def written(entity_id: str, version: int = 1) -> Written:
    return Written(entity_id=entity_id, version=version, token={})


async def acknowledge(request: SetContext, call: Call) -> Written:
    return written(request.entity_id)


class Held:
    """Work that waits until the test lets it go."""

    def __init__(self) -> None:
        self.begun = asyncio.Semaphore(0)
        self.release = asyncio.Event()

    async def __call__(self, request: SetContext, call: Call) -> Written:
        self.begun.release()
        await self.release.wait()
        return written(request.entity_id)


class Desk(Actor):
    """Stands where the gateway would. `set_context` runs `work`, which a test may change at any time."""

    role = "gateway"

    def __init__(self, link: Link, work: Work = acknowledge, *, guard: Guard | None = None) -> None:
        super().__init__(link, guard=guard)
        self.work = work

    @handles(subjects.SET_CONTEXT)
    async def set_context(self, request: SetContext, call: Call) -> Any:
        return await self.work(request, call)

    @handles(subjects.UPSERT_EMBEDDING)
    async def upsert_embedding(self, request: UpsertEmbedding, call: Call) -> Any:
        return await self.work(request, call)

    @handles(subjects.FORGET)
    async def forget(self, request: Forget, call: Call) -> Any:
        return await self.work(request, call)

    @handles(subjects.INGEST)
    async def ingest(self, request: Ingest, call: Call) -> Ingested:
        return Ingested(accepted=0, refused=0, token={}, versions=[])

    @handles(subjects.DERIVE)
    async def derive(self, request: Derive, call: Call) -> Written:
        return written(request.entity_id)


class SmallDesk(Desk):
    """Works on one request at a time and lets two wait."""

    @classmethod
    def handlers(cls) -> dict[str, tuple[AnyOperation, str]]:
        return {
            name: (replace(operation, concurrency=1, mailbox=2), method)
            for name, (operation, method) in super().handlers().items()
        }


async def set_context(asker: Asker, entity_id: str = "e1", *, budget_s: float = 10.0, **fields: Any) -> Written:
    """Ask as the agent that the link belongs to."""
    tenant, agent = str(asker.link.options.user).split(".")
    request = {"entity_id": entity_id, **fields}
    return await asker.ask(subjects.SET_CONTEXT, subjects.set_context(tenant, agent), request, budget_s=budget_s)
