"""The smart-grid demo without a mesh: real SimBench data, a memory that answers in this process."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from rich.console import Console

from examples.smart_grid import (
    agents,
    deciding,
    demo,
    documents,
    forecast,
    loading,
    profiles,
    report,
    substations,
    supply,
)
from examples.smart_grid import grid as grids
from mnemesh.errors import Busy, NotFound, Stale
from mnemesh.messages import (
    Consistency,
    Context,
    Coverage,
    EdgeStatus,
    Hit,
    Hits,
    Ingested,
    Interest,
    Node,
    Outcome,
    Scope,
    TimelineEvent,
    TimelinePage,
    Traversal,
    Written,
)

VILLAGE = "1-LV-rural1--0-sw"


class Recollection:
    """One process's memory with the answers a mesh would give: exact search, breadth-first walks. No network."""

    def __init__(self) -> None:
        self.documents: dict[str, documents.Document] = {}
        self.events: list[tuple[str, str]] = []
        self.largest_batch = 0
        self.obeys_filters = True
        self.known: set[str] = set()
        self.busy_on = ""
        self.behind = 0

    async def ingest(self, entities: Sequence[dict[str, Any]], *, atomic: bool = False) -> Ingested:
        await asyncio.sleep(0)
        self.largest_batch = max(self.largest_batch, len(entities))
        errors = {}
        for index, entity in enumerate(entities):
            if entity["entity_id"] == "bad":
                errors[str(index)] = Outcome(entity_id="bad", code="bad_request", message="no such thing")
            self.documents[entity["entity_id"]] = entity
        token = {"here": len(self.documents)}
        return Ingested(accepted=len(entities), refused=len(errors), token=token, versions=[], errors=errors)

    async def get_context(
        self, entity_id: str, *, consistency: Consistency | None = None, budget_ms: int | None = None
    ) -> Context:
        if entity_id == self.busy_on:
            raise Busy("full")
        if entity_id not in self.documents:
            raise NotFound(entity_id)
        held = self.documents[entity_id]
        return Context(
            entity_id=entity_id,
            attributes=dict(held["attributes"]),
            edges=list(held["edges"]),
            spaces=[],
            version=1,
            watermark=self._watermark,
        )

    async def search_embedding(
        self,
        vector: forecast.Values,
        *,
        space: str,
        k: int,
        filter: Mapping[str, Any],
        output_fields: Sequence[str],
        scope: Scope = "all",
        consistency: Consistency | None = None,
    ) -> Hits:
        if consistency is not None and self.behind:
            self.behind -= 1
            raise Stale("still applying")
        hits = [
            Hit(
                entity_id=held["entity_id"],
                score=float(held["vectors"][space] @ vector),
                attributes={name: held["attributes"].get(name) for name in output_fields},
            )
            for held in self.documents.values()
            if space in held.get("vectors", {}) and (not self.obeys_filters or _passes(held["attributes"], filter))
        ]
        hits.sort(key=lambda hit: -hit.score)
        return Hits(hits=hits[:k], watermark=self._watermark, coverage=Coverage(answered=64, total=64))

    async def traverse(
        self,
        start: str,
        *,
        relations: Sequence[str],
        direction: str = "out",
        depth: int,
        limit: int,
        scope: Scope = "all",
        consistency: Consistency | None = None,
    ) -> Traversal:
        nodes = {start: Node(entity_id=start, depth=0)}
        queue = deque([start])
        while queue:
            here = nodes[queue.popleft()]
            for edge in self.documents[here.entity_id].get("edges", ()) if here.depth < depth else ():
                target = edge["target_id"]
                if edge["relation"] in relations and target not in nodes:
                    nodes[target] = Node(entity_id=target, depth=here.depth + 1, via=here.entity_id)
                    queue.append(target)
        return Traversal(
            nodes=list(nodes.values())[:limit],
            truncated=len(nodes) > limit,
            watermark=self._watermark,
            coverage=Coverage(answered=64, total=64),
        )

    async def set_context(self, entity_id: str, *, attributes: Mapping[str, Any], message_id: str) -> Written:
        held = self.documents[entity_id]["attributes"]
        held.update(attributes)
        self.events.append((entity_id, f"grid.someone.{message_id}"))
        return Written(entity_id=entity_id, version=1, token=self._watermark)

    async def timeline(
        self, entity_id: str, *, after: int = 0, limit: int = 100, consistency: Consistency | None = None
    ) -> TimelinePage:
        now = datetime.now(UTC)
        found = [
            TimelineEvent(
                sequence=sequence,
                event_id=event_id,
                entity_id=entity_id,
                op="put",
                agent="someone",
                recorded_at=now,
                valid_from=now,
            )
            for sequence, (written, event_id) in enumerate(self.events, 1)
            if written == entity_id and sequence > after
        ]
        page = found[: min(limit, 7)]
        more = len(found) > len(page)
        return TimelinePage(events=page, next_after=page[-1].sequence if more else None, watermark=self._watermark)

    @property
    def _watermark(self) -> dict[str, int]:
        return {"here": len(self.documents)}

    async def know(self, names: list[str]) -> None:
        self.known |= set(names)

    @asynccontextmanager
    async def for_agent(self, name: str) -> AsyncIterator[Recollection]:
        assert name in self.known
        yield self


