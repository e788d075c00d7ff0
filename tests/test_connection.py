"""The link: what nats-py leaves open stays closed, against a real server that is killed, frozen and reconfigured."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from conftest import OpenAsker, OpenLink
from desk import Desk, set_context

from cli.server import NatsServer, free_port
from mnemesh import connection, subjects
from mnemesh.connection import LONGEST_RECONNECT_S, Link, Message
from mnemesh.errors import BadRequest, Denied, TooLarge, Unavailable
from mnemesh.host import hosted

MEGABYTE = bytes(1024 * 1024)


async def lost(link: Link) -> None:
    """Wait until the link notices that its connection is gone."""
    noticed = asyncio.Event()
    link.on_lost(noticed.set)
    async with asyncio.timeout(10):
        await noticed.wait()


async def connected_again(link: Link) -> None:
    """Wait until the link has reconnected; a request that waits in the buffer for it is the event."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await link.flush()
            except Unavailable:
                await asyncio.sleep(0)


async def fill(link: Link) -> None:
    """Send until the socket, its buffer and nats-py's are full: only a frozen server lets that happen."""
    try:
        async with asyncio.timeout(0.5):
            while True:
                await link.publish(subjects.set_context("acme", "alice"), MEGABYTE)
    except TimeoutError:
        pass


# ── opening ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_wrong_password_is_denied_at_once(mesh_server: NatsServer) -> None:
    options = replace(mesh_server.credentials.load("gateway").link_options(), password="wrong", connect_timeout_s=60)
    async with asyncio.timeout(1.9):  # nats-py tries again after 2 s
        with pytest.raises(Denied, match="gateway"):
            await Link.open(options)


async def test_where_nobody_listens_the_link_is_unavailable_after_its_timeout(mesh_server: NatsServer) -> None:
    options = mesh_server.credentials.load("gateway").link_options()
    with pytest.raises(Unavailable, match="no NATS server answers"):
        await Link.open(replace(options, url=f"nats://127.0.0.1:{free_port()}", connect_timeout_s=0.2))


@pytest.mark.parametrize("wait", range(3), ids=("the socket opens", "the server greets", "the server lets it in"))
async def test_a_cancellation_in_the_moment_when_what_it_waits_for_has_come_is_not_lost(
    mesh_server: NatsServer, monkeypatch: pytest.MonkeyPatch, wait: int
) -> None:
    """So `mnemesh up` came up in spite of Ctrl-C: `asyncio.wait_for` of Python 3.11 returns then as if nothing was."""
    waits = 0
    real = asyncio.wait_for
    opening = asyncio.ensure_future(Link.open(mesh_server.credentials.load("gateway").link_options()))

    async def cancelled_as_it_ends(awaited: Coroutine[Any, Any, Any], seconds: float) -> Any:
        nonlocal waits
        work = asyncio.ensure_future(awaited)
        if asyncio.current_task() is opening:
            if waits == wait:
                work.add_done_callback(lambda _: opening.cancel())
            waits += 1
        return await real(work, seconds)

    monkeypatch.setattr(asyncio, "wait_for", cancelled_as_it_ends)
    others = asyncio.all_tasks()
    await asyncio.wait([opening])
    assert waits > wait
    assert opening.cancelled()
    assert asyncio.all_tasks() <= others


async def test_a_cancellation_while_a_link_closes_is_not_lost(own_mesh_server: NatsServer, open_link: OpenLink) -> None:
    """nats-py swallows it while it waits for its own attempt to reconnect."""
    link = await open_link("gateway", own_mesh_server)
    await asyncio.gather(lost(link), own_mesh_server.kill())
    closing = asyncio.ensure_future(link.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled()
    assert link.closed.is_set()


# ── flush ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_flush_confirms_also_what_was_still_in_the_buffer(open_link: OpenLink) -> None:
    link = await open_link("acme.alice")
    denied: list[str] = []
    link.on_denied(denied.append)
    for number in range(20):
        await link.publish(f"forbidden.{number}", b"")
        await link.flush()
        assert denied[-1] == f"forbidden.{number}"


async def test_a_flush_that_is_given_up_does_not_hurt_the_connection(
    own_mesh_server: NatsServer, open_link: OpenLink
) -> None:
    """nats-py's own flush leaves a cancelled future behind, and its read loop dies of the PONG that comes later."""
    link = await open_link("gateway", own_mesh_server)
    own_mesh_server.pause()
    with pytest.raises(Unavailable, match="did not confirm"):
        await link.flush(0.05)
    cancelled = asyncio.ensure_future(link.flush())
    await asyncio.sleep(0)
    cancelled.cancel()
    own_mesh_server.resume()
    await link.flush()
    await link.flush()
    assert link.reconnects == 0


async def test_a_flush_ends_when_the_connection_drops_and_fails_while_it_is_down(
    own_mesh_server: NatsServer, open_link: OpenLink
) -> None:
    link = await open_link("gateway", own_mesh_server)
    own_mesh_server.pause()
    flush = asyncio.ensure_future(link.flush(60))
    await asyncio.sleep(0)
    await own_mesh_server.kill()
    async with asyncio.timeout(5):
        with pytest.raises(Unavailable, match="dropped"):
            await flush
        with pytest.raises(Unavailable, match="down"):
            await link.flush(60)


# ── drain ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def wiretap(server: NatsServer) -> AsyncIterator[tuple[str, bytearray]]:
    """A relay in front of a server, and what clients have sent through it."""
    sent = bytearray()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tap: bytearray) -> None:
        while data := await reader.read(65536):
            tap += data
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", server.options.port)
        await asyncio.gather(relay(reader, far_writer, sent), relay(far_reader, writer, bytearray()))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        yield f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}", sent


