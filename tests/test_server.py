"""The life of a site's nats-server, and the private files of its users."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SITE, open_raw, server_options, start_mesh_server

from cli import server as servers
from cli.credentials import Credentials
from cli.server import (
    OLDEST_SERVER,
    AddressInUse,
    DataInUse,
    NatsServer,
    NatsServerFailed,
    NatsServerMissing,
    find_nats_server,
    free_port,
    reload_running,
    server_version,
)
from mnemesh import subjects
from mnemesh.errors import BadRequest, NotFound


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def script(file: Path, line: str) -> Path:
    """A program of one line of shell."""
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)
    return file


async def test_passwords_are_in_private_files_only(tmp_path: Path) -> None:
    server = NatsServer(server_options(tmp_path / "data"))
    alice = server.credentials.add_agent("acme", "alice")
    async with server:
        assert mode(server.credentials.folder) == 0o700
        holders = [
            path
            for path in (tmp_path / "data").rglob("*")
            if path.is_file() and alice.password in path.read_text("latin1")
        ]
    assert sorted(path.name for path in holders) == ["acme.alice.json", "nats-server.conf"]
    assert {mode(path) for path in holders} == {0o600}


async def test_acknowledged_writes_survive_a_killed_server(tmp_path: Path) -> None:
    server = await start_mesh_server(tmp_path)
    gateway = await open_raw(server, "gateway")
    await gateway.client.request(subjects.log_event(SITE, "acme", 0, "e1"), b"event")
    await gateway.client.close()
    await server.kill()
    assert server.pid is None
    async with server:
        operator = await open_raw(server, "operator")
        info = await operator.client.request(f"$JS.API.STREAM.INFO.{subjects.log_stream(SITE)}")
        assert json.loads(info.data)["state"]["messages"] == 1
        await operator.client.close()


async def test_a_paused_server_answers_nobody_until_it_is_resumed_and_can_be_stopped_while_paused(
    tmp_path: Path,
) -> None:
    async with NatsServer(server_options(tmp_path)) as server:
        raw = await open_raw(server, "gateway")
        server.pause()
        answer = asyncio.ensure_future(raw.client.flush())
        done, _ = await asyncio.wait([answer], timeout=0.1)
        assert not done
        server.resume()
        await answer
        server.pause()
        await server.stop(timeout_s=10)
        assert server.pid is None
        await raw.client.close()


async def test_the_end_of_the_process_is_noticed(tmp_path: Path) -> None:
    async with NatsServer(server_options(tmp_path)) as server:
        ended = asyncio.ensure_future(server.wait())
        await server.kill()
        assert await ended == -signal.SIGKILL


async def test_a_second_server_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    async with NatsServer(server_options(tmp_path)) as server:
        with pytest.raises(DataInUse):
            await NatsServer(server.options).start()
        assert server.pid is not None


@pytest.mark.parametrize("taken", ["port", "monitoring_port"])
async def test_a_taken_port_is_named_as_such(tmp_path: Path, taken: str) -> None:
    async with NatsServer(server_options(tmp_path / "one")) as server:
        port = getattr(server.options, taken)
        second = replace(server_options(tmp_path / "two"), **{taken: port})
        with pytest.raises(AddressInUse, match=str(port)):
            await NatsServer(second).start()


async def test_a_server_that_cannot_start_shows_what_it_logged(tmp_path: Path) -> None:
    options = replace(server_options(tmp_path / "data"), host="no.such.host.invalid")
    with pytest.raises(NatsServerFailed) as failure:
        await NatsServer(options).start(timeout_s=20)
    assert any("no.such.host.invalid" in line for line in failure.value.log_tail)


async def test_a_port_where_another_program_never_answers_is_named_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    monkeypatch.setattr(servers, "LOOK_S", 3600)
    options = server_options(tmp_path)
    async with await asyncio.start_server(mute, "127.0.0.1", options.monitoring_port):
        with pytest.raises(AddressInUse, match=str(options.monitoring_port)):
            await NatsServer(options).start(timeout_s=3600)


async def test_a_page_of_a_frozen_server_is_waited_for_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with NatsServer(server_options(tmp_path)) as server:
        assert await servers.monitoring(server.options, "/healthz") == {"status": "ok"}
        server.pause()
        monkeypatch.setattr(servers, "LOOK_S", 0.1)
        assert await servers.monitoring(server.options, "/healthz") == {}


def let_time_pass(monkeypatch: pytest.MonkeyPatch, after: Callable[[str], float]) -> None:
    """After each look at a server's health the loop's clock is set on, by what `after` has for the status."""
    loop = asyncio.get_running_loop()
    look, time = servers.monitoring, loop.time
    passed = 0.0

    async def looked(*page: Any) -> dict[str, Any]:
        nonlocal passed
        health = await look(*page)
        passed += after(health.get("status", ""))
        return health

    monkeypatch.setattr(servers, "monitoring", looked)
    monkeypatch.setattr(loop, "time", lambda: time() + passed)


async def stopped_mesh_server(data: Path) -> tuple[NatsServer, Path]:
    """A server that has a log and is stopped, and the file of the log that it reads first."""
    server = await start_mesh_server(data)
    await server.stop()
    return server, data / "jetstream" / "MESH" / "streams" / subjects.log_stream(SITE) / "meta.inf"


async def test_a_server_that_takes_long_to_recover_its_streams_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device with a log of 330 MB was killed and never came up again: each start was given up after a minute."""
    caplog.set_level("WARNING", logger="mnemesh.server")
    server, meta = await stopped_mesh_server(tmp_path)
    held = meta.read_bytes()
    meta.unlink()
    os.mkfifo(meta)  # it recovers until somebody writes there
    heard = 0

    def after(status: str) -> float:
        nonlocal heard
        if status != "error":
            return 0
        heard += 1
        if heard == 4:
            threading.Thread(target=meta.write_bytes, args=[held], daemon=True).start()
        return 50

    let_time_pass(monkeypatch, after)
    await server.start(timeout_s=60)
    await server.stop()
    assert "still recovers its streams" in caplog.text


