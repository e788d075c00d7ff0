"""Merge rules: what concurrent writes, late writes, removals and forgets come to, whatever order logs arrive in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_shards import merge
from memory_shards.merge import Change, State
from mnemesh.errors import BadRequest
from mnemesh.event import Birth, Event, Record

SITES = ("hub", "edge-1", "edge-2", "edge-3", "edge-4")
FUTURE = 4_000_000_000_000
"""The year 2096, in ms."""


def put(site: str = "hub", ms: int = 10, **fields: Any) -> Event:
    """A put by `site`, stamped `ms`; what is no field of an event goes in its body."""
    known = {
        name: fields.pop(name) for name in ("id", "entity_id", "valid_from", "valid_to", "extra") if name in fields
    }
    event: dict[str, Any] = {"id": f"{site}-{ms}", "tenant": "acme", "entity_id": "pump"} | known
    return Event(**event, op="put", agent="ann", site=site, hlc=ms << 16, body=fields)


def forget(site: str = "hub", ms: int = 10, entity_id: str = "pump") -> Event:
    return Event(
        id=f"forget-{site}-{ms}", tenant="acme", entity_id=entity_id, op="forget", agent="ann", site=site, hlc=ms << 16
    )


def records(events: list[Event], every_ms: int = 5) -> list[Record]:
    """The events as one log: sequence n is recorded at `n * every_ms`."""
    return [Record(n, n * every_ms, 0, event) for n, event in enumerate(events, 1)]


def carried(sequence: int, event: Event, born: int, log: str = "1", **more: Any) -> Record:
    """A record of an event that was born as `born` in a log of its site, and is at `sequence` here and at the hub."""
    return Record(sequence, sequence * 5, 0, event, Birth(f"{event.site} {log}", born), **({"hub": sequence} | more))


def changes(events: list[Event]) -> list[Change]:
    stamps: dict[str, int] = {}
    return [merge.stamped(record, merge.patch_of(record.event), stamps) for record in records(events)]


def seen(state: State) -> tuple[object, ...]:
    """All of a state that must not depend on the order in which sites were heard. `exact_from` may: it is local."""
    ledger = state.ledger
    keys = ledger.tombstone, ledger.type, ledger.types, ledger.text, ledger.attributes, ledger.spaces
    return state.document("pump", 0), state.edges, keys


_names = st.sampled_from("xyz")
_edge = st.fixed_dictionaries(
    {"relation": st.sampled_from(("near", "feeds")), "target_id": st.sampled_from(("pump", "valve", "tank"))}
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(("pump", "valve")),
        "text": st.sampled_from(("", "leaks", "hums softly")),
        "attributes": st.dictionaries(_names, st.none() | st.integers(0, 9), max_size=3),
        "edges": st.lists(
            st.builds(lambda edge, n: edge | ({"properties": {"n": n}} if n else {}), _edge, st.integers(0, 3)),
            max_size=3,
        ),
        "remove_edges": st.lists(_edge, max_size=2),
        "vectors": st.dictionaries(_names, st.just(np.ones(3, np.float32)), max_size=2),
        "remove_vectors": st.lists(_names, max_size=2),
    },
)


@st.composite
def site_logs(draw: st.DrawFn, entities: tuple[str, ...] = ("pump",)) -> list[list[Event]]:
    """A log of each site. Clocks go back, sites write at the same moment, validities are explicit or not."""
    logs = []
    for site in SITES:
        log = []
        for n in range(draw(st.integers(0, 6))):
            entity_id, ms = draw(st.sampled_from(entities)), draw(st.integers(0, 30))
            if draw(st.integers(0, 5)) == 0:
                log.append(forget(site, ms, entity_id))
                continue
            times = draw(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "valid_from": st.integers(0, 60) | st.just(FUTURE),
                        "valid_to": st.integers(0, 60) | st.just(FUTURE),
                    },
                )
            )
            log.append(put(site, ms, id=f"{site}-{n}", entity_id=entity_id, **times, **draw(bodies)))
        logs.append(log)
    return logs


@st.composite
def interleaved(draw: st.DrawFn, logs: list[list[Event]]) -> list[Event]:
    """The logs as one, each in its own order."""
    turns = draw(st.permutations([n for n, log in enumerate(logs) for _ in log]))
    iterators = [iter(log) for log in logs]
    return [next(iterators[n]) for n in turns]


@given(st.data(), site_logs())
def test_sites_commute_as_long_as_each_keeps_its_own_order(data: st.DataObject, logs: list[list[Event]]) -> None:
    one, other = data.draw(interleaved(logs)), data.draw(interleaved(logs))
    assert seen(merge.fold(changes(one))) == seen(merge.fold(changes(other)))


@given(st.data(), site_logs())
def test_a_change_merged_again_changes_nothing(data: st.DataObject, logs: list[list[Event]]) -> None:
    given_once = changes(data.draw(interleaved(logs)))
    again = data.draw(st.lists(st.sampled_from(given_once))) if given_once else []
    assert merge.fold(given_once + again) == merge.fold(given_once)


@given(st.data(), site_logs())
def test_a_state_is_exact_from_the_moment_that_it_names(data: st.DataObject, logs: list[list[Event]]) -> None:
    all_changes = changes(data.draw(interleaved(logs)))
    state = merge.fold(all_changes)
    if state.exact_from != merge.NEVER:
        now = max(state.exact_from, 1_000)
        assert seen(merge.fold(all_changes, valid_at_ms=now)) == seen(state)


def test_the_order_of_a_sites_log_wins_over_the_clocks_of_its_gateways() -> None:
    state = merge.fold(changes([put(ms=20, attributes={"level": "first"}), put(ms=10, attributes={"level": "second"})]))
    assert state.attributes == {"level": "second"}


def test_between_sites_the_later_stamp_wins_whichever_is_heard_last() -> None:
    early, late = put("hub", 10, attributes={"level": 1}), put("edge-1", 11, attributes={"level": 2})
    assert merge.fold(changes([early, late])).attributes == {"level": 2}
    assert merge.fold(changes([late, early])).attributes == {"level": 2}


def test_a_removed_attribute_does_not_come_back_with_an_older_write() -> None:
    state = merge.fold(
        changes([put("hub", 20, attributes={"level": None}), put("edge-1", 10, attributes={"level": 3})])
    )
    assert state.attributes == {}


def test_a_removed_edge_does_not_come_back_with_an_older_write() -> None:
    edge = {"relation": "feeds", "target_id": "tank"}
    state = merge.fold(changes([put("hub", 20, remove_edges=[edge]), put("edge-1", 10, edges=[edge])]))
    document = state.document("pump", 1)
    assert document is not None
    assert document.edges == []


def test_an_event_that_removes_and_adds_one_edge_adds_it() -> None:
    edge = {"relation": "feeds", "target_id": "tank"}
    document = merge.fold(changes([put(remove_edges=[edge], edges=[edge])])).document("pump", 1)
    assert document is not None
    assert document.edges == [edge]


def test_a_type_that_lost_or_does_not_hold_counts_among_those_that_an_entity_was_given() -> None:
    log = [put(ms=10, type="meter"), put(ms=20, type="bus", valid_to=20), put(ms=5, type="x"), put(ms=30)]
    assert merge.fold(changes(log)).ledger.types == {"meter", "bus", "x"}
    assert merge.fold(changes([*log, forget(ms=40), put(ms=50, type="tank")])).ledger.types == {"tank"}


def test_a_forget_erases_what_it_knew_and_spares_what_came_after() -> None:
    history = [put(ms=10, attributes={"a": 1}), forget(ms=20), put(ms=30, attributes={"b": 2})]
    assert merge.fold(changes(history)).attributes == {"b": 2}
    assert merge.fold(changes(history[:2])).document("pump", 2) is None


def test_a_forget_uncovers_a_later_put_that_a_forgotten_one_had_hidden_by_its_validity() -> None:
    hiding = put("hub", 10, valid_from=900, attributes={"level": "forgotten"})
    hidden = put("edge-1", 30, valid_from=100, attributes={"level": "kept"})
    for order in ([hiding, hidden, forget("edge-2", 20)], [forget("edge-2", 20), hiding, hidden]):
        assert merge.fold(changes(order)).attributes == {"level": "kept"}


def test_a_writer_whose_clock_runs_ahead_is_seen_as_soon_as_it_is_recorded() -> None:
    (ahead,) = changes([put(ms=5_000, attributes={"a": 1})])
    assert ahead.recorded_at == 5
    state = merge.fold([ahead])
    assert state.exact_from == 0
    assert merge.fold([ahead], valid_at_ms=5).attributes == {"a": 1}


@pytest.mark.parametrize(
    "event",
    [
        put(attributes=[1, 2]),
        put(attributes={1: 2}),
        put(edges={"relation": "feeds"}),
        put(edges=[{"relation": "feeds"}]),
        put(text=7),
        put(vectors={"default": np.zeros((2, 2), np.float32)}),
        put(ms=-1),
        put(ms=1 << 47),
        put(valid_from=1 << 62),
        put(valid_to=-(1 << 62)),
    ],
)
def test_an_event_that_breaks_the_layout_is_refused(event: Event) -> None:
    with pytest.raises(BadRequest):
        merge.patch_of(event)


# ── once ────────────────────────────────────────────────────────────────────────────────────────────────────


def repeated(*log: Record) -> list[bool]:
    births: dict[str, int] = {}
    stamps: dict[str, int] = {}
    told = []
    for record in log:
        told.append(merge.is_repeated(record, births, stamps))
        if not told[-1]:
            merge.stamped(record, merge.patch_of(record.event), stamps)
    return told


def test_an_event_is_taken_once_by_where_it_was_born() -> None:
    one, two = put("edge-1", 1), put("edge-1", 2)
    assert repeated(carried(1, one, 7), carried(2, two, 8), carried(3, one, 7), carried(4, two, 8)) == [
        False,
        False,
        True,
        True,
    ]


def test_what_a_log_had_before_is_not_taken_after_what_came_later() -> None:
    assert repeated(carried(1, put("edge-1", 2), 8), carried(2, put("edge-1", 1), 7)) == [False, True]


def test_each_log_has_its_own_count_also_those_of_one_site() -> None:
    log = [carried(1, put("edge-1"), 7), carried(2, put("edge-2"), 7), carried(3, put("edge-1"), 1, "2")]
    assert repeated(*log, *log) == [False, False, False, True, True, True]


def test_a_log_that_was_restored_may_give_a_sequence_to_a_newer_event() -> None:
    log = [carried(1, put("hub", 10), 7), carried(2, put("hub", 20), 8), carried(3, put("hub", 30), 7)]
    assert repeated(*log, *log) == [False, False, False, True, True, True]


def test_what_was_born_here_is_never_repeated() -> None:
    own = Record(1, 5, 0, put())
    assert repeated(own, own) == [False, False]
