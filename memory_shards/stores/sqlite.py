"""The embedded store: attributes, edges, text and timelines of a shard in one SQLite file, `memory.db`.

Write-ahead logging lets reads go on while `apply` does, and each read sees one committed state. Who may call what:

* `apply` and `settle` on the store's worker thread, with a connection of its own;
* the reads (of `sqlite_reader`) on one thread, the event loop's: they should be short ones;
* those of a `reader()` on any other one thread: the long ones;
* `digest` on any thread: it reads everything, on a connection made for it.

Vectors are in another store. Looks at `memory_shards.merge`, its own `sqlite_*` files, and `mnemesh`.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import closing
from pathlib import Path

import msgspec

from memory_shards import merge
from memory_shards.digests import Digests, fact_of_edge, facts_of_document
from memory_shards.merger import ALL_PARTS, Part
from memory_shards.stores.provenance import keep_or_clear
from memory_shards.stores.sqlite_batch import Batch
from memory_shards.stores.sqlite_reader import SqliteReader
from memory_shards.stores.sqlite_schema import LAYOUT, SCHEMA, connect
from mnemesh import wire
from mnemesh.event import Record

_CACHE_KIB = 8_192
"""SQLite's page cache where events are applied; pages beyond it come from the system's. 32 MiB apply no faster: 50,000
documents at 21,000/s with either, random updates of 300,000 at 6,200 to 8,100/s."""


class SqliteStore(SqliteReader):
    """One shard's memory on disk, but for the vectors.

    The file serves one `site`, one set of `partitions` and one `incarnation` of the log (its stream's creation time);
    opened for another, it starts from empty and from watermark 0. It keeps `parts`, and is built anew for others.
    """

    def __init__(
        self,
        folder: Path,
        *,
        site: str,
        partitions: Set[int],
        incarnation: str,
        parts: frozenset[Part] = ALL_PARTS,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "memory.db"
        self._writer = connect(self.file)
        self._writer.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        keep_or_clear(
            self._writer, site=site, partitions=partitions, incarnation=incarnation, layout=LAYOUT, parts=parts
        )
        self._writer.executescript(SCHEMA)
        meta = dict(self._writer.execute("SELECT name, value FROM meta"))
        self._site = site
        self._parts = parts
        counted = self._writer.execute("SELECT site, count(*) FROM quarantine GROUP BY site")
        self.quarantined: Counter[str] = Counter(dict(counted.fetchall()))
        """How many events of each site were put aside."""
        self._watermark: int = meta.get("watermark", 0)
        self._rejected: int = meta.get("rejected", 0)
        self._erasing = meta.get("erasing", 0)
        super().__init__(self.file, with_edges="edges" in parts)

    @property
    def watermark(self) -> int:
        """The last log sequence applied and committed. A read that starts later sees at least this."""
        return self._watermark

    @property
    def rejected(self) -> int:
        """How many events broke a rule and were skipped, since the file was begun."""
        return self._rejected

    @staticmethod
    def stands_in(connection: sqlite3.Connection) -> int:
        """Up to where a file like this one has the log."""
        found = connection.execute("SELECT value FROM meta WHERE name = 'watermark'").fetchone()
        return int(found[0]) if found else 0

    def shows(self, record: Record) -> bool:
        """Each of them: it is in the entity's timeline."""
        return True

    def apply(self, records: Sequence[Record], watermark: int) -> None:
        """Commit the effects of `records`, in log order, and stand at `watermark`. On the worker thread only.

        An event that breaks a rule is skipped, logged and counted. Raises `sqlite3.Error` where the file fails (a full
        disk, say); nothing of the call has had an effect then.
        """
        if watermark > self._watermark:
            self._commit([record for record in records if record.sequence > self._watermark], watermark)

    @property
    def is_settled(self) -> bool:
        """Whether no word of a text that is gone is left in the index of texts."""
        return not self._erasing

    def settle(self) -> None:
        """Erase from as much of the index of texts as a batch does. Raises as `apply` does."""
        self._commit([], self._watermark)

    def _commit(self, records: Sequence[Record], watermark: int) -> None:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            batch = Batch(
                self._writer,
                records,
                site=self._site,
                erasing=self._erasing,
                put_aside=self.quarantined,
                parts=self._parts,
            )
            batch.write()
            rejected = self._rejected + batch.rejected
            self._writer.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)",
                [("watermark", watermark), ("rejected", rejected), ("erasing", batch.erasing)],
            )
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise
        self._watermark, self._rejected, self._erasing = watermark, rejected, batch.erasing
        self.quarantined.update(batch.quarantined)

    def close(self) -> None:
        """Close the file, after its readers. Neither `apply`, `settle` nor a read may be under way."""
        super().close()
        self._writer.close()

    def reader(self) -> SqliteReader:
        """Another reader of the same file, for another thread. Who asks for it closes it."""
        return SqliteReader(self.file, with_edges=self._with_edges)

    def digest(self) -> str:
        """A hash of the state, the tombstones and each entity's events in order: equal where the same log was applied.

        Reads everything, on a connection of its own: it may run on any thread.
        """
        return "-".join(digests.whole() for digests in self.digests().values())

    def digests(self) -> dict[str, Digests]:
        """The same of each part that it keeps, by partition."""
        found: dict[str, Digests] = {part: Digests() for part in sorted(self._parts)}
        with closing(connect(self.file)) as connection:
            connection.execute("BEGIN")
            for part, tenant, entity_id, facts in facts_in(connection, self._parts):
                found[part].add(tenant, entity_id, facts)
        return found


def facts_in(connection: sqlite3.Connection, parts: Set[Part]) -> Iterator[tuple[Part, str, str, object]]:
    """What a file holds of these parts, for digests: each part, tenant and entity, and what is told of it."""
    entities = "SELECT id, tenant, entity_id, alive, type, text, doc, ledger FROM entity"
    edges = "SELECT relation, target, removed, valid_from, stamp, site, properties FROM edge WHERE source = ?"
    events = "SELECT stamp, site, event_id FROM event WHERE entity = ?"
    for id, tenant, entity_id, alive, type, text, doc, encoded in connection.execute(entities):
        ledger = msgspec.msgpack.decode(encoded, type=merge.Ledger)
        if not alive and ledger.tombstone is None:
            continue  # only ever named by events that were skipped
        if "attributes" in parts:
            attributes, spaces = wire.decode(doc)
            history = connection.execute(events, (id,)).fetchall()
            facts = facts_of_document(bool(alive), type, text, attributes, spaces, ledger, history)
            yield "attributes", tenant, entity_id, facts
        if "edges" in parts:
            for relation, target, removed, *key, properties in connection.execute(edges, (id,)):
                told = wire.decode(properties) if properties else None
                yield "edges", tenant, entity_id, fact_of_edge(relation, target, bool(removed), tuple(key), told)
        if "text" in parts and text is not None:
            yield "text", tenant, entity_id, text
