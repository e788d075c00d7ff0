"""Suspects: what lost to a concurrent write, kept for whoever asks.

Last writer wins, by clocks. Where the winner's site had not heard of the other write, nobody has decided between the
two, so the other is a suspect. Who had heard of what follows from the hub, through which all sites hear of each other:
an event has a place in the hub's log (`Change.hub`), and one that was born on a device says up to which place the
device had that log (`Change.saw`). Within a site the log's order tells.

A pure function over an entity's history. Looks at `merge` and `mnemesh`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from memory_shards.merge import Change
from mnemesh import wire
from mnemesh.clock import from_ms, stamp_ms
from mnemesh.messages import Suspect


class _Write(NamedTuple):
    """One write to one thing. Later ones of one event win over earlier ones (`turn`)."""

    change: Change
    turn: int
    value: Any

    @property
    def key(self) -> tuple[int, int, str, int]:
        return self.change.valid_from, self.change.stamp, self.change.site, self.turn


def suspects(history: Iterable[Change]) -> list[Suspect]:
    """The writes to each part of an entity that lost to writes that they had nothing to do with.

    In the order of the parts, and of one part those first that came nearest to winning.
    """
    things: dict[tuple[str, str], list[_Write]] = defaultdict(list)
    for change in history:
        for turn, (thing, value) in enumerate(_writes(change)):
            things[thing].append(_Write(change, turn, value))
    return [
        Suspect(
            part=part,
            name=name,
            value=None if loser.value is _VECTOR else loser.value,
            site=loser.change.site,
            written_at=from_ms(stamp_ms(loser.change.stamp)),
        )
        for (part, name), writes in sorted(things.items())
        for loser in _losers(writes)
    ]


def _losers(writes: Iterable[_Write]) -> Iterator[_Write]:
    """Of the writes to one thing those that lost, though of all that win over them none knew of them or was known.

    So a write that was dated back on purpose is no loser, nor does it settle what it was dated back below.
    """
    winner, *rest = ordered = sorted(writes, key=lambda write: write.key, reverse=True)
    sites = {winner.change.site}
    for place, (change, *_) in enumerate(rest, 1):
        if change.site in sites:
            continue  # a write of its own site wins over it
        sites.add(change.site)
        is_settled = any(knew(above.change, change) or knew(change, above.change) for above in ordered[:place])
        if not is_settled and not _say_the_same(ordered[place], winner):
            yield ordered[place]


def knew(one: Change, other: Change) -> bool:
    """Whether the site of `one` had `other`, which is of another site, when it wrote `one`."""
    if other.hub is None:  # it has not been at the hub, so nobody else has heard of it
        return False
    seen = one.hub if one.saw is None else one.saw + 1
    return seen is not None and other.hub < seen


def _say_the_same(one: _Write, other: _Write) -> bool:
    """Whether two writes wrote the same. Of vectors the history keeps too little to say so."""
    return one.value is not _VECTOR and wire.plain(one.value) == wire.plain(other.value)


def _writes(change: Change) -> Iterator[tuple[tuple[str, str], Any]]:
    """What a put wrote: ((part, name), value), in the order in which it did; nothing for a forget."""
    patch = change.patch
    if patch is None:
        return
    if patch.type is not None:
        yield ("type", ""), patch.type
    if patch.text is not None:
        yield ("text", ""), patch.text or None
    for name, value in patch.attributes.items():
        yield ("attribute", name), value
    for gone in patch.remove_edges:
        yield ("edge", f"{gone.relation} {gone.target_id}"), None
    for edge in patch.edges:
        yield ("edge", f"{edge.relation} {edge.target_id}"), edge.properties
    for space in patch.remove_vectors:
        yield ("vector", space), None
    for space in patch.vectors:
        yield ("vector", space), _VECTOR


_VECTOR: Any = object()
"""What a write of a vector wrote."""
