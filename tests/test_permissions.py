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
from desk import Desk

from cli.contract import SOURCE
from cli.server import NatsServer
from mnemesh import subjects
from mnemesh.connection import Link
from mnemesh.contract import AnyOperation, reply_is_private
from mnemesh.host import hosted
from mnemesh.ids import partition_of, to_token

Connect = Callable[[str], Awaitable[Raw]]

CONTRACT: dict[str, Any] = yaml.safe_load(SOURCE.read_text())
SERVICES = ("gateway", "router", "shard", "operator", "hub", "views")
USERS = (*SERVICES, *(f"{tenant}.{agent}" for tenant, agent in AGENTS))
STREAMS = {
    **{stream["name"].replace("<site>", SITE): stream for stream in CONTRACT["streams"].values()},
    **{f"KV_{bucket['name']}": bucket for bucket in CONTRACT["buckets"].values()},
    **{f"OBJ_{bucket['name']}": bucket for bucket in CONTRACT["objects"].values()},
}


class Probe(NamedTuple):
    """One thing to try, and the users that the contract lets do it."""

    verb: Literal["publish", "subscribe"]
    subject: str
    allowed: frozenset[str]


def concrete(template: str, tenant: str, agent: str) -> str:
    """A subject as somebody would use it."""
    values = {
        "site": SITE,
        "origin": SITE,
        "partition": "7",
        "shard": "s0",
        "view": "v",
        "entity": "e1",
        "tenant": tenant,
        "agent": agent,
    }
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


def answerers(caller: str) -> frozenset[str]:
    """The roles that answer a role's requests; all that serve anything answer the operator's discovery."""
    return frozenset(
        operation["owner"]
        for operation in CONTRACT["operations"].values()
        if caller == "operator" or caller in operation["callers"]
    )


def inbox_probes() -> Iterator[Probe]:
    """Everybody reads the own inbox; only who answers its owner's requests writes into it."""
    for user in USERS:
        tenant, _, agent = user.partition(".")
        role = "agent" if agent else user
        inbox = CONTRACT["roles"][role]["inbox"]
        inbox = inbox.replace("<tenant>", tenant).replace("<agent>", agent)
        yield Probe("subscribe", f"{inbox}.abc", frozenset({user}))
        yield Probe("subscribe", f"{inbox}.>", frozenset({user}))
        yield Probe("publish", f"{inbox}.abc", answerers(role))
        yield Probe("publish", inbox, frozenset())
    yield Probe("publish", "_INBOX.abc", frozenset())
    for wildcard in (">", "*.>", "_INBOX.>", "$KV.>", "$JS.>", "$SYS.>", f"{CONTRACT['root']}.>"):
        yield Probe("subscribe", wildcard, frozenset())


def storage_probes() -> Iterator[Probe]:
    """Writers publish what is stored, nobody listens to it live; a stream's API is its readers' and the operator's."""
    log = CONTRACT["streams"]["log"]
    event = concrete(log["subjects"]["event"], "acme", "alice")
    carriers = frozenset(log["carriers"])
    yield Probe("publish", event, carriers | frozenset(log["writers"]))
    yield Probe("publish", event.replace(SITE, "elsewhere"), carriers)
    yield Probe("subscribe", event, frozenset())
    mark = concrete(log["subjects"]["mark"], "acme", "alice")
    yield Probe("publish", mark, carriers)
    yield Probe("subscribe", mark, frozenset())
    for bucket in CONTRACT["buckets"].values():
        key = f"$KV.{bucket['name']}.probe"
        yield Probe("publish", key, frozenset(bucket["writers"]))
        yield Probe("subscribe", key, frozenset())
    for bucket in CONTRACT["objects"].values():
        for part in "CM":
            yield Probe("publish", f"$O.{bucket['name']}.{part}.probe", frozenset(bucket["writers"]))
            yield Probe("subscribe", f"$O.{bucket['name']}.{part}.probe", frozenset())
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
            erasers = frozenset(declared.get("erasers", ())) if verb in ("PURGE", "MSG.DELETE") else frozenset()
            if name.startswith("OBJ_") and verb == "PURGE":
                erasers = frozenset(declared["writers"])
            yield Probe("publish", f"$JS.API.STREAM.{verb}.{name}", operator | erasers)
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


class Deputy(NamedTuple):
    """A service that answers wherever a request's reply subject points, without the runtime's check."""

    role: str
    operation: AnyOperation
    asked: str


DEPUTIES = [
    Deputy("shard", subjects.GET_CONTEXT, subjects.get_context("acme", "alice", "e1")),
    Deputy("gateway", subjects.SET_CONTEXT, subjects.set_context("acme", "alice")),
    Deputy("router", subjects.TRAVERSE, subjects.traverse("acme", "alice")),
]


async def answer_one_request(connect_as: Connect, deputy: Deputy, reply: str) -> list[str]:
    """The deputy answers alice's request as it is told to; the errors of both."""
    service, alice = await connect_as(deputy.role), await connect_as("acme.alice")
    requests = await service.client.subscribe(deputy.operation.pattern())
    await service.settle()
    await alice.client.publish(deputy.asked, b"{}", reply=reply)
    errors = await alice.settle()
    if not errors:
        await service.client.publish((await requests.next_msg(timeout=5)).reply, b"{}")
        errors = await service.settle()
    await requests.unsubscribe()
    return errors


