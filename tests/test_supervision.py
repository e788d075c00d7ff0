"""Supervision and the host: work that fails is started again, until that does not help and the process ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import pytest
from conftest import OpenAsker, OpenLink
from desk import Desk, Held, set_context

from cli.server import NatsServer, free_port
from mnemesh import supervision
from mnemesh.connection import Link, LinkOptions
from mnemesh.errors import Unavailable
from mnemesh.host import Host, hosted, link_as
from mnemesh.supervision import Escalated, Supervisor


class Flaky:
    """Work that fails so many times, then runs for ever."""

    def __init__(self, failures: int, error: BaseException) -> None:
        self.runs = 0
        self.settled = asyncio.Event()
        self._failures = failures
        self._error = error

    async def __call__(self) -> None:
        self.runs += 1
        if self.runs <= self._failures:
            raise self._error
        self.settled.set()
        await asyncio.Event().wait()


def quick(work: Callable[[], Awaitable[None]], *, most: int = 8) -> Supervisor:
    return Supervisor("work", work, most=most, first_backoff_s=0.001, longest_backoff_s=0.002)


@pytest.mark.parametrize("error", [RuntimeError("once more"), asyncio.CancelledError()], ids=["error", "cancelled"])
async def test_work_that_fails_is_started_again(error: BaseException) -> None:
    """A CancelledError that leaked from something else must not end the work in silence."""
    work = Flaky(3, error)
    supervisor = quick(work)
    run = asyncio.ensure_future(supervisor.run())
    async with asyncio.timeout(5):
        await work.settled.wait()
    assert supervisor.restarts == 3
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert work.runs == 4


async def test_work_that_returns_is_done() -> None:
    async def once() -> None:
        return None

    await quick(once).run()


async def test_work_that_keeps_failing_escalates_with_its_last_error() -> None:
    work = Flaky(100, RuntimeError("hopeless"))
    with pytest.raises(Escalated, match="work failed 4 times") as end:
        await quick(work, most=3).run()
    assert str(end.value.__cause__) == "hopeless"
    assert work.runs == 4


async def test_the_pause_before_a_restart_doubles_up_to_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(supervision.asyncio, "sleep", note)
    with pytest.raises(Escalated):
        await Supervisor("work", Flaky(100, RuntimeError()), first_backoff_s=0.1, longest_backoff_s=0.8).run()
    ceilings = [0.1, 0.2, 0.4, 0.8, 0.8, 0.8, 0.8, 0.8]
    assert len(pauses) == len(ceilings)
    assert all(ceiling / 2 <= pause <= ceiling for pause, ceiling in zip(pauses, ceilings, strict=True))
    assert len(set(pauses)) == len(pauses)


async def test_failures_that_are_long_past_do_not_count() -> None:
    work = Flaky(20, RuntimeError())
    supervisor = Supervisor("work", work, most=3, window_s=0.0, first_backoff_s=0.001, longest_backoff_s=0.001)
    run = asyncio.ensure_future(supervisor.run())
    async with asyncio.timeout(5):
        await work.settled.wait()
    run.cancel()


# ── the host ────────────────────────────────────────────────────────────────────────────────────────────────────


class Worker(Desk):
    """A desk with background work."""

    def __init__(self, link: Link, work: Callable[[], Awaitable[None]]) -> None:
        super().__init__(link)
        self._background = work
        self.released = asyncio.Event()

    def background(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        return {"work": self._background}

    async def release(self) -> None:
        self.released.set()


async def test_background_work_that_fails_once_does_not_touch_the_requests(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    alice, work = await open_asker("acme.alice"), Flaky(1, RuntimeError("once"))
    worker = Worker(await open_link("gateway"), work)
    async with hosted(worker):
        async with asyncio.timeout(5):
            await work.settled.wait()
        await set_context(alice)
    assert worker.released.is_set()


async def test_an_escalation_ends_the_host_with_its_error(open_link: OpenLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision.random, "uniform", lambda low, high: 0.0)
    worker = Worker(await open_link("gateway"), Flaky(100, RuntimeError("hopeless")))
    async with asyncio.timeout(10):
        with pytest.raises(Escalated, match=r"gateway\.work"):
            await Host(worker).run()
    assert worker.released.is_set()
    assert worker.link.closed.is_set()


async def test_an_actor_that_cannot_be_prepared_ends_the_host_with_its_error(open_link: OpenLink) -> None:
    class Broken(Desk):
        async def prepare(self) -> None:
            raise FileNotFoundError("no store")

    with pytest.raises(FileNotFoundError, match="no store"):
        await Host(Broken(await open_link("gateway"))).run()


async def test_a_host_can_be_stopped_while_it_still_waits_to_be_ready(open_link: OpenLink) -> None:
    waiting = asyncio.Event()

    class Patient(Desk):
        async def ready(self) -> None:
            waiting.set()
            await asyncio.Event().wait()

    host = Host(Patient(await open_link("gateway")))
    run = asyncio.ensure_future(host.run())
    await waiting.wait()
    host.stop()
    async with asyncio.timeout(5):
        await run
    assert not host.ready.is_set()


async def test_whoever_gives_up_on_actors_that_start_leaves_none_behind(open_link: OpenLink) -> None:
    waiting = asyncio.Event()
    link = await open_link("gateway")

    class Patient(Desk):
        async def ready(self) -> None:
            waiting.set()
            await asyncio.Event().wait()

    async def serve() -> None:
        async with hosted(Patient(link)):
            pass

    before = asyncio.all_tasks()
    serving = asyncio.ensure_future(serve())
    await waiting.wait()
    serving.cancel()
    await asyncio.wait([serving])
    assert serving.cancelled()
    assert link.closed.is_set()
    assert asyncio.all_tasks() <= before


async def test_what_was_prepared_is_released_after_the_background_work_has_ended(open_link: OpenLink) -> None:
    order: list[str] = []

    class Ordered(Desk):
        def background(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
            return {"work": self._work}

        async def _work(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                order.append("work ended")

        async def prepare(self) -> None:
            order.append("prepared")

        async def release(self) -> None:
            order.append("released")

    async with hosted(Ordered(await open_link("gateway"))):
        pass
    assert order == ["prepared", "work ended", "released"]


async def test_a_connection_that_closes_for_good_ends_the_host(
    own_mesh_server: NatsServer, open_link: OpenLink, open_asker: OpenAsker
) -> None:
    """The user is removed while a request is under way: its work ends, what was prepared is released."""
    alice, held = await open_asker("acme.alice", own_mesh_server), Held()
    worker = Worker(await open_link("gateway", own_mesh_server), Flaky(0, RuntimeError()))
    worker.work = held
    host = Host(worker)
    run = asyncio.ensure_future(host.run())
    await host.ready.wait()
    request = asyncio.ensure_future(set_context(alice))
    await held.begun.acquire()
    own_mesh_server.credentials.remove("gateway")
    await own_mesh_server.reload()
    await worker.link.closed.wait()
    held.release.set()
    async with asyncio.timeout(10):
        with pytest.raises(Unavailable, match="closed for good"):
            await run
    assert worker.released.is_set()
    request.cancel()


async def test_opening_a_link_is_tried_for_as_long_as_was_asked() -> None:
    options = LinkOptions(url=f"nats://127.0.0.1:{free_port()}", connect_timeout_s=0.05)
    async with asyncio.timeout(5):
        with pytest.raises(Unavailable):
            await link_as(options, 0.1)