def ignore(message: Message) -> None: ...


async def test_a_drain_waits_for_an_answer_to_a_ping_that_went_out_after_the_last_unsubscribe(
    mesh_server: NatsServer,
) -> None:
    """nats-py sends the PING first, so what the server delivers before it reads the UNSUB is lost."""
    async with wiretap(mesh_server) as (url, sent):
        link = await Link.open(replace(mesh_server.credentials.load("gateway").link_options(), url=url))
        subscriptions = [await link.subscribe(subjects.set_context("acme", f"a{n}"), ignore) for n in range(64)]
        await link.drain(subscriptions)
        assert sent.count(b"UNSUB ") == 64
        assert sent.rfind(b"PING\r\n") > sent.rfind(b"UNSUB ")
        await link.close()


async def test_a_drain_ends_after_all_that_was_sent_before_it_is_called_back(open_link: OpenLink) -> None:
    alice, gateway = await open_link("acme.alice"), await open_link("gateway")
    called = []
    subscription = await gateway.subscribe(
        subjects.set_context("acme", "alice"), lambda message: called.append(message.data)
    )
    await gateway.flush()
    for number in range(100):
        await alice.publish(subjects.set_context("acme", "alice"), b"%d" % number)
    await alice.flush()
    async with asyncio.timeout(5):
        await gateway.drain([subscription])
    assert called == [b"%d" % number for number in range(100)]


async def test_what_was_drained_is_not_subscribed_again_by_a_reconnect(
    own_mesh_server: NatsServer, open_link: OpenLink, open_asker: OpenAsker
) -> None:
    asker = await open_asker("acme.alice", own_mesh_server)
    gateway = await open_link("gateway", own_mesh_server)
    subscription = await gateway.subscribe(subjects.SET_CONTEXT.pattern(), ignore)
    await gateway.flush()
    own_mesh_server.pause()
    drain = asyncio.ensure_future(gateway.drain([subscription]))
    await asyncio.sleep(0)
    await own_mesh_server.kill()
    async with asyncio.timeout(5):
        await drain
    await own_mesh_server.start()
    await asyncio.gather(connected_again(asker.link), connected_again(gateway))
    with pytest.raises(Unavailable, match="nobody serves"):
        await set_context(asker)


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", ["x" * 500, "é" * 250])
async def test_a_message_that_the_server_would_close_the_connection_over_is_refused_first(
    open_link: OpenLink, value: str
) -> None:
    link = await open_link("acme.alice")
    subject = subjects.set_context("acme", "alice")
    for size, headers in ((link.max_payload + 1, None), (link.max_payload - 400, {"traceparent": value})):
        with pytest.raises(TooLarge):
            await link.publish(subject, bytes(size), headers=headers)
    await link.publish(subject, bytes(link.max_payload))
    await link.publish(subject, bytes(link.max_payload - 600), headers={"traceparent": value})
    await link.flush()
    assert not link.closed.is_set()
    assert link.reconnects == 0


async def test_what_is_no_subject_is_a_bad_request(open_link: OpenLink) -> None:
    link = await open_link("acme.alice")
    with pytest.raises(BadRequest):
        await link.publish("two words", b"")


# ── what the server minds ───────────────────────────────────────────────────────────────────────────────────────


