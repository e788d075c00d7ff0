"""How calls are measured: each side's in turns, so that a machine that drifts drifts for both; and the rows of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from statistics import median

from bench.report import Goal, Row, percentile

ROUNDS = 5
Work = Callable[[], Awaitable[object]]


async def latencies(sides: Sequence[Work], count: int) -> list[list[float]]:
    """Seconds of each call of each side, one caller, in turns after a warm-up."""
    samples: list[list[float]] = [[] for _ in sides]
    for work in sides:
        for _ in range(max(5, count // 10)):
            await work()
    for _ in range(ROUNDS):
        for work, side in zip(sides, samples, strict=True):
            for _ in range(count):
                began = time.perf_counter()
                await work()
                side.append(time.perf_counter() - began)
    return samples


async def rates(sides: Sequence[Work], *, callers: int, seconds: float) -> list[list[float]]:
    """Calls a second of each side with so many callers at once, one figure a round, in turns after a warm-up."""
    samples: list[list[float]] = [[] for _ in sides]
    for work in sides:
        await calls_a_second(work, callers, seconds / 4)
    for _ in range(ROUNDS):
        for work, side in zip(sides, samples, strict=True):
            side.append(await calls_a_second(work, callers, seconds))
    return samples


async def calls_a_second(work: Work, callers: int, seconds: float) -> float:
    """Each caller makes one call after another for so long; the last ones to end are waited for and count."""
    began = time.perf_counter()

    async def caller() -> int:
        made = 0
        while time.perf_counter() - began < seconds:
            await work()
            made += 1
        return made

    made = await asyncio.gather(*(caller() for _ in range(callers)))
    return sum(made) / (time.perf_counter() - began)


def latency(
    name: str, ours: Sequence[float], theirs: Sequence[float], goal: Goal, *, holds: bool = True
) -> tuple[Row, Row]:
    """The median with its goal, and the 99th percentile beside it."""
    return (
        Row(
            name=f"{name}_p50",
            value=median(ours) * 1e6,
            unit="µs",
            reference=median(theirs) * 1e6,
            goal=goal,
            runs=len(ours),
            holds=holds,
        ),
        Row(
            name=f"{name}_p99",
            value=percentile(ours, 0.99) * 1e6,
            unit="µs",
            reference=percentile(theirs, 0.99) * 1e6,
            runs=len(ours),
        ),
    )


def rate(name: str, ours: Sequence[float], theirs: Sequence[float], goal: Goal) -> Row:
    return Row(name=name, value=median(ours), unit="1/s", reference=median(theirs), goal=goal, runs=len(ours))
