"""Decisions at a steady rate, by agents that take turns. Looks at `agents` and `profiles`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import date
from math import ceil

from examples.smart_grid.agents import Decision, Failure, Limits, Memory, agent_name, decide
from examples.smart_grid.profiles import Days

LEAST_HISTORY = 21
"""Days before the first decision: three of its weekday to compare with, one of them a week ago."""

MemoryFor = Callable[[str], AbstractAsyncContextManager[Memory]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Every decision as it happened. `late` is how many seconds after its turn each one started."""

    decided: list[Decision]
    failed: list[Failure]
    late: list[float]
    took_s: float
    asked_rate: float


class Crew:
    """The agents of some subnets, each with its client, and what they have decided so far."""

    def __init__(self, memories: Mapping[str, Memory], days: Days, limits: Limits) -> None:
        self.memories = memories
        self.decided: list[Decision] = []
        self.failed: list[Failure] = []
        self.late: list[float] = []
        self._days = days
        self._row = {subnet: row for row, subnet in enumerate(days.subnets)}
        self._limits = limits

    async def decide(self, *, rate: float, duration_s: float, advance: Callable[[], None] = lambda: None) -> Run:
        """Decide `rate` times a second, whatever becomes of earlier ones: agent after agent, then the next day.

        A decision's own time runs from when it starts; how late it started is kept beside it.
        """
        subnets = list(self.memories)
        decisions = ceil(rate * duration_s) if subnets else 0
        mornings = _mornings(self._days, ceil(decisions / max(1, len(subnets))))

        async def turn(number: int, due: float) -> None:
            self.late.append(time.perf_counter() - due)
            await self._turn(subnets[number % len(subnets)], mornings[number // len(subnets) % len(mornings)])
            advance()

        start = time.perf_counter()
        async with asyncio.TaskGroup() as turns:
            for number in range(decisions):
                due = start + number / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                turns.create_task(turn(number, due))
        took = time.perf_counter() - start
        return Run(decided=self.decided, failed=self.failed, late=self.late, took_s=took, asked_rate=rate)

    async def _turn(self, subnet: str, morning: date) -> None:
        days = self._days
        ended = days.mw[self._row[subnet], (morning - days.first).days - 1]
        outcome = await decide(self.memories[subnet], subnet, morning, ended, self._limits)
        if isinstance(outcome, Decision):
            self.decided.append(outcome)
        else:
            self.failed.append(outcome)


@asynccontextmanager
async def crew(subnets: Sequence[str], memory_for: MemoryFor, days: Days, limits: Limits) -> AsyncIterator[Crew]:
    """The agents of these subnets, connected within the block."""
    async with AsyncExitStack() as connections:
        memories = {subnet: await connections.enter_async_context(memory_for(agent_name(subnet))) for subnet in subnets}
        yield Crew(memories, days, limits)


def _mornings(days: Days, wanted: int) -> list[date]:
    """The last days of the window, as many as it takes for each agent to decide once a day."""
    return days.dates[-min(max(1, wanted), len(days.dates) - LEAST_HISTORY) :]
