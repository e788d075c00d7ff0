"""The actor: what happens to a request between the subscription and the reply, whatever the handler does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
import pytest
from conftest import SITE, OpenAsker, OpenLink, Raw
from desk import Desk, Held, SmallDesk, acknowledge, set_context, written

from mnemesh import subjects
from mnemesh.actor import Actor, handles
from mnemesh.asker import Asker
from mnemesh.call import BUDGET, ERROR, ERROR_CODE, TRACE, Call, current
from mnemesh.connection import Link, Message
from mnemesh.errors import (
    BadRequest,
    Busy,
    Conflict,
    Denied,
    Internal,
    MnemeshError,
    NotFound,
    Timeout,
    TooLarge,
    Unavailable,
)
from mnemesh.guard import AllowAll
from mnemesh.host import hosted
from mnemesh.jetstream import stream_state
from mnemesh.messages import SearchEmbedding, SetContext, Written

Connect = Callable[[str], Awaitable[Raw]]

SUBJECT = subjects.set_context("acme", "alice")
LONG_S = 60.0


async def ask_raw(
    asker: Asker, payload: bytes, headers: dict[str, str] | None = None, budget_s: float = 10.0
) -> tuple[dict[str, Any], dict[str, str]]:
    """Body (of JSON) and headers of a reply, as a program without our SDK sees them."""
    message = await asker.inbox.request(SUBJECT, payload, budget_s=budget_s, headers=headers)
    return json.loads(message.data), dict(message.headers or {})


# ── serving ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_requests_on_one_endpoint_are_served_at_once(open_link: OpenLink, open_asker: OpenAsker) -> None:
    asker, meeting = await open_asker("acme.alice"), asyncio.Barrier(50)

    async def meet(request: SetContext, call: Call) -> Written:
        await meeting.wait()
        return written(request.entity_id)

    async with hosted(Desk(await open_link("gateway"), meet)):
        async with asyncio.timeout(10):
            replies = await asyncio.gather(*(set_context(asker, f"e{number}") for number in range(50)))
    assert [reply.entity_id for reply in replies] == [f"e{number}" for number in range(50)]


async def test_a_full_mailbox_answers_busy_at_once_and_says_when_to_come_back(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    asker, held = await open_asker("acme.alice"), Held()
    desk = SmallDesk(await open_link("gateway"), held)
    async with hosted(desk), asyncio.TaskGroup() as tasks:
        served = [tasks.create_task(set_context(asker, "working"))]
        await held.begun.acquire()
        served += [tasks.create_task(set_context(asker, "waiting")) for _ in range(2)]
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            for _ in range(20):
                with pytest.raises(Busy) as refusal:
                    await set_context(asker, budget_s=LONG_S)
                assert refusal.value.retry_after_ms == 50
        stats = desk.stats["set_context"]
        assert (stats.in_flight, stats.waiting, stats.codes["busy"]) == (1, 2, 20)
        held.release.set()
        assert [(await request).entity_id for request in served] == ["working", "waiting", "waiting"]
        assert (stats.in_flight, stats.waiting) == (0, 0)


async def test_json_is_answered_in_json(open_link: OpenLink, open_asker: OpenAsker) -> None:
    asker = await open_asker("acme.alice")
    async with hosted(Desk(await open_link("gateway"))):
        body, headers = await ask_raw(asker, b'{"entity_id": "Z\xc3\xbcrich"}')
        assert body == {"entity_id": "Zürich", "version": 1, "token": {}}
        assert ERROR_CODE not in headers
        message = await asker.inbox.request(SUBJECT, b"\x81\xa9entity_id\xa1x", budget_s=10)
        assert message.data[:1] != b"{"


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (b'{"entity_id": "x", "atributes": {}}', "atributes"),
        (b'{"entity_id": 7}', "entity_id"),
        (b"{", "not valid JSON"),
        (b"\xc1", "not valid MessagePack"),
        (b'{"entity_id": "\\ud800"}', "not valid JSON"),
        (b'{"\\ud800": 1}', "not valid JSON"),
        (b"[]", "not valid MessagePack"),
    ],
)
async def test_a_malformed_request_is_told_what_is_wrong_with_it(
    open_link: OpenLink, open_asker: OpenAsker, payload: bytes, complaint: str
) -> None:
    asker = await open_asker("acme.alice")
    async with hosted(Desk(await open_link("gateway"))):
        message = await asker.inbox.request(SUBJECT, payload, budget_s=10)
        assert message.headers is not None
        assert message.headers[ERROR_CODE] == "bad_request"
        assert complaint.encode() in message.data


# ── handlers that fail ──────────────────────────────────────────────────────────────────────────────────────────


def awaits_what_was_cancelled() -> Awaitable[Any]:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.cancel()
    return future


@pytest.mark.parametrize(
    "failure", [RuntimeError("the secret"), KeyError("the secret"), asyncio.CancelledError("the secret")]
)
async def test_a_bug_in_a_handler_is_internal_and_its_text_stays_in_the_log(
    open_link: OpenLink, open_asker: OpenAsker, failure: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    asker = await open_asker("acme.alice")

    async def fail(request: SetContext, call: Call) -> Written:
        raise failure

    async with hosted(Desk(await open_link("gateway"), fail)):
        body, headers = await ask_raw(asker, b'{"entity_id": "x"}')
        assert (body["code"], headers[ERROR_CODE]) == ("internal", "internal")
        assert "secret" not in f"{body}{headers}"
        assert type(failure).__name__ not in f"{body}{headers}"
        assert "the secret" in caplog.text


async def test_no_failure_of_a_handler_ends_the_subscription_or_strands_those_who_wait(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    """A stray CancelledError used to end the task that would have served the requests behind it in the mailbox."""
    asker, held = await open_asker("acme.alice"), Held()

    async def fail(request: SetContext, call: Call) -> Any:
        await held(request, call)
        if request.entity_id == "cancelled":
            return await awaits_what_was_cancelled()
        raise ValueError(request.entity_id)

    desk = SmallDesk(await open_link("gateway"), fail)
    async with hosted(desk):
        first = asyncio.ensure_future(set_context(asker, "cancelled"))
        await held.begun.acquire()
        waiting = [asyncio.ensure_future(set_context(asker, name)) for name in ("broken", "cancelled")]
        held.release.set()
        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(first, *waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Internal] * 3
        desk.work = acknowledge
        assert (await set_context(asker, "fine")).entity_id == "fine"


@pytest.mark.parametrize(
    "error",
    [NotFound("no bus"), Conflict("changed"), Unavailable("later", retry_after_ms=7), Denied("\ud800 ö\r\nX: y")],
)
async def test_an_error_of_the_mesh_reaches_the_caller_as_the_same_type(
    open_link: OpenLink, open_asker: OpenAsker, error: MnemeshError
) -> None:
    asker = await open_asker("acme.alice")

    async def fail(request: SetContext, call: Call) -> Written:
        raise error

    async with hosted(Desk(await open_link("gateway"), fail)):
        with pytest.raises(type(error)) as failure:
            await set_context(asker)
        assert failure.value.message == error.message.encode(errors="replace").decode()
        assert failure.value.retry_after_ms == error.retry_after_ms
        _, headers = await ask_raw(asker, b'{"entity_id": "x"}')
        assert headers[ERROR_CODE] == error.code
        assert "X" not in headers
        assert headers[ERROR]


async def test_a_reply_that_is_too_large_is_told_so_and_the_actor_serves_on(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    asker = await open_asker("acme.alice")

    async def bloat(request: SetContext, call: Call) -> Written:
        return written("x" * 9_000_000)

    async def complain(request: SetContext, call: Call) -> Written:
        raise BadRequest("x" * 9_000_000)

    desk = Desk(await open_link("gateway"), bloat)
    async with hosted(desk):
        with pytest.raises(TooLarge, match="at most"):
            await set_context(asker)
        desk.work = complain
        with pytest.raises(BadRequest, match="xxx"):
            await set_context(asker)
        desk.work = acknowledge
        await set_context(asker)
        assert desk.link.reconnects == 0


async def test_a_request_over_its_operations_limit_is_refused_also_when_the_sdk_did_not(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    asker = await open_asker("acme.alice")
    async with hosted(Desk(await open_link("gateway"))):
        _, headers = await ask_raw(asker, b"{" + b" " * subjects.SET_CONTEXT.max_bytes)
        assert headers[ERROR_CODE] == "too_large"


# ── budgets and context ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_spent_budget_is_a_timeout_before_the_handler_runs(open_link: OpenLink, open_asker: OpenAsker) -> None:
    asker, calls = await open_asker("acme.alice"), Counter[str]()

    async def count(request: SetContext, call: Call) -> Written:
        calls["run"] += 1
        return written(request.entity_id)

    async with hosted(Desk(await open_link("gateway"), count)):
        body, _ = await ask_raw(asker, b'{"entity_id": "x"}', {BUDGET: "0"})
        assert body["code"] == "timeout"
        assert not calls


async def test_a_budget_that_runs_out_in_the_mailbox_or_in_the_handler_is_a_timeout(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    asker, held = await open_asker("acme.alice"), Held()
    async with hosted(SmallDesk(await open_link("gateway"), held)):
        first = asyncio.ensure_future(ask_raw(asker, b'{"entity_id": "x"}', {BUDGET: "100"}))
        await held.begun.acquire()
        second = asyncio.ensure_future(ask_raw(asker, b'{"entity_id": "x"}', {BUDGET: "50"}))
        assert "did not finish" in (await first)[0]["message"]
        assert "before" in (await second)[0]["message"]
        assert held.begun.locked()


@pytest.mark.parametrize("budget", ["soon", "-1", "nan", "inf", "1e99", ""])
async def test_a_malformed_budget_is_a_bad_request(open_link: OpenLink, open_asker: OpenAsker, budget: str) -> None:
    asker = await open_asker("acme.alice")
    async with hosted(Desk(await open_link("gateway"))):
        body, _ = await ask_raw(asker, b'{"entity_id": "x"}', {BUDGET: budget})
        assert (body["code"], BUDGET in body["message"]) == ("bad_request", True)


async def until(deadline: float) -> None:
    """Use up budget."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(deadline):
            await asyncio.Event().wait()