class Device:
    """A device whose hub has what it has, at once."""

    def __init__(self, memory: Recollection) -> None:
        self.memory = memory
        self.told: list[str] = []

    def memory_for(self, agent: str) -> AbstractAsyncContextManager[Recollection]:
        return self.memory.for_agent(agent)

    async def status(self) -> EdgeStatus:
        length = len(self.memory.documents)
        return EdgeStatus(
            site="s", hub="h", linked=True, silent_s=0, uplinked=0, waiting=0, lag_s=0, downlinked=length, current=True
        )

    async def holds(self) -> int:
        return 7

    def cut(self) -> None:
        self.told.append("cut")

    def heal(self) -> None:
        self.told.append("heal")


def _passes(attributes: Mapping[str, Any], filter: Mapping[str, Any]) -> bool:
    return all(
        attributes.get(name) < wanted["lt"] if isinstance(wanted, dict) else attributes.get(name) == wanted
        for name, wanted in filter.items()
    )


@pytest.fixture(scope="module")
def village() -> grids.Grid:
    return grids.read(VILLAGE)


@pytest.fixture(scope="module")
def traced(village: grids.Grid) -> supply.Supply:
    return supply.trace(village)


@pytest.fixture(scope="module")
def days(village: grids.Grid, traced: supply.Supply) -> profiles.Days:
    return profiles.demand(village, traced, days=42)


@pytest.fixture
async def loaded(village: grids.Grid, traced: supply.Supply, days: profiles.Days) -> Recollection:
    memory = Recollection()
    await loading.load(memory, documents.of_grid(village, traced))
    await loading.load(memory, documents.of_days(days))
    return memory


def test_every_bus_hangs_from_the_source(village: grids.Grid, traced: supply.Supply) -> None:
    assert len(traced.supplier) == len(village.buses) == 15
    assert len(traced.feed) == 14


def test_a_subnet_carries_what_is_behind_it(village: grids.Grid, days: profiles.Days) -> None:
    station, lv = days.subnets.index("MV1.101_LV1.101_Feeder1"), days.subnets.index("LV1.101")
    np.testing.assert_array_equal(days.mw[station], days.mw[lv])

    noon = village.profiles[-1, 48]
    column = village.profile_names.index
    by_hand = sum(load.mw * noon[column(load.profile)] for load in village.loads)
    assert days.mw[lv, -1, 48] == pytest.approx(by_hand, rel=1e-5)


def test_a_year_has_366_days_of_96_quarter_hours_although_clocks_change(village: grids.Grid) -> None:
    assert village.profiles.shape[:2] == (366, 96)
    stamps = ["27.03.2016 01:45", "27.03.2016 03:00", "27.03.2016 03:00", "27.03.2016 23:45"]
    first, filled = grids.by_wall_clock(["27.03.2016 00:00", *stamps], np.array([[1.0], [2.0], [6.0], [8.0], [0.0]]))
    assert first == date(2016, 3, 27)
    assert filled[0, 12, 0] == 7.0, "an hour that happened twice is the mean of both"
    assert filled[0, 8:12, 0].tolist() == [3.0, 4.0, 5.0, 6.0], "an hour that did not happen is interpolated"


