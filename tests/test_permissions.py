"""What nats-server lets every user do, tried on a real server and compared with what the contract says.

What to expect is read from `subjects.yaml` here, not from `cli/permissions.py`, so that a mistake there shows. A
probe publishes or subscribes on one subject and asks the server whether it minded.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Literal, NamedTuple

import pytest
import pytest_asyncio
import yaml
from conftest import AGENTS, SITE, Raw, open_raw, start_mesh_server

from cli.contract import SOURCE
from cli.server import NatsServer
from mnemesh import subjects
from mnemesh.contract import reply_is_private
from mnemesh.ids import partition_of, to_token

Connect = Callable[[str], Awaitable[Raw]]

CONTRACT: dict[str, Any] = yaml.safe_load(SOURCE.read_text())
SERVICES = ("gateway", "router", "shard", "operator")
USERS = (*SERVICES, *(f"{tenant}.{agent}" for tenant, agent in AGENTS))
STREAMS = {
    **{stream["name"].replace("<site>", SITE): stream for stream in CONTRACT["streams"].values()},
    **{f"KV_{bucket['name']}": bucket for bucket in CONTRACT["buckets"].values()},
}


class Probe(NamedTuple):
    """One thing to try, and the users that the contract lets do it."""

    verb: Literal["publish", "subscribe"]
    subject: str
    allowed: frozenset[str]


def concrete(template: str, tenant: str, agent: str) -> str:
    """A subject as somebody would use it."""
    values = {"site": SITE, "partition": "7", "shard": "s0", "entity": "e1", "tenant": tenant, "agent": agent}
    return f"{CONTRACT['root']}." + re.sub(r"<(\w+)>", lambda match: values[match.group(1)], template)


def operation_probes() -> Iterator[Probe]:
    """Callers publish in their own name, on the front subject and the mapped one; owners listen where it is served."""
    for operation in CONTRACT["operations"].values():
        served = operation.get("mapped", operation["subject"])
        for template in {operation["subject"], served}:
            for tenant, agent in AGENTS:
                callers = {role for role in operation["callers"] if role != "agent"}
                if "agent" in operation["callers"]:
                    callers.add(f"{tenant}.{agent}")
                listeners = {operation["owner"]} if template == served else set()
                subject = concrete(template, tenant, agent)
                yield Probe("publish", subject, frozenset(callers))
                yield Probe("subscribe", subject, frozenset(listeners))


def inbox_probes() -> Iterator[Probe]:
    """Everybody reads the own inbox; nobody writes into one unasked."""
    for user in USERS:
        tenant, _, agent = user.partition(".")
        inbox = CONTRACT["roles"]["agent" if agent else user]["inbox"]
        inbox = inbox.replace("<tenant>", tenant).replace("<agent>", agent)
        yield Probe("subscribe", f"{inbox}.abc", frozenset({user}))
        yield Probe("subscribe", f"{inbox}.>", frozenset({user}))
        yield Probe("publish", f"{inbox}.abc", frozenset())
    for wildcard in (">", "*.>", "_INBOX.>", "$KV.>", "$JS.>", "$SYS.>", f"{CONTRACT['root']}.>"):
        yield Probe("subscribe", wildcard, frozenset())


def storage_probes() -> Iterator[Probe]:
    """Writers publish what is stored, nobody listens to it live; a stream's API is its readers' and the operator's."""
    log = concrete(CONTRACT["streams"]["log"]["subject"], "acme", "alice")
    yield Probe("publish", log, frozenset(CONTRACT["streams"]["log"]["writers"]))
    yield Probe("publish", log.replace(SITE, "elsewhere"), frozenset())
    yield Probe("subscribe", log, frozenset())
    for bucket in CONTRACT["buckets"].values():
        key = f"$KV.{bucket['name']}.probe"
        yield Probe("publish", key, frozenset(bucket["writers"]))
        yield Probe("subscribe", key, frozenset())
    for name, declared in STREAMS.items():
        readers = frozenset({*declared["readers"], "operator"})
        for verb in ("STREAM.INFO", "STREAM.MSG.GET"):
            yield Probe("publish", f"$JS.API.{verb}.{name}", readers)
        for verb in ("CONSUMER.CREATE", "CONSUMER.INFO", "CONSUMER.DELETE"):
            yield Probe("publish", f"$JS.API.{verb}.{name}.c", readers)
        yield Probe("publish", f"$JS.API.DIRECT.GET.{name}.x", readers)
        yield Probe("publish", f"$JS.FC.{name}.c.x", readers)
        operator = frozenset({"operator"})
        for verb in ("CREATE", "UPDATE", "DELETE", "PURGE", "SNAPSHOT", "RESTORE", "MSG.DELETE"):
            yield Probe("publish", f"$JS.API.STREAM.{verb}.{name}", operator)
        for verb in ("NAMES", "LIST"):
            yield Probe("publish", f"$JS.API.CONSUMER.{verb}.{name}", operator)
        yield Probe("publish", f"$JS.API.CONSUMER.MSG.NEXT.{name}.c", operator)
        yield Probe("publish", f"$JS.ACK.{name}.c.1.1.1.1.1", operator)
    for verb in ("INFO", "STREAM.NAMES", "STREAM.LIST", "STREAM.CREATE.other"):
        yield Probe("publish", f"$JS.API.{verb}", frozenset({"operator"}))


