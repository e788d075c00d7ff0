"""The embedded store: what it remembers, what it shows at which time, and that every replay ends in the same place."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from test_merge import FUTURE, carried, forget, interleaved, put, records, site_logs

from memory_shards.merge import Document
from memory_shards.stores import sqlite_batch
from memory_shards.stores.sqlite import SqliteStore
from mnemesh.clock import stamp_ms
from mnemesh.event import Event, Record
from mnemesh.messages import Description, Left

ENTITIES = ("pump", "valve")
ALL = frozenset(range(64))


def opened(folder: Path, site: str = "hub", partitions: frozenset[int] = ALL, incarnation: str = "1") -> SqliteStore:
    return SqliteStore(folder, site=site, partitions=partitions, incarnation=incarnation)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = opened(tmp_path)
    yield store
    store.close()


def write(store: SqliteStore, *events: Event) -> None:
    """Append events to the store's log and apply them as one batch."""
    first = store.watermark + 1
    log = [Record(n, n * 5, 0, event) for n, event in enumerate(events, first)]
    store.apply(log, log[-1].sequence)


def take(store: SqliteStore, *log: Record) -> None:
    """Apply records as one batch."""
    store.apply(log, log[-1].sequence)


def note(sequence: int, op: Any, entity_id: str = "pump", **body: Any) -> Record:
    """A device's note of what it holds."""
    event = Event(id="", tenant="acme", entity_id=entity_id, op=op, agent="", site="edge-1", hlc=0, body=body)
    return Record(sequence, sequence * 5, 0, event)


def told(store: SqliteStore, entity_id: str = "pump") -> list[str]:
    return [event.event_id for event in store.timeline("acme", entity_id)]


def got(store: SqliteStore, entity_id: str = "pump", **times: int) -> Document:
    document = store.get("acme", entity_id, **times)
    assert document is not None
    return document


# ── against a model ─────────────────────────────────────────────────────────────────────────────────────────


class Model:
    """What the store must show, the slow and obvious way: keep every event, and look for the largest."""

    def __init__(self, log: list[Record]) -> None:
        self.log: dict[str, list[tuple[Record, tuple[int, str]]]] = {}
        stamps: dict[tuple[str, str], int] = {}
        for record in log:
            event = record.event
            of = event.entity_id, event.site
            stamps[of] = max(event.hlc, stamps.get(of, -1) + 1)
            self.log.setdefault(event.entity_id, []).append((record, (stamps[of], event.site)))

    def left(self, entity_id: str) -> list[tuple[Record, tuple[int, str]]]:
        """The events that no forget has erased."""
        log = self.log.get(entity_id, [])
        erased = max((mark for record, mark in log if record.event.op == "forget"), default=(-1, ""))
        return [(record, mark) for record, mark in log if mark >= erased]

    def get(self, entity_id: str, as_of: int, valid_at: int) -> dict[str, Any] | None:
        best: dict[tuple[str, ...], tuple[tuple[int, tuple[int, str], int], Any]] = {}
        visible = False
        for record, mark in self.left(entity_id):
            event, body = record.event, record.event.body
            implied = stamp_ms(mark[0])
            start = implied if event.valid_from is None else event.valid_from
            since = min(start, record.recorded_at) if start == implied else start
            end = event.valid_to if event.valid_to is not None else valid_at + 1
            if event.op == "forget" or record.recorded_at > as_of or not since <= valid_at < end:
                continue
            visible = True
            said: list[tuple[tuple[str, ...], Any]] = [
                (("attribute", name), v) for name, v in body.get("attributes", {}).items()
            ]
            said += [((name,), body[name] or None) for name in ("type", "text") if name in body]
            said += [(("edge", e["relation"], e["target_id"]), None) for e in body.get("remove_edges", [])]
            said += [(("edge", e["relation"], e["target_id"]), e) for e in body.get("edges", [])]
            said += [(("space", name), None) for name in body.get("remove_vectors", [])]
            said += [(("space", name), name) for name in body.get("vectors", {})]
            for turn, (thing, value) in enumerate(said):
                key = start, mark, turn
                if thing not in best or key > best[thing][0]:
                    best[thing] = key, value
        if not visible:
            return None
        held = {thing: value for thing, (_, value) in sorted(best.items()) if value is not None}
        return {
            "type": held.get(("type",)),
            "text": held.get(("text",)),
            "attributes": {thing[1]: value for thing, value in held.items() if thing[0] == "attribute"},
            "edges": [value for thing, value in held.items() if thing[0] == "edge"],
            "spaces": [value for thing, value in held.items() if thing[0] == "space"],
        }


def shown(document: Document | None) -> dict[str, Any] | None:
    if document is None:
        return None
    return {name: getattr(document, name) for name in ("type", "text", "attributes", "edges", "spaces")}


@st.composite
def logs(draw: st.DrawFn) -> list[Record]:
    return records(draw(interleaved(draw(site_logs(ENTITIES)))))


def apply_in(store: SqliteStore, log: list[Record], cuts: list[int]) -> None:
    """Apply the log in the batches that `cuts` make of it."""
    for start, end in zip([0, *cuts], [*cuts, len(log)], strict=True):
        batch = log[start:end]
        store.apply(batch, batch[-1].sequence if batch else store.watermark)


@st.composite
def cuts_of(draw: st.DrawFn, log: list[Record]) -> list[int]:
    return sorted(draw(st.lists(st.integers(0, len(log)), max_size=4)))