async def test_budget_and_trace_travel_down_the_chain_and_the_budget_shrinks(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    """The desk asks a shard while it works for alice: what arrives there is what is left of alice's budget."""
    asker, router = await open_asker("acme.alice"), await open_asker("router")
    shard, seen = await open_link("shard"), asyncio.Queue[Mapping[str, str]]()

    replies: list[asyncio.Future[None]] = []

    def answer(message: Message) -> None:
        seen.put_nowait(message.headers)
        reply = shard.publish(message.reply, b'{"hits": [], "watermark": {}}')
        replies.append(asyncio.ensure_future(reply))

    async def relay(request: SetContext, call: Call) -> Written:
        assert current.get() is call
        assert (call.caller.tenant, call.caller.agent) == ("acme", "alice")
        await until(call.deadline - 1.4)
        search = SearchEmbedding(vector=[1.0])  # type: ignore[arg-type]  # as a program without NumPy would send it
        subject = subjects.shard_search("s0", "acme", "alice")
        await router.ask(subjects.SHARD_SEARCH, subject, search)
        await router.scatter(subjects.SHARD_SEARCH, [(subject, search)], budget_s=LONG_S)
        return written(request.entity_id)

    await shard.subscribe(subjects.shard_search("s0", "acme", "alice"), answer)
    await shard.flush()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with hosted(Desk(await open_link("gateway"), relay)):
        body, _ = await ask_raw(asker, b'{"entity_id": "x"}', {BUDGET: "1500", TRACE: trace})
        assert body["entity_id"] == "x"
        for headers in (seen.get_nowait(), seen.get_nowait()):
            assert 0 < int(headers[BUDGET]) <= 1400
            assert headers[TRACE] == trace
    assert current.get() is None


async def test_a_handler_cannot_ask_with_more_than_is_left(open_link: OpenLink, open_asker: OpenAsker) -> None:
    asker, router = await open_asker("acme.alice"), await open_asker("router")
    failures: list[MnemeshError] = []

    async def ask_too_late(request: SetContext, call: Call) -> Written:
        while call.remaining_s() > 0:  # blocks the loop, so that the runtime cannot end the handler first
            pass
        try:
            await router.ask(subjects.SHARD_SEARCH, subjects.shard_search("s0", "acme", "alice"), {}, budget_s=LONG_S)
        except MnemeshError as error:
            failures.append(error)
        return written(request.entity_id)

    async with hosted(Desk(await open_link("gateway"), ask_too_late)):
        with contextlib.suppress(Timeout):
            await ask_raw(asker, b'{"entity_id": "x"}', {BUDGET: "300"})
    assert [type(failure) for failure in failures] == [Timeout]


# ── identity ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("headers", [None, {BUDGET: "junk"}], ids=["served", "refused"])
async def test_a_reply_to_anywhere_but_the_callers_inbox_is_never_published(
    open_link: OpenLink, open_asker: OpenAsker, connect_as: Connect, headers: dict[str, str] | None
) -> None:
    """The gateway may publish on any reply subject once: the log, a bucket, another's inbox would all be open."""
    alice, gateway, bob = await open_asker("acme.alice"), await open_asker("gateway"), await connect_as("acme.bob")
    calls = Counter[str]()

    async def count(request: SetContext, call: Call) -> Written:
        calls[request.entity_id] += 1
        return written(request.entity_id)

    targets = [
        f"{subjects.agent_inbox('acme', 'bob')}.abc",
        f"{subjects.agent_inbox('acme', 'alice')}x.abc",
        subjects.agent_inbox("acme", "alice"),
        subjects.log_event(SITE, "acme", 0, "forged"),
        f"$KV.{subjects.SPACES.name}.acme.forged",
    ]
    overheard = await bob.client.subscribe(targets[0])
    await bob.settle()
    streams = (subjects.log_stream(SITE), f"KV_{subjects.SPACES.name}")
    before = [await stream_state(gateway.inbox, stream) for stream in streams]
    desk = Desk(await open_link("gateway"), count)
    async with hosted(desk):
        for target in targets:
            await alice.link.publish(SUBJECT, b'{"entity_id": "forged"}', reply=target, headers=headers)
        await set_context(alice, "honest")
        assert calls == {"honest": 1}
        assert desk.stats["set_context"].codes["denied"] == len(targets)
    await bob.settle()
    assert overheard.pending_msgs == 0
    assert [await stream_state(gateway.inbox, stream) for stream in streams] == before


async def test_a_guard_that_refuses_is_denied_before_the_handler_runs(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    class NoBob(AllowAll):
        def check(self, call: Call, request: msgspec.Struct) -> None:
            if call.caller.agent == "bob":
                raise Denied("not bob")

    calls = Counter[str]()

    async def count(request: SetContext, call: Call) -> Written:
        calls[call.caller.agent] += 1
        return written(request.entity_id)

    async with hosted(Desk(await open_link("gateway"), count, guard=NoBob())):
        await set_context(await open_asker("acme.alice"))
        with pytest.raises(Denied, match="not bob"):
            await set_context(await open_asker("acme.bob"))
    assert calls == {"alice": 1}


async def test_no_request_is_taken_before_the_guard_can_decide(open_link: OpenLink, open_asker: OpenAsker) -> None:
    asker, followed, decided = await open_asker("acme.alice"), asyncio.Event(), asyncio.Event()

    class Slow(AllowAll):
        async def follow(self, link: Link, inbox: Any) -> None:
            followed.set()

        async def ready(self) -> None:
            await decided.wait()

    desk = Desk(await open_link("gateway"), guard=Slow())
    hosting = asyncio.ensure_future(contextlib.AsyncExitStack().enter_async_context(hosted(desk)))
    await followed.wait()
    with pytest.raises(Unavailable):
        await set_context(asker)
    decided.set()
    host = await hosting
    await set_context(asker)
    host.stop()
    await desk.link.closed.wait()


# ── what an actor serves ────────────────────────────────────────────────────────────────────────────────────────


class Lazy(Actor):
    """Does not serve all that its role owns."""

    role = "gateway"

    @handles(subjects.SET_CONTEXT)
    async def set_context(self, request: SetContext, call: Call) -> Written:
        return written(request.entity_id)


class Greedy(Desk):
    """Serves what is the router's."""

    @handles(subjects.TRAVERSE)
    async def traverse(self, request: Any, call: Call) -> Any: ...


@pytest.mark.parametrize(
    ("kind", "complaint"), [(Lazy, "must handle derive, forget, ingest"), (Greedy, "handles traverse")]
)
async def test_an_actor_serves_exactly_what_the_contract_says_it_owns(
    open_link: OpenLink, kind: type[Actor], complaint: str
) -> None:
    with pytest.raises(TypeError, match=complaint):
        async with hosted(kind(await open_link("gateway"))):
            pytest.fail("it started")


async def test_an_actor_that_may_not_listen_fails_when_it_starts(open_link: OpenLink) -> None:
    with pytest.raises(Denied, match="subscribe"):
        async with hosted(Desk(await open_link("shard"))):
            pytest.fail("it started")


# ── draining ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_requests_under_way_and_in_the_mailbox_are_finished_and_answered_on_drain(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    asker, held = await open_asker("acme.alice"), Held()
    async with hosted(SmallDesk(await open_link("gateway"), held)) as host:
        requests = [asyncio.ensure_future(set_context(asker, f"e{number}")) for number in range(3)]
        await held.begun.acquire()
        await asker.link.flush()
        host.stop()
        while True:  # until the desk listens no more
            try:
                await set_context(asker, "late")
            except Unavailable:
                break
            except Busy:
                continue
        for _ in range(20):
            await asker.link.flush()
        assert not host.actors[0].link.closed.is_set()
        held.release.set()
        assert [(await request).entity_id for request in requests] == ["e0", "e1", "e2"]


class Tally:
    """What many callers saw."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.answered: set[str] = set()
        self.failed: Counter[str] = Counter()
        self._enough = asyncio.Event()
        self._goal = 0

    async def taken_more(self, count: int) -> None:
        """Wait until so many more requests were taken."""
        self._goal = len(self.taken) + count
        self._enough.clear()
        async with asyncio.timeout(20):
            await self._enough.wait()

    async def work(self, request: SetContext, call: Call) -> Written:
        self.taken.add(request.entity_id)
        if len(self.taken) >= self._goal:
            self._enough.set()
        await asyncio.sleep(0)
        return written(request.entity_id)

    async def hammer(self, asker: Asker, name: str, over: asyncio.Event) -> None:
        number = 0
        while not over.is_set():
            number += 1
            entity_id = f"{name}-{number}"
            try:
                await set_context(asker, entity_id, budget_s=5)
            except MnemeshError as error:
                self.failed[error.code] += 1
                if isinstance(error, Unavailable):
                    return
            else:
                self.answered.add(entity_id)


async def test_a_drain_under_load_answers_all_that_it_took(open_link: OpenLink, open_asker: OpenAsker) -> None:
    askers = [await open_asker("acme.alice") for _ in range(4)]
    for attempt in range(8):
        tally, over = Tally(), asyncio.Event()
        desk = Desk(await open_link("gateway"), tally.work)
        async with asyncio.TaskGroup() as tasks, hosted(desk):
            for index in range(32):
                tasks.create_task(tally.hammer(askers[index % 4], f"{attempt}-{index}", over))
            await tally.taken_more(500)
        assert tally.taken == tally.answered
        assert tally.failed == {"unavailable": 32}


async def test_callers_do_not_notice_that_one_of_two_replicas_drains(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    askers = [await open_asker("acme.alice") for _ in range(4)]
    tally, over = Tally(), asyncio.Event()
    async with hosted(Desk(await open_link("gateway"), tally.work)), asyncio.TaskGroup() as tasks:
        for index in range(32):
            tasks.create_task(tally.hammer(askers[index % 4], str(index), over))
        for _ in range(5):
            other = Desk(await open_link("gateway"), tally.work)
            async with hosted(other):
                await tally.taken_more(500)
        over.set()
    assert tally.taken == tally.answered
    assert not tally.failed


async def test_a_drain_while_the_server_is_gone_still_finishes_its_work(
    own_mesh_server: Any, open_link: OpenLink, open_asker: OpenAsker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    asker, held = await open_asker("acme.alice", own_mesh_server), Held()
    finished = asyncio.Event()

    async def work(request: SetContext, call: Call) -> Written:
        reply = await held(request, call)
        finished.set()
        return reply

    async with asyncio.timeout(10), hosted(Desk(await open_link("gateway", own_mesh_server), work)) as host:
        request = asyncio.ensure_future(set_context(asker))
        await held.begun.acquire()
        await own_mesh_server.kill()
        with pytest.raises(Unavailable):
            await request
        host.stop()
        held.release.set()
    assert finished.is_set()
