"""The side of the embedded store that only reads: documents, timelines, walks, texts, each from one committed state.

A reader has a connection of its own and belongs to one thread at a time; readers neither wait for each other nor
for `apply`. What takes long (`search_text`: about 1 µs a matching text; `timeline_range` with bounds; `counts`; a wide
walk: 2 µs an edge) belongs on a reader and a thread of its own, where `get` takes some 14 µs.

Looks at `memory_shards.merge`, `sqlite_schema` and `mnemesh`.
"""

from __future__ import annotations

import heapq
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from memory_shards import merge
from memory_shards.merge import Document, State, edge_view
from memory_shards.stores import Edge
from memory_shards.stores.sqlite_schema import connect, history
from memory_shards.suspects import suspects
from mnemesh import wire
from mnemesh.clock import from_ms, wall_ms
from mnemesh.messages import Description, Direction, Hit, Left, ListedEntity, Suspect, TimelineEvent

# One statement sees one commit, and costs a third of a transaction around two: first the entity, then its edges.
_GET = """
SELECT id, alive, exact_from, type, doc, text, version FROM entity WHERE tenant = ?1 AND entity_id = ?2
UNION ALL
SELECT relation, target, properties, 0, 0, 0, 0 FROM entity CROSS JOIN edge ON source = entity.id
WHERE entity.tenant = ?1 AND entity_id = ?2 AND NOT removed
"""
_EVENT = """
SELECT sequence, event_id, entity_id, op, agent, recorded_at, valid_from, valid_to, body
FROM event JOIN entity ON entity.id = event.entity
"""
_TIMELINE = _EVENT + "WHERE entity.tenant = ? AND entity_id = ? AND sequence > ? ORDER BY sequence LIMIT ?"
# The page is chosen first, within the index where there are bounds, and only its events are then fetched.
_RANGE = """WHERE sequence IN (
    SELECT sequence FROM event {index} WHERE tenant = :tenant AND sequence > :after{bounds}{type}
    ORDER BY sequence LIMIT :limit) ORDER BY sequence
"""
_BOUNDS = " AND valid_from >= :start AND valid_from < :end"
_TYPE = " AND (SELECT type FROM entity WHERE id = event.entity) = :type"
# An edge whose source is not exact yet is a candidate even where its last write removed it: the fold decides.
_OUT = """
SELECT entity_id, relation, target, source, exact_from > ? FROM entity CROSS JOIN edge ON source = entity.id
WHERE entity.tenant = ? AND entity_id IN ({ids}) AND (NOT removed OR exact_from > ?){relations} ORDER BY 1, 2, 3
"""
_IN = """
SELECT target, relation, entity_id, source, exact_from > ? FROM edge CROSS JOIN entity ON entity.id = source
WHERE edge.tenant = ? AND target IN ({ids}) AND (NOT removed OR exact_from > ?){relations} ORDER BY 1, 2, 3
"""
_SEARCH = """
SELECT entity_id, -rank FROM entity_text JOIN entity ON entity.id = entity_text.rowid
WHERE entity_text MATCH ? AND tenant = ?{type} ORDER BY rank, entity_id LIMIT ?
"""
_HOLDS = "SELECT held_state = 'whole' FROM entity WHERE tenant = ? AND entity_id = ?"
_HELD_OR_OWN = """
SELECT held_state = 'whole', CASE WHEN held_state = 'whole' THEN NULL ELSE
    (SELECT max(sequence) FROM event WHERE event.entity = entity.id AND hub IS NULL) END
FROM entity WHERE tenant = ? AND entity_id = ?
"""
_LIST = """
SELECT entity_id, type, version, ifnull(held, size), ledger,
    ifnull((SELECT min(sequence) FROM event WHERE entity = entity.id), 0), held_state
FROM entity WHERE tenant = ? AND entity_id > ? AND {which}{types} ORDER BY entity_id LIMIT ?
"""
_DESCRIBE = """
SELECT entity_id, type, alive, ledger, ifnull((SELECT min(sequence) FROM event WHERE entity = entity.id), 0)
FROM entity WHERE tenant = ? AND entity_id IN ({ids})
"""
_ERASED = "SELECT sequence, events FROM erasure WHERE sequence IN ({sequences})"
_LEFT = """
WITH here (site, sequence) AS (
    SELECT event.site, sequence FROM entity CROSS JOIN event ON event.entity = entity.id
    WHERE entity.tenant = :tenant AND entity_id = :entity_id
    UNION ALL SELECT site, sequence FROM quarantine WHERE tenant = :tenant AND entity_id = :entity_id)
"""
_LEFT_OF_EACH = _LEFT + "SELECT site, min(sequence), count(*) FROM here GROUP BY site"
_HAS = _LEFT + "SELECT sequence FROM here WHERE sequence BETWEEN :first AND :last"
_FORGOTTEN = "SELECT sequence FROM erasure WHERE sequence IN ({sequences}) ORDER BY sequence"
_STANDS_AT = "SELECT value FROM meta WHERE name = 'watermark'"
_IDS_A_STATEMENT = 500

