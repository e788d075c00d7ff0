"""Where other sites' logs stand in this one, told by the marks among its messages.

A token may name a site whose events were carried here. `local` turns such a demand into a sequence of this log, which
any watermark can then wait for; `at` turns a watermark back into what it covers of an origin. Looks at `watermark`.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from memory_shards.watermark import Watermark
from mnemesh.origin import Mark

MOST_MARKS = 4096
"""Marks of one origin that are remembered. Only those that the slowest projection has still to reach are needed."""


class Origins:
    """The marks that the follower has seen. Where they `may_go_back`, a log was restored from an older copy."""

    def __init__(self, *, may_go_back: bool) -> None:
        self._may_go_back = may_go_back
        self._marks: dict[str, _Marks] = {}
        self._newcomer = asyncio.Event()

    def note(self, origin: str, place: int, mark: Mark) -> None:
        """Note the mark at `place` of this log. What is before the last one that was noted tells nothing new.

        A follower that begins anew comes by it again: also by what came of an earlier log of the origin.
        """
        marks = self._marks.get(origin)
        if marks is None:
            marks = self._marks[origin] = _Marks()
            self._newcomer.set()
            self._newcomer = asyncio.Event()
        elif place <= marks.places[-1]:
            return
        sequence = mark.sequence
        is_back = bool(marks.sequences) and sequence < marks.sequences[-1]
        if is_back and not self._may_go_back and mark.incarnation == marks.incarnation:
            sequence, is_back = marks.sequences[-1], False
        if mark.incarnation != marks.incarnation or is_back:  # the origin's log began anew, or was restored
            marks.incarnation = mark.incarnation
            marks.places.clear()
            marks.sequences.clear()
            marks.known.begin_anew()
        marks.places.append(place)
        marks.sequences.append(sequence)
        if len(marks.places) > MOST_MARKS:
            del marks.places[: MOST_MARKS // 2], marks.sequences[: MOST_MARKS // 2]
        marks.known.advance(sequence)

    async def local(self, origin: str, sequence: int) -> int:
        """The sequence of this log at which the origin's is here up to `sequence`. Waits until there is one."""
        while (marks := self._marks.get(origin)) is None:
            await self._newcomer.wait()
        await marks.known.reached(sequence)
        index = bisect_left(marks.sequences, sequence)
        return marks.places[index] if index < len(marks.places) else 0

    def at(self, place: int, origins: Iterable[str]) -> dict[str, int]:
        """How much of each origin's log is in this one up to `place`; nothing of those that are not in it."""
        covered = {}
        for origin in origins:
            marks = self._marks.get(origin)
            if marks is not None and (index := bisect_right(marks.places, place)):
                covered[origin] = marks.sequences[index - 1]
        return covered


class _Marks:
    """The marks of one origin, both lists growing."""

    def __init__(self) -> None:
        self.incarnation = ""
        self.places: list[int] = []
        self.sequences: list[int] = []
        self.known = Watermark()
