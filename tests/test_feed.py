"""Which entities a feed asks its hub's shards about, and which it can leave out by their ids alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mnemesh.messages import Interest, Want
from services.roster import Candidate, Roster

NAMES = st.sampled_from("abc")
SOME = st.lists(NAMES, max_size=2, unique=True)
WANTS = st.builds(Want, tenant=NAMES, types=SOME, regions=SOME, entities=SOME, hops=st.integers(0, 2))
CANDIDATES = st.builds(Candidate, st.tuples(NAMES, NAMES), st.none() | NAMES, st.frozensets(NAMES))


@given(st.lists(WANTS, max_size=3), CANDIDATES, SOME)
def test_what_a_want_takes_in_is_never_left_out_by_its_id(
    wants: list[Want], candidate: Candidate, neighbours: list[str]
) -> None:
    roster = Roster(Interest(wants=wants))
    for number, _ in roster.hoods():
        roster.surround(number, neighbours)
    if roster.want_of(candidate) is not None:
        assert roster.may_want(candidate.key)


def test_what_is_not_named_by_a_want_for_entities_alone_is_left_out() -> None:
    roster = Roster(Interest(wants=[Want(tenant="a", entities=["x"], hops=1), Want(tenant="b", types=["pump"])]))
    roster.surround(0, ["x", "y"])
    assert [roster.may_want(("a", name)) for name in "xyz"] == [True, True, False]
    assert roster.may_want(("b", "z")), "its type decides"
    assert not roster.may_want(("c", "x"))
