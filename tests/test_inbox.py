"""Request and scatter: every way to fail is typed, fast and leaves nothing behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from conftest import OpenAsker, OpenLink
from desk import Desk, Held, acknowledge, set_context
from test_connection import fill, lost

from cli.server import NatsServer
from mnemesh import contract, subjects, wire
from mnemesh.asker import Asker
from mnemesh.connection import Link, Message
from mnemesh.errors import Denied, MnemeshError, Timeout, TooLarge, Unavailable
from mnemesh.host import hosted
from mnemesh.ids import partition_of, to_token
from mnemesh.inbox import Ask, Inbox
from mnemesh.messages import GetContext, Status

LONG_S = 60.0
"""A budget that no test may use up."""


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_nobody_listens_is_unavailable_at_once(open_asker: OpenAsker) -> None:
    asker = await open_asker("acme.alice")
    async with asyncio.timeout(2):
        with pytest.raises(Unavailable, match="nobody serves"):
            await set_context(asker, budget_s=LONG_S)
    assert len(asker.inbox) == 0


async def test_a_late_reply_is_a_timeout_and_harms_nobody_when_it_comes(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    asker, held = await open_asker("acme.alice"), Held()
    async with hosted(Desk(await open_link("gateway"), held)) as host:
        with pytest.raises(Timeout):
            await asker.inbox.request(subjects.set_context("acme", "alice"), b'{"entity_id": "late"}', budget_s=0.05)
        assert len(asker.inbox) == 0
        held.release.set()
        assert (await set_context(asker, "next")).entity_id == "next"
        assert host.actors[0].stats["set_context"].requests == 2


async def test_a_cancelled_request_leaves_nothing_behind(open_link: OpenLink, open_asker: OpenAsker) -> None:
    asker, held = await open_asker("acme.alice"), Held()
    async with hosted(Desk(await open_link("gateway"), held)):
        request = asyncio.ensure_future(set_context(asker))
        await held.begun.acquire()
        assert len(asker.inbox) == 1
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert len(asker.inbox) == 0
        held.release.set()


async def test_what_is_too_large_is_not_sent_and_leaves_nothing_behind(open_asker: OpenAsker) -> None:
    asker = await open_asker("acme.alice")
    subject = subjects.set_context("acme", "alice")
    with pytest.raises(TooLarge, match="takes at most"):
        await asker.inbox.request(subject, bytes(asker.link.max_payload + 1), budget_s=LONG_S)
    with pytest.raises(TooLarge, match="set_context takes"):
        await set_context(asker, text="x" * subjects.SET_CONTEXT.max_bytes)
    assert len(asker.inbox) == 0


FORBIDDEN = {
    "another agent's": subjects.set_context("acme", "bob"),
    "another tenant's": subjects.set_context("zeta", "carol"),
    "mapped by the broker": subjects.get_context("acme", "bob", to_token("bus:7")),
    "as the broker maps it": contract.fill(
        subjects.GET_CONTEXT.served,
        site="hub",
        partition=str(partition_of("acme", "e1")),
        tenant="acme",
        agent="bob",
        entity="e1",
    ),
    "in capitals": f"$JS.API.STREAM.DELETE.{subjects.log_stream('hub')}",
}


@pytest.mark.parametrize("subject", FORBIDDEN.values(), ids=FORBIDDEN)
async def test_a_publish_that_the_server_denies_is_denied_at_once(open_asker: OpenAsker, subject: str) -> None:
    asker = await open_asker("acme.alice")
    async with asyncio.timeout(2):
        with pytest.raises(Denied):
            await asker.inbox.request(subject, b"{}", budget_s=LONG_S)
    assert len(asker.inbox) == 0


async def test_a_denial_fails_no_other_request(open_link: OpenLink, open_asker: OpenAsker) -> None:
    asker, held = await open_asker("acme.alice"), Held()
    async with hosted(Desk(await open_link("gateway"), held)):
        mine = asyncio.ensure_future(set_context(asker))
        await held.begun.acquire()
        with pytest.raises(Denied):
            await asker.ask(subjects.GET_CONTEXT, subjects.get_context("acme", "bob", "e1"), GetContext())
        held.release.set()
        assert (await mine).entity_id == "e1"


async def test_an_inbox_that_is_not_the_users_own_is_denied_when_it_opens(mesh_server: NatsServer) -> None:
    options = mesh_server.credentials.load("acme.alice").link_options()
    link = await Link.open(replace(options, inbox_prefix=subjects.agent_inbox("acme", "bob")))
    with pytest.raises(Denied, match="subscribe"):
        await Inbox(link).open()
    await link.close()


async def test_requests_under_way_fail_when_the_connection_drops(
    own_mesh_server: NatsServer, open_link: OpenLink, open_asker: OpenAsker
) -> None:
    asker, held = await open_asker("acme.alice", own_mesh_server), Held()
    desk = Desk(await open_link("gateway", own_mesh_server), held)
    async with hosted(desk):
        requests = [asyncio.ensure_future(set_context(asker, f"e{n}", budget_s=LONG_S)) for n in range(10)]
        for _ in requests:
            await held.begun.acquire()
        await own_mesh_server.kill()
        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 10
        assert "dropped" in str(outcomes[0])
        assert len(asker.inbox) == 0
        held.release.set()


async def test_a_request_made_while_the_connection_is_down_is_answered_when_it_is_back_or_times_out(
    own_mesh_server: NatsServer, open_link: OpenLink, open_asker: OpenAsker
) -> None:
    asker = await open_asker("acme.alice", own_mesh_server)
    async with hosted(Desk(await open_link("gateway", own_mesh_server))):
        gone = asyncio.ensure_future(lost(asker.link))
        await asyncio.sleep(0)
        await own_mesh_server.kill()
        await gone
        with pytest.raises(Timeout):
            await set_context(asker, budget_s=0.05)
        patient = asyncio.ensure_future(answered(asker))
        await own_mesh_server.start()
        async with asyncio.timeout(20):
            await patient
    assert len(asker.inbox) == 0


async def answered(asker: Asker) -> None:
    """Ask as a client does: again when nobody serves yet."""
    while True:
        try:
            await set_context(asker, budget_s=LONG_S)
        except Unavailable:
            continue
        return


async def test_a_full_send_buffer_does_not_outlast_the_budget(
    own_mesh_server: NatsServer, open_asker: OpenAsker
) -> None:
    asker = await open_asker("acme.alice", own_mesh_server)
    own_mesh_server.pause()
    await fill(asker.link)
    async with asyncio.timeout(5):
        with pytest.raises(Timeout):
            await set_context(asker, budget_s=0.1)
    assert len(asker.inbox) == 0
    own_mesh_server.resume()
    await asker.link.flush(20)
    assert asker.link.reconnects == 0


# ── scatter ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_scatter_answers_in_order_and_a_shard_without_replica_at_once(
    open_link: OpenLink, open_asker: OpenAsker
) -> None:
    asker = await open_asker("operator")
    shard = await open_link("shard")

    async def reply(message: Message) -> None:
        name = message.subject.rpartition(".")[2]
        status = {"shard": name, "watermark": {}, "partitions": 0, "entities": 0, "edges": 0, "vectors": 0}
        await shard.publish(message.reply, wire.encode(status))

    replies: list[asyncio.Future[None]] = []

    for name in ("s0", "s2"):
        await shard.subscribe(
            subjects.shard_status(name), lambda message: replies.append(asyncio.ensure_future(reply(message)))
        )
    await shard.flush()
    request = Status()
    async with asyncio.timeout(2):
        outcomes = await asker.scatter(
            subjects.SHARD_STATUS, [(subjects.shard_status(f"s{n}"), request) for n in range(4)], budget_s=LONG_S
        )
    told = [outcome.code if isinstance(outcome, MnemeshError) else outcome.shard for outcome in outcomes]
    assert told == ["s0", "unavailable", "s2", "unavailable"]
    alone = await asker.inbox.scatter([Ask(subjects.shard_status("s3"), b"{}")], budget_s=LONG_S)
    assert isinstance(alone[0], Unavailable)
    assert len(asker.inbox) == 0


async def test_many_requests_at_once_get_each_their_own_reply(open_link: OpenLink, open_asker: OpenAsker) -> None:
    asker = await open_asker("acme.alice")
    async with hosted(Desk(await open_link("gateway"), acknowledge)):
        replies = await asyncio.gather(*(set_context(asker, f"e{number}") for number in range(2000)))
    assert [reply.entity_id for reply in replies] == [f"e{number}" for number in range(2000)]
