"""`mnemesh doctor`: each thing that can be wrong is made wrong on a real server, and the finding names it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SITE, open_raw, server_options
from desk import Desk
from sites import device_options

from cli import check_machine, server
from cli.doctor import diagnose, exit_status, main
from cli.edge_node import EdgeNode
from cli.finding import Finding
from cli.provision import even_shards, provision
from cli.server import NatsServer
from cli.server_config import config_file
from memory_shards.shard import Shard
from mnemesh import kv, subjects
from mnemesh.actor import Actor
from mnemesh.asker import Asker
from mnemesh.connection import Link
from mnemesh.host import hosted
from mnemesh.jetstream import api, log_config
from mnemesh.messages import Status
from router.peers import Devices
from router.router import Router
from router.shard_map import ShardEntry
from services.gateway import Gateway
from services.policy import TenantGuard
from services.site_policy import SitePolicy
from services.view import View

OpenLink = Callable[..., Awaitable[Link]]


async def findings_of(data: Path) -> list[Finding]:
    return [finding async for finding in diagnose(data)]


def one(findings: list[Finding], pattern: str) -> Finding:
    """The only finding that is not ok; its text matches."""
    amiss = [finding for finding in findings if finding.verdict != "ok"]
    assert len(amiss) == 1, amiss
    assert re.search(pattern, amiss[0].what), amiss[0]
    assert amiss[0].advice
    return amiss[0]


def telling(findings: list[Finding], pattern: str) -> Finding:
    """A finding that is not ok and whose text matches, beside others that follow from the same cause."""
    amiss = [finding for finding in findings if finding.verdict != "ok"]
    matching = [finding for finding in amiss if re.search(pattern, finding.what)]
    assert matching, amiss
    assert matching[0].advice
    return matching[0]


async def services(
    data: Path, open_link: OpenLink, its: NatsServer, *, without: str = "", partitions: int = 32
) -> list[Actor]:
    """What `mnemesh up` runs, but in this process: all actors except one."""
    actors: dict[str, Callable[[Link], Actor]] = {
        "gateway": lambda link: Gateway(link, site=SITE, guard=TenantGuard()),
        "router": lambda link: Router(link, peers=Devices(SitePolicy(SITE)), guard=TenantGuard()),
    }
    for entry in even_shards(2):

        def shard(link: Link, entry: ShardEntry = entry) -> Actor:
            folder = data / "shards" / entry.name
            mine = sorted(entry.partitions)[:partitions]
            return Shard(link, name=entry.name, site=SITE, partitions=mine, folder=folder, guard=TenantGuard())

        actors[entry.name] = shard
    return [
        make(await open_link(name if name in ("gateway", "router") else "shard", its))
        for name, make in actors.items()
        if name != without
    ]


@pytest.fixture
def data(own_mesh_server: NatsServer) -> Path:
    """The data folder of a server that runs, with a log, buckets, two shards in the map, and no service."""
    return own_mesh_server.options.data


# ── all is well ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_healthy_mesh_has_nothing_amiss(
    data: Path, open_link: OpenLink, own_mesh_server: NatsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    async with hosted(*await services(data, open_link, own_mesh_server)):
        assert await main(data) == 0
    said = capsys.readouterr().out
    assert {line.split()[0] for line in said.splitlines()} == {"ok"}
    assert "4 services run; all 64 partitions are served" in said


async def test_a_healthy_device_has_nothing_amiss(tmp_path: Path) -> None:
    """nats-server took `reconnect: 1`, but `nats-server -t` did not, so that nothing could be compared."""
    async with EdgeNode(device_options("sub7", tmp_path, "nats://127.0.0.1:1")):
        amiss = [finding.what for finding in await findings_of(tmp_path) if finding.verdict != "ok"]
        assert len(amiss) == 1
        assert "the hub at nats://127.0.0.1:1 has not answered" in amiss[0]


async def test_views_that_nobody_keeps_are_named(data: Path, open_link: OpenLink, own_mesh_server: NatsServer) -> None:
    view = View(name="notes", tenant="acme", type="note", attributes=["title"], space="notes", embedder="hashing:64")
    link = await open_link("operator", own_mesh_server)
    await kv.put((await Asker(link).open()).inbox, subjects.VIEWS.name, view.name, view.encode())
    async with hosted(*await services(data, open_link, own_mesh_server)):
        one(await findings_of(data), "no views service runs: the vectors of notes are not kept")


async def test_looking_changes_nothing(data: Path, open_link: OpenLink, own_mesh_server: NatsServer) -> None:
    operator = await open_raw(own_mesh_server, "operator")
    async with hosted(*await services(data, open_link, own_mesh_server)):
        stored = []
        for _ in range(2):
            info = await operator.client.request("$JS.API.STREAM.LIST")
            streams = json.loads(info.data)["streams"]
            stored.append({stream["config"]["name"]: stream["state"]["last_seq"] for stream in streams})
            await findings_of(data)
    await operator.client.close()
    assert stored[0] == stored[1]


def test_only_what_is_wrong_fails() -> None:
    assert exit_status([Finding("ok", "a"), Finding("warning", "b", "c")]) == 0
    assert exit_status([Finding("ok", "a"), Finding("wrong", "b", "c")]) == 1


# ── the machine ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_old_program_is_named_with_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nats-server"
    program.write_text("#!/bin/sh\necho 'nats-server: v2.10.4'\n")
    program.chmod(0o755)
    monkeypatch.setattr(server, "_candidates", lambda: [program])
    found = one([check_machine.program()], r"too old: .*/nats-server is 2\.10\.4; Mnemesh needs 2\.12")
    assert "pip install" in found.advice


def test_no_program_at_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_candidates", list)
    one([check_machine.program()], "there is no nats-server")


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("2.11.9", "wrong"), ("2.12.0", "ok"), ("2.12.0-RC.1", "ok"), ("3.0.1", "ok"), ("dev", "warning")],
)
def test_the_version_that_runs_is_judged(version: str, verdict: str) -> None:
    found = check_machine.running_version(version)
    assert found.verdict == verdict
    assert version in found.what


async def test_a_folder_that_does_not_exist_or_holds_no_mesh_is_said(tmp_path: Path) -> None:
    assert f"mnemesh up --data {tmp_path / 'none'}" in one(await findings_of(tmp_path / "none"), "no folder").advice
    one(await findings_of(tmp_path), "no mesh was ever started")
    (tmp_path / "nats-server.json").write_text("{")
    one(await findings_of(tmp_path), "options saved in .* cannot be read")


async def test_a_server_that_does_not_run_is_told_from_a_port_that_another_program_took(tmp_path: Path) -> None:
    its = NatsServer(server_options(tmp_path))
    async with its:
        pass
    port = its.options.port
    found = one(await findings_of(tmp_path), f"not running: nobody listens on port {port}")
    assert f"mnemesh up --data {tmp_path}" in found.advice

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", port):
        found = one(await findings_of(tmp_path), f"port {port} is taken by another program")
        assert "--port" in found.advice


async def test_another_nats_server_on_the_port_is_called_one(tmp_path: Path) -> None:
    its = NatsServer(server_options(tmp_path / "ours"))
    async with its:
        pass
    async with NatsServer(replace(its.options, data=tmp_path / "other")):
        one(await findings_of(tmp_path / "ours"), "taken by another nats-server")


async def test_a_frozen_server_is_said_to_be_one(own_mesh_server: NatsServer, data: Path) -> None:
    own_mesh_server.pause()
    try:
        found = one(await findings_of(data), "takes connections on port .* but does not answer")
    finally:
        own_mesh_server.resume()
    assert str(own_mesh_server.pid) in found.advice


# ── passwords and permissions ───────────────────────────────────────────────────────────────────────────────────


async def test_a_wrong_password_is_named_by_its_file(data: Path, own_mesh_server: NatsServer) -> None:
    path = own_mesh_server.credentials.load("shard").path
    path.write_text(json.dumps(json.loads(path.read_text()) | {"password": "wrong"}))
    telling(await findings_of(data), f"does not let shard in with the password in {path}")


async def test_the_operators_wrong_password_leaves_the_mesh_unseen_and_says_so(
    data: Path, own_mesh_server: NatsServer
) -> None:
    path = own_mesh_server.credentials.load("operator").path
    path.write_text(json.dumps(json.loads(path.read_text()) | {"password": "wrong"}))
    findings = await findings_of(data)
    telling(findings, f"does not let operator in with the password in {path}")
    telling(findings, "the mesh cannot be looked at")


async def test_files_that_others_may_read_are_named(data: Path, own_mesh_server: NatsServer) -> None:
    path = own_mesh_server.credentials.load("gateway").path
    path.chmod(0o644)
    path.parent.chmod(0o755)
    findings = await findings_of(data)
    assert telling(findings, rf"others may read {path},").advice == f"`chmod 600 {path}`"
    assert telling(findings, rf"others may read {path.parent},").advice == f"`chmod 700 {path.parent}`"


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("inbox_prefix", "_INBOX_agent_acme.alice", r"names the inbox _INBOX_agent_acme\.alice; the contract says"),
        ("url", "nats://127.0.0.1:1", "names nats://127.0.0.1:1; the mesh is at"),
    ],
)
async def test_credentials_of_another_time_are_named(
    data: Path, own_mesh_server: NatsServer, field: str, value: str, pattern: str
) -> None:
    path = own_mesh_server.credentials.load("acme.alice").path
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    found = telling(await findings_of(data), pattern)
    assert str(path) in found.what
    assert "mnemesh agent add acme.alice" in found.advice


async def test_missing_and_broken_credentials_are_named(data: Path, own_mesh_server: NatsServer) -> None:
    own_mesh_server.credentials.load("router").path.unlink()
    own_mesh_server.credentials.load("gateway").path.write_text("{")
    findings = await findings_of(data)
    telling(findings, "there are no credentials for router")
    telling(findings, r"gateway\.json is not a credentials file")


async def reload_with(its: NatsServer, old: str, new: str) -> None:
    """Edit the configuration behind Mnemesh's back and have the server take it."""
    file = config_file(its.options.data)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert its.pid is not None
    await server._reload(its.options, its.pid, its.log_file, 10)


