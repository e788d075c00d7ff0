"""`mnemesh edge` as an operator types it: a device as a process, its enrolment, and what the hub tells of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from sites import TENANT, HubSite, alice_at, device_options, since, stolen

from cli import edge
from cli.devices import new_seed, public_of
from cli.edge_node import EdgeOptions
from cli.main import main
from cli.operator import asking
from cli.server import NatsServer, NatsServerFailed, monitoring
from cli.server_config import ServerOptions
from mnemesh import kv, subjects
from mnemesh.errors import MnemeshError, Unavailable
from services.site_policy import SiteEntry


async def mnemesh(*arguments: str) -> str:
    """What a command prints; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complaint = await process.communicate()
    assert process.returncode == 0, complaint.decode()
    return said.decode()


@contextlib.asynccontextmanager
async def edge_up(options: EdgeOptions, log_file: Path, *more: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`mnemesh edge up` as a process, with more flags."""
    server = options.server
    flags = ["--data", str(server.data), "--site", server.site, "--hub", server.hub, "--port", str(server.port)]
    flags += [
        "--monitoring-port",
        str(server.monitoring_port),
        "--metrics-port",
        "0",
        "--agent",
        f"{TENANT}.alice",
        *more,
    ]
    with log_file.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli.main", "edge", "up", *flags),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    assert process.stdout is not None
    while b"Ctrl-C" not in (line := await process.stdout.readline()):
        assert line, f"it ended before it was up; see {log_file}"
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def test_a_killed_device_comes_back_and_sends_every_acknowledged_write_once(tmp_path: Path) -> None:
    async with HubSite(tmp_path / "hub").up() as hub:
        options = device_options("sub7", tmp_path / "d", f"nats://127.0.0.1:{hub.options.leaf_port}")
        key = (await mnemesh("edge", "key", "--data", str(tmp_path / "d"))).strip()
        await mnemesh("edge", "enrol", "sub7", "--key", key, "--data", str(tmp_path / "hub"))
        acknowledged = []
        for life in range(3):
            async with edge_up(options, tmp_path / "up.log") as process, alice_at(NatsServer(options.server)) as here:
                with contextlib.suppress(MnemeshError):
                    for n in range(200):
                        written = await here.set_context("t:1", attributes={"n": f"{life}-{n}"})
                        acknowledged.append(f"{life}-{n}")
                        if n == 150 and life < 2:
                            process.kill()
        async with edge_up(options, tmp_path / "up.log"), alice_at(hub.server) as there:
            await there.get_context("t:1", consistency=since(written), budget_ms=30_000)
            page = await there.timeline("t:1", limit=1000)
            told = [event.body["attributes"]["n"] for event in page.events]
            assert [n for n in told if n in acknowledged] == acknowledged
            assert len(set(told)) == len(told) <= len(acknowledged) + 2  # a write may be there whose ack was lost
            listed = await mnemesh("edge", "ls", "--data", str(tmp_path / "hub"))
            assert "sub7" in listed
            assert "linked" in listed
        await mnemesh("edge", "revoke", "sub7", "--data", str(tmp_path / "hub"))
        assert "revoked" in await mnemesh("edge", "ls", "--data", str(tmp_path / "hub"))


async def entry_of(hub: HubSite, device: str) -> SiteEntry | None:
    """What the hub's services know of a device."""
    async with asking(hub.options, "test") as operator:
        held = await kv.get(operator.inbox, subjects.SITES.name, device)
    return None if held is None else msgspec.json.decode(held, type=SiteEntry)


async def test_the_hub_knows_whose_memory_a_device_may_have_before_it_may_connect(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(data: Path) -> bool:
        raise NatsServerFailed("it does not answer", [])

    monkeypatch.setattr(edge, "reload_running", fails)
    flags = ["--key", public_of(new_seed()), "--tenant", TENANT, "--data", str(tmp_path / "hub")]
    assert await asyncio.to_thread(main, ["edge", "enrol", "sub7", *flags]) == 1
    assert await entry_of(hub, "sub7") == SiteEntry(tenants=[TENANT])


async def test_a_revocation_that_failed_halfway_is_repeated(
    hub: HubSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await hub.enrol("sub7", tmp_path / "d")
    revoke = ["edge", "revoke", "sub7", "--data", str(tmp_path / "hub")]

    async def fails(data: Path) -> bool:
        raise NatsServerFailed("it does not answer", [])

    async with stolen(hub, tmp_path / "d"):
        while not await leaves_of(hub):
            pass
        with monkeypatch.context() as patched:
            patched.setattr(edge, "reload_running", fails)
            assert await asyncio.to_thread(main, revoke) == 1
        assert await leaves_of(hub)
        assert await asyncio.to_thread(main, revoke) == 1
        assert "no device sub7 is enrolled; " in capsys.readouterr().err
        assert not await leaves_of(hub)
    assert await entry_of(hub, "sub7") == SiteEntry(revoked=True)
    await hub.enrol("sub7", tmp_path / "d")
    assert await entry_of(hub, "sub7") == SiteEntry()


@pytest.mark.parametrize("page", [{}, {"leafs": [{"id": 1 << 40}]}], ids=["not told", "not disconnected"])
async def test_a_device_that_may_still_be_connected_is_not_said_to_be_out(
    hub: HubSite, page: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def told(options: ServerOptions, name: str) -> dict[str, object]:
        return page if name == "/leafz" else await monitoring(options, name)

    monkeypatch.setattr(edge, "monitoring", told)
    with pytest.raises(Unavailable, match="revoke it again"):
        await edge.shut_out(hub.options)


async def leaves_of(hub: HubSite) -> list[object]:
    """The devices that are connected to a hub."""
    return (await monitoring(hub.options, "/leafz"))["leafs"] or []


async def test_a_hub_does_not_send_its_devices_round_the_url_that_they_were_given(tmp_path: Path) -> None:
    async with HubSite(tmp_path / "hub").up() as hub:
        reader, writer = await asyncio.open_connection("127.0.0.1", hub.options.leaf_port)
        verb, _, told = (await reader.readline()).partition(b" ")
        writer.close()
    assert verb == b"INFO"
    assert "leafnode_urls" not in json.loads(told)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["up", "--site", "a.b", "--hub", "nats://x"], "site 'a.b' must be"),
        (["up", "--site", "a", "--hub", "hub.example"], "expected a URL such as nats://"),
        (["up", "--site", "a", "--hub", "nats://x", "--uplink-bytes-per-s", "0"], "must be more than 0"),
        (["enrol", "sub7", "--key", "U", "--data", "nowhere"], "is no mesh's data folder"),
    ],
)
def test_a_flag_that_cannot_be_is_named(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edge", *arguments]) == 1
    assert says in capsys.readouterr().err
