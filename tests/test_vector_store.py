"""The store of vectors, over each kind of space: what a search finds after any history, and what survives."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from backends import GPU_IS_HERE
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_shards.stores import VectorQuery
from memory_shards.stores import space as space_module
from memory_shards.stores.accelerator import Accelerator
from memory_shards.stores.array_space import ArraySpace
from memory_shards.stores.flat import flat
from memory_shards.stores.gpu_flat import MOST_FOUND, GpuFlat
from memory_shards.stores.hnsw import Hnsw
from memory_shards.stores.memory_vectors import MemoryVectors
from memory_shards.stores.space import Space
from mnemesh.errors import BadRequest, MnemeshError, NotFound
from mnemesh.event import Birth, Event, Record
from mnemesh.messages import Hit, IndexKind, Metric
from mnemesh.wire import Vector

TENANT = "acme"


class Log:
    """Writes events as a site's log would hold them."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def put(self, entity_id: str, *, tenant: str = TENANT, site: str = "hub", hlc: int = 0, **body: Any) -> Record:
        return self._append(entity_id, "put", tenant, site, hlc, body)

    def forget(self, entity_id: str, *, tenant: str = TENANT, site: str = "hub", hlc: int = 0) -> Record:
        return self._append(entity_id, "forget", tenant, site, hlc, {})

    def _append(self, entity_id: str, op: Any, tenant: str, site: str, hlc: int, body: dict[str, Any]) -> Record:
        sequence = len(self.records) + 1
        event = Event(
            id=str(sequence),
            tenant=tenant,
            entity_id=entity_id,
            op=op,
            agent="a",
            site=site,
            hlc=hlc or sequence << 16,
            body=body,
        )
        self.records.append(Record(sequence, sequence, sequence % 64, event))
        return self.records[-1]


class DeviceLog(Log):
    """A device's log: what comes from elsewhere says where it was born, and notes say what is held."""

    def carry(self, record: Record, *, log: str = "1") -> Record:
        """A record of another log, at its place in this one."""
        birth = Birth(f"{record.event.site} {log}", record.sequence)
        self.records.append(record._replace(sequence=len(self.records) + 1, birth=birth))
        return self.records[-1]

    def note(self, op: str, entity_id: str) -> Record:
        return self._append(entity_id, op, TENANT, "edge", 1, {})


class Kind:
    """The spaces that this run of a test has."""

    make: Callable[..., Any] = Space


class SmallSegments(GpuFlat):
    """An index on a GPU from the third row on, in segments of a thousand."""

    worth: ClassVar[dict[IndexKind, float]] = dict.fromkeys(("auto", "flat", "hnsw"), 3)

    def __init__(self, dimension: int, metric: Metric) -> None:
        super().__init__(dimension, metric)
        self._segment_rows = 1_000


class Flat:
    """In place of FAISS's index on a GPU: rounds queries to fp16, finds 2,048 at most, has room for so many rows."""

    room = 1_000_000

    def __init__(self, dimension: int, metric: Metric) -> None:
        self._flat = flat(dimension, metric)

    @property
    def ntotal(self) -> int:
        return int(self._flat.ntotal)

    def add(self, vectors: Vector) -> None:
        if len(vectors) > Flat.room:
            raise RuntimeError("out of memory")
        Flat.room -= len(vectors)
        self._flat.add(vectors)

    def search(self, vectors: Vector, k: int) -> Any:
        if k > MOST_FOUND:
            raise RuntimeError("too large a k")
        return self._flat.search(vectors.astype(np.float16).astype(np.float32), k)

    def __del__(self) -> None:
        Flat.room += self.ntotal


class OnHost(SmallSegments):
    """The same but for the GPU."""

    @staticmethod
    def segments(dimension: int, metric: Metric) -> Callable[[], Any]:
        return lambda: Flat(dimension, metric)


