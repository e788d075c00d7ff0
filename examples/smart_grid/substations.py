"""Substations that remember for themselves: parts of the grid, what each holds, and an account of what each wrote.

A substation is a transformer and the subnets that it supplies. Their agents ask a device there, an edge site of the
mesh, and it answers from what it holds: the subnets, their past days, and what hangs on the transformer. So they go on
deciding while the link to the hub is cut. Afterwards each event that the device acknowledged is looked for at the hub.

Whoever calls brings the devices (`Device`). Looks at `deciding`, `documents`, `report` and the modules of the data.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import date
from typing import Protocol

import msgspec

from examples.smart_grid import documents
from examples.smart_grid.agents import Memory, Wrote, agent_name
from examples.smart_grid.deciding import Crew, MemoryFor, Run
from examples.smart_grid.grid import Grid, Transformer
from examples.smart_grid.profiles import Days
from examples.smart_grid.report import Accounted, latency
from examples.smart_grid.supply import Supply
from mnemesh.errors import Stale, Timeout
from mnemesh.messages import Consistency, Context, EdgeStatus, Interest, Token, Want

MOST_AGENTS = 10
"""Most MV stations of the grid feed eight to ten subnets; the few that feed a hundred are no small site."""

MOST_HOPS = 8
"""How far a `Want` may reach."""

RATE = 5.0
"""Decisions a second at each substation. Two cores, which the hub's 200 a second take three quarters of, keep up."""

PATIENCE_S = 30.0
ASK_MS = 5_000
POLL_S = 0.1
PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Substation:
    """A transformer and the subnets that it supplies and that have an agent. `site` is the name of its device."""

    site: str
    transformer: str
    subnets: list[str]

    @property
    def agents(self) -> list[str]:
        return [*map(agent_name, self.subnets)]


class Device(Protocol):
    """What stands at a substation, and the link between it and the hub."""

    @property
    def memory_for(self) -> MemoryFor: ...

    async def status(self) -> EdgeStatus: ...

    async def holds(self) -> int: ...

    def cut(self) -> None: ...

    def heal(self) -> None: ...


DevicesFor = Callable[[Sequence[tuple[Substation, Interest]]], AbstractAsyncContextManager[Sequence[Device]]]
"""Sets up a device for each substation, that holds what is of interest there, and lets its agents in."""


@dataclass(frozen=True, slots=True)
class Post:
    """A substation, its device, and its agents."""

    substation: Substation
    device: Device
    crew: Crew


@dataclass(frozen=True, slots=True)
class Outage:
    """When the link was cut and when it healed, by `time.perf_counter`.

    `caught_up_s` is from then until the hub had all that was written before; `None`: not within `PATIENCE_S`.
    """

    cut_at: float
    healed_at: float
    caught_up_s: float | None

    def covers(self, wrote: Wrote) -> bool:
        return self.cut_at <= wrote.at < self.healed_at


# ── which, and what they hold ───────────────────────────────────────────────────────────────────────────────


def choose(grid: Grid, supply: Supply, days: Days, count: int) -> list[Substation]:
    """The `count` substations with the most agents, up to `MOST_AGENTS` each; at least one agent stays at the hub."""
    entries = supply.entries(grid.buses)
    supplied: dict[str, list[str]] = defaultdict(list)
    for subnet in days.subnets:
        supplier = supply.supplier[entries[subnet]]
        if isinstance(supplier, Transformer):
            supplied[documents.element_id(supplier)].append(subnet)
    chosen: list[Substation] = []
    left = len(days.subnets) - 1
    for transformer, subnets in sorted(supplied.items(), key=lambda item: (-len(item[1]), item[0])):
        if len(chosen) < count and len(subnets) <= min(MOST_AGENTS, left):
            chosen.append(Substation(site=agent_name(subnets[0]), transformer=transformer, subnets=subnets))
            left -= len(subnets)
    return chosen


def interest(substation: Substation, dates: Sequence[date], *, tenant: str, hops: int) -> Interest:
    """What its agents ask for: their subnets, the days of these, and so many hops around the transformer."""
    subnets = [documents.subnet_id(subnet) for subnet in substation.subnets]
    days = [documents.day_id(subnet, day) for subnet in substation.subnets for day in dates]
    return Interest(
        wants=[
            Want(tenant=tenant, entities=[*subnets, *days]),
            Want(tenant=tenant, entities=[substation.transformer], hops=hops),
        ]
    )


async def all_current(devices: Sequence[Device], loaded: int, advance: Callable[[int], None]) -> None:
    """Wait until each device has all that it wants of the hub's log, which is `loaded` events long.

    `advance` hears how many of these all devices together have gone through.
    """
    while True:
        told = await asyncio.gather(*(device.status() for device in devices))
        advance(sum(min(status.downlinked, loaded) for status in told))
        if all(status.current and status.downlinked >= loaded for status in told):
            return
        await asyncio.sleep(POLL_S)


