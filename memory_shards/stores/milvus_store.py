"""The store `milvus:`: an index of the file of vectors (`vector_file`), kept in Milvus (`milvus_client` says how).

    records say which entities changed → what these are now, by the file → upsert or delete → where that is

Milvus has no transactions, and what it takes is small (64 KB a field), so what writes are merged by stays in the
file, which every replica has. A row is written as the entity is *now*: to write it again changes nothing, and so the
place may follow behind. It is told twice: `written`, which readers go by, once Milvus has acknowledged all before it;
`flushed`, which whoever applies next goes on from, once that is on Milvus's disk. (Milvus Lite loses acknowledged
writes when its process is killed.) An index that is empty is filled from the file, not from the log.

Who lost the lease stops by the place, which another has moved on; a row that it was just about to write may come late
and be older. `doctor --stores` finds such a row.

Looks at `vector_file`, `milvus_client`, `milvus_rows` and `mnemesh`.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from pymilvus import MilvusClient, MilvusException

from memory_shards.stores import WentBack, milvus_client, namespace
from memory_shards.stores.milvus_client import CALL_S, LAYOUT, PLACES, Target, make_collection, prefix_of
from memory_shards.stores.milvus_rows import row_of
from memory_shards.stores.vector_file import VectorFile
from memory_shards.stores.vector_reader import VectorReader, VectorSpace
from memory_shards.stores.vector_state import VectorState
from mnemesh.event import Record

MOST_ROWS = 1_000
MOST_BYTES = 8 << 20
"""In one call."""

FLUSH_FILE_S, FLUSH_SERVER_S = 1.0, 10.0
"""How often what was written is flushed, at most. A server flushes a collection ten times in 100 s and no oftener."""

FLUSH_S = 60.0
"""How long a flush may take: a server takes some 3 s."""

FILE_WAITS_S = 5.0
"""How long the file is waited for, which follows the same log. Then the projection tries again."""
_POLL_S = 0.002


class FileIsBehind(OSError):
    """The file of vectors has yet to apply what is to be written."""


class Place(NamedTuple):
    """Up to where a shard's rows are written, when Milvus took the last of them, and up to where they are flushed."""

    written: int
    visible_from: int
    flushed: int


NOWHERE = Place(0, 0, 0)


class Row(NamedTuple):
    """An entity's vector in one space, as it is to be."""

    space: VectorSpace
    entity: VectorState
    vector: NDArray[np.float32]


