"""The whole story: read the grid, load the mesh, let every agent decide, report. Looks at all of this folder.

Whoever calls `run` brings the mesh: `memory_for(name)` is one agent's client, over whatever connection suits.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from datetime import date
from math import ceil
from pathlib import Path

from rich.progress import Progress

from examples.smart_grid import documents, grid, profiles, supply
from examples.smart_grid.agents import Decision, Failure, Limits, Memory, agent_name, decide
from examples.smart_grid.forecast import shape
from examples.smart_grid.loading import load
from examples.smart_grid.profiles import Days
from examples.smart_grid.report import Loaded, Report, Run, draw, summarise
from mnemesh.errors import Stale, Timeout
from mnemesh.messages import Consistency, Token

GRID = "1-EHVHVMVLV-mixed-all-0-sw"
LOADER = "loader"
LEAST_HISTORY = 21
"""Days before the first decision: three of its weekday to compare with, one of them a week ago."""

CATCH_UP_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to run. `days` are loaded from the end of the year; the decisions are for the last of them."""

    grid: str = GRID
    days: int = 84
    agents: int | None = None
    rate: float = 200.0
    duration_s: float = 30.0
    limits: Limits = field(default_factory=Limits)
    picture: Path | None = Path("demo-output/smart-grid.png")

    def __post_init__(self) -> None:
        if self.days <= LEAST_HISTORY:
            raise ValueError(f"days is {self.days}; it takes at least {LEAST_HISTORY + 1} to have something to recall")
        if self.rate <= 0 or self.duration_s <= 0:
            raise ValueError("rate and duration must be above zero")
        if self.agents is not None and self.agents < 1:
            raise ValueError("at least one agent must decide")

    @property
    def decisions(self) -> int:
        return ceil(self.rate * self.duration_s)


@dataclass(frozen=True, slots=True)
class Facts:
    """A grid made ready: its days, and its documents, not yet loaded."""

    days: Days
    entities: int
    documents: Callable[[], Iterator[documents.Document]]


MemoryFor = Callable[[str], AbstractAsyncContextManager[Memory]]
PrepareAgents = Callable[[list[str]], Awaitable[None]]
"""Makes the named agents known to the mesh, before `MemoryFor` is asked for them."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The demo's flags, with the defaults of `Options`."""
    plain = Options()
    flag = parser.add_argument
    flag("--grid", default=plain.grid, help="a SimBench code (default: %(default)s)")
    flag("--days", type=int, default=plain.days, help="days of profiles to load; 366 is all (default: %(default)s)")
    flag("--agents", type=int, help="how many subnets get an agent (default: every one with demand)")
    flag("--rate", type=float, default=plain.rate, help="decisions a second (default: %(default)s)")
    flag("--duration", type=float, default=plain.duration_s, help="seconds of decisions (default: %(default)s)")
    flag("--similar", type=int, default=plain.limits.similar, help="similar days to recall (default: %(default)s)")
    flag("--depth", type=int, default=plain.limits.depth, help="hops below the transformer (default: %(default)s)")
    flag("--reach", type=int, default=plain.limits.reach, help="most entities to walk (default: %(default)s)")
    flag("--picture", type=Path, default=plain.picture, help="where the PNG goes (default: %(default)s)")
    flag("--json", action="store_true", help="print the figures as one JSON object instead of a table")


def from_flags(flags: argparse.Namespace) -> Options:
    """Raises `ValueError` that says which flag cannot be."""
    return Options(
        grid=flags.grid,
        days=flags.days,
        agents=flags.agents,
        rate=flags.rate,
        duration_s=flags.duration,
        limits=Limits(similar=flags.similar, depth=flags.depth, reach=flags.reach),
        picture=flags.picture,
    )


async def run(options: Options, memory_for: MemoryFor, *, prepare_agents: PrepareAgents, progress: Progress) -> Report:
    """Read, load, decide, report. Raises `loading.Refused` or a `MnemeshError` if the mesh cannot be loaded."""
    began = time.perf_counter()
    reading = progress.add_task(f"reading {options.grid}", total=None)
    facts = await asyncio.to_thread(prepare, options)
    progress.update(reading, total=1, completed=1)
    read_s = time.perf_counter() - began

    await prepare_agents([LOADER, *map(agent_name, facts.days.subnets)])
    async with memory_for(LOADER) as memory:
        loaded = await _load(memory, facts, read_s, progress)

    days = facts.days
    del facts
    gc.collect()
    gc.freeze()  # a full collection over the loaded grid costs tens of ms, which would be measured as the mesh's
    done = await _decide_all(options, memory_for, days, progress)
    report = summarise(options.grid, days, loaded, done, picture=options.picture)
    if options.picture is not None:
        await asyncio.to_thread(draw, days, done, options.picture)
    return report