def server_probes() -> Iterator[Probe]:
    """Discovery is for the operator to ask and for owners to answer; the server's own API is for nobody."""
    owners = frozenset(operation["owner"] for operation in CONTRACT["operations"].values())
    for subject in ("$SRV.PING", "$SRV.STATS.mnemesh-shard"):
        yield Probe("publish", subject, frozenset({"operator"}))
        yield Probe("subscribe", subject, owners)
    for subject in ("SERVER.PING", "ACCOUNT.MESH.CONNZ", "ACCOUNT.PING.CONNZ", "USER.INFO", "SERVER.ID.RELOAD"):
        yield Probe("publish", f"$SYS.REQ.{subject}", frozenset())
        yield Probe("subscribe", f"$SYS.REQ.{subject}", frozenset())


PROBES = [*operation_probes(), *inbox_probes(), *storage_probes(), *server_probes()]


async def is_allowed(raw: Raw, probe: Probe) -> bool:
    """What the server says. The payload is one that no API takes, so nothing is created or destroyed."""
    if probe.verb == "publish":
        await raw.client.publish(probe.subject, b"?")
        return not await raw.settle()
    subscription = await raw.client.subscribe(probe.subject)
    denied = await raw.settle()
    await subscription.unsubscribe()
    return not denied


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def probed_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NatsServer]:
    """A server of this file's own: allowed probes leave rubbish in its log and buckets."""
    server = await start_mesh_server(tmp_path_factory.mktemp("probed"))
    yield server
    await server.stop()


@pytest.mark.parametrize("user", USERS)
async def test_the_server_allows_each_user_what_the_contract_says_and_nothing_else(
    probed_server: NatsServer, user: str
) -> None:
    raw = await open_raw(probed_server, user)
    wrong = [
        f"{'denied' if user in probe.allowed else 'allowed'}: {probe.verb} {probe.subject}"
        for probe in PROBES
        if await is_allowed(raw, probe) != (user in probe.allowed)
    ]
    await raw.client.close()
    assert wrong == []


async def test_the_system_account_sees_nothing_of_the_mesh(connect_as: Connect) -> None:
    system, operator = await connect_as("sys"), await connect_as("operator")
    everything = await system.client.subscribe(f"{CONTRACT['root']}.>")
    assert await system.settle() == []
    await operator.client.publish(subjects.shard_status("s0"), b"{}")
    await operator.settle()
    await system.settle()
    assert everything.pending_msgs == 0


# ── point reads, mapped by the broker ───────────────────────────────────────────────────────────────────────────

IDS = [
    *(f"entity-{number}" for number in range(200)),
    "Zürich",
    "東京 駅",
    "a.b.c",
    "*",
    ">",
    "=41",
    "==",
    "emoji 🦆",
    "tab\tnew\nline",
    "x" * 200,
    "x" * 201,
    "ö" * 5000,
]


