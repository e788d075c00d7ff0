"""The benchmark's report and its parts: goals, ratios, what it prints, what it owes. No figure is asserted here."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from types import ModuleType

import pytest

from bench import core, edge, report, stores
from bench.cable import CableProcess
from bench.processes import pss_mib
from bench.report import Row, percentile, ratio, value
from bench.suite import measured
from mnemesh.errors import BadRequest


def test_a_goal_on_the_ratio_is_met_by_the_ratio_alone() -> None:
    row = Row(name="r", value=150, unit="µs", reference=100, goal=ratio("at most", 1.5))
    assert row.ratio == 1.5
    assert row.met is True
    assert Row(name="r", value=151, unit="µs", reference=100, goal=ratio("at most", 1.5)).met is False
    assert Row(name="r", value=1, unit="1/s", reference=2, goal=ratio("at least", 0.6)).met is False


def test_a_goal_on_the_value_needs_no_reference() -> None:
    assert Row(name="r", value=0.98, unit="recall@10", goal=value("at least", 0.98)).met is True
    assert Row(name="r", value=10.1, unit="ms", goal=value("at most", 10)).met is False
    assert Row(name="r", value=10.1, unit="ms").met is None


@pytest.mark.parametrize(("share", "expected"), [(0.5, 51), (0.99, 100), (0.0, 1), (1.0, 100)])
def test_a_percentile_is_a_sample(share: float, expected: float) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_the_json_has_the_shape_that_every_suite_has() -> None:
    rows = [Row(name="r", value=2, unit="1/s", reference=1, goal=ratio("at least", 2), runs=3)]
    told = json.loads(report.as_json("core", rows))
    assert told.keys() == {"suite", "machine", "rows"}
    assert told["rows"] == [
        {
            "name": "r",
            "value": 2,
            "unit": "1/s",
            "reference": 1,
            "ratio": 2,
            "goal": "at least 2 x",
            "met": True,
            "runs": 3,
        }
    ]


CORE = {
    "actor_call_p50",
    "get_context_p50",
    "get_context_rate",
    "set_context_p50",
    "set_context_rate",
    "ingest_rate",
    "write_to_recall_p99",
    "federated_search_p50",
    "federated_search_rate",
    "federated_recall",
    "search_rate_20k",
    "filtered_search_p50",
    "decision_loop_p99",
    "replay_rate",
}
EDGE = {
    "uplink_p50",
    "uplink_p99",
    "resume_s",
    "catch_up_rate",
    "edge_get_context_p50",
    "edge_memory_mib",
    "edge_cold_start_s",
}
STORES = {
    "redis_get_context_p50",
    "neo4j_traverse_p50",
    "milvus_search_p50",
    "takeover_s",
    "redis_apply_rate",
    "neo4j_apply_rate",
    "milvus_apply_rate",
    "faiss_apply_rate",
}


@pytest.mark.parametrize(("suite", "owed"), [(core, CORE), (edge, EDGE), (stores, STORES)])
def test_every_figure_that_a_suite_owes_belongs_to_one_group(suite: ModuleType, owed: set[str]) -> None:
    names = [name for group, _ in suite.GROUPS for name in group]
    assert len(names) == len(set(names))
    assert owed <= set(names)


async def test_a_suite_measures_the_groups_of_the_wanted_rows_and_tells_only_those() -> None:
    async def pair(sizes: None) -> list[Row]:
        return [Row(name="a", value=1, unit="s"), Row(name="b", value=2, unit="s")]

    async def other(sizes: None) -> list[Row]:
        raise AssertionError("nobody wanted this group")

    groups = ((("a", "b"), pair), (("c",), other))
    assert [row.name for row in await measured(groups, None, ["b"])] == ["b"]
    with pytest.raises(BadRequest, match="no row d; there are a, b, c"):
        await measured(groups, None, ["d"])


async def test_what_was_said_into_a_cut_cable_is_lost_and_healed_it_can_be_joined_anew() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while said := await reader.read(100):
            writer.write(said)
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as far:
        cable = CableProcess(far.sockets[0].getsockname()[1])
        async with cable.laid() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"whole")
            assert await reader.readexactly(5) == b"whole"
            await cable.cut()
            writer.write(b"cut")
            await cable.heal()
            assert await reader.read() == b""
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"healed")
            assert await reader.readexactly(6) == b"healed"
            writer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_this_process_is_told() -> None:
    assert 1 < pss_mib(os.getpid()) < 100_000
