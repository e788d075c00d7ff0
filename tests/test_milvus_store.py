"""What is Milvus's own: filters that it evaluates, places that follow behind, what it loses when it is killed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends import Backend, apply
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_merge import put
from test_stores import found, log_of

from memory_shards.stores.by_url import Stores
from memory_shards.stores.milvus_reader import MilvusVectors
from memory_shards.stores.milvus_store import MilvusStore
from memory_shards.stores.urls import EMBEDDED

BOTH = pytest.mark.parametrize("backend", ["milvus-lite", "milvus"], indirect=True)
EAST = np.array([1, 0], np.float32)


def milvus(stores: Stores) -> MilvusStore:
    assert isinstance(stores.vectors, MilvusVectors)
    store = stores.vectors.store
    assert isinstance(store, MilvusStore)
    return store


VALUES: list[Any] = [
    *(True, False, 0, 1, -1, 2, 1.0, 0.5, -0.0, 1e300, math.inf, -math.inf, math.nan),
    *((1 << 53) + 1, 1 << 53, (1 << 63) - 1, -(1 << 63)),
    *("", "a", "b", "ä", "日本", "it's", 'say "x"', "back\\slash", "a\nb", "tab\t", "\0", "%", "true", "1", "😀"),
    *([], ["a"], ["a", 1], [True], [1], [0.5], ["a", 0.5], [[1]], {"a": 1}, {}, "x" * 70_000, ["y" * 40_000]),
]
NAMES = ["n", "ä b", 'q"q', "it's", "back\\", "a.b", "a[0]", "line\nfeed", "$x", "and"]
ASKABLE = [
    value for value in VALUES if isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))
]
CONDITIONS = st.one_of(
    st.sampled_from(ASKABLE).map(lambda value: {"eq": value}),
    st.sampled_from(ASKABLE).map(lambda value: {"ne": value}),
    st.tuples(
        st.sampled_from(["lt", "lte", "gt", "gte"]),
        st.sampled_from([value for value in ASKABLE if not isinstance(value, bool)]),
    ).map(lambda pair: {pair[0]: pair[1]}),
    st.lists(st.sampled_from(ASKABLE), max_size=4).map(lambda values: {"in": values}),
    st.booleans().map(lambda there: {"exists": there}),
)


@BOTH
async def test_a_filter_lets_pass_what_it_does_in_memory(backend: Backend, tmp_path: Path) -> None:
    """Whatever an attribute is called and is: on the same log, against the embedded store."""
    events = [
        put(
            ms=n,
            entity_id=f"e{n}",
            type=["pump", "valve", None, "ü'\""][n % 4],
            attributes={NAMES[n % len(NAMES)]: value, "n": value, "even": n % 2 == 0},
            vectors={"s": EAST},
            spaces={"s": {"index": "flat"}},
        )
        for n, value in enumerate(VALUES, 1)
    ]
    log = log_of(*events)
    async with backend.opened() as stores, Backend.of(EMBEDDED, tmp_path / "embedded").opened() as embedded:
        for each in (stores, embedded):
            await apply(each, log)

        async def passing(which: Stores, asked: dict[str, Any], kind: str | None) -> set[str]:
            return {name for name, _ in await found(which, EAST, k=200, filter=asked, type=kind)}

        filters = filters_to_try()
        for asked, kind in filters:
            assert await passing(stores, asked, kind) == await passing(embedded, asked, kind), (asked, kind)


def filters_to_try() -> Sequence[tuple[dict[str, Any], str | None]]:
    drawn: list[tuple[dict[str, Any], str | None]] = []

    @settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        st.dictionaries(st.sampled_from(["n", "n", *NAMES]), CONDITIONS, min_size=1, max_size=2),
        st.sampled_from([None, None, None, "pump", "ü'\""]),
    )
    def draw(asked: dict[str, Any], kind: str | None) -> None:
        drawn.append((asked, kind))

    draw()
    return drawn