@settings(max_examples=150, deadline=None)
@given(st.data(), logs())
def test_the_store_shows_what_a_model_shows(data: st.DataObject, log: list[Record]) -> None:
    model, now = Model(log), 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        store = opened(Path(folder))
        apply_in(store, log, data.draw(cuts_of(log)))
        edges = 0
        for entity_id in ENTITIES:
            current = model.get(entity_id, now, now)
            assert shown(store.get("acme", entity_id)) == current
            for as_of, valid_at in ((20, 20), (now, 25), (35, now), (now, FUTURE + 1)):
                document = store.get("acme", entity_id, as_of_ms=as_of, valid_at_ms=valid_at)
                assert shown(document) == model.get(entity_id, as_of, valid_at)

            outward = [(entity_id, e["relation"], e["target_id"]) for e in current["edges"]] if current else []
            assert store.expand("acme", [entity_id]) == (sorted(outward), False)
            edges += len(outward)
            told = [event.event_id for event in store.timeline("acme", entity_id)]
            assert told == [record.event.id for record, _ in model.left(entity_id)]
            timeless = all(r.event.valid_from is r.event.valid_to is None for r, _ in model.left(entity_id))
            if timeless:  # a search does not look at validity
                found = [hit.entity_id for hit in store.search_text("acme", "leaks", 10)]
                assert (entity_id in found) == (current is not None and current["text"] == "leaks")
        both, _ = store.expand("acme", ENTITIES, direction="in")
        assert len(both) <= edges
        store.close()


@settings(max_examples=60, deadline=None)
@given(st.data(), logs())
def test_any_split_into_batches_and_any_replay_give_the_same_digest(data: st.DataObject, log: list[Record]) -> None:
    digests = set()
    for cuts in ([], list(range(len(log))), data.draw(cuts_of(log))):
        with tempfile.TemporaryDirectory() as folder:
            store = opened(Path(folder))
            apply_in(store, log, cuts)
            digests.add(store.digest())
            store.apply(log, store.watermark)
            digests.add(store.digest())
            store.close()
            store = opened(Path(folder))
            store.apply(log, store.watermark)
            digests.add(store.digest())
            store.close()
    assert len(digests) == 1


def test_a_digest_tells_states_apart_but_not_the_order_in_which_entities_were_met(tmp_path: Path) -> None:
    one, other = opened(tmp_path / "1"), opened(tmp_path / "2")
    pump, valve = put(attributes={"a": 1}), put(entity_id="valve", id="v")
    write(one, pump, valve)
    write(other, valve, pump)
    assert one.digest() == other.digest()
    write(other, put(ms=20, attributes={"a": 2}))
    assert one.digest() != other.digest()
    one.close()
    other.close()


# ── apply, crash, open ──────────────────────────────────────────────────────────────────────────────────────


def test_after_a_crash_between_batches_the_store_resumes_at_its_watermark(tmp_path: Path) -> None:
    log = records([put(ms=n, id=str(n), attributes={"n": n}) for n in range(1, 21)])
    whole, crashed = opened(tmp_path / "whole"), opened(tmp_path / "crashed")
    whole.apply(log, 20)
    crashed.apply(log[:12], 12)
    shutil.copytree(tmp_path / "crashed", tmp_path / "left")  # what a crash leaves: the file and its open WAL
    resumed = opened(tmp_path / "left")
    assert resumed.watermark == 12
    resumed.apply(log[5:], 20)
    assert resumed.digest() == whole.digest()
    for store in (whole, crashed, resumed):
        store.close()


def test_a_batch_that_fails_half_way_leaves_nothing_behind(store: SqliteStore) -> None:
    write(store, put(attributes={"a": 1}, text="leaks"))
    before = store.digest()
    broken: Any = None
    with pytest.raises(AttributeError):
        store.apply([Record(2, 10, 0, forget(ms=20)), Record(3, 15, 0, put(ms=30)), broken], 4)
    assert (store.watermark, store.digest()) == (1, before)
    write(store, put(ms=40, attributes={"a": 2}))
    assert got(store).attributes == {"a": 2}


def test_the_watermark_may_pass_the_last_record_and_never_goes_back(store: SqliteStore) -> None:
    store.apply([], 7)
    assert store.watermark == 7
    store.apply([Record(3, 1, 0, put())], 3)
    assert store.watermark == 7
    assert store.get("acme", "pump") is None