_ledger_decoder = msgspec.msgpack.Decoder(merge.Ledger)

# A word is what ASCII punctuation and blanks leave; the tokenizer makes a phrase of whatever else is in it.
_WORD = re.compile(r"[0-9A-Za-z\u0080-\U0010ffff]+")


class SqliteReader:
    """Reads `memory.db`, which may be one without edges. A read that starts after a commit sees it."""

    def __init__(self, file: Path, *, with_edges: bool = True) -> None:
        self._with_edges = with_edges
        self._connection = connect(file)
        self._connection.execute("PRAGMA query_only = ON")
        self._snapshot = _Snapshot(self._connection)

    def close(self) -> None:
        """Close the file. No read may be under way."""
        self._connection.close()

    def get(
        self, tenant: str, entity_id: str, as_of_ms: int | None = None, valid_at_ms: int | None = None
    ) -> Document | None:
        """What is remembered of an entity; `None` if nothing is, or it was forgotten.

        `as_of_ms`: what was recorded by then; `valid_at_ms`: what held then (now, if not given). `version` is the log
        sequence of its last event (by `as_of_ms`).
        """
        found = self._connection.execute(_GET, (tenant, entity_id)).fetchall()
        if not found:
            return None
        (_, alive, exact_from, type, doc, text, version), *edges = found
        now = wall_ms()
        if as_of_ms is not None or valid_at_ms is not None or exact_from > now:
            return self._folded(tenant, entity_id, as_of_ms, now if valid_at_ms is None else valid_at_ms)
        if not alive:
            return None
        attributes, spaces = wire.decode(doc)
        return Document(
            entity_id=entity_id,
            type=type,
            attributes=attributes,
            edges=_seen(edges) if self._with_edges else None,
            spaces=spaces,
            text=text,
            version=version,
        )

    def edges_of(self, tenant: str, entity_id: str) -> list[Edge]:
        """The edges that start from an entity and hold now, by relation and target."""
        document = self.get(tenant, entity_id)
        return [] if document is None else document.edges or []

    def _folded(self, tenant: str, entity_id: str, as_of_ms: int | None, valid_at_ms: int) -> Document | None:
        """What the history of an entity comes to."""
        with self._snapshot:
            id, *_, version = self._connection.execute(_GET, (tenant, entity_id)).fetchone()
            changes = history(self._connection, id)
        if as_of_ms is not None:
            changes = [change for change in changes if change.recorded_at <= as_of_ms]
            version = max((change.sequence for change in changes), default=0)
        return merge.fold(changes, valid_at_ms=valid_at_ms).document(entity_id, version)

    def stands_at(self) -> int:
        """Up to where the file has the log: no read before this one saw anything later."""
        found: tuple[int] | None = self._connection.execute(_STANDS_AT).fetchone()
        return found[0] if found else 0

    def suspects(self, tenant: str, entity_id: str) -> list[Suspect]:
        """What lost to a write that did not know of it."""
        with self._snapshot:
            found = self._connection.execute(_GET, (tenant, entity_id)).fetchone()
            changes = history(self._connection, found[0]) if found else []
        return suspects(changes)

    def holds(self, tenant: str, entity_id: str) -> bool:
        """Whether this device was given all that its hub has of an entity, and is told what comes."""
        held: tuple[int] | None = self._connection.execute(_HOLDS, (tenant, entity_id)).fetchone()
        return held == (1,)

    def held_or_own(self, tenant: str, entity_id: str) -> tuple[bool, int | None]:
        """What `holds` says; and of what this device does not hold, the sequence of the last event that it wrote."""
        found = self._connection.execute(_HELD_OR_OWN, (tenant, entity_id)).fetchone()
        return (False, None) if found is None else (found[0] == 1, found[1])

    def list_entities(
        self, tenant: str, after: str, limit: int, *, types: Sequence[str] = (), held: bool, with_sites: bool
    ) -> list[ListedEntity]:
        """Entities in the order of their ids: those remembered (of `types`, if any), or those noted as `held`."""
        which = "held_state IS NOT NULL" if held else "alive"
        chosen = f" AND type IN ({_places(types)})" if types else ""
        rows = self._connection.execute(_LIST.format(which=which, types=chosen), (tenant, after, *types, limit))
        listed = []
        for entity_id, type, version, size, raw, first, state in rows:
            ledger = _ledger_decoder.decode(raw)
            sites = ledger.sites if with_sites else []
            listed.append(ListedEntity(entity_id, type, version, size, sites, first, state, sorted(ledger.types)))
        return listed

    def describe(self, tenant: str, entity_ids: Sequence[str]) -> list[Description]:
        """The types of these entities and who wrote them, in their order."""
        found: dict[str, Description] = {}
        for start in range(0, len(entity_ids), _IDS_A_STATEMENT):
            ids = entity_ids[start : start + _IDS_A_STATEMENT]
            rows = self._connection.execute(_DESCRIBE.format(ids=_places(ids)), (tenant, *ids))
            for entity_id, type, alive, raw, first in rows:
                ledger = _ledger_decoder.decode(raw)
                is_gone = not alive and ledger.tombstone is not None
                kind = ledger.gone if is_gone else type
                found[entity_id] = Description(kind, ledger.sites, is_gone, first, sorted(ledger.types))
        return [found.get(entity_id, Description()) for entity_id in entity_ids]

    def erased(self, tenant: str, entity_id: str, sequences: Sequence[int]) -> tuple[list[int], list[int], list[Left]]:
        """Of an entity: how many events the forgets at these log sequences erased, which of these are left, and what.

        Left is also what is put aside. Walks all of the entity's events.
        """
        named = {"tenant": tenant, "entity_id": entity_id, "first": sequences[0], "last": sequences[-1]}
        with self._snapshot:
            counted = dict(self._connection.execute(_ERASED.format(sequences=_places(sequences)), sequences).fetchall())
            left = self._connection.execute(_LEFT_OF_EACH, named).fetchall()
            here = {sequence for (sequence,) in self._connection.execute(_HAS, named)}
        has = [sequence for sequence in sequences if sequence in here]
        return [counted.get(sequence, 0) for sequence in sequences], has, [Left(*row) for row in left]

    def forgotten(self, sequences: Sequence[int]) -> list[int]:
        """Those of the log's sequences that are of forgets, or of what came after the forget that wins over it."""
        found: list[int] = []
        for start in range(0, len(sequences), _IDS_A_STATEMENT):
            some = sequences[start : start + _IDS_A_STATEMENT]
            rows = self._connection.execute(_FORGOTTEN.format(sequences=_places(some)), some)
            found += [sequence for (sequence,) in rows]
        return found

    def timeline(self, tenant: str, entity_id: str, after: int = 0, limit: int = 100) -> list[TimelineEvent]:
        """The entity's events after sequence `after`, in log order. A forget has erased those before it."""
        return _events(self._connection.execute(_TIMELINE, (tenant, entity_id, after, limit)))

    def timeline_range(
        self,
        tenant: str,
        start_ms: int | None = None,
        end_ms: int | None = None,
        type: str | None = None,
        after: int = 0,
        limit: int = 100,
    ) -> list[TimelineEvent]:
        """All entities' events whose valid time starts in [`start_ms`, `end_ms`), after sequence `after`, in log order.

        With a bound the index on (tenant, valid_from) chooses the page, at a cost that grows with the events in the
        range; without one the log order is walked, at the cost of the page. `type` is the entity's type now.
        """
        bounded = start_ms is not None or end_ms is not None
        chosen = _RANGE.format(
            index="INDEXED BY event_by_validity" if bounded else "NOT INDEXED",
            bounds=_BOUNDS if bounded else "",
            type="" if type is None else _TYPE,
        )
        values = {
            "tenant": tenant,
            "after": after,
            "start": -merge.NEVER if start_ms is None else start_ms,
            "end": merge.NEVER if end_ms is None else end_ms,
            "type": type,
            "limit": limit,
        }
        return _events(self._connection.execute(_EVENT + chosen, values))

    def expand(
        self,
        tenant: str,
        entity_ids: Sequence[str],
        relations: Sequence[str] = (),
        direction: Direction = "out",
        limit: int = 100_000,
    ) -> tuple[list[tuple[str, str, str]], bool]:
        """The edges one hop from `entity_ids` along `relations` (all if empty), sorted, without repeats.

        Each is (from, relation, to) in the direction walked: `from` is one of `entity_ids`. The flag tells whether
        there were more than `limit`.
        """
        found: list[tuple[str, str, str]] = []
        wanted = sorted(set(entity_ids))
        with self._snapshot:
            for start in range(0, len(wanted), _IDS_A_STATEMENT):
                ids = wanted[start : start + _IDS_A_STATEMENT]
                for edge in self._one_hop(tenant, ids, relations, direction):
                    if found and edge == found[-1]:
                        continue
                    if len(found) == limit:
                        return found, True
                    found.append(edge)
        return found, False

    def search_text(self, tenant: str, query: str, k: int, type: str | None = None) -> list[Hit]:
        """The `k` entities whose last text answers best, by BM25, to any of the words of `query`; best first.

        Any text is a query; one without words finds nothing. Validity is not looked at.
        """
        words = dict.fromkeys(_WORD.findall(query.encode(errors="replace").decode()))
        if not words:
            return []
        expression = " OR ".join(f'"{word}"' for word in words)
        values = [expression, tenant, k] if type is None else [expression, tenant, type, k]
        rows = self._connection.execute(_SEARCH.format(type="" if type is None else " AND type = ?"), values)
        return [Hit(entity_id=entity_id, score=score) for entity_id, score in rows]

    def held(self) -> tuple[int, int]:
        """How many entities are held for this device, and the bytes that its hub sent of them."""
        with self._snapshot:
            counted: tuple[int, int] = self._connection.execute(
                "SELECT count(*), ifnull(sum(held), 0) FROM entity WHERE held_state = 'whole'"
            ).fetchone()
        return counted

    def counts(self) -> tuple[int, int]:
        """How many entities and edges are remembered. Walks an index of the ones, and all of the others."""
        with self._snapshot:
            (entities,) = self._connection.execute("SELECT count(*) FROM entity WHERE alive").fetchone()
            (edges,) = self._connection.execute("SELECT count(*) FROM edge WHERE NOT removed").fetchone()
        return entities, edges

    def _one_hop(
        self, tenant: str, ids: Sequence[str], relations: Sequence[str], direction: Direction
    ) -> Iterator[tuple[str, str, str]]:
        """The edges that touch `ids`, sorted; a self-loop comes twice where both directions are walked."""
        outward = self._walk(_OUT, tenant, ids, relations)
        inward = self._walk(_IN, tenant, ids, relations)
        match direction:
            case "out":
                return outward
            case "in":
                return inward
            case "both":
                return heapq.merge(outward, inward)

    def _walk(
        self, query: str, tenant: str, ids: Sequence[str], relations: Sequence[str]
    ) -> Iterator[tuple[str, str, str]]:
        now = wall_ms()
        chosen = f" AND relation IN ({_places(relations)})" if relations else ""
        rows = self._connection.execute(
            query.format(ids=_places(ids), relations=chosen), (now, tenant, *ids, now, *relations)
        )
        states: dict[int, State] = {}
        for near, relation, far, source, inexact in rows:
            if inexact:
                if source not in states:
                    states[source] = merge.fold(history(self._connection, source), valid_at_ms=now)
                edge = states[source].edges.get((relation, far if query is _OUT else near))
                if edge is None or edge.removed:
                    continue
            yield near, relation, far


class _Snapshot:
    """A read transaction: the statements within see one commit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN")

    def __exit__(self, *_: object) -> None:
        self._connection.execute("COMMIT")


def _seen(rows: Iterable[tuple[Any, ...]]) -> list[Edge]:
    """Edges as readers see them, by relation and target."""
    return [edge_view(relation, to, raw and wire.decode(raw)) for relation, to, raw, *_ in sorted(rows)]


def _places(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def _events(rows: Iterable[tuple[Any, ...]]) -> list[TimelineEvent]:
    return [
        TimelineEvent(
            sequence=sequence,
            event_id=event_id,
            entity_id=entity_id,
            op=op,
            agent=agent,
            recorded_at=from_ms(recorded_at),
            valid_from=from_ms(valid_from),
            valid_to=None if valid_to is None else from_ms(valid_to),
            body=wire.decode(body),
        )
        for sequence, event_id, entity_id, op, agent, recorded_at, valid_from, valid_to, body in rows
    ]
