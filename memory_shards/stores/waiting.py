"""Puts that wait for a vector: what a store of vectors keeps of an entity that has none, and mostly never will.

Each put is checked and then appended, unread, to the entity's row. The first vector, a forget or `MOST_WAITING` bytes
of them merge them into the row's state, which is then what it would have been at once. Looks at `vector_state`,
`memory_shards.merge` and `mnemesh`.
"""

from __future__ import annotations

from memory_shards.merge import Patch, is_repeated, stamped
from memory_shards.stores.vector_state import Kept, VectorState
from mnemesh import wire
from mnemesh.event import Birth, Event, Record

MOST_WAITING = 4_096
"""Bytes of puts that one entity may have waiting (some 40 to 60 puts): what a row of SQLite holds in one page."""

_LENGTH_BYTES = 4


def waiting_put(record: Record, patch: Patch) -> bytes:
    """What of a put without vectors can matter to a vector that comes later, with its length before it."""
    event = record.event
    times = event.hlc, event.valid_from, event.valid_to
    kept = wire.encode((record.birth, event.site, *times, patch.type, patch.attributes, patch.remove_vectors))
    return len(kept).to_bytes(_LENGTH_BYTES, "little") + kept


def merge_waiting(entity: VectorState, waiting: bytes) -> None:
    """Take in the puts that waited, one after another in log order."""
    start = 0
    while start < len(waiting):
        end = start + _LENGTH_BYTES + int.from_bytes(waiting[start : start + _LENGTH_BYTES], "little")
        birth, site, hlc, valid_from, valid_to, kind, attributes, removed = wire.decode(
            waiting[start + _LENGTH_BYTES : end]
        )
        start = end
        event = Event(
            id="",
            tenant=entity.tenant,
            entity_id=entity.entity_id,
            op="put",
            agent="",
            site=site,
            hlc=hlc,
            valid_from=valid_from,
            valid_to=valid_to,
        )
        patch = Patch(type=kind, attributes=attributes, remove_vectors=removed)
        record = Record(0, 0, 0, event, Birth(*birth) if birth else None)
        if not is_repeated(record, entity.births, entity.stamps):
            entity.merge(stamped(record, patch, entity.stamps), {}, _no_vector)


def _no_vector(space: str) -> Kept:
    raise LookupError(f"an entity whose puts wait has a vector in {space!r}")
