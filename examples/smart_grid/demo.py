"""The whole story: read the grid, load the mesh, let every agent decide, report. Looks at all of this folder.

Whoever calls `run` brings the mesh: `memory_for(name)` is one agent's client, over whatever connection suits.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from rich.progress import Progress

from examples.smart_grid import documents, grid, profiles, substations, supply
from examples.smart_grid.agents import Limits, Memory, agent_name
from examples.smart_grid.deciding import LEAST_HISTORY, Crew, MemoryFor, Run, crew
from examples.smart_grid.forecast import shape
from examples.smart_grid.loading import load
from examples.smart_grid.profiles import Days
from examples.smart_grid.report import Accounted, Loaded, Report, draw, summarise
from examples.smart_grid.substations import DevicesFor, Post, Substation
from mnemesh.errors import Stale, Timeout
from mnemesh.messages import Consistency, Token

GRID = "1-EHVHVMVLV-mixed-all-0-sw"
TENANT = "grid"
LOADER = "loader"
CATCH_UP_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to run. `days` are loaded from the end of the year; the decisions are for the last of them.

    The link of one of the `substations` is cut in the middle, for `cut_s`.
    """

    grid: str = GRID
    days: int = 84
    agents: int | None = None
    rate: float = 200.0
    duration_s: float = 30.0
    limits: Limits = field(default_factory=Limits)
    substations: int = 3
    cut_s: float | None = None
    picture: Path | None = Path("demo-output/smart-grid.png")

    def __post_init__(self) -> None:
        if self.days <= LEAST_HISTORY:
            raise ValueError(f"days is {self.days}; it takes at least {LEAST_HISTORY + 1} to have something to recall")
        if self.rate <= 0 or self.duration_s <= 0:
            raise ValueError("rate and duration must be above zero")
        if self.agents is not None and self.agents < 1:
            raise ValueError("at least one agent must decide")
        if self.substations < 0:
            raise ValueError("substations must be 0 or more")
        if self.substations and self.limits.depth > substations.MOST_HOPS:
            raise ValueError(f"a substation holds at most {substations.MOST_HOPS} hops; depth is {self.limits.depth}")
        if self.cut_s is not None and not 0 < self.cut_s <= self.duration_s:
            raise ValueError("the cut must be above zero, and no longer than the duration")

    @property
    def cut_lasts_s(self) -> float:
        return self.duration_s / 3 if self.cut_s is None else self.cut_s

    @property
    def decisions(self) -> int:
        return ceil(self.rate * self.duration_s)


@dataclass(frozen=True, slots=True)
class Facts:
    """A grid made ready: its days, and its documents, not yet loaded."""

    days: Days
    substations: list[Substation]
    entities: int
    documents: Callable[[], Iterator[documents.Document]]


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
    flag("--substations", type=int, default=plain.substations, help="sites of their own (default: %(default)s)")
    flag("--cut", type=float, help="seconds that one substation is cut off (default: a third of the duration)")
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
        substations=flags.substations,
        cut_s=flags.cut,
        picture=flags.picture,
    )


async def run(
    options: Options,
    memory_for: MemoryFor,
    *,
    prepare_agents: PrepareAgents,
    devices_for: DevicesFor,
    progress: Progress,
) -> Report:
    """Read, load, decide, report. Raises `loading.Refused` or a `MnemeshError` if the mesh cannot be loaded."""
    began = time.perf_counter()
    reading = progress.add_task(f"reading {options.grid}", total=None)
    facts = await asyncio.to_thread(prepare, options)
    progress.update(reading, total=1, completed=1)
    read_s = time.perf_counter() - began

    days, stations = facts.days, facts.substations
    elsewhere = {subnet for station in stations for subnet in station.subnets}
    at_hub = [subnet for subnet in days.subnets if subnet not in elsewhere]
    await prepare_agents([LOADER, *map(agent_name, at_hub)])
    async with memory_for(LOADER) as loader:
        loaded, events = await _load(loader, facts, read_s, progress)
        del facts
        gc.collect()
        gc.freeze()  # a full collection over the loaded grid costs tens of ms, which would be measured as the mesh's
        async with (
            _posts(options, stations, days, devices_for, events, progress) as posts,
            crew(at_hub, memory_for, days, options.limits) as hub_crew,
        ):
            done, told = await _decide(options, hub_crew, posts, loader, progress)
    report = summarise(options.grid, days, loaded, done, told, picture=options.picture)
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

    return Facts(days, substations.choose(read, traced, days, options.substations), entities, all_documents)


async def _load(memory: Memory, facts: Facts, read_s: float, progress: Progress) -> tuple[Loaded, int]:
    """What was loaded, and how long the hub's log is then."""
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
    loaded = Loaded(
        entities=facts.entities,
        edges=counts.pop("edges"),
        by_type=counts,
        read_s=read_s,
        ingest_s=ingested - began,
        catch_up_s=time.perf_counter() - ingested,
    )
    return loaded, max(token.values())


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


@contextlib.asynccontextmanager
async def _posts(
    options: Options,
    stations: Sequence[Substation],
    days: Days,
    devices_for: DevicesFor,
    loaded: int,
    progress: Progress,
) -> AsyncIterator[list[Post]]:
    """The substations with their devices, once each holds what it wants, and their agents connected to these."""
    if not stations:
        yield []
        return
    bar = progress.add_task(f"{len(stations)} substations take what they want", total=len(stations) * loaded)
    wanted = [
        (station, substations.interest(station, days.dates, tenant=TENANT, hops=options.limits.depth))
        for station in stations
    ]
    async with contextlib.AsyncExitStack() as stack:
        devices = await stack.enter_async_context(devices_for(wanted))
        await substations.all_current(devices, loaded, lambda count: progress.update(bar, completed=count))
        yield [
            Post(
                station,
                device,
                await stack.enter_async_context(crew(station.subnets, device.memory_for, days, options.limits)),
            )
            for station, device in zip(stations, devices, strict=True)
        ]


async def _decide(
    options: Options, hub_crew: Crew, posts: Sequence[Post], hub: Memory, progress: Progress
) -> tuple[Run, list[Accounted]]:
    """Everybody decides at once, and the first substation is cut off meanwhile."""
    rate, lasts_s = options.rate, options.duration_s
    total = options.decisions + len(posts) * ceil(substations.RATE * lasts_s)
    bar = progress.add_task("deciding", total=total)

    def advance() -> None:
        progress.advance(bar)

    async with asyncio.TaskGroup() as group:
        at_hub = group.create_task(hub_crew.decide(rate=rate, duration_s=lasts_s, advance=advance))
        runs = [
            group.create_task(post.crew.decide(rate=substations.RATE, duration_s=lasts_s, advance=advance))
            for post in posts
        ]
        cut_s = options.cut_lasts_s
        cuts = [
            group.create_task(substations.outage(post, hub, after_s=(lasts_s - cut_s) / 2, lasts_s=cut_s))
            for post in posts[:1]
        ]
    outages = [cut.result() for cut in cuts] + [None] * (len(posts) - len(cuts))
    told = [
        await substations.account(post, hub, run.result(), cut)
        for post, run, cut in zip(posts, runs, outages, strict=True)
    ]
    return at_hub.result(), told