@pytest.fixture(params=["faiss", "array", "gpu"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test here runs on each kind of space; those for a GPU do without where there is none."""
    if request.param == "array":
        monkeypatch.setattr(Kind, "make", partial(ArraySpace, Accelerator("" if GPU_IS_HERE else "numpy")))
    elif request.param == "gpu":
        monkeypatch.setattr(Kind, "make", partial(Space, head=SmallSegments if GPU_IS_HERE else OnHost))
    return str(request.param)


def opened(folder: Path, partitions: frozenset[int] | None = None, **options: Any) -> MemoryVectors:
    return MemoryVectors(folder, partitions, make_space=Kind.make, **options)


def vector(*numbers: float) -> Vector:
    return np.array(numbers, np.float32)


def applied(store: MemoryVectors, records: Sequence[Record]) -> None:
    store.apply(records, records[-1].sequence)


def find(store: MemoryVectors, wanted: Vector, **query: Any) -> list[Hit]:
    (answer,) = store.search([VectorQuery(tenant=query.pop("tenant", TENANT), vector=wanted, **query)])
    if isinstance(answer, MnemeshError):
        raise answer
    return answer


def ids(hits: list[Hit]) -> list[str]:
    return [hit.entity_id for hit in hits]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryVectors]:
    store = opened(tmp_path)
    yield store
    store.close()


@pytest.fixture
def log() -> Log:
    return Log()


# ── writes and what they show ───────────────────────────────────────────────────────────────────────────────


def test_a_search_right_after_apply_finds_the_nearest_first(store: MemoryVectors, log: Log) -> None:
    log.put("east", vectors={"default": vector(2, 0)})
    log.put("north", vectors={"default": vector(0, 3)})
    log.put("north-east", vectors={"default": vector(1, 1)})
    applied(store, log.records)
    hits = find(store, vector(5, 0), k=2)
    assert ids(hits) == ["east", "north-east"]
    assert [hit.score for hit in hits] == pytest.approx([1, 0.7071], abs=1e-3)
    assert hits[0].attributes is None
    assert hits[0].vector is None


@pytest.mark.parametrize(("metric", "scores"), [("cosine", [1, 1]), ("ip", [6, 2]), ("l2", [0, -4])])
def test_a_larger_score_is_better_whatever_the_metric(
    store: MemoryVectors, log: Log, metric: str, scores: list[float]
) -> None:
    log.put("near", vectors={"v": vector(1, 0)}, spaces={"v": {"metric": metric}})
    log.put("far", vectors={"v": vector(3, 0)})
    applied(store, log.records)
    query = vector(1, 0) if metric == "l2" else vector(2, 0)
    assert [hit.score for hit in find(store, query, space="v")] == pytest.approx(scores)


def test_a_hit_brings_the_fields_and_the_vector_that_were_asked_for(store: MemoryVectors, log: Log) -> None:
    log.put("e", vectors={"default": vector(30, 40)}, attributes={"a": 1, "b": {"deep": [1]}, "c": 3})
    applied(store, log.records)
    (hit,) = find(store, vector(1, 0), output_fields=["b", "c", "missing"], include_vectors=True)
    assert hit.attributes == {"b": {"deep": [1]}, "c": 3}
    assert hit.vector is not None
    assert hit.vector.dtype == np.float32
    assert hit.vector == pytest.approx([30, 40], rel=1e-3)


def test_attributes_set_before_the_vector_came_can_be_filtered_by(store: MemoryVectors, log: Log) -> None:
    applied(store, [log.put("e", attributes={"floor": 3}, type="room")])
    applied(store, [log.put("e", vectors={"default": vector(1, 0)})])
    assert ids(find(store, vector(1, 0), filter={"floor": 3}, type="room")) == ["e"]
    applied(store, [log.put("e", attributes={"floor": None})])
    assert ids(find(store, vector(1, 0), filter={"floor": 3})) == []


def test_a_replaced_vector_is_found_only_where_it_is_now(store: MemoryVectors, log: Log) -> None:
    applied(store, [log.put("e", vectors={"default": vector(1, 0)}, attributes={"x": 1})])
    applied(store, [log.put("e", vectors={"default": vector(0, 1)})])
    (hit,) = find(store, vector(0, 1), filter={"x": 1})
    assert hit.score == pytest.approx(1)
    assert store.count() == 1


def test_a_removed_vector_is_gone_but_the_attributes_stay(store: MemoryVectors, log: Log) -> None:
    applied(
        store,
        [
            log.put(
                "e",
                vectors={
                    "a": vector(1, 0),
                    "b": vector(
                        1,
                    ),
                },
                attributes={"x": 1},
            )
        ],
    )
    applied(store, [log.put("e", remove_vectors=["a"])])
    assert find(store, vector(1, 0), space="a") == []
    assert ids(find(store, vector(1), space="b", filter={"x": 1})) == ["e"]
    assert list(store.vectors_of(TENANT, "e")) == ["b"]


def test_a_forgotten_entity_leaves_nothing_and_can_be_learned_anew(store: MemoryVectors, log: Log) -> None:
    applied(store, [log.put("e", vectors={"default": vector(1, 0)}, attributes={"x": 1})])
    applied(store, [log.forget("e")])
    assert find(store, vector(1, 0)) == []
    assert store.vectors_of(TENANT, "e") == {}
    applied(store, [log.put("e", vectors={"default": vector(1, 0)})])
    assert ids(find(store, vector(1, 0))) == ["e"]
    assert find(store, vector(1, 0), filter={"x": 1}) == []


def test_a_put_from_another_site_that_is_older_than_the_forget_has_no_effect(store: MemoryVectors, log: Log) -> None:
    applied(store, [log.forget("e", hlc=100 << 16)])
    applied(store, [log.put("e", site="edge", hlc=99 << 16, vectors={"default": vector(1, 0)})])
    assert store.count() == 0


def test_the_order_of_one_site_wins_over_its_clocks(store: MemoryVectors, log: Log) -> None:
    applied(store, [log.put("e", hlc=100 << 16, vectors={"default": vector(1, 0)})])
    applied(store, [log.put("e", hlc=50 << 16, vectors={"default": vector(0, 1)})])
    assert store.vectors_of(TENANT, "e")["default"] == pytest.approx([0, 1])


def test_tenants_and_spaces_do_not_see_each_other(store: MemoryVectors, log: Log) -> None:
    log.put("e", vectors={"a": vector(1, 0)}, spaces={"a": {"metric": "l2", "index": "flat", "model": "m1"}})
    log.put("e", tenant="other", vectors={"a": vector(1, 0, 0)})
    applied(store, log.records)
    info = store.stored.spaces[TENANT, "a"]
    assert (info.name, info.dimension, info.metric, info.index, info.model) == ("a", 2, "l2", "flat", "m1")
    assert [(*name, info.dimension) for name, info in store.stored.spaces.items()] == [
        (TENANT, "a", 2),
        ("other", "a", 3),
    ]
    with pytest.raises(NotFound):
        find(store, vector(1, 0), tenant="third", space="a")


# ── what cannot be ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_space_whose_only_vector_is_removed_in_the_same_batch_is_empty_and_not_unknown(
    store: MemoryVectors, log: Log
) -> None:
    log.put("e", vectors={"default": vector(1, 0)})
    log.put("e", remove_vectors=["default"])
    applied(store, log.records)
    assert find(store, vector(1, 0)) == []


def test_a_vector_of_another_dimension_is_skipped_and_counted(store: MemoryVectors, log: Log) -> None:
    log.put("e", vectors={"default": vector(1, 0)})
    log.put("f", vectors={"default": vector(1, 0, 0), "other": vector(1)}, attributes={"x": 1})
    applied(store, log.records)
    assert store.rejected == 1
    assert list(store.vectors_of(TENANT, "f")) == ["other"]
    assert ids(find(store, vector(1), space="other", filter={"x": 1})) == ["f"]


@pytest.mark.parametrize(
    ("metric", "bad"), [("cosine", float("nan")), ("ip", float("inf")), ("l2", 70_000.0), ("nonsense", 1.0)]
)
def test_a_vector_that_no_space_can_hold_does_not_stop_the_log(
    store: MemoryVectors, log: Log, metric: str, bad: float
) -> None:
    log.put("e", vectors={"default": vector(bad, 1)}, spaces={"default": {"metric": metric}})
    log.put("f", vectors={"default": vector(1, 0)})
    applied(store, log.records)
    assert store.rejected == 1
    assert ids(find(store, vector(1, 0))) == ["f"]


def test_very_long_and_very_short_vectors_keep_their_length(store: MemoryVectors, log: Log) -> None:
    log.put("long", vectors={"default": vector(3e9, 4e9)})
    log.put("short", vectors={"default": vector(3e-9, 4e-9)})
    applied(store, log.records)
    assert store.vectors_of(TENANT, "long")["default"] == pytest.approx([3e9, 4e9], rel=1e-3)
    assert [hit.score for hit in find(store, vector(3, 4))] == pytest.approx([1, 1], abs=1e-3)


def test_one_wrong_query_of_a_batch_leaves_the_others_alone(store: MemoryVectors, log: Log) -> None:
    log.put("e", vectors={"default": vector(1, 0)}, attributes={"x": 1})
    log.put("f", vectors={"default": vector(0, 1)}, attributes={"x": 2})
    applied(store, log.records)
    right = VectorQuery(tenant=TENANT, vector=vector(1, 0), k=1)
    answers = store.search(
        [
            right,
            VectorQuery(tenant=TENANT, vector=vector(1, 0, 0)),
            VectorQuery(tenant=TENANT, vector=vector(1, 0), space="nowhere"),
            VectorQuery(tenant=TENANT, vector=vector(0, 1), k=5),
            VectorQuery(tenant=TENANT, vector=vector(1, 0), filter={"x": {"near": 1}}),
            VectorQuery(tenant=TENANT, vector=vector(1, 0), filter={"x": 2}),
        ]
    )
    kinds = [type(answer) for answer in answers]
    assert kinds == [list, BadRequest, NotFound, list, BadRequest, list]
    assert "3 dimensions" in str(answers[1])
    assert "has 2" in str(answers[1])
    found = [ids(answer) for answer in answers if isinstance(answer, list)]
    assert found == [["e"], ["f", "e"], ["f"]]


# ── the log is the truth ────────────────────────────────────────────────────────────────────────────────────


def test_a_record_at_or_below_the_watermark_has_no_effect(store: MemoryVectors, log: Log) -> None:
    first = log.put("e", vectors={"default": vector(1, 0)})
    second = log.put("f", vectors={"default": vector(0, 1)})
    store.apply([first], 1)
    store.apply([first, second], 9)
    assert store.watermark == 9
    before = store.digest()
    store.apply([first, second], 9)
    assert store.digest() == before
    assert store.count() == 2


def test_a_store_of_some_partitions_takes_only_their_records(tmp_path: Path, log: Log) -> None:
    log.put("e", vectors={"default": vector(1, 0)})
    log.put("f", vectors={"default": vector(0, 1)})
    store = opened(tmp_path, frozenset({log.records[0].partition}))
    applied(store, log.records)
    assert ids(find(store, vector(1, 0))) == ["e"]
    store.close()
    moved = opened(tmp_path, frozenset({log.records[1].partition}))
    assert (moved.watermark, moved.count()) == (0, 0)
    moved.close()


def test_a_failed_commit_leaves_the_store_as_it_was(store: MemoryVectors, log: Log) -> None:
    applied(store, [log.put("e", vectors={"default": vector(1, 0)})])
    record = log.put("f", attributes={"x": 1 << 70}, vectors={"default": vector(1, 0), "new": vector(1)})
    with pytest.raises(BadRequest):
        applied(store, [record])
    assert store.watermark == 1
    assert ids(find(store, vector(1, 0))) == ["e"]
    assert list(store.stored.spaces) == [(TENANT, "default")]


# ── events once, and what a device holds ────────────────────────────────────────────────────────────────────


@pytest.fixture
def here() -> DeviceLog:
    return DeviceLog()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[MemoryVectors]:
    device = opened(tmp_path, site="edge")
    yield device
    device.close()


def applied_in(store: MemoryVectors, records: Sequence[Record], size: int) -> None:
    for start in range(0, len(records), size):
        applied(store, records[start : start + size])


@pytest.mark.parametrize("size", [1, 2, 9])
def test_an_event_that_comes_again_has_no_effect_in_whatever_batch(
    device: MemoryVectors, log: Log, here: DeviceLog, size: int
) -> None:
    old = log.put("e", vectors={"v": vector(1, 0)}, attributes={"x": "old"})
    new = log.put("e", vectors={"v": vector(0, 1)}, attributes={"x": "new"})
    for each in (old, new, old, old, new):
        here.carry(each)
    applied_in(device, here.records, size)
    assert device.vectors_of(TENANT, "e")["v"] == pytest.approx([0, 1])
    assert ids(find(device, vector(0, 1), space="v", filter={"x": "new"})) == ["e"]


@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_put_that_waits_and_comes_again_has_no_effect(
    device: MemoryVectors, log: Log, here: DeviceLog, size: int
) -> None:
    old, new = log.put("e", attributes={"x": "old"}, type="a"), log.put("e", attributes={"x": "new"}, type="b")
    for each in (old, new, old, old):
        here.carry(each)
    here.carry(log.put("e", vectors={"v": vector(1, 0)}))
    here.carry(old)
    here.carry(new)
    applied_in(device, here.records, size)
    (hit,) = find(device, vector(1, 0), space="v", type="b", output_fields=["x"])
    assert hit.attributes == {"x": "new"}


def test_many_repeats_of_a_put_that_waits_take_bounded_room(device: MemoryVectors, log: Log, here: DeviceLog) -> None:
    old, new = log.put("e", attributes={"x": "old"}), log.put("e", attributes={"x": "new"})
    here.carry(old)
    here.carry(new)
    for _ in range(500):
        here.carry(old)
    applied_in(device, here.records, 50)
    applied(device, [here.carry(log.put("e", vectors={"v": vector(1, 0)}))])
    assert ids(find(device, vector(1, 0), space="v", filter={"x": "new"})) == ["e"]


def test_a_log_that_began_anew_counts_from_one_again(device: MemoryVectors, here: DeviceLog) -> None:
    for number, incarnation in ((1, "1"), (2, "2")):
        applied(
            device, [here.carry(Log().put("e", hlc=number << 16, vectors={"v": vector(number, 0)}), log=incarnation)]
        )
    assert device.vectors_of(TENANT, "e")["v"] == pytest.approx([2, 0])


def test_what_a_forget_erased_does_not_come_again(device: MemoryVectors, log: Log, here: DeviceLog) -> None:
    log.put("e", vectors={"v": vector(1, 0)}, attributes={"x": 1})
    log.forget("e")
    log.put("e", vectors={"w": vector(0, 1)})
    for each in (*log.records, *log.records[:2]):
        applied(device, [here.carry(each)])
    assert list(device.vectors_of(TENANT, "e")) == ["w"]
    assert ids(find(device, vector(0, 1), space="w", filter={"x": 1})) == []


def test_what_is_put_aside_has_no_effect(store: MemoryVectors, log: Log) -> None:
    applied(store, [log.put("e", vectors={"v": vector(1, 0)})])
    before = store.digest()
    put_aside = [
        log.put("e", hlc=999 << 16, vectors={"v": vector(0, 1)}),
        log.forget("e", hlc=999 << 16),
        log.put("f", hlc=999 << 16, attributes={"x": 1}),
        log.put("g", vectors={"v": vector(1, 0, 0)}, attributes=[1]),
    ]
    applied(store, [record._replace(quarantined=True) for record in put_aside])
    assert (store.digest(), store.rejected) == (before, 0)
    applied(store, [log.put("e", vectors={"v": vector(0, 2)})])
    assert store.vectors_of(TENANT, "e")["v"] == pytest.approx([0, 2]), "its stamp is not taken for the site's last"


@pytest.mark.parametrize("size", [1, 9])
def test_what_a_device_releases_leaves_nothing_where_it_wrote_none_of_it(
    tmp_path: Path, log: Log, here: DeviceLog, size: int
) -> None:
    device = opened(tmp_path, site="edge")
    here.carry(log.put("e", vectors={"v": vector(1, 0)}, attributes={"pin": "hunter2"}))
    here.carry(log.put("waits", attributes={"pin": "hunter2"}))
    here.carry(log.put("f", vectors={"v": vector(1, 1)}))
    for entity_id in ("e", "waits", "nobody"):
        here.note("hold", entity_id)
        here.note("release", entity_id)
    applied_in(device, here.records, size)
    assert ids(find(device, vector(1, 0), space="v")) == ["f"]
    assert (device.count(), device.vectors_of(TENANT, "e")) == (1, {})
    device.close()
    assert b"hunter2" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
    device = opened(tmp_path, site="edge")
    assert device.count() == 1
    device.close()


@pytest.mark.parametrize("waits", [False, True])
def test_a_device_keeps_what_it_releases_where_it_wrote_some_of_it(
    device: MemoryVectors, log: Log, here: DeviceLog, waits: bool
) -> None:
    applied(
        device, [here.carry(log.put("e", attributes={"x": 1}, **({} if waits else {"vectors": {"v": vector(1, 0)}})))]
    )
    applied(device, [here.put("e", site="edge", attributes={"y": 2})])
    applied(device, [here.note("release", "e")])
    if waits:
        applied(device, [here.put("e", site="edge", vectors={"v": vector(1, 0)})])
    assert ids(find(device, vector(1, 0), space="v", filter={"x": 1, "y": 2})) == ["e"]


@pytest.mark.parametrize("size", [1, 9])
def test_what_is_held_again_after_a_release_is_what_it_was(
    device: MemoryVectors, log: Log, here: DeviceLog, size: int
) -> None:
    log.put("e", type="room", attributes={"x": 1})
    log.put("e", vectors={"v": vector(1, 0), "w": vector(0, 1)}, attributes={"y": 2})
    log.put("e", remove_vectors=["w"])
    for each in log.records:
        applied(device, [here.carry(each)])
    before = device.digest()
    fresh = [here.note("release", "e"), *map(here.carry, log.records), here.note("hold", "e")]
    applied_in(device, fresh, size)
    assert device.digest() == before
    assert ids(find(device, vector(1, 0), space="v", type="room", filter={"x": 1, "y": 2})) == ["e"]
    assert device.count() == 1


def test_a_filter_does_not_find_by_an_attribute_that_was_released(
    device: MemoryVectors, log: Log, here: DeviceLog
) -> None:
    applied(device, [here.carry(log.put("e", vectors={"v": vector(1, 0)}, attributes={"x": 1}))])
    applied(device, [here.note("release", "e"), here.put("e", site="edge", vectors={"v": vector(1, 0)})])
    assert ids(find(device, vector(1, 0), space="v")) == ["e"]
    assert ids(find(device, vector(1, 0), space="v", filter={"x": 1})) == []


NAMES = st.sampled_from("abcdefghij")
SMALL = st.lists(st.integers(-4, 4), min_size=3, max_size=3).map(lambda numbers: vector(*numbers))
METRICS = st.sampled_from(["cosine", "ip", "l2"])
BODIES = st.fixed_dictionaries(
    {"vectors": st.dictionaries(METRICS, SMALL)},
    optional={
        "remove_vectors": st.lists(METRICS, max_size=1),
        "attributes": st.dictionaries(
            st.sampled_from("xy"), st.sampled_from([None, 1, 2, "red", ["red", "blue"], True])
        ),
        "type": st.sampled_from(["cat", "dog"]),
    },
)
WRITES = st.tuples(NAMES, st.one_of(BODIES, BODIES, BODIES, st.none()))
STEPS = st.tuples(st.lists(WRITES, min_size=1, max_size=12), st.sampled_from(["go on", "build", "build", "reopen"]))
SPACES = {name: {"metric": name, "index": "hnsw"} for name in ("cosine", "ip", "l2")}


def write(log: Log, entity_id: str, body: dict[str, Any] | None, **where: Any) -> Record:
    if body is None:
        return log.forget(entity_id, **where)
    return log.put(entity_id, spaces=SPACES, **body, **where)


class Model:
    """What the store should hold, kept the plain way."""

    def __init__(self) -> None:
        self.entities: dict[str, dict[str, Any]] = {}

    def write(self, entity_id: str, body: dict[str, Any] | None) -> None:
        if body is None:
            self.entities.pop(entity_id, None)
            return
        entity = self.entities.setdefault(entity_id, {"vectors": {}, "attributes": {}, "type": None})
        for name in body.get("remove_vectors", []):
            entity["vectors"].pop(name, None)
        entity["vectors"] |= body.get("vectors", {})
        entity["attributes"] |= body.get("attributes", {})
        entity["type"] = body.get("type", entity["type"])

    def scores(self, space: str, wanted: Vector, color: object, kind: str | None) -> dict[str, float]:
        return {
            entity_id: score(space, entity["vectors"][space], wanted)
            for entity_id, entity in self.entities.items()
            if space in entity["vectors"]
            and kind in (None, entity["type"])
            and (color is None or holds(entity["attributes"].get("x"), color))
        }


def holds(value: object, color: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return any(type(item) is type(color) and item == color for item in items)


def score(metric: str, one: Vector, other: Vector) -> float:
    if metric == "l2":
        return -float(((one - other) ** 2).sum())
    if metric == "ip":
        return float(one @ other)
    return float(one @ other) / (float(np.linalg.norm(one) * np.linalg.norm(other)) or 1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(STEPS, min_size=1, max_size=8),
    SMALL,
    st.sampled_from([None, 1, "red", True]),
    st.sampled_from([None, None, "cat"]),
    st.integers(1, 8),
)
def test_search_finds_what_brute_force_finds_after_any_history(
    steps: list[Any], wanted: Vector, color: object, kind: str | None, k: int
) -> None:
    log, model = Log(), Model()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setitem(Hnsw.worth, "hnsw", 3)
        patch.setattr(space_module, "LEAST_DEAD", 1)
        store = opened(Path(folder))
        for writes, then in steps:
            for entity_id, body in writes:
                model.write(entity_id, body)
            applied(store, [write(log, entity_id, body) for entity_id, body in writes])
            if then == "build":
                store.wait_until_built()
            elif then == "reopen":
                store.close()
                store = opened(Path(folder))
            for info in store.stored.spaces.values():
                expected = model.scores(info.name, wanted, color, kind)
                hits = find(
                    store, wanted, space=info.name, k=k, type=kind, filter={} if color is None else {"x": color}
                )
                best = sorted(expected.values(), reverse=True)[:k]
                assert [hit.score for hit in hits] == pytest.approx(best, abs=2e-3)
                assert [expected[hit.entity_id] for hit in hits] == pytest.approx(best, abs=2e-3)
        for entity_id, entity in model.entities.items():
            held = store.vectors_of(TENANT, entity_id)
            assert held.keys() == entity["vectors"].keys()
            for name in held:
                assert held[name] == pytest.approx(entity["vectors"][name], abs=1e-2)
        store.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(WRITES, min_size=1, max_size=20), st.integers(1, 7))
def test_replay_in_other_batches_gives_the_same_digest(
    writes: list[tuple[str, dict[str, Any] | None]], size: int
) -> None:
    log = Log()
    for entity_id, body in writes:
        write(log, entity_id, body)
    digests = set()
    for step in (size, len(log.records)):
        with tempfile.TemporaryDirectory() as folder:
            store = opened(Path(folder))
            for start in range(0, len(log.records), step):
                applied(store, log.records[start : start + step])
            digests.add(store.digest())
            store.close()
            store = opened(Path(folder))
            digests.add(store.digest())
            store.close()
    assert len(digests) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(WRITES, max_size=10), st.lists(WRITES, max_size=10), st.data())
def test_events_of_two_sites_commute(
    here: list[tuple[str, Any]], there: list[tuple[str, Any]], data: st.DataObject
) -> None:
    events = [
        [(site, hlc, *each) for each, hlc in zip(writes, stamps, strict=True)]
        for site, writes in (("hub", here), ("edge", there))
        for stamps in [[data.draw(st.integers(1, 20)) << 16 for _ in writes]]
    ]
    turns = data.draw(st.permutations([0] * len(here) + [1] * len(there)))
    digests = set()
    for order in (turns, sorted(turns)):
        log, waiting = Log(), [iter(events[0]), iter(events[1])]
        for turn in order:
            site, hlc, entity_id, body = next(waiting[turn])
            write(log, entity_id, body, site=site, hlc=hlc)
        with tempfile.TemporaryDirectory() as folder:
            store = opened(Path(folder))
            if log.records:
                applied(store, log.records)
            digests.add(store.digest())
            store.close()
    assert len(digests) == 1


# ── large spaces ────────────────────────────────────────────────────────────────────────────────────────────


def latent(count: int, dimension: int, seed: int) -> Vector:
    """Vectors that live near a subspace of 16 dimensions, as embeddings do."""
    basis = np.random.default_rng(7).standard_normal((16, dimension), np.float32)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, dimension), np.float32)
    return rng.standard_normal((count, 16), np.float32) @ basis + np.float32(0.3) * noise


def test_the_graph_of_a_large_space_recalls_what_an_exact_scan_finds(store: MemoryVectors, log: Log) -> None:
    vectors, queries = latent(20_000, 64, 1), latent(100, 64, 2)
    for row, each in enumerate(vectors):
        log.put(f"e{row}", vectors={"default": each}, attributes={"tenth": row % 10, "half": row % 2})
    applied(store, log.records)
    store.wait_until_built()
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for wanted, rows in (
        ({}, slice(None)),
        ({"half": 1}, slice(1, None, 2)),
        ({"tenth": {"lt": 1}}, slice(0, None, 10)),
    ):
        answers = store.search([VectorQuery(tenant=TENANT, vector=each, filter=wanted) for each in queries])
        names = np.arange(len(vectors))[rows]
        exact = names[np.argsort(-(queries @ units[rows].T), axis=1)[:, :10]]
        recalled = [
            len({f"e{row}" for row in best} & set(ids(answer)))
            for best, answer in zip(exact.tolist(), answers, strict=True)
            if isinstance(answer, list)
        ]
        assert sum(recalled) / (10 * len(queries)) >= 0.98

    # Writes after the graph was built: a replaced, a removed and a new vector.
    spot = latent(1, 64, 3)[0]
    late = [log.put("e5", vectors={"default": spot}), log.forget("e6"), log.put("new", vectors={"default": spot})]
    applied(store, late)
    assert set(ids(find(store, spot, k=2))) == {"e5", "new"}
    assert "e6" not in ids(find(store, vectors[6], k=100))
    assert ids(find(store, spot, k=1, filter={"tenth": 5})) == ["e5"]


def test_a_space_that_loses_most_of_its_rows_still_answers_in_full(store: MemoryVectors, log: Log) -> None:
    vectors = latent(3_000, 16, 1)
    for row, each in enumerate(vectors):
        log.put(f"e{row}", vectors={"default": each}, spaces={"default": {"index": "hnsw"}})
    applied(store, log.records)
    store.wait_until_built()
    applied(store, [log.forget(f"e{row}") for row in range(2_990)])
    assert len(find(store, vectors[0], k=50)) == 10
    store.wait_until_built()
    assert set(ids(find(store, vectors[0], k=50))) == {f"e{row}" for row in range(2_990, 3_000)}


def test_writes_while_a_graph_is_built_are_not_lost(store: MemoryVectors, log: Log) -> None:
    vectors = latent(3_000, 16, 1)
    for row, each in enumerate(vectors):
        log.put(f"e{row}", vectors={"default": each}, spaces={"default": {"index": "hnsw"}})
    applied(store, log.records)
    spot = latent(1, 16, 9)[0]
    applied(store, [log.put("e1", vectors={"default": spot}), log.put("late", vectors={"default": spot})])
    applied(store, [log.forget("e2")])
    store.wait_until_built()
    assert set(ids(find(store, spot, k=2))) == {"e1", "late"}
    assert "e2" not in ids(find(store, vectors[2], k=100))


def test_a_filter_that_passes_only_far_rows_still_gives_k_hits(store: MemoryVectors, log: Log) -> None:
    near = latent(2_000, 16, 1) + 100
    far = latent(400, 16, 2) - 100
    for row, each in enumerate(np.concatenate((near, far))):
        attributes = {"far": row >= len(near)}
        log.put(f"e{row}", vectors={"v": each}, attributes=attributes, spaces={"v": {"index": "hnsw", "metric": "l2"}})
    applied(store, log.records)
    store.wait_until_built()
    exact = len(near) + np.argsort(((far - near[0]) ** 2).sum(axis=1))[:300]
    hits = find(store, near[0], space="v", k=300, filter={"far": True})
    assert len(hits) == 300
    assert len(set(ids(hits)) & {f"e{row}" for row in exact}) >= 290


@pytest.mark.parametrize("kind", ["faiss"], indirect=True)
def test_in_quiet_a_search_has_the_tail_brought_into_the_graph(
    store: MemoryVectors, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = latent(30, 16, 1)
    monkeypatch.setitem(Hnsw.worth, "hnsw", 20)
    monkeypatch.setattr(space_module, "LEAST_TAIL", 2)
    monkeypatch.setattr(space_module, "TAIL_SHARE", 1.0)
    for start, end in ((0, 20), (20, 30)):
        some = [
            log.put(f"e{row}", vectors={"default": vectors[row]}, spaces={"default": {"index": "hnsw"}})
            for row in range(start, end)
        ]
        applied(store, some)
        store.wait_until_built()
    (space,) = store._spaces.values()
    find(store, vectors[0])
    assert space.build is None
    monkeypatch.setattr(space_module, "QUIET_S", -1.0)
    find(store, vectors[0])
    assert space.build is not None
    store.wait_until_built()
    assert space._head_size == 30
    assert all(ids(find(store, vectors[row], k=1)) == [f"e{row}"] for row in range(30))


def near_in(kept: Vector, wanted: Vector, metric: str) -> Vector:
    """The exact scores."""
    rows, asked = kept.astype(np.float64), wanted.astype(np.float64)
    if metric == "l2":
        return -np.square(rows - asked).sum(axis=1)
    if metric == "cosine":
        rows, asked = rows / np.linalg.norm(rows, axis=1, keepdims=True), asked / np.linalg.norm(asked)
    return rows @ asked


@pytest.mark.parametrize("scale", [1e-9, 1e6])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_a_query_that_does_not_fit_fp16_finds_the_nearest(
    store: MemoryVectors, log: Log, metric: str, scale: float
) -> None:
    vectors, wanted = latent(2_000, 16, 1), latent(1, 16, 2)[0] * np.float32(scale)
    spaces = {"v": {"metric": metric}}
    for start, end in ((0, 1_990), (1_990, 2_000)):  # the last are in the tail
        applied(store, [log.put(f"e{row}", vectors={"v": vectors[row]}, spaces=spaces) for row in range(start, end)])
        store.wait_until_built()
    scores = near_in(vectors.astype(np.float16), wanted, metric)
    hits = find(store, wanted, space="v", k=20)
    assert [hit.score for hit in hits] == pytest.approx(np.sort(scores)[::-1][:20].tolist(), rel=1e-3)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_a_query_whose_scores_would_be_infinite_is_refused(store: MemoryVectors, log: Log, metric: str) -> None:
    applied(store, [log.put("e", vectors={"v": vector(1, 2)}, spaces={"v": {"metric": metric}})])
    with pytest.raises(BadRequest, match="beyond 1e"):
        find(store, vector(1e37, 0), space="v")


@pytest.mark.parametrize(
    ("metric", "centre", "spread"), [("cosine", 1, 1e-3), ("l2", 100, 0.1), ("l2", 1_000, 0.5), ("ip", 10, 0.1)]
)
def test_the_nearest_of_many_that_are_close_together_are_found(
    store: MemoryVectors, log: Log, metric: str, centre: float, spread: float
) -> None:
    random = np.random.default_rng(5)
    vectors = (centre + spread * random.standard_normal((4_000, 24))).astype(np.float32)
    spaces = {"v": {"metric": metric, "index": "flat"}}
    applied(store, [log.put(f"e{row}", vectors={"v": each}, spaces=spaces) for row, each in enumerate(vectors)])
    store.wait_until_built()
    kept = np.stack([store.vectors_of(TENANT, f"e{row}")["v"] for row in range(len(vectors))])
    for wanted in vectors[:3]:
        scores = near_in(kept, wanted, metric)
        found = [scores[int(hit.entity_id[1:])] for hit in find(store, wanted, space="v", k=10)]
        assert found == pytest.approx(np.sort(scores)[::-1][:10].tolist(), rel=2e-6, abs=1e-6)


def test_a_tail_of_what_is_far_does_not_hide_the_near(store: MemoryVectors, log: Log) -> None:
    """Of what is near most does not pass the filter; what passes is fair, and in the tail far."""
    random = np.random.default_rng(3)
    towards = np.eye(16, dtype=np.float32)
    kinds = [("near", 3_000, towards[0]), ("fair", 1_500, towards[0] + towards[1] / 4), ("far", 500, -towards[0])]
    for kind, count, direction in kinds:
        some = direction + 0.01 * random.standard_normal((count, 16)).astype(np.float32)
        writes = [
            log.put(f"{kind}{row}", vectors={"v": each}, attributes={"in": kind != "near"}, spaces=AS_GRAPH)
            for row, each in enumerate(some)
        ]
        applied(store, writes)
        store.wait_until_built()
    assert {hit.entity_id[:4] for hit in find(store, towards[0], space="v", k=10, filter={"in": True})} == {"fair"}


AS_GRAPH = {"v": {"index": "hnsw"}}


# ── room on a GPU ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says for how many rows the GPU has room."""
    if GPU_IS_HERE:
        pytest.skip("a real GPU has room for more than a test has rows")
    return lambda rows: monkeypatch.setattr(Flat, "room", rows)


def all_found(store: MemoryVectors, vectors: Vector, rows: range) -> bool:
    return all(ids(find(store, vectors[row], space="v", k=1)) == [f"e{row}"] for row in rows)


@pytest.mark.parametrize("kind", ["gpu"], indirect=True)
def test_rows_that_find_no_room_on_a_gpu_are_scanned_beside_it(
    store: MemoryVectors, log: Log, room: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    vectors = latent(5_000, 16, 1)
    room(3_500)
    for start, end in ((0, 2_500), (2_500, 5_000)):
        applied(store, [log.put(f"e{row}", vectors={"v": vectors[row]}) for row in range(start, end)])
        store.wait_until_built()
    assert "out of memory" in caplog.text
    (space,) = store._spaces.values()
    assert 2_500 <= space._head_size <= 3_500
    assert all_found(store, vectors, range(0, 5_000, 50))
    assert len(find(store, vectors[0], space="v", k=5_000)) == 5_000
    assert len(find(store, vectors[0], space="v", k=2_500)) == 2_500


@pytest.mark.parametrize("kind", ["gpu"], indirect=True)
def test_what_fits_is_on_the_gpu_after_a_start_too(tmp_path: Path, log: Log, room: Callable[[int], None]) -> None:
    vectors = latent(5_000, 16, 1)
    store = opened(tmp_path)
    applied(store, [log.put(f"e{row}", vectors={"v": each}) for row, each in enumerate(vectors)])
    store.close()
    room(3_500)
    store = opened(tmp_path)
    store.wait_until_built()
    (space,) = store._spaces.values()
    assert space._head_size == 3_000, "whole segments"
    assert all_found(store, vectors, range(0, 5_000, 50))
    store.close()
    assert Flat.room == 3_500


@pytest.mark.parametrize("kind", ["gpu"], indirect=True)
def test_a_space_that_takes_most_of_a_gpu_is_rid_of_its_dead_rows(
    store: MemoryVectors, log: Log, room: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space_module, "RETRY_S", 0.0)
    vectors = latent(4_000, 16, 1)
    room(7_000)
    for turn in range(6):
        some = range(0, 4_000, 1 if turn == 0 else 2)
        vectors[some] = latent(len(some), 16, 10 + turn)
        applied(store, [log.put(f"e{row}", vectors={"v": vectors[row]}) for row in some])
        for _ in range(4):
            store.wait_until_built()
            find(store, vectors[0], space="v")
        (space,) = store._spaces.values()
        assert len(space._entity_ids) <= 6_000
        assert all_found(store, vectors, range(0, 4_000, 100))