# ── the link ────────────────────────────────────────────────────────────────────────────────────────────────


async def outage(post: Post, hub: Memory, *, after_s: float, lasts_s: float) -> Outage:
    """Cut a substation's link without a sign, heal it, and see how long the hub takes to have all."""
    await asyncio.sleep(after_s)
    post.device.cut()
    cut_at = time.perf_counter()
    await asyncio.sleep(lasts_s)
    post.device.heal()
    healed_at = time.perf_counter()
    written = [decision.wrote for decision in post.crew.decided]
    return Outage(cut_at, healed_at, await seconds_until(hub, written))


async def seconds_until(hub: Memory, written: Sequence[Wrote]) -> float | None:
    """How long it takes until the hub has these writes, whatever shards they are on; `None`: over `PATIENCE_S`."""
    began = time.perf_counter()
    consistency = Consistency(level="session", token=_newest(written))
    try:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(_read(hub, entity_id, consistency) for entity_id in _entities(written)))
    except TimeoutError:
        return None
    return time.perf_counter() - began


# ── the account ─────────────────────────────────────────────────────────────────────────────────────────────


async def account(post: Post, hub: Memory, run: Run, cut: Outage | None) -> Accounted:
    """Look for every event of a run at the hub, and compare what both sides say of each entity."""
    written = [decision.wrote for decision in run.decided]
    after_end_s = await seconds_until(hub, written)
    entities = _entities(written)
    kept = [event_id for entity_id in entities for event_id in await _events(hub, entity_id)]
    here = next(iter(post.crew.memories.values()))
    alike = [
        digest(await here.get_context(entity_id)) == digest(await hub.get_context(entity_id)) for entity_id in entities
    ]
    return accounted(
        post.substation,
        run,
        cut,
        kept,
        held=await post.device.holds(),
        after_end_s=after_end_s,
        equal=sum(alike),
        compared=len(alike),
    )


def accounted(
    substation: Substation,
    run: Run,
    cut: Outage | None,
    kept: Iterable[str],
    *,
    held: int,
    after_end_s: float | None,
    equal: int,
    compared: int,
) -> Accounted:
    """The figures of one substation. `kept` are the ids of the events that the hub has of its entities."""
    written = [decision.wrote for decision in run.decided]
    meanwhile = [decision for decision in run.decided if cut is not None and cut.covers(decision.wrote)]
    lost, doubled = misplaced((wrote.event_id for wrote in written), kept)
    parts = [part.complete for decision in run.decided for part in decision.coverage]
    return Accounted(
        site=substation.site,
        agents=len(substation.subnets),
        held=held,
        decisions=len(run.decided),
        failed=dict(Counter(f"{failure.step}: {failure.code}" for failure in run.failed)),
        loop=latency([sum(decision.took.values()) for decision in run.decided]),
        coverage=sum(parts) / len(parts) if parts else None,
        cut_s=None if cut is None else cut.healed_at - cut.cut_at,
        loop_while_cut=latency([sum(decision.took.values()) for decision in meanwhile]),
        written=len(written),
        written_while_cut=len(meanwhile),
        after_heal_s=None if cut is None else cut.caught_up_s,
        after_end_s=after_end_s,
        lost=lost,
        doubled=doubled,
        equal=equal,
        compared=compared,
    )


def misplaced(acknowledged: Iterable[str], kept: Iterable[str]) -> tuple[int, int]:
    """How many ids of acknowledged events are lost, and how many of those that are kept are there more than once."""
    times = Counter(kept)
    lost = sum(event_id not in times for event_id in set(acknowledged))
    return lost, sum(count > 1 for count in times.values())


def digest(context: Context) -> str:
    """A hash of what a site says of an entity, whatever the order of its edges."""
    edges = sorted(msgspec.json.encode(edge, order="deterministic") for edge in context.edges)
    told = [context.type, context.text, context.attributes, [edge.decode() for edge in edges]]
    return hashlib.sha256(msgspec.json.encode(told, order="deterministic")).hexdigest()


async def _events(hub: Memory, entity_id: str) -> list[str]:
    found: list[str] = []
    after: int | None = 0
    while after is not None:
        page = await hub.timeline(entity_id, after=after, limit=PAGE)
        found += [event.event_id.rpartition(".")[2] for event in page.events]  # the gateway puts who wrote before it
        after = page.next_after
    return found


async def _read(hub: Memory, entity_id: str, consistency: Consistency) -> Context:
    while True:
        with contextlib.suppress(Stale, Timeout):  # the budget of one question, not ours, is spent
            return await hub.get_context(entity_id, consistency=consistency, budget_ms=ASK_MS)


def _entities(written: Iterable[Wrote]) -> list[str]:
    return sorted({wrote.entity_id for wrote in written})


def _newest(written: Iterable[Wrote]) -> Token:
    newest: Token = {}
    for wrote in written:
        for site, sequence in wrote.token.items():
            newest[site] = max(sequence, newest.get(site, 0))
    return newest
