"""A circuit breaker around one outside store: who asks it while it does not answer is refused at once.

    closed ── 3 failures in a row ──→ open ── after a while ──→ half open: one may try
       ↑                                                          │ │
       └────────────────────── it answers ────────────────────────┘ └── it fails: open again, for longer

A failure is an outage, as the store's driver says it, or no answer within `ANSWER_S`. Looks at `mnemesh` only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mnemesh.errors import Unavailable

logger = logging.getLogger("mnemesh.breaker")

Answer = TypeVar("Answer")

MOST_FAILURES = 3
FIRST_OPEN_S = 0.5
LONGEST_OPEN_S = 5.0
ANSWER_S = 2.0
"""How long a store is waited for, where the caller waits that long."""
PATIENCE_S = 0.25
"""A caller that gave up sooner says nothing of the store."""


class Breaker:
    """Guards the calls to one store, from one event loop. `outages` are what its driver raises where that is away."""

    def __init__(self, name: str, outages: tuple[type[Exception], ...]) -> None:
        self.name = name
        self.opened = 0
        self._outages = outages
        self._failures = 0
        self._open_s = FIRST_OPEN_S
        self._retry_at = 0.0
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Whether it failed so often that only one may try it."""
        return self._failures >= MOST_FAILURES

    @property
    def refuses(self) -> bool:
        """Whether who asks now is refused: it is open, and not yet time to try."""
        return self.is_open and (self._probing or asyncio.get_running_loop().time() < self._retry_at)

    async def call(self, work: Callable[[], Awaitable[Answer]]) -> Answer:
        """What `work` answers. Raises `Unavailable` where the store is not there, or was not a moment ago."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        if self.refuses:
            after_ms = max(1, round((self._retry_at - began) * 1000))
            raise Unavailable(f"{self.name} does not answer; it is tried again soon", retry_after_ms=after_ms)
        probes = self._probing = self.is_open
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await work()
        except TimeoutError as error:
            raise self.failed(error) from error
        except self._outages as error:
            raise self.failed(error) from error
        except asyncio.CancelledError as error:
            if loop.time() - began > PATIENCE_S:
                self.failed(error)
            raise
        else:
            self.answered()
            return answer
        finally:
            if probes:
                self._probing = False

    def failed(self, error: BaseException) -> Unavailable:
        """Note that the store did not answer. Returns what to say of that."""
        now = asyncio.get_running_loop().time()
        self._failures += 1
        if self._failures == MOST_FAILURES:
            self.opened += 1
            self._retry_at = now + self._open_s
            logger.warning("%s does not answer: %s", self.name, reason_of(error))
        elif self.is_open and now >= self._retry_at:  # it was tried again; the others were under way when it opened
            self._open_s = min(LONGEST_OPEN_S, self._open_s * 2)
            self._retry_at = now + self._open_s
        return Unavailable(f"{self.name} does not answer", retry_after_ms=round(FIRST_OPEN_S * 1000))

    def answered(self) -> None:
        """Note that the store is there."""
        if self.is_open:
            logger.warning("%s answers again", self.name)
        self._failures, self._open_s = 0, FIRST_OPEN_S


def reason_of(error: BaseException) -> str:
    """What a driver's error says, in a line for the log. Redis's begins with the whole pipeline."""
    return str(error).rpartition("of pipeline caused error: ")[2][:200] or type(error).__name__
