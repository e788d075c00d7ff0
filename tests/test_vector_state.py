"""What the vector store remembers of one entity, and the part of it that a start reads."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from memory_shards.stores.vector_state import VectorState, description_of
from mnemesh import wire

plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5)
times = st.datetimes(timezones=st.just(UTC))
values = plain | times | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=5), plain | times, max_size=3)


@settings(max_examples=50, deadline=None)
@given(st.none() | st.text(max_size=5), st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_a_start_reads_of_a_state_what_all_of_it_says(kind: str | None, attributes: dict[str, Any]) -> None:
    key = [1, 2, "hub"]
    things = {name: [[key, value]] for name, value in attributes.items()}
    encoded = wire.encode([{"hub": 2}, {}, None, [] if kind is None else [[key, kind]], things, {"v": [[key, True]]}])
    state = VectorState(1, "acme", "e", encoded)
    assert description_of(encoded) == (state.type, state.attributes)