async def test_violations_leave_the_connection_usable(open_asker: OpenAsker) -> None:
    asker = await open_asker("acme.alice")
    link = asker.link
    desk = await open_asker("gateway")
    async with hosted(Desk(desk.link)):
        await link.publish("forbidden", b"")
        await link.subscribe("forbidden", ignore)
        await link.flush()
        assert (await set_context(asker, "e7")).entity_id == "e7"
        assert "permissions violation" in str(link.last_error)
    assert link.reconnects == 0


async def test_a_callback_that_raises_costs_neither_its_next_message_nor_those_of_others(open_link: OpenLink) -> None:
    alice, gateway = await open_link("acme.alice"), await open_link("gateway")
    called = []

    def stumble(message: Message) -> None:
        called.append(message.data)
        raise KeyError(message.subject)

    await gateway.subscribe(subjects.set_context("acme", "alice"), stumble)
    await gateway.subscribe(subjects.forget("acme", "alice"), lambda message: called.append(message.data))
    await gateway.flush()
    for subject, said in ((subjects.set_context, b"1"), (subjects.forget, b"2"), (subjects.set_context, b"3")):
        await alice.publish(subject("acme", "alice"), said)
    await alice.flush()
    await gateway.flush()
    assert called == [b"1", b"2", b"3"]


async def test_a_subscription_that_is_refused_takes_nothing_of_the_next(open_link: OpenLink) -> None:
    alice, gateway = await open_link("acme.alice"), await open_link("gateway")
    taken: list[Message] = []
    with pytest.raises(Unavailable, match="cannot subscribe"):
        await gateway.subscribe("two words", taken.append)
    subscription = await gateway.client.subscribe(subjects.set_context("acme", "alice"))
    await gateway.flush()
    await alice.publish(subjects.set_context("acme", "alice"), b"for the next")
    assert (await subscription.next_msg(timeout=5)).data == b"for the next"
    assert not taken


async def test_headers_arrive_as_they_were_sent_and_none_passes_for_a_status(open_link: OpenLink) -> None:
    alice, gateway = await open_link("acme.alice"), await open_link("gateway")
    seen: list[Message] = []
    await gateway.subscribe(subjects.set_context("acme", "alice"), seen.append)
    await gateway.flush()
    sent = {"traceparent": "00-a-b-01", "X-Colon": "a: b:c", "X-Text": "é ü"}
    await alice.publish(subjects.set_context("acme", "alice"), b"body", headers=sent)
    await alice.publish(subjects.set_context("acme", "alice"), b"bare")
    await alice.flush()
    await gateway.flush()
    assert [(message.data, dict(message.headers)) for message in seen] == [(b"body", sent), (b"bare", {})]
    status = Message("s", "", b"", b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 7\r\n\r\n")
    assert (status.status, status.headers) == ("100", {"Nats-Last-Consumer": "7"})
    for forged in (b"NATS/1.0\r\nStatus: 503\r\n\r\n", b"404\r\n\r\n", None):
        assert Message("s", "", b"", forged).status == ""


@pytest.mark.parametrize("token", [b"a\x0bb", b"a\x0cb", b"\xff", b"a\x85b"])
async def test_a_subject_may_hold_what_looks_like_a_blank_or_is_no_text(
    own_mesh_server: NatsServer, open_link: OpenLink, token: bytes
) -> None:
    """An agent could have any service lose its connection, by the reply subject that it named."""
    gateway = await open_link("gateway", own_mesh_server)
    seen: list[bytes] = []
    ended = asyncio.Event()

    def on_message(message: Message) -> None:
        seen.append(message.data)
        if message.data == b"z":
            ended.set()

    await gateway.subscribe(subjects.set_context("acme", "alice"), on_message)
    await gateway.flush()
    login = own_mesh_server.credentials.load("acme.alice")
    _, writer = await asyncio.open_connection("127.0.0.1", own_mesh_server.options.port)
    connect = json.dumps({"user": login.user, "pass": login.password, "verbose": False, "headers": True})
    reply = b"_INBOX_agent.acme.alice." + token
    subject = subjects.set_context("acme", "alice").encode()
    writer.write(b"CONNECT " + connect.encode() + b"\r\nPUB " + subject + b" " + reply + b" 1\r\nx\r\n")
    writer.write(b"HPUB " + subject + b" " + reply + b" 12 13\r\nNATS/1.0\r\n\r\ny\r\n")
    writer.write(b"PUB " + subject + b" 1\r\nz\r\n")
    async with asyncio.timeout(10):
        await ended.wait()
    writer.close()
    assert seen == [b"x", b"y", b"z"]
    assert gateway.reconnects == 0


async def test_what_the_socket_does_not_take_at_once_arrives_later_in_order(
    own_mesh_server: NatsServer, open_link: OpenLink
) -> None:
    alice, gateway = await open_link("acme.alice", own_mesh_server), await open_link("gateway", own_mesh_server)
    seen: list[bytes] = []
    await gateway.subscribe(subjects.set_context("acme", "alice"), lambda message: seen.append(message.data[:4]))
    await gateway.flush()
    own_mesh_server.pause()
    sent = [number.to_bytes(4, "big") for number in range(1500)]
    for number in sent:  # 1.5 MB: beyond the socket's buffers, below where publishers wait
        await alice.publish(subjects.set_context("acme", "alice"), number + bytes(1000))
    own_mesh_server.resume()
    await alice.flush()
    await gateway.flush()
    assert seen == sent


async def test_a_denied_subscription_is_told_when_it_is_confirmed(open_link: OpenLink) -> None:
    link = await open_link("acme.alice")
    await link.subscribe(subjects.SET_CONTEXT.pattern(), ignore, queue="gateway")
    with pytest.raises(Denied, match=r"mnemesh\.v1\.memory\.set_context"):
        await link.confirm()


# ── drops ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_after_a_killed_server_is_back_requests_work_and_subscriptions_are_live(
    own_mesh_server: NatsServer, open_link: OpenLink, open_asker: OpenAsker
) -> None:
    asker = await open_asker("acme.alice", own_mesh_server)
    async with hosted(Desk(await open_link("gateway", own_mesh_server))) as host:
        desk = host.actors[0].link
        for end in (own_mesh_server.kill, own_mesh_server.stop):
            before = asker.link.reconnects
            await set_context(asker)
            await end()
            await own_mesh_server.start()
            await asyncio.gather(connected_again(asker.link), connected_again(desk))
            assert (await set_context(asker, "again")).entity_id == "again"
            assert asker.link.reconnects == before + 1