async def test_the_broker_routes_a_point_read_to_the_partition_that_python_computes(connect_as: Connect) -> None:
    shard, alice = await connect_as("shard"), await connect_as("acme.alice")
    served = await shard.client.subscribe(subjects.GET_CONTEXT.pattern(site=SITE))
    await shard.settle()
    positions = subjects.GET_CONTEXT.positions
    for entity_id in IDS:
        await alice.client.publish(subjects.get_context("acme", "alice", to_token(entity_id)), b"{}")
        message = await served.next_msg(timeout=5)
        tokens = {name: message.subject.split(".")[place] for name, place in positions.items()}
        assert tokens == {
            "site": SITE,
            "partition": str(partition_of("acme", entity_id)),
            "tenant": "acme",
            "agent": "alice",
            "entity": to_token(entity_id),
        }
    assert await alice.settle() == []
    await served.unsubscribe()


@pytest.mark.parametrize(("tenant", "agent"), [("acme", "bob"), ("zeta", "carol"), ("zeta", "alice")])
async def test_a_point_read_in_anothers_name_is_denied_and_the_error_names_the_mapped_subject(
    connect_as: Connect, tenant: str, agent: str
) -> None:
    alice = await connect_as("acme.alice")
    await alice.client.publish(subjects.get_context(tenant, agent, "e1"), b"{}")
    (error,) = await alice.settle()
    mapped = concrete(CONTRACT["operations"]["get_context"]["mapped"], tenant, agent)
    assert mapped.replace(".7.", f".{partition_of(tenant, 'e1')}.") in error


# ── replies ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_service_answers_a_request_once_and_no_more(connect_as: Connect) -> None:
    gateway, alice = await connect_as("gateway"), await connect_as("acme.alice")
    requests = await gateway.client.subscribe(subjects.forget("*", "*"))
    await gateway.settle()
    inbox = subjects.agent_inbox("acme", "alice") + ".once"
    replies = await alice.client.subscribe(inbox)
    await alice.client.publish(subjects.forget("acme", "alice"), b"{}", reply=inbox)
    request = await requests.next_msg(timeout=5)
    await gateway.client.publish(request.reply, b"first")
    assert await gateway.settle() == []
    await gateway.client.publish(request.reply, b"second")
    assert len(await gateway.settle()) == 1
    await alice.settle()
    assert (await replies.next_msg(timeout=5)).data == b"first"
    assert replies.pending_msgs == 0


async def answer_one_request(server: NatsServer, reply: str) -> list[str]:
    """A shard that answers alice's request wherever its reply subject points; the errors of both."""
    shard, alice = await open_raw(server, "shard"), await open_raw(server, "acme.alice")
    requests = await shard.client.subscribe(subjects.GET_CONTEXT.pattern(site=SITE))
    await shard.settle()
    await alice.client.publish(subjects.get_context("acme", "alice", "e1"), b"{}", reply=reply)
    errors = await alice.settle()
    if not errors:
        await shard.client.publish((await requests.next_msg(timeout=5)).reply, b"{}")
        errors = await shard.settle()
    await shard.client.close()
    await alice.client.close()
    return errors


REACHABLE = [
    subjects.log_event(SITE, "acme", 0, "e1"),
    f"$KV.{subjects.TENANTS.name}.evil",
    f"$JS.API.STREAM.PURGE.{subjects.log_stream(SITE)}",
    subjects.set_context("zeta", "carol"),
    subjects.agent_inbox("acme", "bob") + ".x",
]


@pytest.mark.parametrize("reply", REACHABLE)
async def test_a_caller_could_have_a_service_publish_anywhere_so_the_runtime_must_refuse_such_a_reply_subject(
    own_mesh_server: NatsServer, reply: str
) -> None:
    """The confused deputy: should nats-server ever refuse this itself, this test says so."""
    assert await answer_one_request(own_mesh_server, reply) == []
    assert not reply_is_private(subjects.GET_CONTEXT, {"tenant": "acme", "agent": "alice"}, reply)