@pytest.mark.parametrize(
    ("entry", "who", "verb"),
    [
        (subjects.log_event(SITE, "*", "*", "*"), "gateway", "publish"),
        (subjects.set_context("*", "*"), "gateway", "subscribe"),
        (f"$JS.API.CONSUMER.CREATE.{subjects.log_stream(SITE)}.>", "shard", "publish"),
        (f"{subjects.agent_inbox('*', '*')}.>", "router", "publish"),
        (subjects.set_context("acme", "alice"), "acme.alice", "publish"),
        (subjects.GET_CONTEXT.pattern(tenant="acme", agent="alice"), "acme.alice", "publish"),
    ],
)
async def test_a_permission_that_the_server_lacks_is_named(
    data: Path, own_mesh_server: NatsServer, entry: str, who: str, verb: str
) -> None:
    await reload_with(own_mesh_server, f'    "{entry}"\n', "")
    subject = entry.replace("*", "doctor").replace(">", "doctor")
    found = telling(await findings_of(data), f"does not let {who} .*{verb} {re.escape(subject)}")
    assert "restart" in found.advice


async def test_a_permission_beyond_the_contract_shows_in_the_configuration(
    data: Path, own_mesh_server: NatsServer
) -> None:
    own = f'    "{subjects.router_inbox()}.>"\n'
    await reload_with(own_mesh_server, own, own + '    "evil.>"\n')
    telling(await findings_of(data), f"another configuration than contract {subjects.CONTRACT}")


