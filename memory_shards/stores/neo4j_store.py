"""The store `neo4j:`: the graph in Neo4j (`neo4j_client` says how it lies). A batch is one transaction.

    lock the shard's node → what the records name → merge (`neo4j_batch`) → write, with the watermark
    → say that it commits → commit → say that it has

The lock makes whoever applies for the same shard wait, and see what was applied before. Several shards may share a
server: an edge leads to the same node, whosever entity that is. Where their transactions wait for each other in a
circle, Neo4j ends one, and it is tried again.

`apply` runs on the worker thread, over a driver that blocks: packing a batch would hold the event loop for long. Reads
are `neo4j_reader`'s. Looks at `neo4j_batch`, `neo4j_client` and `mnemesh`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar
from uuid import uuid4

import neo4j

from memory_shards.stores import WentBack, namespace, neo4j_client
from memory_shards.stores.neo4j_batch import Batch
from memory_shards.stores.neo4j_client import LAYOUT, Target
from mnemesh.event import Record

_LOCK = """
MERGE (s:Shard {key: $shard}) SET s.locked = true
RETURN s.watermark AS watermark, s.counts AS counts
"""
_MARK = """
MATCH (s:Shard {key: $shard})
SET s.watermark = $watermark, s.counts = $counts, s.edges = coalesce(s.edges, 0) + $edges
"""
_BEGUN = "MERGE (c:Commit {key: $shard}) SET c.begun = $commit"
_ENDED = "MATCH (c:Commit {key: $shard}) WHERE c.begun = $commit SET c.ended = $commit"
_STANDS = "MATCH (s:Shard {key: $shard, counts: $counts}) RETURN s.watermark AS watermark"
_CLEAR = """
MATCH (e:Entity) WHERE e.site = $site AND e.partition IN $partitions AND e.ledger IS NOT NULL
WITH e LIMIT $most
CALL (e) { MATCH (e)-[:SAID]->(v:Event) DETACH DELETE v }
CALL (e) { MATCH (e)-[r:EDGE|GONE]->() DELETE r }
REMOVE e.ledger, e.type, e.exact_from, e:Forgotten
RETURN count(e) AS cleared
"""
_CLEAR_TARGETS = """
MATCH (e:Entity) WHERE e.site = $site AND e.ledger IS NULL AND NOT (e)--() WITH e LIMIT $most DELETE e
RETURN count(e) AS cleared
"""
_BEGIN = """
MERGE (s:Shard {key: $shard}) WITH s WHERE coalesce(s.counts, '') <> $counts
SET s.counts = $counts, s.watermark = 0, s.edges = 0, s.site = $site, s.partitions = $partitions
"""
_END_OTHERS = """
MATCH (s:Shard {site: $site}) WHERE s.key <> $shard AND any(each IN s.partitions WHERE each IN $partitions)
SET s.counts = ''
"""

_DROP = "MATCH (s:Shard|Commit {key: $shard}) DELETE s"

_CLEARED_AT_ONCE = 2_000

WRITE_S = 5.0
"""How long a transaction may take: one whose replica hangs keeps the next from applying for so long."""

EDGE_S = 0.005
"""How much longer for each event, and each edge that it says: an atomic write of a thousand is one transaction, and
would never be done otherwise. Neo4j takes 0.2 to 0.5 ms for an edge on a small machine."""

Result = TypeVar("Result")


class Neo4jStore:
    """Writes the edges of some partitions of a site's log. What was written for another is cleared as it is opened."""

    outages = neo4j_client.OUTAGES
    is_shared = True

    def __init__(
        self, url: str, *, site: str, shard: str, partitions: Iterable[int], incarnation: str, generation: int = 0
    ) -> None:
        self.target = Target.of(url)
        self._born = site
        self.site = namespace(site, generation)
        self.partitions = sorted(partitions)
        self.shard_key = f"{self.site}.{shard}"
        self._counts = f"{LAYOUT} {incarnation} {self.partitions}"
        self._opened: neo4j.Driver | None = None
        self._watermark = 0
        self._commit: str | None = None
        """What the transaction that is under way is called, once it commits."""

    @property
    def watermark(self) -> int:
        """Where it stood when it was last asked, or applied."""
        return self._watermark

    def open(self) -> None:
        """Connect. Raises `BadRequest` on a server that is no good."""
        self._opened = neo4j_client.open_sync(self.target)

    def look(self) -> int | None:
        """Where the server stands now; `None` where what it has is of another log."""
        with self._session() as session:
            there = session.execute_read(lambda tx: tx.run(_STANDS, shard=self.shard_key, counts=self._counts).single())
        stands: int | None = None if there is None else there["watermark"]
        self._watermark = stands or 0
        return stands

    def begin(self, *, afresh: bool) -> None:
        """Clear what was written for another log, a piece at a time. Nodes that edges of others lead to stay."""
        with self._session() as session:
            self._write(session, self._end_others)
            if afresh:
                self._write(session, self._begin, "")
            for statement in (_CLEAR, _CLEAR_TARGETS):
                while self._write(session, self._clear, statement):
                    pass
            self._write(session, self._begin, self._counts)

    def drop(self) -> None:
        """Delete all that Neo4j has of it, a piece at a time."""
        with self._session() as session:
            self._write(session, self._begin, "")
            for statement in (_CLEAR, _CLEAR_TARGETS):
                while self._write(session, self._clear, statement):
                    pass
            self._write(session, lambda tx: tx.run(_DROP, self._asked).consume())

    def _end_others(self, tx: neo4j.ManagedTransaction) -> None:
        """Whoever had some of our partitions, and may again, has to begin anew."""
        tx.run(_END_OTHERS, self._asked).consume()

    def _begin(self, tx: neo4j.ManagedTransaction, counts: str) -> None:
        tx.run(_BEGIN, self._asked | {"counts": counts}).consume()

    @property
    def _asked(self) -> dict[str, Any]:
        return {"shard": self.shard_key, "site": self.site, "partitions": self.partitions}

    def _write(
        self, session: neo4j.Session, work: Callable[..., Result], *arguments: object, within_s: float = WRITE_S
    ) -> Result:
        """Do work in a transaction, which Neo4j ends when it takes longer, or waits so long for another."""
        return session.execute_write(neo4j.unit_of_work(timeout=within_s)(work), *arguments)

    def _session(self) -> neo4j.Session:
        assert self._opened is not None, "it is opened first"
        return self._opened.session(database=self.target.database)

    def apply(self, records: Sequence[Record], watermark: int, after: int = 0) -> None:
        """Commit the effects of `records`, in log order, and stand at `watermark`. On the worker thread only.

        Raises what the driver raises where Neo4j cannot be reached; nothing of the call has had an effect then, or all.
        Raises `WentBack` where the server stands before `after`.
        """
        within_s = WRITE_S + EDGE_S * sum(1 + _edges_in(record) for record in records)
        with self._session() as session:
            self._commit = None
            self._watermark = self._write(session, self._apply, records, watermark, after, within_s=within_s)
            if self._commit is not None:
                session.run(_ENDED, shard=self.shard_key, commit=self._commit).consume()

    def _apply(self, tx: neo4j.ManagedTransaction, records: Sequence[Record], watermark: int, after: int) -> int:
        """Where the store stands then. May run several times, until one commits."""
        there = tx.run(_LOCK, shard=self.shard_key).single(strict=True)
        stands: int = there["watermark"] if there["counts"] == self._counts else -1
        if stands < after:
            raise WentBack(f"it stands at {stands}, and stood at {after}")
        if watermark <= stands:
            return stands
        batch = Batch(tx, self.site, self._born, [record for record in records if record.sequence > stands])
        told = {"shard": self.shard_key, "watermark": watermark, "counts": self._counts, "edges": batch.write()}
        tx.run(_MARK, told).consume()
        self._commit = uuid4().hex
        with self._session() as beside:
            beside.run(_BEGUN, shard=self.shard_key, commit=self._commit).consume()
        return watermark

    def _clear(self, tx: neo4j.ManagedTransaction, cypher: str) -> int:
        """How many nodes were cleared; none once somebody else has done so and writes there."""
        there = tx.run(_LOCK, shard=self.shard_key).single(strict=True)
        if there["counts"] == self._counts:
            return 0
        cleared: int = tx.run(cypher, self._asked | {"most": _CLEARED_AT_ONCE}).single(strict=True)["cleared"]
        return cleared

    def close(self) -> None:
        """Let go of the connections."""
        if self._opened is not None:
            self._opened.close()


def _edges_in(record: Record) -> int:
    """How many edges an event says, if it is one that says them well."""
    said = (record.event.body.get(part) for part in ("edges", "remove_edges"))
    return sum(len(edges) for edges in said if isinstance(edges, list))