async def test_a_start_tells_of_a_stream_that_could_not_be_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, meta = await stopped_mesh_server(tmp_path)
    meta.write_text("spoilt")
    let_time_pass(monkeypatch, lambda status: 100 if status == "unavailable" else 0)
    with pytest.raises(NatsServerFailed, match=r"nats-server was not ready in .* could not be recovered"):
        await server.start()


async def test_a_server_that_is_well_but_writes_no_ports_file_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = script(tmp_path / "program", f'exec {find_nats_server()} "$@" --ports_file_dir /no/such/folder')
    let_time_pass(monkeypatch, lambda status: 100 if status == "ok" else 0)
    with pytest.raises(NatsServerFailed, match="has written no ports file"):
        await NatsServer(server_options(tmp_path / "data"), program=program).start()


def test_a_device_may_have_all_of_its_streams_in_memory_after_a_kill(tmp_path: Path) -> None:
    block = tmp_path / "jetstream" / "MESH" / "1.blk"
    block.parent.mkdir(parents=True)
    with block.open("wb") as file:
        file.truncate(100 * 1024 * 1024)
    hub = server_options(tmp_path)
    assert servers._go_settings(hub) == {}
    device = replace(hub, hub="nats://127.0.0.1:1")
    assert servers._go_settings(device) == {"GOMEMLIMIT": f"{servers.DEVICE_MEMORY_MIB + 100}MiB"}


async def test_a_server_of_which_nothing_is_heard_is_given_up(tmp_path: Path) -> None:
    program = script(tmp_path / "silent", "exec sleep 60")
    with pytest.raises(NatsServerFailed, match="nats-server was not ready"):
        await NatsServer(server_options(tmp_path / "data"), program=program).start(timeout_s=0.5)


