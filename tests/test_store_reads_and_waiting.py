"""What the faster paths of the stores must not change: waiting puts, many rows a statement, readers, matrix scans."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge import put, records
from test_sqlite_store import opened
from test_sqlite_store import write as write_events
from test_vector_store import TENANT, WRITES, Log, applied, find, ids, vector, write

from memory_shards.stores import VectorQuery, vector_file
from memory_shards.stores import space as space_module
from memory_shards.stores.bulk import execute_all, select_all
from memory_shards.stores.halves import halved, widened
from memory_shards.stores.memory_vectors import MemoryVectors
from memory_shards.stores.space import Space
from memory_shards.stores.waiting import MOST_WAITING

# ── puts that wait for a vector ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def log() -> Log:
    return Log()


def waiting(store: MemoryVectors, entity_id: str) -> bytes:
    row = store.stored._db.execute("SELECT waiting FROM entities WHERE entity_id = ?", (entity_id,)).fetchone()
    assert row is not None
    kept: bytes = row[0]
    return kept


def test_puts_without_a_vector_wait_and_count_once_it_comes(tmp_path: Path, log: Log) -> None:
    store = MemoryVectors(tmp_path)
    applied(store, [log.put("e", type="room", attributes={"floor": 3, "tag": "old"})])
    applied(store, [log.put("e", attributes={"tag": "new", "floor": None})])
    assert waiting(store, "e") != b""
    store.close()
    store = MemoryVectors(tmp_path)
    applied(store, [log.put("e", vectors={"default": vector(1, 0)})])
    assert waiting(store, "e") == b""
    (hit,) = find(store, vector(1, 0), type="room", filter={"tag": "new"}, output_fields=["tag", "floor"])
    assert hit.attributes == {"tag": "new"}
    store.close()


def test_a_forget_erases_what_waited(tmp_path: Path, log: Log) -> None:
    store = MemoryVectors(tmp_path)
    applied(store, [log.put("e", attributes={"pin": "hunter2"})])
    applied(store, [log.forget("e")])
    applied(store, [log.put("e", vectors={"default": vector(1, 0)})])
    assert ids(find(store, vector(1, 0), filter={"pin": "hunter2"})) == []
    store.close()
    assert b"hunter2" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_many_puts_of_an_entity_without_a_vector_take_bounded_room(tmp_path: Path, log: Log) -> None:
    store = MemoryVectors(tmp_path)
    for n in range(300):
        applied(store, [log.put("e", attributes={"n": n, "note": "x" * 50})])
        assert len(waiting(store, "e")) <= MOST_WAITING
    applied(store, [log.put("e", vectors={"default": vector(1, 0)})])
    assert ids(find(store, vector(1, 0), filter={"n": 299})) == ["e"]
    store.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(WRITES, min_size=1, max_size=20), st.sampled_from([0, 40, 4_096]))
def test_when_waiting_puts_are_merged_makes_no_difference(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[str, dict[str, Any] | None]], most: int
) -> None:
    log = Log()
    for entity_id, body in writes:
        body = body if body is None or len(log.records) % 3 == 0 else {**body, "vectors": {}}
        write(log, entity_id, body)
    for name in "abcdefghij":  # a last vector shows what waited
        write(log, name, {"vectors": {"ip": vector(1, 2, 3)}})
    digests = set()
    for step in (1, len(log.records)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vector_file, "_CROWDED", vector_file._CROWDED.replace(str(MOST_WAITING), str(most)))
            store = MemoryVectors(tmp_path_factory.mktemp("store"))
            for start in range(0, len(log.records), step):
                applied(store, log.records[start : start + step])
            digests.add(store.digest())
            store.close()
    assert len(digests) == 1


# ── many rows in one statement ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1_000])
def test_all_rows_are_written_and_found_in_however_many_statements(count: int) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT)")
    execute_all(connection, "INSERT OR FAIL INTO t VALUES {rows}", [(n, str(n)) for n in range(count)])
    query = "WITH w (a) AS (VALUES {rows}) SELECT t.a, b FROM w CROSS JOIN t USING (a)"
    found = list(select_all(connection, query, [(n,) for n in range(-5, count)]))
    assert found == [(n, str(n)) for n in range(count)]


# ── readers ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reader_on_another_thread_sees_each_commit_while_apply_goes_on(tmp_path: Path) -> None:
    store = opened(tmp_path)
    log = records([put(ms=n, id=str(n), entity_id=f"e{n}", text="leaks") for n in range(1, 301)])
    faults: list[str] = []
    done = threading.Event()

    def scan() -> None:
        reader = store.reader()
        while not done.is_set():
            floor = store.watermark
            seen = len(reader.search_text("acme", "leaks", 1_000))
            if not floor <= seen <= len(log) or reader.counts()[0] < floor:
                faults.append(f"{floor}: {seen}")
        reader.close()

    thread = threading.Thread(target=scan)
    thread.start()
    for record in log:
        store.apply([record], record.sequence)
    done.set()
    thread.join()
    assert faults == []
    store.close()


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    store = opened(tmp_path)
    write_events(store, put(attributes={"a": 1}))
    reader = store.reader()
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader._connection.execute("DELETE FROM event")
    document = reader.get("acme", "pump")
    assert document is not None
    assert document.attributes == {"a": 1}
    reader.close()
    store.close()


# ── many queries at once ────────────────────────────────────────────────────────────────────────────────────


def test_widening_gives_every_finite_half_exactly() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 2)
    wide = widened(halves.view(np.uint8), np.empty((len(halves), 2), np.int32))
    assert (wide.view(np.uint32) == halves.astype(np.float32).view(np.uint32)).all()


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("k", [1, 2, 10, 150, 5_000])
@pytest.mark.parametrize("removed", [0, 700])
def test_many_queries_at_once_find_what_each_finds_alone(
    metric: Any, k: int, removed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    space = Space(1, 384, metric, "flat", None)
    halves, _ = halved(rng.standard_normal((4_500, 384), np.float32), metric)
    space.put([str(row) for row in range(len(halves))], halves)
    for row in range(removed):
        space.remove(str(row * 5))
    queries = rng.standard_normal((12, 384), np.float32)
    monkeypatch.setattr(space_module, "MATRIX_FROM", 1)
    scores, rows = space.search(queries, k)
    monkeypatch.setattr(space_module, "MATRIX_FROM", 1_000)
    exact_scores, exact_rows = space.search(queries, k)
    assert scores == pytest.approx(exact_scores, rel=1e-4, abs=1e-3)
    assert (rows == exact_rows).mean() > 0.99
    assert (rows >= 0).all()
    assert all(len(set(line)) == len(line) for line in rows.tolist())


def test_a_batch_of_many_queries_is_answered_query_by_query(tmp_path: Path, log: Log) -> None:
    store = MemoryVectors(tmp_path)
    for n in range(50):
        log.put(f"e{n}", vectors={"default": vector(n, 1)}, spaces={"default": {"metric": "l2"}})
    applied(store, log.records)
    answers = store.search([VectorQuery(tenant=TENANT, vector=vector(n, 1), k=1 + n % 2) for n in range(50)])
    assert [ids(answer)[0] for answer in answers if isinstance(answer, list)] == [f"e{n}" for n in range(50)]
    assert [len(answer) for answer in answers if isinstance(answer, list)] == [1 + n % 2 for n in range(50)]
    store.close()
