"""The benchmark's report: goals, ratios and the shape of what it prints. No figure is asserted here."""

from __future__ import annotations

import json

import pytest

from bench import report
from bench.core import GROUPS
from bench.report import Row, percentile, ratio, value


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


def test_every_figure_that_the_suite_owes_belongs_to_one_group() -> None:
    names = [name for group, _ in GROUPS for name in group]
    assert len(names) == len(set(names))
    assert {
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
    } <= set(names)
