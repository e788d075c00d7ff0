"""Filters over columns of attributes: what each operator means, and that wrong filters are named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_shards.stores.columns import Columns, parse_filter
from mnemesh.errors import BadRequest

SCALARS = st.sampled_from(["a", "b", "c", True, False, 0, 1, 2.5, -3])
VALUES = st.one_of(st.none(), SCALARS, st.lists(SCALARS, max_size=3), st.just({"nested": 1}))
ROWS = st.lists(st.dictionaries(st.sampled_from("xy"), VALUES), max_size=12)
DEMANDS = st.one_of(
    SCALARS,
    st.tuples(st.sampled_from(["eq", "ne"]), SCALARS),
    st.tuples(st.sampled_from(["lt", "lte", "gt", "gte"]), st.sampled_from(["b", 1, 2.5])),
    st.tuples(st.just("in"), st.lists(SCALARS, max_size=3)),
    st.tuples(st.just("exists"), st.booleans()),
).map(lambda demand: dict([demand]) if isinstance(demand, tuple) else demand)


def columns_of(rows: list[dict[str, Any]]) -> Columns:
    columns = Columns()
    for row, attributes in enumerate(rows):
        columns.describe(row, None, attributes, attributes)
    return columns


def selected(rows: list[dict[str, Any]], wanted: dict[str, Any]) -> list[int]:
    live = np.ones(len(rows), np.bool_)
    return list(columns_of(rows).select(live, None, parse_filter(wanted)))


def same(one: object, other: object) -> bool:
    return (isinstance(one, bool), one) == (isinstance(other, bool), other)


def meets(value: Any, op: str, operand: Any) -> bool:
    """The meaning of an operator, said the plain way."""
    if op == "exists":
        return (value is not None) is bool(operand)
    if value is None:
        return False
    if op == "eq":
        if not isinstance(value, list):
            return same(value, operand)
        has_fractions = any(isinstance(item, float) and item % 1 != 0 for item in value)
        return not has_fractions and any(same(item, operand) for item in value)
    if op == "ne":
        return not meets(value, "eq", operand)
    if op == "in":
        return any(meets(value, "eq", item) for item in operand)
    texts = isinstance(value, str) and isinstance(operand, str)
    numbers = type(value) in (int, float) and type(operand) in (int, float)
    if not texts and not numbers:
        return False
    answers: dict[str, bool] = {
        "lt": value < operand,
        "lte": value <= operand,
        "gt": value > operand,
        "gte": value >= operand,
    }
    return answers[op]


@given(ROWS, st.dictionaries(st.sampled_from("xyz"), DEMANDS, max_size=3))
def test_a_filter_selects_the_rows_that_meet_every_condition(
    rows: list[dict[str, Any]], wanted: dict[str, Any]
) -> None:
    conditions = parse_filter(wanted)
    expected = [
        row
        for row, attributes in enumerate(rows)
        if all(meets(attributes.get(name), op, operand) for name, op, operand in conditions)
    ]
    assert selected(rows, wanted) == expected


@given(ROWS, st.data())
def test_renumbered_rows_keep_their_attributes(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    order = data.draw(st.lists(st.sampled_from(range(len(rows))), unique=True)) if rows else []
    columns = columns_of(rows)
    columns.take(np.array(order, np.intp))
    for wanted in ({"x": "a"}, {"x": 1}, {"y": {"lt": 2}}, {"y": {"exists": True}}):
        live = np.ones(len(order), np.bool_)
        found = columns.select(live, None, parse_filter(wanted)).tolist()
        assert found == selected([rows[row] for row in order], wanted)


def test_true_is_not_one() -> None:
    rows: list[dict[str, Any]] = [{"x": True}, {"x": 1}, {"x": [True]}, {"x": [1]}]
    assert selected(rows, {"x": True}) == [0, 2]
    assert selected(rows, {"x": 1}) == [1, 3]


def test_a_changed_attribute_is_found_under_its_new_value_only() -> None:
    columns = columns_of([{"x": "a"}, {"x": 1}])
    columns.describe(0, None, {"x": 7}, {"x"})
    columns.describe(1, None, {}, {"x"})
    live = np.ones(2, np.bool_)
    assert columns.select(live, None, parse_filter({"x": "a"})).tolist() == []
    assert columns.select(live, None, parse_filter({"x": 7})).tolist() == [0]
    assert columns.select(live, None, parse_filter({"x": {"exists": False}})).tolist() == [1]


def test_an_attribute_that_changes_for_ever_stays_filterable() -> None:
    columns = columns_of([{"x": "still"}])
    for tick in range(5_000):
        columns.describe(1, None, {"x": f"tick {tick}"}, {"x"})
    live = np.ones(2, np.bool_)
    assert columns.select(live, None, parse_filter({"x": "still"})).tolist() == [0]
    assert columns.select(live, None, parse_filter({"x": "tick 4999"})).tolist() == [1]
    assert columns.select(live, None, parse_filter({"x": "tick 1"})).tolist() == []


def test_a_type_is_no_attribute() -> None:
    columns = Columns()
    columns.describe(0, "sensor", {"type": "other"}, {"type"})
    live = np.ones(1, np.bool_)
    assert columns.select(live, "sensor", []).tolist() == [0]
    assert columns.select(live, "other", []).tolist() == []
    assert columns.select(live, None, parse_filter({"type": "other"})).tolist() == [0]


@pytest.mark.parametrize(
    ("demand", "named"),
    [
        ({"like": "a%"}, "unknown operator 'like'"),
        ({"in": "abc"}, "in needs a list"),
        ({"in": [["a"]]}, "in needs a list"),
        ({"lt": True}, "lt needs a text or a number"),
        ({"lt": None}, "lt needs a text or a number"),
        ({"exists": 1}, "exists needs true or false"),
        ({}, "names no operator"),
        (None, "eq needs a text, a number or a bool"),
        (["a"], "eq needs a text, a number or a bool"),
        (float("nan"), "eq needs a text, a number or a bool"),
        (10**400, "eq needs a text, a number or a bool"),
    ],
)
def test_a_wrong_filter_is_refused_by_name(demand: object, named: str) -> None:
    with pytest.raises(BadRequest, match=named) as refused:
        parse_filter({"date": demand})
    assert "'date'" in refused.value.message
