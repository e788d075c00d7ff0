"""One agent a subnet: the decision loop. Looks at the client's methods, `forecast` and `documents`.

At midnight an agent reads its context, looks for past days shaped like the one that just ended, forecasts
the six hours to come from what followed them, walks what hangs on its transformer, and writes its decision
into its context. It is handed the day that ended and no other measurement; all else it knows it asks the mesh:
the site that it is connected to, which holds all that a decision takes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Protocol
from uuid import uuid4

import numpy as np

from examples.smart_grid import documents
from examples.smart_grid.forecast import HORIZON, Values, errors, from_similar, shape
from examples.smart_grid.loading import Ingesting
from mnemesh.errors import MnemeshError, NotFound
from mnemesh.messages import (
    Consistency,
    Context,
    Coverage,
    Direction,
    Hits,
    Scope,
    TimelinePage,
    Token,
    Traversal,
    Written,
)

STEPS = ("context", "search", "forecast", "traverse", "write")

RISING = 1.1
"""An agent watches a morning whose peak is expected this much above yesterday's at the same hours."""


class Memory(Ingesting, Protocol):
    """The part of `mnemesh.client.Memory` that the demo uses."""

    async def get_context(
        self, entity_id: str, *, consistency: Consistency | None = None, budget_ms: int | None = None
    ) -> Context: ...

    async def timeline(
        self, entity_id: str, *, after: int = 0, limit: int = 100, consistency: Consistency | None = None
    ) -> TimelinePage: ...

    async def search_embedding(
        self,
        vector: Values,
        *,
        space: str,
        k: int,
        filter: Mapping[str, Any],
        output_fields: Sequence[str],
        scope: Scope = "all",
        consistency: Consistency | None = None,
    ) -> Hits: ...

    async def traverse(
        self,
        start: str,
        *,
        relations: Sequence[str],
        direction: Direction = "out",
        depth: int,
        limit: int,
        scope: Scope = "all",
        consistency: Consistency | None = None,
    ) -> Traversal: ...

    async def set_context(self, entity_id: str, *, attributes: Mapping[str, Any], message_id: str) -> Written: ...


class Leak(RuntimeError):
    """A search returned a day that the agent could not know: the mesh did not keep to the filter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far an agent looks: `similar` days, `depth` hops and `reach` entities below its transformer."""

    similar: int = 8
    depth: int = 2
    reach: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrote:
    """An acknowledged write: the event, by the id that its agent gave it, and `at` by `time.perf_counter`."""

    entity_id: str
    event_id: str
    token: Token
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What an agent decided for the morning of `day`, on what grounds, and how long each step took (seconds).

    `ended` is the day before, which it knew; `forecast` has 24 values in MW. `below` counts what hangs on the
    transformer, by type.
    """

    subnet: str
    day: date
    ended: Values
    forecast: Values
    similar: list[date]
    below: dict[str, int]
    truncated: bool
    coverage: list[Coverage]
    took: dict[str, float]
    watch: bool
    wrote: Wrote


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A decision that the mesh did not let happen: the error's code, and the step it came from."""

    subnet: str
    day: date
    step: str
    code: str


def agent_name(subnet: str) -> str:
    """A subnet's agent by a name that NATS takes as one token: `MV1.101_Feeder1` is `MV1-101_Feeder1`."""
    return subnet.replace(".", "-")


async def decide(memory: Memory, subnet: str, day: date, ended: Values, limits: Limits) -> Decision | Failure:
    """One turn of the loop, at 00:00 of `day`. `ended` is all of the day before, in MW.

    Mesh errors become a `Failure`; `Leak` is a bug and is raised.
    """
    watch = Stopwatch()
    me = documents.subnet_id(subnet)
    try:
        context = await memory.get_context(me)
        supplier = _supplier(context)
        watch.lap("context")

        found = await memory.search_embedding(
            shape(ended),
            space=documents.SPACE,
            k=limits.similar,
            filter=knowable(subnet, day),
            output_fields=["date", "last", "next_morning"],
            scope="here",
        )
        watch.lap("search")

        similar = [(hit.score, hit.attributes or {}) for hit in found.hits]
        dates = [date.fromisoformat(known["date"]) for _, known in similar]
        if any(known >= day - timedelta(days=1) for known in dates):
            raise Leak(f"{subnet} was shown {max(dates)} when it asked for days before {day - timedelta(days=1)}")
        forecast = from_similar(ended, similar)
        watch.lap("forecast")

        below = await memory.traverse(
            supplier,
            relations=[documents.SUPPLIES],
            direction="out",
            depth=limits.depth,
            limit=limits.reach,
            scope="here",
        )
        watch.lap("traverse")

        kinds = _kinds(below)
        rising = bool(forecast.max() > RISING * ended[:HORIZON].max())
        event_id = uuid4().hex
        written = await memory.set_context(
            me,
            message_id=event_id,
            attributes={
                "decided_for": day.isoformat(),
                "action": "watch" if rising else "hold",
                "forecast_mw": [round(value, 6) for value in forecast.tolist()],
                "similar_days": [known.isoformat() for known in dates],
                "below": kinds,
                "last_error": _hindsight(context, day, ended),
            },
        )
        watch.lap("write")
    except MnemeshError as error:
        return Failure(subnet=subnet, day=day, step=watch.running, code=error.code)
    return Decision(
        subnet=subnet,
        day=day,
        ended=ended,
        forecast=forecast,
        similar=dates,
        below=kinds,
        truncated=below.truncated,
        coverage=[part for part in (found.coverage, below.coverage) if part is not None],
        took=watch.took,
        watch=rising,
        wrote=Wrote(entity_id=me, event_id=event_id, token=written.token, at=time.perf_counter()),
    )


def knowable(subnet: str, day: date) -> dict[str, Any]:
    """The filter for what may be compared at 00:00 of `day`: this subnet, same weekday, and whose next morning is past.

    The day that just ended is excluded too: what followed it is what the agent is to forecast.
    """
    ended = day - timedelta(days=1)
    return {"subnet": subnet, "weekday": ended.weekday(), "date": {"lt": ended.isoformat()}}


class Stopwatch:
    """Seconds of each step, in order; `running` names the one that is under way."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}
        self._since = time.perf_counter()

    @property
    def running(self) -> str:
        return STEPS[len(self.took)]

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.took[step] = now - self._since
        self._since = now


def _supplier(context: Context) -> str:
    for edge in context.edges:
        if edge["relation"] == documents.SUPPLIED_BY:
            return str(edge["target_id"])
    raise NotFound(f"{context.entity_id} remembers no supplier")


def _kinds(below: Traversal) -> dict[str, int]:
    """How many buses, loads, transformers: an id begins with its type."""
    kinds: dict[str, int] = {}
    for node in below.nodes:
        if node.depth:
            kind = node.entity_id.partition(":")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def _hindsight(context: Context, day: date, ended: Values) -> float | None:
    """How wrong the last decision was, if it was for the day that just ended."""
    remembered = context.attributes
    if remembered.get("decided_for") != (day - timedelta(days=1)).isoformat():
        return None
    forecast = np.array(remembered["forecast_mw"], np.float32)
    return round(errors(forecast, ended[:HORIZON], usual=float(ended.mean()))[0], 4)