class MilvusStore:
    """Writes the vectors of some partitions of a site's log. `stands_at` tells how far the file has applied it.

    All but `stands_at` runs on the projection's worker; flushes run beside it.
    """

    outages = milvus_client.OUTAGES

    def __init__(
        self,
        target: Target,
        file: VectorFile,
        stands_at: Callable[[], int],
        *,
        site: str,
        shard: str,
        partitions: Iterable[int],
        incarnation: str,
        generation: int = 0,
    ) -> None:
        self.target = target
        self.shard = f"{namespace(site, generation)}.{shard}"
        self.is_shared = not target.is_file
        self._file = file
        self._stands_at = stands_at
        self._counts = f"{LAYOUT} {incarnation} {sorted(partitions)}"
        self._opened: MilvusClient | None = None
        self._reader: VectorReader | None = None
        self.place = NOWHERE
        self._collections: dict[tuple[str, str], str] = {}
        self._unflushed: set[str] = set()
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="milvus-flush")
        self._flushing: Future[None] | None = None
        self._flushed_at = 0.0
        self._writes = False
        self._checked = False
        self._lost = False
        self._placing = threading.Lock()

    @property
    def watermark(self) -> int:
        """Where it stood when it was last asked, or applied."""
        return self.place.written

    @property
    def visible_from(self) -> int:
        """What a search has to wait for, as Milvus counts time, to see all up to the watermark; 0 if not known."""
        return self.place.visible_from

    def open(self) -> None:
        """Connect. Raises `BadRequest` on a server that is no good."""
        if self._opened is None:
            self._opened = milvus_client.connect(self.target)
        milvus_client.make_places(self._opened)

    def close(self) -> None:
        """Flush what is written to a file, and let go."""
        try:
            if self._opened is not None and self._writes and self.target.is_file:
                self._flush(self._unflushed, self.place.written)
        finally:
            self._flusher.shutdown()
            if self._reader is not None:
                self._reader.close()
            if self._opened is not None:
                milvus_client.close(self._opened, self.target)

    @property
    def _client(self) -> MilvusClient:
        assert self._opened is not None, "it is opened first"
        return self._opened

    @property
    def _read(self) -> VectorReader:
        if self._reader is None:
            self._reader = self._file.reader()
        return self._reader

    # ── where it stands ─────────────────────────────────────────────────────────────────────────────────────

    def look(self) -> int | None:
        """Where the server stands now; `None` where what it has is of another log."""
        if self._lost or not self._checked:
            self._check()
        self._flush_if_due()
        place = None if self._lost else self._asked()
        if place is None or place.written > self.place.written:
            self._writes = False  # another does
        self.place = place or NOWHERE
        return None if place is None else place.written

    def begin(self, *, afresh: bool) -> None:
        """Drop what was written for another log, and fill what is empty from the file; go on from what was flushed."""
        self._writes = False
        milvus_client.make_places(self._client)
        place = None if afresh or self._lost else self._asked()
        if place is None:
            self._drop()
            self._lost = False
            self._fill()
        else:
            self._put_place(place._replace(written=place.flushed))
        self._writes = True

    def drop(self) -> None:
        """Delete its collections, and its place."""
        self._drop()
        self._client.delete(PLACES, ids=[self.shard], timeout=CALL_S)

    def _check(self) -> None:
        """Find whether a collection is gone that there are vectors for; it would be made again, and be empty."""
        there = set(self._client.list_collections(timeout=CALL_S))
        self._lost = self._asked() is not None and any(
            milvus_client.collection_of(self.shard, space.tenant, space.name) not in there and self._read.count(space)
            for space in self._read.spaces()
        )
        self._checked = True

    def _drop(self) -> None:
        if self._flushing is not None:
            wait([self._flushing])  # of what is dropped: it may fail
            self._flushing = None
        self._collections, self._unflushed, self.place = {}, set(), NOWHERE
        for name in self._client.list_collections(timeout=CALL_S):
            if name.startswith(prefix_of(self.shard)):
                self._client.drop_collection(name, timeout=CALL_S)

    def _fill(self) -> None:
        stands = self._stands_at()
        for space in self._read.spaces():
            for some in self._read.vectors_in(space):
                self._upsert([Row(space, each.entity, each.vector) for each in some])
        self._put_place(Place(stands, self._visible_from(), 0))
        self._flush(self._unflushed, stands)

    def _asked(self) -> Place | None:
        """The place as the server has it; `None` where that is none of this log's.

        What another replica wrote is asked for with what a server takes for it: the next tick of its clock, 200 ms.
        """
        level = {} if self.target.is_file else {"consistency_level": "Session" if self._writes else "Strong"}
        fields = ["counts", *Place._fields]
        try:
            found = self._client.get(PLACES, [self.shard], output_fields=fields, timeout=CALL_S, **level)
        except MilvusException:
            if self._client.has_collection(PLACES, timeout=CALL_S):
                raise
            return None  # it was emptied
        if not found or found[0]["counts"] != self._counts:
            return None
        return Place(*(found[0][name] for name in Place._fields))

    def _put_place(self, place: Place) -> None:
        row = {"id": self.shard, "vector": [0.0, 0.0], "counts": self._counts, **place._asdict()}
        self._client.upsert(PLACES, [row], timeout=CALL_S)
        self.place = place

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, records: Sequence[Record], watermark: int, after: int = 0) -> None:
        """Write what the entities of `records` are now, and stand at `watermark`. Raises `WentBack`."""
        self._wait_for_file(watermark)
        there = self._asked()
        if there is None or there.written < after:
            raise WentBack(f"Milvus stood at {after} of the log and stands at {there.written if there else 0}")
        if there.written >= watermark:
            self.place = there
            return
        rows, gone = self._changed(records)
        self._upsert(rows)
        for collection, entity_ids in gone.items():
            with self._noticing_what_is_gone():
                self._client.delete(collection, ids=entity_ids, timeout=CALL_S)
            self._unflushed.add(collection)
        with self._placing:
            self._put_place(Place(watermark, self._visible_from(), max(there.flushed, self.place.flushed)))
        self._flush_if_due()

    def _wait_for_file(self, watermark: int) -> None:
        deadline = time.monotonic() + FILE_WAITS_S
        while self._stands_at() < watermark:
            if time.monotonic() > deadline:
                raise FileIsBehind(f"the file of vectors stands at {self._stands_at()} of {watermark}")
            time.sleep(_POLL_S)

    def _changed(self, records: Sequence[Record]) -> tuple[list[Row], dict[str, list[str]]]:
        """The vectors of the entities that records are about, and by collection those that may have one no more."""
        names: dict[str, dict[str, bool]] = defaultdict(dict)
        for record in records:
            about = names[record.event.tenant]
            is_whole = record.event.op != "put"
            about[record.event.entity_id] = is_whole or about.get(record.event.entity_id, False)
        rows: list[Row] = []
        gone: dict[str, list[str]] = defaultdict(list)
        for space in self._read.spaces():
            about = names.get(space.tenant, {})
            stored = self._read.stored(space.tenant, about)
            for entity_id, is_whole in about.items():
                entity = stored.get(entity_id)
                vector = None
                if entity is not None and space.name in entity.spaces:
                    vector = self._read.vector(space, entity.number)
                if entity is not None and vector is not None:
                    rows.append(Row(space, entity, vector))
                elif is_whole or (entity is not None and entity.was_in(space.name)):
                    gone[self._collection(space)].append(entity_id)
        return rows, gone

    def _upsert(self, rows: Iterable[Row]) -> None:
        """Put the rows, so many at once as a call takes."""
        batches: dict[str, _Batch] = {}
        for row in rows:
            collection = self._collection(row.space)
            data = row_of(*row)
            size = row.vector.nbytes + len(msgspec.json.encode(data["attributes"]))
            batch = batches.setdefault(collection, _Batch())
            if not batch.takes(size):
                self._put(collection, batch)
                batch = batches[collection] = _Batch()
            batch.add(data, size)
        for collection, batch in batches.items():
            self._put(collection, batch)

    def _put(self, collection: str, batch: _Batch) -> None:
        with self._noticing_what_is_gone():
            self._client.upsert(collection, batch.rows, timeout=CALL_S)
        self._unflushed.add(collection)

    @contextmanager
    def _noticing_what_is_gone(self) -> Iterator[None]:
        """A collection that somebody dropped is to be filled again, with all others: who knows what else is gone."""
        try:
            yield
        except MilvusException as error:
            self._lost = self._lost or milvus_client.is_gone(error)
            raise

    def _collection(self, space: VectorSpace) -> str:
        """The name of a space's collection, made when it is first needed."""
        name = space.tenant, space.name
        if name not in self._collections:
            self._collections[name] = make_collection(self._client, self.shard, space, in_file=self.target.is_file)
        return self._collections[name]

    def _visible_from(self) -> int:
        database = self.target.database
        written = [milvus_client.last_written(self._client, name, database) for name in self._collections.values()]
        return max([self.place.visible_from, *written])

    # ── flushing ────────────────────────────────────────────────────────────────────────────────────────────

    def _flush_if_due(self) -> None:
        """Have what was written flushed, beside further writes, if that was not done just now."""
        if self._flushing is not None:
            if not self._flushing.done():
                return
            flushing, self._flushing = self._flushing, None
            flushing.result()
        every = FLUSH_FILE_S if self.target.is_file else FLUSH_SERVER_S
        is_due = time.monotonic() - self._flushed_at > every
        if self._writes and is_due and self.place.flushed < self.place.written:
            self._flushed_at = time.monotonic()
            unflushed, self._unflushed = self._unflushed, set()
            self._flushing = self._flusher.submit(self._flush, unflushed, self.place.written)

    def _flush(self, collections: set[str], written: int) -> None:
        """Flush these collections, which have all up to `written`, and say so."""
        try:
            for name in collections:
                with self._noticing_what_is_gone():
                    self._client.flush(name, timeout=FLUSH_S)
        except BaseException:
            self._unflushed |= collections
            raise
        with self._placing:
            there = self._asked()
            if there is not None and there.flushed < written:
                self._put_place(there._replace(flushed=written))


class _Batch:
    """Rows of one call."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._size = 0

    def takes(self, size: int) -> bool:
        return not self.rows or (len(self.rows) < MOST_ROWS and self._size + size <= MOST_BYTES)

    def add(self, row: dict[str, Any], size: int) -> None:
        self.rows.append(row)
        self._size += size