@pytest.mark.parametrize("other", [{"site": "edge"}, {"partitions": frozenset({1})}, {"incarnation": "2"}])
def test_a_store_opened_for_another_log_or_partition_set_starts_from_empty(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    store = opened(tmp_path)
    write(store, put(attributes={"a": 1}, text="leaks", edges=[{"relation": "feeds", "target_id": "tank"}]))
    store.close()
    store = opened(tmp_path)
    assert store.watermark == 1
    store.close()
    store = opened(tmp_path, **other)
    assert (store.watermark, store.rejected, store.counts()) == (0, 0, (0, 0))
    assert store.get("acme", "pump") is None
    assert store.search_text("acme", "leaks", 5) == []
    store.close()


def test_an_event_that_breaks_a_rule_is_skipped_counted_and_named(
    store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    deep: dict[str, Any] = {}
    for _ in range(1_500):
        deep = {"in": deep}
    write(store, put(attributes={"a": 1}), put(ms=11, attributes=[1]), put(ms=12, attributes=deep), put(ms=1 << 47))
    assert got(store).attributes == {"a": 1}
    assert got(store).version == 4, "a compare-and-set must name the last event on the subject, skipped or not"
    assert (store.rejected, store.watermark) == (3, 4)
    assert "event 2 of the log is skipped: " in caplog.text
    write(store, put(entity_id="valve", attributes=7))
    assert store.get("acme", "valve") is None
    assert store.counts() == (1, 0)


def test_reads_go_on_while_a_thread_applies_and_each_sees_one_commit(store: SqliteStore) -> None:
    def edge(n: int) -> list[dict[str, str]]:
        return [{"relation": "at", "target_id": f"place-{n}"}]

    events = [put(ms=n, attributes={"n": n}, edges=edge(n), remove_edges=edge(n - 1)) for n in range(1, 401)]
    log = records(events)

    def follow() -> None:
        for record in log:
            store.apply([record], record.sequence)

    writer = threading.Thread(target=follow)
    writer.start()
    seen: set[int] = set()
    while writer.is_alive() or not seen:
        floor = store.watermark
        document = store.get("acme", "pump")
        if document is not None:
            n = document.attributes["n"]
            assert document.edges == edge(n)
            assert document.version == n >= floor
            seen.add(n)
    writer.join()
    assert got(store).attributes == {"n": 400}


# ── events once ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 4], [2]])
def test_an_event_that_comes_again_has_no_effect_in_whatever_batch(store: SqliteStore, cuts: list[int]) -> None:
    old, new = put("edge-1", 10, attributes={"a": "old"}), put("edge-1", 11, attributes={"a": "new"})
    log = [carried(1, old, 4), carried(2, new, 5), carried(3, old, 4), carried(4, old, 4), carried(5, new, 5)]
    apply_in(store, log, cuts)
    assert got(store).attributes == {"a": "new"}
    assert told(store) == ["edge-1-10", "edge-1-11"]
    assert got(store).version == 5, "a compare-and-set must name the last event on the subject, repeated or not"


def test_a_log_that_began_anew_counts_from_one_again(store: SqliteStore) -> None:
    take(store, carried(1, put("edge-1", 10, attributes={"a": "old"}), 9, "1"))
    take(store, carried(2, put("edge-1", 20, attributes={"a": "new"}), 1, "2"))
    assert got(store).attributes == {"a": "new"}
    assert told(store) == ["edge-1-10", "edge-1-20"]


def test_what_a_forget_erased_does_not_come_again(store: SqliteStore) -> None:
    history = [put("edge-1", 10, text="old"), forget("edge-1", 20), put("edge-1", 30, attributes={"b": 2})]
    once = [carried(n, event, n) for n, event in enumerate(history, 1)]
    again = [carried(n + 3, event, n) for n, event in enumerate(history, 1)]
    take(store, *once)
    before = store.digest()
    take(store, *again)
    assert store.digest() == before
    assert told(store) == ["forget-edge-1-20", "edge-1-30"]
    assert (got(store).text, got(store).attributes) == (None, {"b": 2})


def test_an_event_that_broke_a_rule_does_not_hide_the_next(store: SqliteStore) -> None:
    take(store, carried(1, put("edge-1", attributes=[1]), 4), carried(2, put("edge-1", 11, attributes={"a": 1}), 5))
    assert got(store).attributes == {"a": 1}


# ── what a device holds ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def device(tmp_path: Path) -> Iterator[SqliteStore]:
    store = opened(tmp_path, "edge-1")
    yield store
    store.close()


EVERY_PART: dict[str, Any] = {
    "type": "pump",
    "text": "hunter2 leaks",
    "attributes": {"pin": "hunter2"},
    "edges": [{"relation": "at", "target_id": "hunter2"}],
    "vectors": {"v": np.ones(3, np.float32)},
}


@pytest.mark.parametrize("one_batch", [False, True])
def test_what_a_device_releases_leaves_no_trace_where_it_wrote_none_of_it(tmp_path: Path, one_batch: bool) -> None:
    device = opened(tmp_path, "edge-1")
    log = [
        carried(1, put("hub", 10, **EVERY_PART), 1),
        carried(2, put("edge-2", 11, entity_id="valve", text="leaks"), 1),
        note(3, "hold", bytes=70),
        note(4, "hold", "valve", bytes=7),
        note(5, "release"),
    ]
    apply_in(device, log, [] if one_batch else [1, 2, 3, 4])
    assert device.get("acme", "pump") is None
    assert told(device) == []
    assert [event.event_id for event in device.timeline_range("acme")] == ["edge-2-11"]
    assert device.expand("acme", ["pump", "hunter2"], direction="both") == ([], False)
    assert [hit.entity_id for hit in device.search_text("acme", "hunter2 leaks", 5)] == ["valve"]
    assert (device.counts(), device.held()) == ((1, 0), (1, 7))
    assert (device.holds("acme", "pump"), device.holds("acme", "valve")) == (False, True)
    assert device.describe("acme", ["pump"]) == [Description()]
    assert device.suspects("acme", "pump") == []
    device._writer.execute("INSERT INTO entity_text (entity_text, rank) VALUES ('integrity-check', 1)")
    device.close()
    assert b"hunter2" not in files_of(tmp_path)


def test_a_device_keeps_what_it_releases_where_it_wrote_some_of_it(device: SqliteStore) -> None:
    own = Record(2, 10, 0, put("edge-1", 20, attributes={"a": 1}))
    take(device, carried(1, put("hub", 10, **EVERY_PART), 1), own, note(3, "hold", bytes=7))
    assert device.holds("acme", "pump")
    before = device.digest()
    take(device, note(4, "release"))
    assert (device.digest(), device.holds("acme", "pump"), device.held()) == (before, False, (0, 0))
    assert told(device) == ["hub-10", "edge-1-20"]


def test_a_device_keeps_what_it_wrote_before_another_site_forgot_it(device: SqliteStore) -> None:
    take(device, Record(1, 5, 0, put("edge-1", 10)), carried(2, forget("hub", 20), 2), note(3, "release"))
    assert device.describe("acme", ["pump"]) == [Description(None, ["edge-1", "hub"], True, first=2)]
    take(device, carried(4, put("edge-2", 15, text="late"), 1))
    assert device.get("acme", "pump") is None, "for the forget is still known"


def test_the_device_that_wrote_is_not_the_hub_that_says_so(device: SqliteStore) -> None:
    take(device, carried(1, put("hub", 10), 1), carried(2, put("edge-2", 11), 1), note(3, "release"))
    assert device.get("acme", "pump") is None


def test_what_is_held_again_after_a_release_is_taken_from_its_beginning(device: SqliteStore) -> None:
    history = [put("hub", 10, **EVERY_PART), put("hub", 20, attributes={"a": 2})]
    take(device, *(carried(n, event, n) for n, event in enumerate(history, 1)), note(3, "hold", bytes=7))
    before, shown_before = device.digest(), shown(device.get("acme", "pump"))
    again = [carried(n + 4, event, n) for n, event in enumerate(history, 1)]
    take(device, note(4, "release"), *again, note(7, "hold", bytes=9))
    assert (device.digest(), shown(device.get("acme", "pump"))) == (before, shown_before)
    assert (told(device), device.held()) == (["hub-10", "hub-20"], (1, 9))
    assert [hit.entity_id for hit in device.search_text("acme", "leaks", 5)] == ["pump"]


def test_a_device_may_hold_an_entity_of_which_nothing_is_remembered(device: SqliteStore) -> None:
    take(device, note(1, "hold", bytes=0), note(2, "release", "valve"))
    assert (device.holds("acme", "pump"), device.holds("acme", "valve"), device.held()) == (True, False, (1, 0))
    assert device.get("acme", "pump") is None
    assert device.list_entities("acme", "", 9, held=False, with_sites=False) == []
    assert [each.entity_id for each in device.list_entities("acme", "", 9, held=True, with_sites=True)] == ["pump"]
    take(device, carried(3, put("hub", 10, attributes={"a": 1}), 1), carried(4, forget("hub", 20), 2))
    assert device.holds("acme", "pump")


def test_what_is_begun_is_listed_with_what_is_held_and_is_not_held(device: SqliteStore) -> None:
    take(device, carried(1, put("hub", 10, attributes={"a": 1}), 1), note(2, "hold", bytes=7, state="begun"))
    (begun,) = device.list_entities("acme", "", 9, held=True, with_sites=False)
    assert (begun.entity_id, begun.state, begun.bytes) == ("pump", "begun", 7)
    assert (device.holds("acme", "pump"), device.held()) == (False, (0, 0))
    take(device, carried(3, put("hub", 20, attributes={"a": 2}), 2), note(4, "hold", bytes=9))
    (whole,) = device.list_entities("acme", "", 9, held=True, with_sites=False)
    assert (whole.state, whole.bytes) == ("whole", 9)
    assert (device.holds("acme", "pump"), device.held()) == (True, (1, 9))


def test_notes_of_what_is_held_are_neither_in_timelines_nor_versions(device: SqliteStore) -> None:
    take(device, carried(1, put("hub", 10), 1), note(2, "hold", bytes=7))
    assert (told(device), got(device).version) == (["hub-10"], 1)


# ── what is put aside ───────────────────────────────────────────────────────────────────────────────────────


def test_an_event_that_is_put_aside_has_no_effect_and_is_counted_by_its_site(tmp_path: Path) -> None:
    store = opened(tmp_path)
    take(store, carried(1, put("edge-1", 10, attributes={"a": 1}, text="leaks"), 1))
    before = store.digest()
    take(
        store,
        carried(2, put("edge-1", 99, attributes={"a": 2}, text="hums"), 2, quarantined=True),
        carried(3, forget("edge-1", 98), 3, quarantined=True),
        carried(4, put("edge-2", 99, entity_id="valve", type="valve"), 1, quarantined=True),
        carried(5, put("edge-2", 99, attributes=[1]), 2, quarantined=True),
    )
    assert (store.digest(), store.rejected) == (before, 0)
    assert (got(store).attributes, told(store), store.counts()) == ({"a": 1}, ["edge-1-10"], (1, 0))
    assert got(store).version == 5, "a compare-and-set must name the last event on the subject, put aside or not"
    assert store.search_text("acme", "hums", 5) == []
    assert store.describe("acme", ["valve"]) == [Description()]
    assert store.list_entities("acme", "", 9, held=False, with_sites=True)[0].sites == ["edge-1"]
    assert store.quarantined == {"edge-1": 2, "edge-2": 2}
    store.close()
    store = opened(tmp_path)
    assert store.quarantined == {"edge-1": 2, "edge-2": 2}
    store.close()


def test_what_a_site_writes_after_an_event_that_was_put_aside_counts(store: SqliteStore) -> None:
    take(store, carried(1, put("edge-1", 99, attributes={"a": 1}), 1, quarantined=True))
    take(
        store, carried(2, put("edge-1", 20, attributes={"b": 2}), 2), carried(3, put("hub", 30, attributes={"b": 3}), 1)
    )
    assert got(store).attributes == {"b": 3}, "the stamp that was put aside does not push those after it ahead"


# ── what is told of entities ────────────────────────────────────────────────────────────────────────────────


def test_entities_are_described_in_the_order_asked_by_their_type_and_who_wrote_them(store: SqliteStore) -> None:
    write(store, put("hub", 10, type="pump"), put("edge-1", 20), put(entity_id="valve", id="v"))
    assert store.describe("acme", ["valve", "nobody", "pump"]) == [
        Description(None, ["hub"], first=3),
        Description(),
        Description("pump", ["hub", "edge-1"], first=1, types=["pump"]),
    ]
    assert store.describe("rival", ["pump"]) == [Description()]
    assert store.describe("acme", []) == []


def test_more_entities_than_a_statement_takes_are_described(store: SqliteStore) -> None:
    ids = [f"e{n}" for n in range(1_201)]
    write(store, *(put(entity_id=each, id=each, type=each) for each in ids))
    assert [each.type for each in store.describe("acme", [*reversed(ids)])] == ids[::-1]


def test_of_what_is_gone_the_type_of_then_is_told(store: SqliteStore) -> None:
    write(store, put("edge-1", 10, type="pump"), forget("hub", 20))
    gone = Description("pump", ["edge-1", "hub"], True, first=2, types=["pump"])
    assert store.describe("acme", ["pump"]) == [gone]
    write(store, forget("hub", 30))
    later = replace(gone, first=3)
    assert store.describe("acme", ["pump"]) == [later], "also after it was forgotten once more"
    write(store, put("hub", 40))
    assert store.describe("acme", ["pump"]) == [Description(None, ["edge-1", "hub"], False, 3)]
    write(store, put("hub", 50, type="valve"), forget("hub", 60))
    assert store.describe("acme", ["pump"]) == [Description("valve", ["edge-1", "hub"], True, 6, ["valve"])]


def test_all_types_that_an_entity_was_given_are_told_also_once_it_is_gone(store: SqliteStore) -> None:
    write(store, put(ms=10, type="meter"), put("edge-1", 5, type="x"), put(ms=20, type="bus", valid_to=20))
    types = ["bus", "meter", "x"]
    assert store.describe("acme", ["pump"]) == [Description("bus", ["hub", "edge-1"], first=1, types=types)]
    assert store.list_entities("acme", "", 9, held=False, with_sites=False)[0].types == types
    write(store, forget(ms=30))
    assert store.describe("acme", ["pump"])[0].types == types
    write(store, put(ms=40, type="tank"))
    assert store.describe("acme", ["pump"])[0].types == ["tank"]


def test_a_forget_that_something_outlives_takes_no_type_from_it(store: SqliteStore) -> None:
    write(store, put(ms=10, type="meter"), put(ms=30, attributes={"n": 1}), forget("edge-1", 20))
    assert store.get("acme", "pump") is not None
    assert store.describe("acme", ["pump"])[0].types == ["meter"]


def test_of_what_was_forgotten_before_it_came_no_type_is_told(store: SqliteStore) -> None:
    write(store, forget("hub", 20), put("edge-1", 10, type="pump"))
    assert store.describe("acme", ["pump"]) == [Description(None, ["hub", "edge-1"], True, 1)]


def test_what_forgets_and_what_came_after_that_is_told_by_its_place_in_the_log(tmp_path: Path) -> None:
    store = opened(tmp_path)
    take(
        store,
        carried(1, put("edge-1", 10), 1),
        carried(2, forget("edge-1", 20), 2),
        carried(3, put("edge-2", 15), 1),  # late
        carried(4, put("edge-2", 30), 2),
        carried(5, put("edge-2", 16, attributes=[1]), 3),  # late, and it breaks a rule
        carried(6, forget("edge-1", 20), 2),  # once more
        carried(7, put("edge-2", 15), 1),  # once more, and late
        carried(8, forget("edge-1", 99), 3, quarantined=True),
        carried(9, put("edge-2", 5, entity_id="valve"), 4),
    )
    assert store.forgotten([*range(1, 10)]) == [2, 3, 5, 6, 7]
    assert store.forgotten([1, 3, 4, 7, 100]) == [3, 7]
    left = [Left("edge-1", 2, 2), Left("edge-2", 4, 1)]
    assert store.erased("acme", "pump", [2, 3]) == ([1, 0], [2], left)
    assert store.erased("acme", "pump", [3, 4, 6, 8]) == ([0, 0, 0, 0], [4, 8], left)
    assert store.erased("acme", "valve", [9]) == ([0], [9], [Left("edge-2", 9, 1)])
    assert store.erased("acme", "nobody", [9]) == ([0], [], [])
    store.close()


def test_of_more_of_the_log_than_a_statement_takes_is_told_what_forgets(store: SqliteStore) -> None:
    write(store, *(forget(entity_id=f"e{n}", ms=n) for n in range(1_201)))
    assert store.forgotten([*range(1, 1_300)]) == [*range(1, 1_202)]


def test_entities_are_listed_by_id_in_pages_of_types(store: SqliteStore) -> None:
    write(store, *(put(entity_id=f"e{n}", id=str(n), type=f"t{n % 3}", attributes={"n": n}) for n in range(9)))
    write(store, forget(entity_id="e4", ms=20), put("edge-1", 30, entity_id="e7", id="7b", attributes={"n": 70}))

    def listed(after: str = "", limit: int = 9, **more: Any) -> list[str]:
        found = store.list_entities("acme", after, limit, held=False, with_sites=False, **more)
        return [each.entity_id for each in found]

    assert listed() == ["e0", "e1", "e2", "e3", "e5", "e6", "e7", "e8"]
    assert listed("e2", 3) == ["e3", "e5", "e6"]
    assert listed(types=["t1"]) == ["e1", "e7"]
    assert listed("e1", 2, types=["t1", "t2"]) == ["e2", "e5"]
    assert listed("e8") == []
    assert store.list_entities("rival", "", 9, held=False, with_sites=False) == []
    (one,) = store.list_entities("acme", "e6", 1, held=False, with_sites=True)
    assert (one.type, one.version, one.sites) == ("t1", 11, ["hub", "edge-1"])
    assert one.bytes == sum(
        len(body)
        for body in (b"\x81\xaaattributes\x81\xa1n\x46", b"\x82\xa4type\xa2t1" + b"\xaaattributes\x81\xa1n\x07")
    )


def test_of_what_is_held_the_bytes_that_the_hub_sent_are_listed(device: SqliteStore) -> None:
    take(
        device,
        carried(1, put("hub", 10, type="pump"), 1),
        carried(2, put("hub", 11, entity_id="valve", type="valve"), 2),
        carried(3, put("hub", 12, entity_id="tank", type="valve"), 3),
        note(4, "hold", bytes=1_234),
        note(5, "hold", "valve", bytes=5),
    )
    found = device.list_entities("acme", "", 9, held=True, with_sites=False)
    assert [(each.entity_id, each.bytes) for each in found] == [("pump", 1_234), ("valve", 5)]
    assert [
        each.entity_id for each in device.list_entities("acme", "", 9, types=["valve"], held=True, with_sites=False)
    ] == ["valve"]
    assert device.held() == (2, 1_239)
    take(device, note(6, "hold", bytes=2_000))
    assert device.held() == (2, 2_005)


# ── documents ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_document_has_all_parts_of_what_was_put(store: SqliteStore) -> None:
    when = datetime(2026, 7, 1, 12, tzinfo=UTC)
    body: dict[str, Any] = {
        "type": "pump",
        "attributes": {"level": 0.5, "since": when, "tags": ["a", {"b": None}], "raw": b"\x00"},
        "edges": [
            {"relation": "feeds", "target_id": "tank", "properties": {"pipe": 3}},
            {"relation": "at", "target_id": "x"},
        ],
        "vectors": {"default": np.ones(4, np.float32)},
        "text": "It hums.",
    }
    write(store, put(**body))
    document = got(store)
    assert document.attributes == body["attributes"]
    assert document.edges == [{"relation": "at", "target_id": "x"}, body["edges"][0]]
    assert (document.type, document.text, document.spaces, document.version) == ("pump", "It hums.", ["default"], 1)


@pytest.mark.parametrize("entity_id", ["ü.*> \x00'\"%", "記憶 🧠", "x" * 10_240, "a\x00b"])
def test_an_id_may_hold_any_text(store: SqliteStore, entity_id: str) -> None:
    edge = {"relation": "same\x00as", "target_id": entity_id + "!"}
    write(store, put(entity_id=entity_id, attributes={"a": 1}, edges=[edge]), put(entity_id="a", id="other"))
    assert got(store, entity_id).edges == [edge]
    assert store.expand("acme", [entity_id])[0] == [(entity_id, "same\x00as", entity_id + "!")]
    assert store.expand("acme", [entity_id + "!"], direction="in")[0] == [(entity_id + "!", "same\x00as", entity_id)]
    assert [event.entity_id for event in store.timeline("acme", entity_id)] == [entity_id]


def test_tenants_do_not_see_each_other(store: SqliteStore) -> None:
    edges = [{"relation": "feeds", "target_id": "tank"}]
    ours = put(attributes={"who": "us"}, text="secret", edges=edges)
    theirs = Event(
        id="t", tenant="rival", entity_id="pump", op="put", agent="eve", site="hub", hlc=1, body={"text": "own"}
    )
    write(store, ours, theirs)
    assert got(store).attributes == {"who": "us"}
    assert store.search_text("rival", "secret", 5) == []
    assert store.expand("rival", ["pump"])[0] == store.expand("rival", ["tank"], direction="in")[0] == []
    assert [event.event_id for event in store.timeline_range("rival")] == ["t"]


def test_attributes_and_edges_are_shown_as_of_a_time_and_as_valid_at_a_time(store: SqliteStore) -> None:
    old, new = {"relation": "at", "target_id": "old"}, {"relation": "at", "target_id": "new"}
    write(
        store,
        put(ms=5, attributes={"level": 1}, edges=[old]),
        put(ms=10, attributes={"level": 2}, edges=[new], remove_edges=[old]),
        put(ms=15, attributes={"level": 9}, valid_from=2, valid_to=4),
    )
    assert (got(store).attributes, got(store).edges) == ({"level": 2}, [new])
    then = got(store, as_of_ms=7)
    assert (then.attributes, then.edges, then.version) == ({"level": 1}, [old], 1)
    assert got(store, valid_at_ms=3).attributes == {"level": 9}, "learned late, but true then"
    assert store.get("acme", "pump", as_of_ms=7, valid_at_ms=3) is None, "not known then"
    assert (got(store, valid_at_ms=7).edges, got(store, valid_at_ms=12).edges) == ([old], [new])


def test_a_plan_for_the_future_shows_neither_in_documents_nor_on_walks_until_it_holds(store: SqliteStore) -> None:
    now, later = ({"relation": "at", "target_id": name} for name in ("here", "there"))
    write(store, put(edges=[now]), put(ms=20, valid_from=FUTURE, edges=[later], remove_edges=[now]))
    assert got(store).edges == [now]
    assert store.expand("acme", ["pump"], direction="both")[0] == [("pump", "at", "here")]
    assert store.expand("acme", ["here", "there"], direction="in")[0] == [("here", "at", "pump")]
    assert got(store, valid_at_ms=FUTURE).edges == [later]


def test_an_expired_write_uncovers_the_one_before_it(store: SqliteStore) -> None:
    write(store, put(attributes={"level": 1}), put(ms=20, valid_to=30, attributes={"level": 2}))
    assert got(store).attributes == {"level": 1}


# ── forget ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_forgotten_entity_is_gone_from_every_answer_but_its_tombstone(store: SqliteStore) -> None:
    write(store, put(type="pump", text="leaks", attributes={"a": 1}, edges=[{"relation": "at", "target_id": "x"}]))
    write(store, forget(ms=20))
    assert store.get("acme", "pump") is None
    assert store.get("acme", "pump", as_of_ms=6) is None
    assert store.expand("acme", ["pump", "x"], direction="both") == ([], False)
    assert store.search_text("acme", "leaks", 5) == []
    assert store.counts() == (0, 0)
    (tombstone,) = store.timeline("acme", "pump")
    assert (tombstone.op, tombstone.sequence, tombstone.body) == ("forget", 2, {})


def test_what_was_forgotten_is_no_longer_in_the_file(tmp_path: Path) -> None:
    store = opened(tmp_path)
    write(store, put(attributes={"pin": "hunter2"}, edges=[{"relation": "at", "target_id": "hunter2"}]))
    write(store, forget(ms=20))
    store.close()
    assert b"hunter2" not in files_of(tmp_path)


def files_of(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.iterdir())


def test_the_words_of_a_forgotten_text_are_no_longer_in_the_index(tmp_path: Path) -> None:
    store = opened(tmp_path)
    write(store, put(text="hunter2 leaks"), put(entity_id="valve", id="v", text="it leaks"))
    write(store, put(entity_id="tank", id="t", text="swordfish"), forget(ms=20), forget(ms=20, entity_id="tank"))
    assert [hit.entity_id for hit in store.search_text("acme", "leaks hunter2 swordfish", 5)] == ["valve"]
    store.close()
    assert b"hunter2" not in files_of(tmp_path)
    assert b"swordfish" not in files_of(tmp_path)


@pytest.mark.parametrize("work", ["batches without records", "steps of its own"])
def test_words_are_erased_from_a_large_index_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    monkeypatch.setattr(sqlite_batch, "PAGES_MERGED", 1)
    store = opened(tmp_path)
    fill_and_forget(store)
    store.close()
    store = opened(tmp_path)
    watermark, parts = store.watermark, 0
    while not store.is_settled:
        if work == "steps of its own":
            store.settle()
            assert store.watermark == watermark
        else:
            store.apply([], store.watermark + 1)
        parts += 1
        assert parts < 200
    assert len(store.search_text("acme", "hums", 2_000)) == 1_000
    store.close()
    assert parts > 1
    assert b"hunter2" not in files_of(tmp_path)


def fill_and_forget(store: SqliteStore) -> None:
    """Leave the words of one text to be erased from an index of 1,000."""
    write(store, put(text="hunter2 leaks"))
    for n in range(10):
        texts = {f"e{n}x{m}": " ".join(f"e{n}x{m}x{k}" for k in range(20)) for m in range(100)}
        write(store, *(put(entity_id=name, id=name, text=f"hums {text}") for name, text in texts.items()))
    write(store, forget(ms=20))
    assert not store.is_settled


def test_an_index_from_which_is_always_something_erased_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each merge makes the index deeper for good; beyond 2,000 levels SQLite calls it corrupt."""
    monkeypatch.setattr(sqlite_batch, "PAGES_MERGED", 1)
    monkeypatch.setattr(sqlite_batch, "MOST_LEVELS", 20)
    store = opened(tmp_path)
    deepest = 0
    for n in range(400):
        puts = [
            put(ms=n, entity_id=f"e{n % 20}-{m}", id=f"{n}-{m}", text=f"word{n} {n * m}x{m} {m}y{n} stays")
            for m in range(50)
        ]
        write(store, *puts, forget(ms=n + 1, entity_id=f"e{(n + 7) % 20}-{n % 50}"))
        structure = store._writer.execute("SELECT block FROM entity_text_data WHERE id = 10").fetchone()[0]
        deepest = max(deepest, sqlite_batch.levels_in(structure))
    assert 20 < deepest < 30
    assert len(store.search_text("acme", "stays", 2_000)) == store.counts()[0]
    store._writer.execute("INSERT INTO entity_text (entity_text) VALUES ('integrity-check')")
    write(store, put(ms=900, text="hunter2"), forget(ms=901))
    while not store.is_settled:
        store.settle()
    store.close()
    assert b"hunter2" not in files_of(tmp_path)


def test_a_put_after_a_forget_makes_the_entity_anew_also_within_one_batch(store: SqliteStore) -> None:
    write(
        store, put(ms=10, text="old", attributes={"a": 1}), forget(ms=20), put(ms=30, text="new", attributes={"b": 2})
    )
    assert (got(store).attributes, got(store).text, got(store).version) == ({"b": 2}, "new", 3)
    assert [hit.entity_id for hit in store.search_text("acme", "new old", 5)] == ["pump"]
    assert [event.op for event in store.timeline("acme", "pump")] == ["forget", "put"]


def test_a_put_from_another_site_that_a_forget_wins_over_leaves_no_trace(store: SqliteStore) -> None:
    write(store, forget("hub", 20), put("edge-1", 10, attributes={"a": 1}, text="late"))
    assert store.get("acme", "pump") is None
    assert store.search_text("acme", "late", 5) == []
    assert [event.op for event in store.timeline("acme", "pump")] == ["forget"]


# ── timelines ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_timeline_keeps_fields_that_this_version_does_not_know_and_only_the_dimension_of_vectors(
    store: SqliteStore,
) -> None:
    write(store, put(mood="calm", vectors={"default": np.ones(4, np.float32)}, extra={"signature": b"x"}))
    (event,) = store.timeline("acme", "pump")
    assert event.body == {"mood": "calm", "vectors": {"default": {"dimension": 4}}, "extra": {"signature": b"x"}}


def test_a_timeline_is_read_in_pages_in_log_order_with_times_in_utc(store: SqliteStore) -> None:
    write(store, *(put(ms=n, id=str(n), valid_from=100 - n, valid_to=FUTURE) for n in range(1, 6)))
    first = store.timeline("acme", "pump", after=0, limit=2)
    rest = store.timeline("acme", "pump", after=first[-1].sequence, limit=10)
    assert [event.sequence for event in first + rest] == [1, 2, 3, 4, 5]
    assert first[0].recorded_at == datetime(1970, 1, 1, 0, 0, 0, 5_000, tzinfo=UTC)
    assert first[0].valid_from == datetime(1970, 1, 1, 0, 0, 0, 99_000, tzinfo=UTC)
    assert first[0].valid_to == datetime(2096, 10, 2, 7, 6, 40, tzinfo=UTC)


def test_a_range_holds_the_events_that_begin_in_it_in_log_order(store: SqliteStore) -> None:
    write(
        store, *(put(ms=n, id=str(n), entity_id=f"e{n % 2}", type=f"t{n % 2}", valid_from=100 - n) for n in range(1, 9))
    )

    def sequences(*args: Any, **more: Any) -> list[int]:
        return [event.sequence for event in store.timeline_range("acme", *args, **more)]

    assert sequences(94, 98) == [3, 4, 5, 6]
    assert sequences(94, 98, after=4, limit=1) == [5]
    assert sequences(94, 98, "t1") == [3, 5]
    assert sequences(97) == [1, 2, 3]
    assert sequences(None, 94) == [7, 8]
    assert sequences(type="t0", after=2) == [4, 6, 8]
    assert sequences(limit=3) == [1, 2, 3]


def test_a_range_is_chosen_within_its_index(store: SqliteStore) -> None:
    plans: list[str] = []
    store._connection.set_trace_callback(plans.append)
    store.timeline_range("acme", 1, 2)
    store._connection.set_trace_callback(None)
    plan = " / ".join(row[3] for row in store._connection.execute(f"EXPLAIN QUERY PLAN {plans[0]}"))
    assert "USING COVERING INDEX event_by_validity (tenant=? AND valid_from>? AND valid_from<?)" in plan


# ── walks ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_node_of_ten_thousand_edges_is_walked_both_ways_and_cut_at_the_limit(store: SqliteStore) -> None:
    names = [f"s{n:05}" for n in range(10_000)]
    write(store, put(entity_id="hub", edges=[{"relation": "has", "target_id": name} for name in names]))
    assert store.expand("acme", ["hub"]) == ([("hub", "has", name) for name in names], False)
    assert store.expand("acme", ["hub"], limit=10) == ([("hub", "has", name) for name in names[:10]], True)
    assert store.expand("acme", ["hub"], limit=10_000)[1] is False
    back, truncated = store.expand("acme", [*reversed(names), "nobody"], direction="in")
    assert (back, truncated) == ([(name, "has", "hub") for name in names], False)
    assert store.counts() == (1, 10_000)
    assert len(got(store, "hub").edges) == 10_000


def test_a_walk_takes_the_relations_asked_for_and_no_edge_twice(store: SqliteStore) -> None:
    edges = [{"relation": r, "target_id": t} for r, t in (("feeds", "tank"), ("feeds", "pump"), ("near", "tank"))]
    write(store, put(edges=edges), put(entity_id="tank", id="t", edges=[{"relation": "near", "target_id": "pump"}]))
    feeds = [("pump", "feeds", "pump"), ("pump", "feeds", "tank")]
    assert store.expand("acme", ["pump", "pump"], ["feeds"], "both") == (feeds, False)
    assert store.expand("acme", ["pump"], [], "both")[0] == [*feeds, ("pump", "near", "tank")]
    assert store.expand("acme", [], [], "both") == ([], False)


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_best_text_comes_first_and_types_narrow_it(store: SqliteStore) -> None:
    texts = {"a": "a pump leaks oil", "b": "the oil tank and the oil line: oil", "c": "nothing to say"}
    write(store, *(put(entity_id=name, id=name, type=f"type-{name}", text=text) for name, text in texts.items()))
    hits = store.search_text("acme", "oil?", 5)
    assert [hit.entity_id for hit in hits] == ["b", "a"]
    assert hits[0].score > hits[1].score > 0
    assert [hit.entity_id for hit in store.search_text("acme", "oil leaks", 1)] == ["a"]
    assert [hit.entity_id for hit in store.search_text("acme", "oil", 5, "type-a")] == ["a"]


def test_a_replaced_text_is_found_by_its_new_words_only(store: SqliteStore) -> None:
    write(store, put(text="alpha"))
    write(store, put(ms=20, text="beta"))
    assert store.search_text("acme", "alpha", 5) == []
    assert len(store.search_text("acme", "beta", 5)) == 1
    write(store, put(ms=30, text=""))
    assert store.search_text("acme", "beta", 5) == []
    assert got(store).text is None


@pytest.mark.parametrize(
    "query",
    [
        'oil AND NOT "', "NEAR(oil, 2)", "text: oil*", "^oil", "oil\x00leak", "(((oil", "🛢️ oil 🛢️", "oil \ud800",
        "-oil+", "{oil}", "'oil';--", "oil " + " ".join(f"w{n}" for n in range(1_500)),
    ],
)  # fmt: skip
def test_operators_quotes_and_emoji_are_text_not_syntax(store: SqliteStore, query: str) -> None:
    write(store, put(text="Oil, crude 🛢️"))
    assert [hit.entity_id for hit in store.search_text("acme", query, 5)] == ["pump"]


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_query(searched: SqliteStore, query: str) -> None:
    searched.search_text("acme", query, 3)


@pytest.fixture(scope="module")
def searched() -> Iterator[SqliteStore]:
    with tempfile.TemporaryDirectory() as folder:
        store = opened(Path(folder))
        write(store, put(text="a few words, one café"))
        yield store
        store.close()


def test_accents_and_case_do_not_matter_and_composed_forms_are_the_same_word(searched: SqliteStore) -> None:
    for query in ("CAFÉ", "cafe", "cafe\u0301"):
        assert len(searched.search_text("acme", query, 3)) == 1