FORBIDDEN = {
    "the log": subjects.log_event(SITE, "acme", 0, "e1"),
    "a KV bucket": f"$KV.{subjects.TENANTS.name}.evil",
    "the JetStream API": f"$JS.API.STREAM.PURGE.{subjects.log_stream(SITE)}",
    "an acknowledgement": f"$JS.ACK.{subjects.log_stream(SITE)}.c.1.1.1.1.1",
    "the server's own API": "$SYS.REQ.USER.INFO",
    "discovery": "$SRV.PING",
    "another tenant's write": subjects.set_context("zeta", "carol"),
    "the caller's own write": subjects.set_context("acme", "alice"),
    "a shard's status": subjects.shard_status("s0"),
    "an inbox without its last token": subjects.agent_inbox("acme", "alice"),
    "an inbox of nobody": "_INBOX.x",
    "the server's reply space": "_R_.x",
}


REFUSED = [
    pytest.param(deputy, reply, id=f"{deputy.role}, {what}")
    for deputy in DEPUTIES
    for what, reply in FORBIDDEN.items()
    if (deputy.role, what) != ("gateway", "the log")
]


@pytest.mark.parametrize(("deputy", "reply"), REFUSED)
async def test_the_server_refuses_an_answer_that_a_caller_aimed_at_anything_but_an_inbox(
    connect_as: Connect, deputy: Deputy, reply: str
) -> None:
    """The confused deputy: with `allow_responses` the server let these pass."""
    (error,) = await answer_one_request(connect_as, deputy, reply)
    assert "violation" in error.lower()
    assert not reply_is_private(deputy.operation, {"tenant": "acme", "agent": "alice"}, reply)


@pytest.mark.parametrize("deputy", DEPUTIES, ids=lambda deputy: deputy.role)
async def test_an_answer_reaches_the_inbox_of_the_caller(connect_as: Connect, deputy: Deputy) -> None:
    alice = await connect_as("acme.alice")
    inbox = subjects.agent_inbox("acme", "alice") + ".x"
    replies = await alice.client.subscribe(inbox)
    await alice.settle()
    assert await answer_one_request(connect_as, deputy, inbox) == []
    assert (await replies.next_msg(timeout=5)).data == b"{}"


SHARD, GATEWAY = DEPUTIES[:2]
PASSED = [
    (SHARD, subjects.agent_inbox("zeta", "carol") + ".x"),
    (SHARD, subjects.operator_inbox() + ".x"),
    (SHARD, f"$JS.API.STREAM.INFO.{subjects.log_stream(SITE)}"),
    (GATEWAY, subjects.log_event(SITE, "acme", 0, "e1")),
    (GATEWAY, f"$KV.{subjects.SPACES.name}.acme.evil"),
]


@pytest.mark.parametrize(("deputy", "reply"), PASSED)
async def test_the_server_passes_what_the_service_publishes_of_its_own_accord_so_the_runtime_must_refuse_it(
    own_mesh_server: NatsServer, deputy: Deputy, reply: str
) -> None:
    """Should nats-server ever refuse this itself, this test says so."""
    opened: list[Raw] = []

    async def connect(user: str) -> Raw:
        opened.append(await open_raw(own_mesh_server, user))
        return opened[-1]

    assert await answer_one_request(connect, deputy, reply) == []
    assert not reply_is_private(deputy.operation, {"tenant": "acme", "agent": "alice"}, reply)
    for raw in opened:
        await raw.client.close()


async def test_discovery_answers_only_into_the_inbox_of_the_operator(
    open_link: Callable[..., Awaitable[Link]], connect_as: Connect
) -> None:
    operator, carol = await connect_as("operator"), await connect_as("zeta.carol")
    theirs = await carol.client.subscribe(subjects.agent_inbox("zeta", "carol") + ".x")
    await carol.settle()
    async with hosted(Desk(await open_link("gateway"))):
        await operator.client.publish("$SRV.PING", b"", reply=theirs.subject)
        answer = await operator.client.request("$SRV.PING", b"", timeout=5)
    assert json.loads(answer.data)["name"] == "mnemesh-gateway"
    await carol.settle()
    assert theirs.pending_msgs == 0


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
        ("get_context", "_INBOX_agent.acme.alice.x.1", True),
        ("get_context", "_INBOX_agent.acme.alice", False),
        ("get_context", "_INBOX_agent.acme.alice2.x", False),
        ("get_context", "_INBOX_agent.acme.bob.x", False),
        ("get_context", "_INBOX_agent.zeta.alice.x", False),
        ("get_context", "_INBOX_router_0.x", False),
        ("get_context", "", True),
        ("get_context", "_R_.a.b", False),
        ("hub_get_context", "_R_.a.b", True),
        ("hub_get_context", "_INBOX_edge.hub.x", False),
        ("hub_get_context", "", False),
        ("device_search", "_INBOX_router_0.x", False),
        ("shard_search", "_INBOX_router_0.x", True),
        ("shard_search", "_INBOX_agent.acme.alice.x", False),
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
