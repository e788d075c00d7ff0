"""Service discovery as ADR-32 has it, so that `nats micro ls`, `info` and `stats` know the mesh.

https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-32.md
"""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import UTC, datetime
from typing import Any

from nats.aio.subscription import Subscription

from mnemesh import subjects
from mnemesh.actor import Actor
from mnemesh.asker import Asker
from mnemesh.connection import Message
from mnemesh.errors import MnemeshError
from mnemesh.stats import OperationStats

logger = logging.getLogger("mnemesh.discovery")

VERSION = "0.1.0"
_NS = 1_000_000_000


class Discovery:
    """Answers `$SRV.PING`, `INFO` and `STATS` for one actor, in tasks of `tasks`."""

    def __init__(self, actor: Actor, tasks: asyncio.TaskGroup) -> None:
        self._actor = actor
        self._tasks = tasks
        self._started = datetime.now(UTC)
        self.name = f"mnemesh-{actor.role}"
        self._subscriptions: list[Subscription] = []

    async def start(self) -> None:
        for verb, describe in (("PING", self._ping), ("INFO", self._info), ("STATS", self._stats)):

            def answer(message: Message, describe: Any = describe) -> None:
                if message.reply.startswith(f"{subjects.operator_inbox()}."):
                    self._tasks.create_task(self._answer(message.reply, describe()))

            for tail in ("", f".{self.name}", f".{self.name}.{self._actor.instance}"):
                self._subscriptions.append(await self._actor.link.subscribe(f"$SRV.{verb}{tail}", answer))
        await self._actor.link.confirm()

    async def stop(self) -> None:
        if self._actor.link.is_connected:
            for subscription in self._subscriptions:
                await subscription.unsubscribe()

    async def _answer(self, inbox: str, description: dict[str, Any]) -> None:
        try:
            await self._actor.link.publish(inbox, json.dumps(description).encode())
        except MnemeshError as error:
            logger.warning("an operator could not be answered: %s", error.message)

    def _identity(self, kind: str) -> dict[str, Any]:
        return {
            "type": f"io.nats.micro.v1.{kind}_response",
            "name": self.name,
            "id": self._actor.instance,
            "version": VERSION,
            "metadata": {"contract": subjects.CONTRACT, **self._actor.metadata()},
        }

    def _ping(self) -> dict[str, Any]:
        return self._identity("ping")

    def _info(self) -> dict[str, Any]:
        return self._identity("info") | {
            "description": (self._actor.__doc__ or "").partition("\n")[0],
            "endpoints": [
                {
                    "name": operation.name,
                    "subject": operation.pattern(),
                    "queue_group": self._actor.queue(operation),
                    "metadata": {"request": operation.request.__name__, "reply": operation.reply.__name__},
                }
                for operation, _ in self._actor.handlers().values()
            ],
        }

    def _stats(self) -> dict[str, Any]:
        return self._identity("stats") | {
            "started": self._started.isoformat().replace("+00:00", "Z"),
            "endpoints": [self._endpoint(name, stats) for name, stats in self._actor.stats.items()],
        }

    def _endpoint(self, name: str, stats: OperationStats) -> dict[str, Any]:
        operation = subjects.OPERATIONS[name]
        return {
            "name": name,
            "subject": operation.pattern(),
            "queue_group": self._actor.queue(operation),
            "num_requests": stats.requests,
            "num_errors": stats.errors,
            "last_error": stats.last_error,
            "processing_time": int(stats.seconds * _NS),
            "average_processing_time": int(stats.seconds / stats.requests * _NS) if stats.requests else 0,
            "data": {"codes": dict(stats.codes)},
        }


async def ping_all(asker: Asker, *, at_least: int, wait_s: float = 1.0) -> list[dict[str, Any]]:
    """Every service that answers `$SRV.PING`, as ADR-32 describes it; waits until `at_least` have, or `wait_s`."""
    return [
        json.loads(reply.data) for reply in await asker.inbox.gather("$SRV.PING", b"", most=at_least, wait_s=wait_s)
    ]
