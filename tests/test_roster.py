"""The roster of a device: what meets its wants, and what goes where not all of it fits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemesh.messages import Interest, Want
from services.roster import Candidate, Key, Roster

PUMPS = Want(tenant="acme", types=["pump"])
ALL_OF_ACME = Want(tenant="acme")


def roster(*wants: Want, **limits: int) -> Roster:
    return Roster(Interest(wants=list(wants), **limits))


def key(entity_id: str, tenant: str = "acme") -> Key:
    return tenant, entity_id


def candidate(entity_id: str = "e", type: str | None = None, *regions: str, tenant: str = "acme") -> Candidate:
    return Candidate(key(entity_id, tenant), type, frozenset(regions))


def keys(*entity_ids: str) -> list[Key]:
    return [key(entity_id) for entity_id in entity_ids]


# ── what is wanted ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("want", "met", "not_met"),
    [
        ({}, [candidate(), candidate("e", "pump", "north")], [candidate(tenant="zeta")]),
        (
            {"types": ["pump", "valve"]},
            [candidate("e", "pump"), candidate("e", "valve")],
            [candidate(), candidate("e", "tank"), candidate("e", "pump", tenant="zeta")],
        ),
        (
            {"regions": ["north", "west"]},
            [candidate("e", None, "north"), candidate("e", "pump", "south", "west")],
            [candidate(), candidate("e", "pump", "south")],
        ),
        (
            {"entities": ["a", "b"]},
            [candidate("a"), candidate("b", "pump")],
            [candidate("c"), candidate("a", tenant="zeta")],
        ),
        (
            {"types": ["pump"], "regions": ["north"], "entities": ["a"]},
            [candidate("a", "pump", "north")],
            [candidate("a", "pump"), candidate("a", None, "north"), candidate("b", "pump", "north")],
        ),
    ],
)
def test_a_want_is_met_by_those_of_all_that_it_names(
    want: dict[str, Any], met: list[Candidate], not_met: list[Candidate]
) -> None:
    wanted = roster(Want(tenant="acme", **want))
    assert [wanted.want_of(each) for each in met] == [0] * len(met)
    assert [wanted.want_of(each) for each in not_met] == [None] * len(not_met)


def test_an_entity_belongs_to_the_first_want_that_it_meets() -> None:
    wanted = roster(Want(tenant="acme", entities=["a"]), PUMPS, ALL_OF_ACME)
    assert wanted.want_of(candidate("a", "pump")) == 0
    assert wanted.want_of(candidate("b", "pump")) == 1
    assert wanted.want_of(candidate("b", "tank")) == 2


def test_nothing_is_wanted_by_a_device_without_wants() -> None:
    assert roster().want_of(candidate()) is None
    assert list(roster().named()) == []
    assert roster().tenants == frozenset()


def test_a_neighbourhood_takes_in_whom_it_is_told_of_and_keeps_them() -> None:
    around = Want(tenant="acme", entities=["a"], hops=1)
    wanted = roster(ALL_OF_ACME, around, Want(tenant="acme", entities=["z"]))
    assert [number for number, _ in wanted.hoods()] == [1], "neither a want without hops nor one without entities"
    assert wanted.surround(1, ["a", "b"]) == keys("b")
    assert wanted.surround(1, ["c"]) == keys("c")
    assert wanted.surround(1, ["b", "c"]) == []
    assert set(wanted.named()) == set(keys("a", "b", "c", "z"))
    assert all(wanted.is_near(1, each) for each in keys("a", "b", "c"))
    assert not wanted.is_near(2, key("b"))
    assert not wanted.is_near(1, key("b", "zeta"))


def test_a_neighbour_must_be_of_the_types_of_its_want_too() -> None:
    wanted = roster(Want(tenant="acme", types=["pump"], entities=["a"], hops=2))
    wanted.surround(0, ["b", "c"])
    assert wanted.want_of(candidate("b", "pump")) == 0
    assert wanted.want_of(candidate("c", "tank")) is None
    assert wanted.want_of(candidate("d", "pump")) is None


# ── what fits ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_want_goes_first_and_in_it_what_has_not_changed_for_longest() -> None:
    held = roster(PUMPS, ALL_OF_ACME, most_entities=4)
    for entity_id, want in (("p1", 0), ("o1", 1), ("o2", 1), ("o3", 1)):
        assert held.admit(key(entity_id), want, 1) == []
    assert held.grow(key("o1"), 1) == []
    assert held.admit(key("p2"), 0, 1) == keys("o2")
    assert held.admit(key("o4"), 1, 1) == keys("o3")
    assert held.admit(key("p3"), 0, 1) == keys("o1")
    assert held.admit(key("p4"), 0, 1) == keys("o4")
    assert held.admit(key("o5"), 1, 1) == keys("o5"), "the only one of the last want"
    assert held.admit(key("p5"), 0, 1) == keys("p1")
    assert (len(held), held.bytes, held.left_out) == (4, 4, 6)


def test_as_many_go_as_a_large_one_needs_room_for() -> None:
    held = roster(PUMPS, ALL_OF_ACME, most_bytes=100)
    for entity_id, want in (("p1", 0), ("o1", 1), ("o2", 1)):
        held.admit(key(entity_id), want, 30)
    assert held.admit(key("p2"), 0, 60) == keys("o1", "o2")
    assert (held.bytes, key("p1") in held, key("o1") in held) == (90, True, False)


def test_an_entity_that_grows_pushes_others_out_and_at_last_goes_itself() -> None:
    held = roster(ALL_OF_ACME, most_bytes=100)
    held.admit(key("a"), 0, 40)
    held.admit(key("b"), 0, 40)
    assert held.grow(key("a"), 20) == []
    assert held.size_of(key("a")) == 60
    assert held.grow(key("a"), 10) == keys("b")
    assert held.grow(key("a"), 31) == keys("a")
    assert (len(held), held.bytes) == (0, 0)


def test_one_that_is_larger_than_all_that_fits_goes_alone() -> None:
    held = roster(PUMPS, ALL_OF_ACME, most_bytes=100)
    for entity_id, want in (("p1", 0), ("o1", 1)):
        held.admit(key(entity_id), want, 40)
    assert held.admit(key("huge"), 0, 101) == keys("huge")
    assert held.grow(key("p1"), 61) == keys("p1")
    assert held.grow(key("o1"), 60) == []
    assert (len(held), held.bytes, held.left_out) == (1, 100, 2)


@pytest.mark.parametrize("limits", [{"most_entities": 0}, {"most_bytes": 0}])
def test_of_nothing_that_may_be_held_nothing_is(limits: dict[str, int]) -> None:
    held = roster(ALL_OF_ACME, **limits)
    assert held.admit(key("a"), 0, 1) == keys("a")
    assert (len(held), held.bytes, key("a") in held) == (0, 0, False)


def test_what_takes_no_bytes_fits_where_none_may_be_held() -> None:
    held = roster(ALL_OF_ACME, most_bytes=0)
    assert held.admit(key("a"), 0, 0) == []
    assert held.grow(key("a"), 1) == keys("a")


def test_one_that_went_may_come_again() -> None:
    held = roster(ALL_OF_ACME, most_entities=1)
    held.admit(key("a"), 0, 5)
    assert held.admit(key("b"), 0, 6) == keys("a")
    assert held.admit(key("a"), 0, 7) == keys("b")
    assert (held.bytes, held.size_of(key("a"))) == (7, 7)


def test_one_that_is_admitted_again_is_there_once_under_its_new_want() -> None:
    held = roster(PUMPS, ALL_OF_ACME, most_entities=2)
    held.admit(key("a"), 1, 5)
    held.admit(key("b"), 1, 5)
    assert held.admit(key("a"), 0, 9) == []
    assert (len(held), held.bytes, held.size_of(key("a"))) == (2, 14, 9)
    assert held.admit(key("c"), 0, 1) == keys("b")
    assert held.admit(key("d"), 0, 1) == keys("a")
    assert (len(held), held.bytes) == (2, 2)


_ids = st.sampled_from("abcdefgh")
_steps = st.lists(st.tuples(_ids, st.integers(0, 2), st.integers(0, 8)), max_size=30)


@given(_steps, st.integers(0, 5), st.integers(0, 25))
def test_a_roster_never_holds_too_much_and_lets_go_of_the_least_wanted(
    steps: list[tuple[str, int, int]], most_entities: int, most_bytes: int
) -> None:
    held = roster(PUMPS, PUMPS, ALL_OF_ACME, most_entities=most_entities, most_bytes=most_bytes)
    model: list[tuple[int, Key, int]] = []  # (want, key, size), the last to change last
    for entity_id, want, size in steps:
        this = key(entity_id)
        known = next((each for each in model if each[1] == this), None)
        if known is None:
            gone = held.admit(this, want, size)
            model.append((want, this, size))
        else:
            gone = held.grow(this, size)
            model.remove(known)
            model.append((known[0], this, known[2] + size))
        for each in gone:
            assert len(model) > most_entities or sum(size for *_, size in model) > most_bytes, "nobody goes for nothing"
            last = max(want for want, *_ in model)
            expected = next(entry for entry in model if entry[0] == last)
            if model[-1][2] > most_bytes:
                expected = model[-1]
            assert each == expected[1]
            model.remove(expected)
        assert len(held) == len(model) <= most_entities
        assert held.bytes == sum(size for *_, size in model) <= most_bytes
        assert all(each in held and held.size_of(each) == size for _, each, size in model)
