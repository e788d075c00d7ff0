"""What the vector store remembers of one entity, and how an event changes it.

Last writer wins by the keys of `memory_shards.merge`. A write that lost is kept as long as a forget may bring it back:
where it carries the later stamp, and lost by its valid time alone. So this store comes to the same state as one that
folds the whole history. Looks at `memory_shards.merge` and `mnemesh`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from memory_shards.merge import Change, Key, Mark
from mnemesh import wire
from mnemesh.wire import Vector

Kept: TypeAlias = tuple[float, bytes]
"""A vector as the store keeps it: its length and its halves. (A list, once it comes back from the file.)"""

_Written: TypeAlias = tuple[Key, Any]
"""The key of a write to a thing, and what it wrote. (Lists, once it comes back from the file.)"""

_Thing: TypeAlias = list[_Written]
"""The writes to one thing that count, the winner first: each of the others has a later stamp than the one before it."""


class VectorState:
    """One entity, and what a batch changed of it: `vectors` (`None` where removed), `changed` attributes.

    Of a vector the thing written is whether it is there; one that is hidden is kept whole.
    """

    __slots__ = (
        "_attributes",
        "_spaces",
        "_tombstone",
        "_type",
        "births",
        "changed",
        "entity_id",
        "number",
        "stamps",
        "tenant",
        "vectors",
    )

    def __init__(self, number: int, tenant: str, entity_id: str, state: bytes | None = None) -> None:
        self.number, self.tenant, self.entity_id = number, tenant, entity_id
        self.vectors: dict[str, Vector | Kept | None] = {}
        self.changed: set[str] = set()
        self.stamps: dict[str, int]
        self.births: dict[str, int]
        self._tombstone: Mark | None
        self._type: _Thing
        self._attributes: dict[str, _Thing]
        self._spaces: dict[str, _Thing]
        self.stamps, self.births, self._tombstone, self._type, self._attributes, self._spaces = (
            wire.decode(state) if state else ({}, {}, None, [], {}, {})
        )

    @property
    def type(self) -> str | None:
        return self._type[0][1] if self._type else None

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes that are there."""
        return {name: thing[0][1] for name, thing in self._attributes.items() if thing[0][1] is not None}

    @property
    def spaces(self) -> list[str]:
        """The spaces in which it has a vector, sorted."""
        return sorted([name for name, thing in self._spaces.items() if thing[0][1]])

    def was_in(self, space: str) -> bool:
        """Whether it has, or had, a vector in a space; not after a forget."""
        return space in self._spaces

    def encode(self) -> bytes:
        return wire.encode((self.stamps, self.births, self._tombstone, self._type, self._attributes, self._spaces))

    def merge(self, change: Change, vectors: dict[str, Vector], kept: Callable[[str], Kept]) -> None:
        """Take one event in; `vectors` are those of its vectors that fit their spaces.

        `kept` tells how the store keeps the entity's vector of a space.
        """
        if self._tombstone is not None and change.mark < tuple(self._tombstone):
            return
        if change.patch is None:
            self._forget(change.mark)
            return
        patch, key = change.patch, change.key
        if patch.type is not None:
            _put(self._type, key, patch.type)
        for name, value in patch.attributes.items():
            if _put(self._attributes.setdefault(name, []), key, value):
                self.changed.add(name)
        # An event that both removes and adds a vector adds it: the later wins among equal keys.
        for name in patch.remove_vectors:
            self._put_vector(name, key, None, kept)
        for name, vector in vectors.items():
            self._put_vector(name, key, vector, kept)

    def _put_vector(self, name: str, key: Key, vector: Vector | None, kept: Callable[[str], Kept]) -> None:
        thing = self._spaces.setdefault(name, [])
        before = thing[0] if thing else None
        if not _put(thing, key, vector):
            return
        for place, written in enumerate(thing):
            if written is before:  # it lost by its valid time alone: a forget may bring it back
                held = self.vectors[name] if name in self.vectors else kept(name) if before[1] else None
                thing[place] = before[0], held
        thing[0] = key, vector is not None
        self.vectors[name] = vector

    def release(self, site: str) -> None:
        """Drop all of it, unless this site wrote some of it itself. What has no stamps any more is dropped."""
        if site in self.stamps:
            return
        self.vectors |= dict.fromkeys(self.spaces)
        self.changed.update(self._attributes)
        self.stamps, self.births, self._tombstone, self._type, self._attributes, self._spaces = {}, {}, None, [], {}, {}

    def _forget(self, mark: Mark) -> None:
        """Erase all that was written before the mark, and bring up what it had hidden; what came after stays."""
        self._tombstone = mark
        self._type = _spared(self._type, mark)
        for name, thing in list(self._attributes.items()):
            rest = _spared(thing, mark)
            if not rest or rest[0] is not thing[0]:
                self.changed.add(name)
            _keep(self._attributes, name, rest)
        for name, thing in list(self._spaces.items()):
            rest = _spared(thing, mark)
            if not rest:
                self.vectors[name] = None
            elif rest[0] is not thing[0]:
                key, self.vectors[name] = rest[0]
                rest[0] = key, self.vectors[name] is not None
            _keep(self._spaces, name, rest)


class _Described(msgspec.Struct, array_like=True, gc=False):
    """A state of which all but the type and the attributes stays as it is."""

    stamps: msgspec.Raw
    births: msgspec.Raw
    tombstone: msgspec.Raw
    type: list[Any]
    attributes: dict[str, list[Any]]
    spaces: msgspec.Raw


_described = msgspec.msgpack.Decoder(_Described).decode


def description_of(state: bytes) -> tuple[str | None, dict[str, Any]]:
    """The type and the attributes that a state tells: what a start reads of each entity, in a third of the time."""
    told = _described(state)
    attributes = {name: thing[0][1] for name, thing in told.attributes.items() if thing[0][1] is not None}
    return told.type[0][1] if told.type else None, attributes


def _put(thing: _Thing, key: Key, value: Any) -> bool:
    """Add a write to a thing; whether it is now what the thing is. Writes that nothing can bring back are dropped."""
    if not thing or (key >= tuple(thing[0][0]) and key[1:] >= _mark(thing[-1])):
        thing[:] = [(key, value)]
        return True
    place = next((n for n, (held, _) in enumerate(thing) if key >= tuple(held)), len(thing))
    writes = [*thing[:place], (key, value), *thing[place:]]
    thing.clear()
    for written in writes:
        if not thing or _mark(written) > _mark(thing[-1]):
            thing.append(written)
    return place == 0


def _spared(thing: _Thing, mark: Mark) -> _Thing:
    return [written for written in thing if _mark(written) >= mark]


def _keep(things: dict[str, _Thing], name: str, thing: _Thing) -> None:
    if thing:
        things[name] = thing
    else:
        del things[name]


def _mark(written: _Written) -> Mark:
    _, stamp, site = written[0]
    return stamp, site
