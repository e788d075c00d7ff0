"""What waits for a device goes in batches that its log takes, all of it and in order."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from hypothesis import given, settings
from hypothesis import strategies as st

from mnemesh import subjects
from mnemesh.atomic_batch import MOST_IN_BATCH
from mnemesh.connection import Message
from mnemesh.event import Event
from mnemesh.jetstream import Stored
from mnemesh.messages import Carried, FeedBatch
from mnemesh.origin import place_of
from services.outbox import Outbox
from services.selection import Selection

PLENTY = 1 << 22
MOST_READ = 500


class Everything(Selection):
    """All may leave."""

    def __init__(self) -> None:
        pass

    def reduced(self, event: Event, origin: str, types: Collection[str]) -> Event:
        return event


def outbox() -> Outbox:
    begin = FeedBatch(turn=0, place=0)
    return Outbox(Everything(), device="sub7", own_log="x", incarnation="y", noted=[], begin=begin)


def send(out: Outbox, number: int) -> None:
    event = Event(id="", tenant="t", entity_id=f"e{number}", op="put", agent="a", site="hub", hlc=number)
    subject = subjects.log_event("hub", "t", "0", event.entity_id)
    out.send(Stored(number, 0, Message(subject, "", event.encode()), 0), place_of(subject), event, ())


def test_a_batch_and_all_the_marks_of_a_reading_fit_the_devices_log() -> None:
    out = outbox()
    for number in range(899):
        out.hold(("t", f"e{number}"), 1, "whole")
    out.reached(5000, "", {f"dev{number}": b"" for number in range(200)})
    first = out.batch(1, PLENTY, current=True)
    assert (len(first.items), len(first.marks), first.place, first.current) == (899, 0, 0, False)
    second = out.batch(2, PLENTY, current=True)
    assert (len(second.items), len(second.marks), second.place, second.current) == (0, 200, 5000, True)


def test_more_marks_than_one_batch_takes_are_news() -> None:
    out = outbox()
    out.reached(500, "", {f"dev{number}": b"" for number in range(500)})
    assert not out.has_news
    out.reached(1000, "", {f"dev{number}": b"" for number in range(500, 1000)})
    assert out.has_news
    assert (len(out.batch(1, PLENTY, current=True).marks), out.has_news) == (500, False)


READINGS = st.lists(st.tuples(st.integers(0, MOST_READ), st.integers(0, 1500), st.integers(0, MOST_READ)), max_size=9)
"""Of each: how many events, the number of the first device whose mark it has, and of how many it has marks."""


@settings(deadline=None)
@given(READINGS, st.sampled_from([1024, 8192, PLENTY]))
def test_whatever_was_read_comes_once_in_batches_that_fit_with_each_mark_no_later_than_its_place(
    readings: list[tuple[int, int, int]], most_bytes: int
) -> None:
    out = outbox()
    numbers = itertools.count()
    told: list[dict[str, int]] = []
    for place, (events, first, marks) in enumerate(readings, 1):
        for number in itertools.islice(numbers, events):
            send(out, number)
        told.append({f"dev{number}": place for number in range(first, first + marks)})
        out.reached(place, "", {device: str(place).encode() for device, place in told[-1].items()})
    came: list[int] = []
    marked: dict[str, int] = {}
    while out:
        batch = out.batch(out.last.turn + 1, most_bytes, current=True)
        assert len(batch.items) + len(batch.marks) < MOST_IN_BATCH
        came += [item.hub for item in batch.items if isinstance(item, Carried)]
        marked |= {device: int(mark) for device, mark in batch.marks.items()}
        assert all(marked[device] >= place for marks in told[: batch.place] for device, place in marks.items())
    assert (came, out.last.place) == ([*range(next(numbers))], len(readings))