def test_a_shape_is_centred_and_of_length_one_and_a_flat_day_has_none(days: profiles.Days) -> None:
    shapes = forecast.shape(days.mw)
    np.testing.assert_allclose(np.linalg.norm(shapes, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(shapes.sum(axis=-1), 0, atol=1e-4)
    assert not forecast.shape(np.full(96, 3.0, np.float32)).any()


def test_a_day_like_another_is_followed_by_a_morning_like_its_morning(days: profiles.Days) -> None:
    past, morning = days.mw[0, 3], days.mw[0, 4, : forecast.HORIZON]
    known = {
        "last": float(forecast.in_own_scale(past[-1:], past)[0]),
        "next_morning": forecast.in_own_scale(morning, past).tolist(),
    }
    twice = forecast.from_similar(2 * past, [(1.0, known), (0.5, known)])
    np.testing.assert_allclose(twice, 2 * morning, rtol=1e-4)


def test_without_a_similar_day_the_last_value_is_held(days: profiles.Days) -> None:
    assert (forecast.from_similar(days.mw[0, 0], []) == days.mw[0, 0, -1]).all()


async def test_what_hangs_on_a_transformer_is_two_hops_away_and_the_wiring_reaches_the_same_buses(
    village: grids.Grid, loaded: Recollection
) -> None:
    async def reach(relation: str, depth: int) -> set[str]:
        transformer = documents.element_id(village.transformers[0])
        walk = await loaded.traverse(transformer, relations=[relation], depth=depth, limit=1000)
        return {node.entity_id for node in walk.nodes}

    short = await reach("supplies", 2)
    wired = await reach("feeds", 64)
    buses = {f"bus:{bus.name}" for bus in village.buses if bus.subnet == "LV1.101"}
    assert buses == {found for found in short if found.startswith("bus:")}
    assert buses == {found for found in wired if found.startswith("bus:")}
    assert {f"load:{load.name}" for load in village.loads} <= short


async def test_every_edge_leads_to_an_entity(loaded: Recollection) -> None:
    targets = {edge["target_id"] for held in loaded.documents.values() for edge in held.get("edges", ())}
    assert targets <= loaded.documents.keys()


async def test_an_agent_asks_for_nothing_that_it_could_not_know(loaded: Recollection, days: profiles.Days) -> None:
    day = days.dates[-2]
    subnet = days.subnets[0]
    decision = await agents.decide(loaded, subnet, day, days.day(0, day - timedelta(days=1)), agents.Limits())
    assert isinstance(decision, agents.Decision)
    assert len(decision.similar) >= 3
    assert all(known + timedelta(days=1) < day for known in decision.similar)
    assert {known.weekday() for known in decision.similar} == {(day - timedelta(days=1)).weekday()}


async def test_the_forecast_does_not_change_when_the_future_does(
    village: grids.Grid, traced: supply.Supply, days: profiles.Days
) -> None:
    day = days.dates[-5]
    known = (day - days.first).days
    other_future = days.mw.copy()
    other_future[:, known:] *= 17

    async def decided(world: profiles.Days) -> agents.Decision:
        memory = Recollection()
        await loading.load(memory, documents.of_grid(village, traced))
        await loading.load(memory, documents.of_days(world))
        decision = await agents.decide(memory, world.subnets[0], day, world.mw[0, known - 1], agents.Limits())
        assert isinstance(decision, agents.Decision)
        return decision

    ours, theirs = await decided(days), await decided(replace(days, mw=other_future))
    np.testing.assert_array_equal(ours.forecast, theirs.forecast)


async def test_a_mesh_that_leaks_the_future_is_caught(loaded: Recollection, days: profiles.Days) -> None:
    loaded.obeys_filters = False
    with pytest.raises(agents.Leak):
        await agents.decide(loaded, days.subnets[0], days.dates[-9], days.mw[0, -10], agents.Limits(similar=1000))


async def test_an_agent_grades_its_last_decision_when_it_reads_it_back(
    loaded: Recollection, days: profiles.Days
) -> None:
    held = loaded.documents[documents.subnet_id(days.subnets[0])]["attributes"]
    for day in days.dates[-2:]:
        await agents.decide(loaded, days.subnets[0], day, days.day(0, day - timedelta(days=1)), agents.Limits())
    came = days.mw[0, -2, : forecast.HORIZON]
    assert held["decided_for"] == days.dates[-1].isoformat()
    assert 0 < held["last_error"] < 1
    assert held["action"] in ("watch", "hold")
    assert came.size == len(held["forecast_mw"])


async def test_an_error_of_the_mesh_fails_that_decision_alone(loaded: Recollection, days: profiles.Days) -> None:
    loaded.busy_on = documents.subnet_id(days.subnets[0])
    failure = await agents.decide(loaded, days.subnets[0], days.dates[-1], days.mw[0, -2], agents.Limits())
    assert isinstance(failure, agents.Failure)
    assert (failure.step, failure.code) == ("context", "busy")


def test_batches_keep_to_both_bounds() -> None:
    heavy = [{"entity_id": str(n), "edges": [{}] * 1500} for n in range(7)]
    light = [{"entity_id": str(n)} for n in range(1201)]
    assert [len(batch) for batch in loading.batches(heavy)] == [2, 2, 2, 1]
    assert [len(batch) for batch in loading.batches(light)] == [500, 500, 201]


async def test_a_refused_document_stops_the_loading_and_is_named() -> None:
    with pytest.raises(loading.Refused, match="bad first: no such thing"):
        await loading.load(Recollection(), [{"entity_id": "good"}, {"entity_id": "bad"}])


async def test_the_story_from_grid_to_picture(tmp_path: Path) -> None:
    memory = Recollection()
    memory.behind = 2
    device = Device(memory)

    @asynccontextmanager
    async def devices_for(
        wanted: Sequence[tuple[substations.Substation, Interest]],
    ) -> AsyncIterator[list[Device]]:
        await memory.know([agent for station, _ in wanted for agent in station.agents])
        yield [device]

    options = demo.Options(
        grid=VILLAGE, days=42, rate=200, duration_s=0.3, substations=3, picture=tmp_path / "picture.png"
    )
    console = Console(file=StringIO(), width=120)
    with report.bars(console) as progress:
        told = await demo.run(
            options, memory.for_agent, prepare_agents=memory.know, devices_for=devices_for, progress=progress
        )
    assert told.decisions == 60
    (station,) = told.substations
    assert (station.decisions, station.written, station.lost, station.doubled) == (2, 2, 0, 0)
    assert (station.equal, station.compared, station.held) == (1, 1, 7)
    assert device.told == ["cut", "heal"]
    assert told.failed == {}
    assert told.coverage == 1.0
    assert told.loaded.entities == len(memory.documents) == sum(told.loaded.by_type.values())
    assert set(told.steps) == set(agents.STEPS)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(report.as_json(told))["error"].keys() == report.NAMES.keys()
    report.show(told, console)


def test_substations_are_transformers_with_their_subnets_and_leave_an_agent_to_the_hub(
    village: grids.Grid, traced: supply.Supply, days: profiles.Days
) -> None:
    (station,) = substations.choose(village, traced, days, 3)
    assert station.transformer == documents.element_id(village.transformers[0])
    assert station.subnets == ["LV1.101"]
    assert station.agents == [station.site] == ["LV1-101"]
    assert set(station.subnets) < set(days.subnets)
    assert substations.choose(village, traced, days, 0) == []


async def test_a_substation_wants_all_that_a_decision_there_asks_for(
    village: grids.Grid, traced: supply.Supply, days: profiles.Days, loaded: Recollection
) -> None:
    (station,) = substations.choose(village, traced, days, 1)
    named, around = substations.interest(station, days.dates, tenant="grid", hops=2).wants
    assert (around.entities, around.hops) == ([station.transformer], 2)
    walk = await loaded.traverse(station.transformer, relations=["supplies"], depth=2, limit=1000)
    near = {node.entity_id for node in walk.nodes}

    there = Recollection()
    there.documents = {name: loaded.documents[name] for name in {*named.entities, *near}}
    day, ended = days.dates[-2], days.mw[days.subnets.index("LV1.101"), -3]
    decisions = [await agents.decide(memory, "LV1.101", day, ended, agents.Limits()) for memory in (loaded, there)]
    ours, theirs = decisions
    assert isinstance(ours, agents.Decision)
    assert isinstance(theirs, agents.Decision)
    assert (theirs.similar, theirs.below) == (ours.similar, ours.below)
    np.testing.assert_array_equal(theirs.forecast, ours.forecast)


async def test_the_account_finds_what_was_lost_and_what_was_doubled(days: profiles.Days, loaded: Recollection) -> None:
    station = substations.Substation(site="s", transformer="transformer:t", subnets=days.subnets[:1])
    crew = deciding.Crew({station.subnets[0]: loaded}, days, agents.Limits())
    run = await crew.decide(rate=200, duration_s=0.05)
    first, second, *_, last = [decision.wrote for decision in run.decided]
    loaded.events.remove((first.entity_id, f"grid.someone.{first.event_id}"))
    loaded.events += [(second.entity_id, f"grid.someone.{second.event_id}")] * 2
    cut = substations.Outage(cut_at=second.at, healed_at=last.at, caught_up_s=None)

    told = await substations.account(substations.Post(station, Device(loaded), crew), loaded, run, cut)
    assert (told.written, told.written_while_cut) == (10, 8)
    assert (told.lost, told.doubled) == (1, 1)
    assert (told.after_heal_s, told.coverage) == (None, 1.0)
    assert (told.equal, told.compared) == (1, 1)


def test_a_digest_tells_what_is_remembered_and_not_in_which_order() -> None:
    edges = [{"relation": "feeds", "target_id": target} for target in ("a", "b")]
    context = Context(
        entity_id="e", attributes={"x": 1, "y": [2.5]}, edges=edges, spaces=[], version=3, watermark={"here": 3}
    )
    shuffled = structs.replace(context, attributes={"y": [2.5], "x": 1}, edges=edges[::-1], version=4, watermark={})
    assert substations.digest(shuffled) == substations.digest(context)
    for other in (
        structs.replace(context, attributes={"x": 1}),
        structs.replace(context, edges=edges[:1]),
        structs.replace(context, text="t"),
        structs.replace(context, type="subnet"),
    ):
        assert substations.digest(other) != substations.digest(context)


async def test_a_substation_that_is_cut_off_decides_on_and_the_hub_has_every_event_once(tmp_path: Path) -> None:
    flags = ["--grid", VILLAGE, "--days", "30", "--rate", "20", "--duration", "6", "--json"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "demo", *flags, "--picture", str(tmp_path / "picture.png")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complaint = await process.communicate()
    assert process.returncode == 0, complaint.decode()
    (station,) = json.loads(said)["substations"]
    assert station["failed"] == {}
    assert station["coverage"] == 1.0
    assert station["cut_s"] >= 1.9
    assert 0 < station["written_while_cut"] < station["written"] == station["decisions"]
    assert station["after_heal_s"] is not None
    assert (station["lost"], station["doubled"]) == (0, 0)
    assert station["equal"] == station["compared"] == 1


async def test_figures_that_nothing_backs_are_left_out(days: profiles.Days) -> None:
    loaded = report.Loaded(entities=0, edges=0, by_type={}, read_s=0, ingest_s=0, catch_up_s=0)
    failed = [agents.Failure(subnet=days.subnets[0], day=days.dates[-1], step="search", code="busy")]
    run = deciding.Run(decided=[], failed=failed, late=[0.0], took_s=1.0, asked_rate=1.0)
    told = report.summarise(VILLAGE, days, loaded, run, [], picture=None)
    assert told.loop is None
    assert told.error == {}
    assert told.failed == {"search: busy": 1}
    report.show(told, Console(file=StringIO()))