async def test_reconnecting_never_gives_up_and_waits_with_jitter_up_to_a_ceiling(open_link: OpenLink) -> None:
    link = await open_link("gateway")
    assert link.client.options["max_reconnect_attempts"] == -1
    assert link.client.options["allow_reconnect"]
    waits = [link._choose_server(link.client.server_pool, None)[1] for _ in range(200)]
    assert all(0 < wait <= LONGEST_RECONNECT_S for wait in waits)
    assert max(waits[:3]) < 0.5 < max(waits[20:])
    assert len(set(waits)) == len(waits)


async def test_a_frozen_server_is_noticed_by_pings_even_with_full_buffers(
    own_mesh_server: NatsServer, open_link: OpenLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await open_link("gateway")).client.options["ping_interval"] == 5
    monkeypatch.setattr(connection, "PING_INTERVAL_S", 0.3)
    link = await open_link("acme.alice", own_mesh_server)
    gone = asyncio.ensure_future(lost(link))
    own_mesh_server.pause()
    await fill(link)
    await gone
    own_mesh_server.resume()
    await connected_again(link)


async def test_closing_does_not_wait_for_a_frozen_server(
    own_mesh_server: NatsServer, open_link: OpenLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CLOSE_S", 0.1)
    link = await open_link("acme.alice", own_mesh_server)
    own_mesh_server.pause()
    await fill(link)
    async with asyncio.timeout(5):
        await link.close()
    assert link.closed.is_set()
    own_mesh_server.resume()


async def test_closing_while_the_server_is_gone_and_data_waits(
    own_mesh_server: NatsServer, open_link: OpenLink
) -> None:
    link = await open_link("acme.alice", own_mesh_server)
    gone = asyncio.ensure_future(lost(link))
    await asyncio.sleep(0)
    await own_mesh_server.kill()
    await gone
    await link.publish(subjects.set_context("acme", "alice"), MEGABYTE)
    async with asyncio.timeout(5):
        await link.close()
    assert link.closed.is_set()
    with pytest.raises(Unavailable):
        await link.publish(subjects.set_context("acme", "alice"), b"")


async def test_a_user_that_is_removed_loses_the_connection_for_good(
    own_mesh_server: NatsServer, open_link: OpenLink
) -> None:
    link = await open_link("acme.bob", own_mesh_server)
    own_mesh_server.credentials.remove("acme.bob")
    await own_mesh_server.reload()
    async with asyncio.timeout(5):
        await link.closed.wait()
    assert not link.is_connected
