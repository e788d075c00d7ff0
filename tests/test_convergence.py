"""Sites that have heard the same hold the same, in whatever order they heard it: the hashes of their stores agree."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge import forget, interleaved, put, records, site_logs

from memory_shards.stores import Store
from memory_shards.stores.memory_vectors import MemoryVectors
from memory_shards.stores.sqlite import SqliteStore
from mnemesh.event import Event

ENTITIES = ("pump", "valve", "tank")
EVERYTHING = frozenset({0})


def stores(folder: Path) -> list[Store]:
    return [
        SqliteStore(folder, site="anywhere", partitions=EVERYTHING, incarnation="1"),
        MemoryVectors(folder, EVERYTHING, site="anywhere", incarnation="1"),
    ]


def digests(heard: Sequence[Event], cuts: Sequence[int], every_ms: int) -> list[str]:
    """What the stores of a site come to that heard these events in this order, in batches that end at `cuts`."""
    log = records(list(heard), every_ms)
    with tempfile.TemporaryDirectory() as folder:
        site = stores(Path(folder))
        for store in site:
            start = 0
            for end in (*sorted(cuts), len(log)):
                store.apply(log[start:end], end)
                start = max(start, end)
        told = [store.digest() for store in site]
        for store in site:
            store.close()
    return told


@settings(deadline=None)
@given(st.data(), site_logs(ENTITIES))
def test_five_sites_come_to_the_same_whatever_order_they_heard_each_other_in(
    data: st.DataObject, logs: list[list[Event]]
) -> None:
    told = []
    for _ in range(5):
        heard = data.draw(interleaved(logs))
        cuts = data.draw(st.lists(st.integers(0, len(heard)), max_size=3))
        told.append(digests(heard, cuts, data.draw(st.integers(1, 100))))
    assert told == [told[0]] * 5


@pytest.mark.parametrize("forget_first", [False, True])
def test_a_forget_uncovers_a_vector_that_a_forgotten_one_had_hidden_by_its_validity(forget_first: bool) -> None:
    one, other = (np.full(3, n, np.float32) for n in (1, 2))
    hiding = put("hub", 10, valid_from=900, vectors={"v": one}, attributes={"level": "forgotten"}, type="gone")
    hidden = put("edge-1", 30, valid_from=100, vectors={"v": other}, attributes={"level": "kept"}, type="stays")
    erased = forget("edge-2", 20)
    heard = [erased, hiding, hidden] if forget_first else [hiding, hidden, erased]
    assert digests(heard, [1, 2], 5) == digests([hidden, erased], [], 5)