# ── storage ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_log_without_atomic_batches_is_named(
    data: Path, open_link: OpenLink, own_mesh_server: NatsServer
) -> None:
    operator = await Asker(await open_link("operator", own_mesh_server)).open()
    config = log_config(SITE) | {"allow_atomic": False}
    await api(operator.inbox, f"STREAM.UPDATE.{subjects.log_stream(SITE)}", config)
    one(await findings_of(data), f"stream {subjects.log_stream(SITE)} .* allow_atomic is None, not True")


async def test_a_missing_bucket_is_named(data: Path, open_link: OpenLink, own_mesh_server: NatsServer) -> None:
    operator = await Asker(await open_link("operator", own_mesh_server)).open()
    await api(operator.inbox, f"STREAM.DELETE.KV_{subjects.SPACES.name}")
    one(await findings_of(data), f"no stream KV_{subjects.SPACES.name}")


async def test_jetstream_that_is_off_is_said(data: Path, own_mesh_server: NatsServer) -> None:
    await reload_with(own_mesh_server, "    jetstream: enabled\n", "")
    telling(await findings_of(data), "JetStream does not answer")


# ── services ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_without_services_each_missing_one_is_named(data: Path) -> None:
    findings = await findings_of(data)
    for pattern in ("no gateway runs", "no router runs", "0 of 1 replicas of shard s0", "0 of 1 replicas of shard s1"):
        telling(findings, pattern)
    telling(findings, "64 of 64 partitions are not served")