ABANDON = """
import asyncio, os, sys
from pathlib import Path
from cli.server import NatsServer, ServerOptions

async def main():
    server = NatsServer(ServerOptions(data=Path(sys.argv[1]), port=int(sys.argv[2]), monitoring_port=int(sys.argv[3])))
    await server.start()
    print(server.pid, flush=True)
    os._exit(9)

asyncio.run(main())
"""


async def test_the_orphan_of_a_parent_that_died_is_found_and_replaced(tmp_path: Path) -> None:
    options = server_options(tmp_path)
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ABANDON, str(tmp_path), str(options.port), str(options.monitoring_port)),
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await parent.communicate()
    orphan = int(said)
    Credentials(tmp_path, url=options.url).add_agent("acme", "alice")
    assert await reload_running(tmp_path)
    server = NatsServer(options)
    alice = await open_raw(server, "acme.alice")
    async with server:
        assert server.pid not in (None, orphan)
        await asyncio.wait_for(alice.closed.wait(), 10)
    assert not await reload_running(tmp_path)


def test_the_program_found_is_new_enough() -> None:
    assert server_version(find_nats_server()) >= OLDEST_SERVER


def fake_server(folder: Path, version: str) -> Path:
    """A program that says it is some version of nats-server: real old ones are not at hand."""
    folder.mkdir()
    return script(folder / "nats-server", f"echo 'nats-server: v{version}'")


def test_an_old_program_on_the_path_is_passed_over_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = fake_server(tmp_path / "bin", "2.10.4")
    monkeypatch.setenv("PATH", str(old.parent), prepend=":")
    caplog.set_level("WARNING", logger="mnemesh.server")
    assert find_nats_server() != old
    assert "2.10.4, too old" in caplog.text


def test_an_old_program_alone_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fake_server(tmp_path / "bin", "2.10.4")
    monkeypatch.setattr(servers, "_candidates", lambda: [old])
    with pytest.raises(NatsServerMissing, match=r"needs nats-server 2\.12 or later; .*/bin/nats-server is 2\.10\.4"):
        find_nats_server()


# ── credentials ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_user_keeps_the_password_and_follows_the_server_to_another_url(tmp_path: Path) -> None:
    first = Credentials(tmp_path).add_agent("acme", "alice")
    moved = Credentials(tmp_path, url=f"nats://127.0.0.1:{free_port()}").add_agent("acme", "alice")
    assert moved.password == first.password
    assert moved.url != first.url
    assert json.loads(moved.path.read_text())["inbox_prefix"] == subjects.agent_inbox("acme", "alice")


def test_every_role_has_a_user_and_no_two_share_a_password(tmp_path: Path) -> None:
    credentials = Credentials(tmp_path)
    credentials.ensure_roles()
    users = [*credentials.list(), credentials.add_agent("acme", "alice")]
    assert {user.role for user in users} == {"agent", "gateway", "router", "shard", "operator", "hub", "views", "sys"}
    assert len({user.password for user in users}) == len(users)


@pytest.mark.parametrize(("tenant", "agent"), [("acme", "../x"), ("a.b", "c"), ("", "alice"), ("acme", "*")])
def test_a_name_that_is_not_plain_makes_no_file(tmp_path: Path, tenant: str, agent: str) -> None:
    with pytest.raises(BadRequest):
        Credentials(tmp_path).add_agent(tenant, agent)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_user_is_not_found_and_a_broken_file_is_named(tmp_path: Path) -> None:
    credentials = Credentials(tmp_path)
    with pytest.raises(NotFound):
        credentials.load("acme.nobody")
    gateway = credentials.ensure("gateway")
    gateway.path.write_text("{")
    with pytest.raises(BadRequest, match=r"gateway\.json"):
        credentials.load("gateway")
    with pytest.raises(BadRequest):
        credentials.ensure("agent")