@pytest.mark.parametrize("reply", [f"$JS.ACK.{subjects.log_stream(SITE)}.c.1.1.1.1.1", "_R_.x"])
async def test_the_server_refuses_the_reply_subjects_that_it_reserves(own_mesh_server: NatsServer, reply: str) -> None:
    (error,) = await answer_one_request(own_mesh_server, reply)
    assert "reply" in error


async def test_an_answer_sent_by_the_unguarded_deputy_lands_in_the_log(own_mesh_server: NatsServer) -> None:
    await answer_one_request(own_mesh_server, subjects.log_event(SITE, "acme", 0, "e1"))
    operator = await open_raw(own_mesh_server, "operator")
    info = await operator.client.request(f"$JS.API.STREAM.INFO.{subjects.log_stream(SITE)}")
    await operator.client.close()
    assert json.loads(info.data)["state"]["messages"] == 1


@pytest.mark.parametrize(
    ("destination", "denied"),
    [
        (subjects.log_event(SITE, "acme", 0, "e1"), True),
        (subjects.agent_inbox("acme", "bob") + ".x", True),
    ],
)
async def test_message_tracing_reaches_only_where_the_caller_may_publish(
    connect_as: Connect, destination: str, denied: bool
) -> None:
    alice = await connect_as("acme.alice")
    await alice.client.publish(subjects.set_context("acme", "alice"), b"", headers={"Nats-Trace-Dest": destination})
    assert bool(await alice.settle()) == denied


AGENT_TOKENS = {"tenant": "acme", "agent": "alice", "site": SITE, "partition": "0", "entity": "e1", "shard": "s0"}


@pytest.mark.parametrize(
    ("operation", "reply", "private"),
    [
        ("get_context", "_INBOX_agent_acme.alice.x.1", True),
        ("get_context", "_INBOX_agent_acme.alice", False),
        ("get_context", "_INBOX_agent_acme.alice2.x", False),
        ("get_context", "_INBOX_agent_acme.bob.x", False),
        ("get_context", "_INBOX_agent_zeta.alice.x", False),
        ("get_context", "_INBOX_router_0.x", False),
        ("get_context", "", False),
        ("shard_search", "_INBOX_router_0.x", True),
        ("shard_search", "_INBOX_agent_acme.alice.x", False),
        ("shard_status", "_INBOX_operator_0.x", True),
    ],
)
def test_a_reply_is_private_only_in_the_inbox_of_who_may_ask(operation: str, reply: str, private: bool) -> None:
    assert reply_is_private(subjects.OPERATIONS[operation], AGENT_TOKENS, reply) is private


# ── following and reloading ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("user", ["gateway", "shard"])
async def test_a_reader_can_make_a_push_consumer_and_receive_the_log(own_mesh_server: NatsServer, user: str) -> None:
    gateway, reader = await open_raw(own_mesh_server, "gateway"), await open_raw(own_mesh_server, user)
    await gateway.client.request(subjects.log_event(SITE, "acme", 0, "e1"), b"event")
    deliver = f"{own_mesh_server.credentials.load(user).inbox_prefix}.follow"
    messages = await reader.client.subscribe(deliver)
    config = {"name": "c", "deliver_subject": deliver, "ack_policy": "none"}
    stream = subjects.log_stream(SITE)
    request = json.dumps({"stream_name": stream, "config": config}).encode()
    await reader.client.request(f"$JS.API.CONSUMER.CREATE.{stream}.c", request)
    assert (await messages.next_msg(timeout=5)).data == b"event"
    assert await reader.settle() == []
    await gateway.client.close()
    await reader.client.close()


async def test_an_agent_added_by_reload_can_log_in_and_nobody_is_disconnected(own_mesh_server: NatsServer) -> None:
    gateway = await open_raw(own_mesh_server, "gateway")
    own_mesh_server.credentials.add_agent("acme", "dave")
    await own_mesh_server.reload()
    dave = await open_raw(own_mesh_server, "acme.dave")
    await dave.client.publish(subjects.set_context("acme", "dave"), b"")
    assert await dave.settle() == []
    assert await gateway.settle() == []
    own_mesh_server.credentials.remove("acme.dave")
    await own_mesh_server.reload()
    await asyncio.wait_for(dave.closed.wait(), 10)
    await gateway.client.close()