async def test_a_missing_shard_is_named_and_so_are_its_partitions(
    data: Path, open_link: OpenLink, own_mesh_server: NatsServer
) -> None:
    async with hosted(*await services(data, open_link, own_mesh_server, without="s1")):
        findings = await findings_of(data)
    assert "--shard s1" in telling(findings, "0 of 1 replicas of shard s1").advice
    telling(findings, "32 of 64 partitions are not served: 32, 33, 34")
    assert exit_status(findings) == 1


async def test_a_missing_replica_is_a_warning(data: Path, open_link: OpenLink, own_mesh_server: NatsServer) -> None:
    operator = own_mesh_server.credentials.load("operator").link_options()
    await provision(operator, site=SITE, tenants=["acme"], shards=even_shards(2, replicas=2))
    async with hosted(*await services(data, open_link, own_mesh_server)):
        findings = await findings_of(data)
    assert telling(findings, "1 of 2 replicas of shard s0 run").verdict == "warning"
    assert exit_status(findings) == 0


async def test_a_shard_that_serves_less_than_the_map_says_is_named(
    data: Path, open_link: OpenLink, own_mesh_server: NatsServer
) -> None:
    async with hosted(*await services(data, open_link, own_mesh_server, partitions=30)):
        telling(await findings_of(data), r"shard s0 .* serves 30 partitions; the shard map gives it 32")


async def test_a_shard_outside_the_map_is_a_warning(
    data: Path, open_link: OpenLink, own_mesh_server: NatsServer
) -> None:
    operator = own_mesh_server.credentials.load("operator").link_options()
    async with hosted(*await services(data, open_link, own_mesh_server)):
        await provision(operator, site=SITE, tenants=["acme"], shards=even_shards(1))
        assert telling(await findings_of(data), "shard s1 .* not in the shard map").verdict == "warning"


class OlderDesk(Desk):
    """Another gateway, built from another contract."""

    def metadata(self) -> dict[str, str]:
        return {"contract": "0123456789ab"}


async def test_a_service_of_another_contract_is_named_with_both_hashes(
    data: Path, open_link: OpenLink, own_mesh_server: NatsServer
) -> None:
    older = OlderDesk(await open_link("gateway", own_mesh_server))
    async with hosted(*await services(data, open_link, own_mesh_server), older):
        found = one(await findings_of(data), f"gateway .*{older.instance}.* runs contract 0123456789ab; ")
    assert subjects.CONTRACT in found.what


class StuckShard(Shard):
    """Serves, and does not follow the log."""

    def background(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        return {name: work for name, work in super().background().items() if name != "follow"}


async def test_a_shard_far_behind_the_log_is_a_warning(
    data: Path, open_link: OpenLink, own_mesh_server: NatsServer
) -> None:
    gateway = await open_raw(own_mesh_server, "gateway")
    for number in range(10_000):
        await gateway.client.publish(subjects.log_event(SITE, "acme", 0, f"e{number}"), b"")
    await gateway.client.request(subjects.log_event(SITE, "acme", 0, "last"), b"", timeout=10)
    await gateway.client.close()
    stuck = StuckShard(
        await open_link("shard", own_mesh_server), name="s0", site=SITE, partitions=range(32), folder=data / "stuck"
    )
    async with hosted(stuck):
        found = telling(await findings_of(data), "shard s0 is 10,001 events behind the log")
    assert found.verdict == "warning"


async def test_events_that_a_shard_cannot_read_are_a_warning(
    data: Path, open_link: OpenLink, own_mesh_server: NatsServer
) -> None:
    gateway = await open_raw(own_mesh_server, "gateway")
    for number in range(3):
        await gateway.client.request(subjects.log_event(SITE, "acme", 0, f"e{number}"), b"\xc1", timeout=10)
    await gateway.client.close()
    shard = Shard(
        await open_link("shard", own_mesh_server), name="s0", site=SITE, partitions=range(64), folder=data / "s0"
    )
    async with hosted(shard):
        operator = await Asker(await open_link("operator", own_mesh_server)).open()
        async with asyncio.timeout(5):
            while (await operator.ask(subjects.SHARD_STATUS, subjects.shard_status("s0"), Status())).skipped < 3:
                pass  # the next question takes a round trip
        found = telling(await findings_of(data), "shard s0 skipped 3 events")
    assert found.verdict == "warning"
