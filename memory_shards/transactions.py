"""How the records of a log are cut into transactions of a store: in order, and an atomic write never in two.

Looks at `mnemesh` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mnemesh.event import Record


def transactions(records: Sequence[Record], watermark: int, most: int) -> Iterator[tuple[Sequence[Record], int]]:
    """Runs of at most so many records, each with where the store stands after it: at `watermark` after the last.

    A write of more is a run of its own. There is always one run, for the watermark.
    """
    start = 0
    while len(records) - start > most:
        end = _cut(records, start, start + most)
        if end == len(records):
            break
        yield records[start:end], records[end - 1].sequence
        start = end
    yield records[start:], watermark


def _cut(records: Sequence[Record], start: int, end: int) -> int:
    """The end of a run from `start` on: where a write goes on beyond `end`, that is before it, or after all of it."""
    write = records[end].write
    if not write or records[end - 1].write != write:
        return end
    begin = end - 1
    while begin > start and records[begin - 1].write == write:
        begin -= 1
    if begin > start:
        return begin
    while end < len(records) and records[end].write == write:
        end += 1
    return end
