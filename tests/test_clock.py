"""The hybrid logical clock: its stamps grow whatever the machine's clock does."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from mnemesh.clock import COUNTER_BITS, HybridClock, from_ms, stamp_ms, to_ms, wall_ms

MOMENTS = st.integers(0, 2**47)


class Wall:
    """A machine's clock that shows what the test says."""

    def __init__(self) -> None:
        self.ms = 0

    def __call__(self) -> int:
        return self.ms


@given(st.lists(st.tuples(st.sampled_from(["now", "observe"]), MOMENTS)))
def test_stamps_always_grow_and_never_fall_behind_what_was_observed(steps: list[tuple[str, int]]) -> None:
    wall, newest = Wall(), -1
    clock = HybridClock(wall)
    for step, moment in steps:
        if step == "observe":
            clock.observe(moment << COUNTER_BITS)
            newest = max(newest, moment << COUNTER_BITS)
        else:
            wall.ms = moment
            stamp = clock.now()
            assert stamp > newest
            assert stamp_ms(stamp) >= moment
            newest = stamp


@given(st.lists(MOMENTS, min_size=1))
def test_without_strangers_a_stamp_is_the_latest_time_shown(moments: list[int]) -> None:
    wall = Wall()
    clock = HybridClock(wall)
    for index, moment in enumerate(moments):
        wall.ms = moment
        assert stamp_ms(clock.now()) == max(moments[: index + 1])


def test_a_machine_that_boots_in_1970_writes_after_what_it_knows() -> None:
    clock = HybridClock(lambda: 0)
    known = to_ms(datetime(2026, 1, 1, tzinfo=UTC)) << COUNTER_BITS
    clock.observe(known)
    stamps = [clock.now() for _ in range(100_000)]
    assert stamps == list(range(known + 1, known + 100_001))


def test_two_clocks_that_hear_of_each_other_order_cause_before_effect() -> None:
    ahead, behind = HybridClock(lambda: 2000), HybridClock(lambda: 1000)
    cause = ahead.now()
    behind.observe(cause)
    assert behind.now() > cause


def test_the_default_is_the_machines_clock() -> None:
    before = wall_ms()
    assert before <= stamp_ms(HybridClock().now()) <= wall_ms()


@given(st.integers(0, 253_402_300_799_000))
def test_milliseconds_and_times_are_the_same_to_the_millisecond(milliseconds: int) -> None:
    assert to_ms(from_ms(milliseconds)) == milliseconds
    assert from_ms(milliseconds).tzinfo is UTC