def prepare(options: Options) -> Facts:
    """Everything that needs no mesh: tables, supply tree, demand. Blocks for seconds."""
    read = grid.read(options.grid)
    traced = supply.trace(read)
    days = profiles.demand(read, traced, days=options.days, subnets=options.agents)
    if len(days.dates) <= LEAST_HISTORY:
        raise ValueError(f"{options.grid} has {len(days.dates)} days; it takes more than {LEAST_HISTORY}")
    entities = (
        len(read.buses)
        + len(read.loads)
        + len(read.lines)
        + len(read.transformers)
        + len(read.sources)
        + len(traced.entries(read.buses))
        + days.mean.size
    )

    def all_documents() -> Iterator[documents.Document]:
        yield from documents.of_grid(read, traced)
        yield from documents.of_days(days)

    return Facts(days, entities, all_documents)


async def _load(memory: Memory, facts: Facts, read_s: float, progress: Progress) -> Loaded:
    began = time.perf_counter()
    bar = progress.add_task("loading the mesh", total=facts.entities)
    counts = {"edges": 0}

    def counted() -> Iterable[documents.Document]:
        for document in facts.documents():
            counts[document["type"]] = counts.get(document["type"], 0) + 1
            counts["edges"] += len(document.get("edges", ()))
            yield document

    token = await load(memory, counted(), advance=lambda count: progress.advance(bar, count))
    ingested = time.perf_counter()
    await _catch_up(memory, facts.days, token)
    return Loaded(
        entities=facts.entities,
        edges=counts.pop("edges"),
        by_type=counts,
        read_s=read_s,
        ingest_s=ingested - began,
        catch_up_s=time.perf_counter() - ingested,
    )


async def _catch_up(memory: Memory, days: Days, token: Token) -> None:
    """Wait until every shard has applied all that was loaded: each is asked for at least the loader's token."""
    loaded = Consistency(level="session", token=token)
    async with asyncio.timeout(CATCH_UP_S):
        while True:
            with contextlib.suppress(Stale, Timeout):  # the budget of one question, not ours, is spent
                found = await memory.search_embedding(
                    shape(days.mw[0, -1]),
                    space=documents.SPACE,
                    k=1,
                    filter={},
                    output_fields=[],
                    consistency=loaded,
                )
                walked = await memory.traverse(
                    documents.subnet_id(days.subnets[0]),
                    relations=[],
                    direction="in",  # asks every shard
                    depth=1,
                    limit=1,
                    consistency=loaded,
                )
                if found.coverage is not None and found.coverage.complete and walked.coverage.complete:
                    return
            await asyncio.sleep(0.1)


async def _decide_all(options: Options, memory_for: MemoryFor, days: Days, progress: Progress) -> Run:
    """Decisions at a steady rate, whatever becomes of earlier ones: agent after agent, then the next day.

    A decision's own time runs from when it starts; how late it started is kept beside it.
    """
    subnets = days.subnets
    mornings = _mornings(days, options.decisions)
    decided: list[Decision] = []
    failed: list[Failure] = []
    late: list[float] = []
    bar = progress.add_task("deciding", total=options.decisions)

    async def turn(number: int, due: float) -> None:
        late.append(time.perf_counter() - due)
        agent = number % len(subnets)
        morning = mornings[number // len(subnets) % len(mornings)]
        ended = days.mw[agent, (morning - days.first).days - 1]
        outcome = await decide(memories[agent], subnets[agent], morning, ended, options.limits)
        if isinstance(outcome, Decision):
            decided.append(outcome)
        else:
            failed.append(outcome)
        progress.advance(bar)

    async with AsyncExitStack() as connections:
        memories = [await connections.enter_async_context(memory_for(agent_name(subnet))) for subnet in subnets]
        start = time.perf_counter()
        async with asyncio.TaskGroup() as turns:
            for number in range(options.decisions):
                due = start + number / options.rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                turns.create_task(turn(number, due))
        took = time.perf_counter() - start
    return Run(decided=decided, failed=failed, late=late, took_s=took, asked_rate=options.rate)


def _mornings(days: Days, decisions: int) -> list[date]:
    """The last days of the window, as many as it takes for each agent to decide once a day."""
    wanted = ceil(decisions / len(days.subnets))
    return days.dates[-min(wanted, len(days.dates) - LEAST_HISTORY) :]
