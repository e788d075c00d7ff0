"""A breaker: when it opens, who may try then, and what closes it. On a loop where waiting takes no time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from memory_shards.breaker import ANSWER_S, FIRST_OPEN_S, LONGEST_OPEN_S, MOST_FAILURES, PATIENCE_S, Breaker
from mnemesh.errors import Unavailable


class _Hasty(selectors.DefaultSelector):
    """Where a loop has nothing to do but to wait, the wait is over at once."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(timeout if timeout is None else 0)
        if not ready and timeout is not None:
            self.waited += timeout
        return ready


class HastyLoop(asyncio.SelectorEventLoop):
    """Its clock goes on by what it would have waited: timers come in their order, and in no time."""

    def __init__(self) -> None:
        self._hasty = _Hasty()
        super().__init__(self._hasty)

    def time(self) -> float:
        return super().time() + self._hasty.waited


def hasty(scenario: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test of this coroutine on such a loop."""

    def test() -> None:
        with asyncio.Runner(loop_factory=HastyLoop) as runner:
            runner.run(scenario())

    return test


class Away(Exception):
    """What the driver of the store says where it is away."""


def breaker() -> Breaker:
    return Breaker("the store", (Away,))


async def answers() -> str:
    return "here"


async def fails() -> str:
    raise Away


async def hangs() -> str:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


async def refused(breaker: Breaker, work: Callable[[], Awaitable[str]] = answers) -> Unavailable:
    with pytest.raises(Unavailable) as raised:
        await breaker.call(work)
    return raised.value


async def opened() -> Breaker:
    made = breaker()
    for _ in range(MOST_FAILURES):
        await refused(made, fails)
    assert made.refuses
    return made


async def given_up(breaker: Breaker, after_s: float) -> None:
    """A caller who asks a store that hangs, and goes after so long."""
    asking = asyncio.ensure_future(breaker.call(hangs))
    await asyncio.sleep(after_s)
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()


async def until_it_may_be_tried(breaker: Breaker) -> float:
    """Wait as long as it says. How long that was."""
    waits_s = ((await refused(breaker)).retry_after_ms or 0) / 1000
    assert breaker.refuses
    await asyncio.sleep(waits_s + 0.001)  # it tells whole milliseconds
    assert breaker.is_open
    assert not breaker.refuses
    return waits_s


@hasty
async def test_it_opens_after_failures_in_a_row_and_refuses_without_asking() -> None:
    made = breaker()
    for _ in range(MOST_FAILURES - 1):
        await refused(made, fails)
    assert await made.call(answers) == "here"
    for _ in range(MOST_FAILURES - 1):
        await refused(made, fails)
    assert not made.is_open
    await refused(made, fails)
    assert (made.is_open, made.refuses, made.opened) == (True, True, 1)
    asked: list[str] = []

    async def notes() -> str:
        asked.append("asked")
        return "here"

    error = await refused(made, notes)
    assert (asked, error.retry_after_ms) == ([], round(FIRST_OPEN_S * 1000))


@hasty
async def test_a_store_that_does_not_answer_in_time_fails() -> None:
    made, loop = breaker(), asyncio.get_running_loop()
    for _ in range(MOST_FAILURES):
        began = loop.time()
        await refused(made, hangs)
        assert loop.time() - began == pytest.approx(ANSWER_S, abs=0.1)
    assert made.refuses


@hasty
async def test_what_is_no_outage_is_told_as_it_is_and_says_nothing_of_the_store() -> None:
    made = breaker()

    async def mistaken() -> str:
        raise ValueError("no such thing")

    for _ in range(MOST_FAILURES):
        with pytest.raises(ValueError, match="no such thing"):
            await made.call(mistaken)
    assert not made.is_open


@hasty
async def test_half_open_it_lets_one_try_and_is_closed_when_that_is_answered() -> None:
    made = await opened()
    await until_it_may_be_tried(made)
    may_answer = asyncio.Event()

    async def slow() -> str:
        await may_answer.wait()
        return "here"

    tries = [asyncio.ensure_future(made.call(slow)) for _ in range(5)]
    await asyncio.wait(tries, return_when=asyncio.FIRST_COMPLETED)
    await refused(made)
    first, *others = tries
    assert not first.done()
    may_answer.set()
    assert await first == "here"
    assert [type(error) for error in await asyncio.gather(*others, return_exceptions=True)] == 4 * [Unavailable]
    assert (made.is_open, made.refuses) == (False, False)
    assert await asyncio.gather(*(made.call(answers) for _ in range(5))) == 5 * ["here"]


@hasty
async def test_a_try_that_fails_opens_it_for_longer_up_to_a_limit_and_an_answer_begins_anew() -> None:
    made = await opened()
    waited = []
    for _ in range(6):
        waited.append(await until_it_may_be_tried(made))
        await refused(made, fails)
    assert waited == pytest.approx([FIRST_OPEN_S, 1.0, 2.0, 4.0, LONGEST_OPEN_S, LONGEST_OPEN_S], abs=0.01)
    await until_it_may_be_tried(made)
    await made.call(answers)
    for _ in range(MOST_FAILURES):
        await refused(made, fails)
    assert await until_it_may_be_tried(made) == pytest.approx(FIRST_OPEN_S, abs=0.01)
    assert made.opened == 2


@hasty
async def test_a_try_that_is_cancelled_soon_lets_the_next_try_at_once() -> None:
    made = await opened()
    await until_it_may_be_tried(made)
    await given_up(made, PATIENCE_S / 2)
    assert not made.refuses
    assert await made.call(answers) == "here"


@hasty
async def test_a_try_that_is_cancelled_late_has_failed_and_another_may_try_later() -> None:
    made = await opened()
    await until_it_may_be_tried(made)
    await given_up(made, PATIENCE_S * 2)
    assert await until_it_may_be_tried(made) == pytest.approx(2 * FIRST_OPEN_S, abs=0.01)
    assert await made.call(answers) == "here"


@hasty
async def test_callers_that_give_up_open_it_only_where_they_had_patience() -> None:
    made = breaker()
    for _ in range(2 * MOST_FAILURES):
        await given_up(made, PATIENCE_S / 2)
    assert not made.is_open
    for _ in range(MOST_FAILURES):
        await given_up(made, PATIENCE_S * 2)
    assert made.refuses


@hasty
async def test_what_was_under_way_when_it_opened_does_not_keep_it_open_for_longer() -> None:
    made, goes = breaker(), asyncio.Event()

    async def fails_with_the_others() -> str:
        await goes.wait()
        raise Away

    asking = [asyncio.ensure_future(refused(made, fails_with_the_others)) for _ in range(4 * MOST_FAILURES)]
    asyncio.get_running_loop().call_later(0.1, goes.set)
    await asyncio.gather(*asking)
    assert await until_it_may_be_tried(made) == pytest.approx(FIRST_OPEN_S, abs=0.01)
