"""What the vector store remembers of one entity, and how an event changes it.

Last writer wins by the keys of `memory_shards.merge`. No history is kept here. So after a forget, a
concurrent write that a forgotten one had hidden by a later `valid_from` does not come back, as it does in the
store of attributes. Looks at `memory_shards.merge` and `mnemesh`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from memory_shards.merge import Change, Key, Mark
from mnemesh import wire
from mnemesh.wire import Vector

_Written: TypeAlias = tuple[Key, Any]
"""The key of the last write to a thing, and what it wrote. (Lists, once it comes back from the file.)"""


class VectorState:
    """One entity, and what a batch changed of it: `vectors` (`None` where removed), `changed` attributes."""

    __slots__ = (
        "_attributes",
        "_spaces",
        "_tombstone",
        "_type",
        "changed",
        "entity_id",
        "number",
        "stamps",
        "tenant",
        "vectors",
    )

    def __init__(self, number: int, tenant: str, entity_id: str, state: bytes | None = None) -> None:
        self.number, self.tenant, self.entity_id = number, tenant, entity_id
        self.vectors: dict[str, Vector | None] = {}
        self.changed: set[str] = set()
        self.stamps: dict[str, int]
        self._tombstone: Mark | None
        self._type: _Written | None
        self._attributes: dict[str, _Written]
        self._spaces: dict[str, _Written]
        self.stamps, self._tombstone, self._type, self._attributes, self._spaces = (
            wire.decode(state) if state else ({}, None, None, {}, {})
        )

    @property
    def type(self) -> str | None:
        return self._type[1] if self._type else None

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes that are there."""
        return {name: value for name, (_, value) in self._attributes.items() if value is not None}

    @property
    def spaces(self) -> list[str]:
        """The spaces in which it has a vector, sorted."""
        return sorted(name for name, (_, present) in self._spaces.items() if present)

    def encode(self) -> bytes:
        return wire.encode((self.stamps, self._tombstone, self._type, self._attributes, self._spaces))

    def merge(self, change: Change, vectors: dict[str, Vector]) -> None:
        """Take one event in; `vectors` are those of its vectors that fit their spaces."""
        if self._tombstone is not None and change.mark < tuple(self._tombstone):
            return
        if change.patch is None:
            self._forget(change.mark)
            return
        patch, key = change.patch, (change.valid_from, change.stamp, change.site)
        if patch.type is not None and _wins(key, self._type):
            self._type = key, patch.type
        for name, value in patch.attributes.items():
            if _wins(key, self._attributes.get(name)):
                self._attributes[name] = key, value
                self.changed.add(name)
        # An event that both removes and adds a vector adds it: the later wins among equal keys.
        for name in patch.remove_vectors:
            if _wins(key, self._spaces.get(name)):
                self._spaces[name], self.vectors[name] = (key, False), None
        for name, vector in vectors.items():
            if _wins(key, self._spaces.get(name)):
                self._spaces[name], self.vectors[name] = (key, True), vector

    def _forget(self, mark: Mark) -> None:
        """Erase all that was written before the mark; what another site wrote after it stays."""
        self._tombstone = mark
        if self._type and _mark(self._type) < mark:
            self._type = None
        for name in [name for name, written in self._attributes.items() if _mark(written) < mark]:
            del self._attributes[name]
            self.changed.add(name)
        for name in [name for name, written in self._spaces.items() if _mark(written) < mark]:
            del self._spaces[name]
            self.vectors[name] = None


def _wins(key: Key, held: _Written | None) -> bool:
    return held is None or key >= tuple(held[0])


def _mark(written: _Written) -> Mark:
    _, stamp, site = written[0]
    return stamp, site
