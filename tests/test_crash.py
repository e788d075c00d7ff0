"""One crash a test: what each part of a mesh leaves behind, and how it comes back. All at once: `ledger.py`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
import uvloop
from conftest import SITE, OpenAsker, OpenLink, server_options
from disk import disk, needs_root
from ledger import STRONG, statuses

import mnemesh
from cli.doctor import diagnose
from cli.mesh import Mesh, MeshOptions
from cli.server import NatsServer
from memory_shards.shard import Shard
from mnemesh import Memory, messages, subjects, wire
from mnemesh.actor import handles
from mnemesh.asker import Asker
from mnemesh.atomic_batch import BATCH_COMMIT, BATCH_ID, BATCH_SEQUENCE
from mnemesh.call import Call
from mnemesh.clock import HybridClock, wall_ms
from mnemesh.connection import Link
from mnemesh.errors import MnemeshError, Timeout, Unavailable
from mnemesh.host import Host, hosted
from mnemesh.ids import PARTITIONS
from mnemesh.jetstream import check, stream_state
from router.peers import Devices
from router.router import Router
from services.gateway import Gateway
from services.site_policy import SitePolicy

HOUR_MS = 3_600_000
ENTITIES = 50


@asynccontextmanager
async def alice_on(server: NatsServer) -> AsyncIterator[Memory]:
    async with mnemesh.connect(credentials=server.credentials.load("acme.alice").path) as memory:
        yield memory


async def fill(memory: Memory, count: int = ENTITIES) -> None:
    """Entities `e:0`, `e:1`, … with their number as attribute, and a vector each."""
    await memory.ingest(
        [
            {"entity_id": f"e:{n}", "type": "thing", "attributes": {"n": n}, "vectors": {"v": wire.as_vector([n, 1.0])}}
            for n in range(count)
        ]
    )


async def is_full(memory: Memory, count: int = ENTITIES) -> bool:
    contexts = [await memory.get_context(f"e:{n}", consistency=STRONG) for n in range(count)]
    return [context.attributes for context in contexts] == [{"n": n} for n in range(count)]


def whole_shard(link: Link, folder: Path) -> Shard:
    return Shard(link, name="s0", site=SITE, partitions=range(PARTITIONS), folder=folder)


async def status_of(operator: Asker, head: int) -> messages.ShardStatus:
    (status,) = await statuses(operator, "s0", 1, head)
    return status


async def metric(log_file: Path, name: str) -> float:
    """A value of the metrics page of the process that logs there now."""
    port = re.findall(r"metrics and health on port (\d+)", await asyncio.to_thread(log_file.read_text))[-1]

    def page() -> str:
        with urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
            text: str = reply.read().decode()
            return text

    (value,) = re.findall(rf"^{name} (\S+)$", await asyncio.to_thread(page), re.MULTILINE)
    return float(value)


@asynccontextmanager
async def small_mesh(data: Path) -> AsyncIterator[Mesh]:
    options = MeshOptions(server=server_options(data), shards=1, tenants=["acme"], agents=[("acme", "alice")])
    async with Mesh(options) as mesh:
        yield mesh


# ── shards ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_killed_shard_resumes_from_its_watermark_with_the_same_digest(
    tmp_path: Path, open_asker: OpenAsker
) -> None:
    async with small_mesh(tmp_path) as mesh, alice_on(mesh.server) as memory:
        await fill(memory)
        operator = await open_asker("operator", mesh.server)
        before = await status_of(operator, ENTITIES)
        shard = mesh.children["s0.0"]
        assert shard.process is not None
        killed = shard.process
        shard.send(signal.SIGKILL)
        await killed.wait()
        late = await memory.set_context("late", attributes={"n": 1}, vectors={"v": [1.0, 0.0]})
        await mesh.ready()
        after = await status_of(operator, late.version)
        assert await metric(shard.log_file, "mnemesh_shard_documents_applied") == 1
        assert await metric(shard.log_file, "mnemesh_shard_vectors_applied") == 1
        assert (after.entities, after.vectors) == (before.entities + 1, before.vectors + 1)
        killed = shard.process
        shard.send(signal.SIGKILL)
        await killed.wait()
        await mesh.ready()
        assert (await status_of(operator, late.version)) == after
        assert await metric(shard.log_file, "mnemesh_shard_documents_applied") == 0
        assert await metric(shard.log_file, "mnemesh_shard_vectors_applied") == 0


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def scribble(file: Path) -> None:
    """Over all but the header, so that it opens."""
    with file.open("r+b") as opened:
        opened.seek(4096)
        opened.write(b"\xa5" * (file.stat().st_size - 4096))


def behead(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(b"\xa5" * 100)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [("memory.db", halve), ("vectors.db", scribble), ("memory.db", behead), ("vectors.db", behead)],
)
async def test_a_store_that_cannot_be_read_any_more_is_rebuilt_from_the_log(
    tmp_path: Path, open_asker: OpenAsker, name: str, spoil: Callable[[Path], None]
) -> None:
    async with small_mesh(tmp_path) as mesh, alice_on(mesh.server) as memory:
        await fill(memory, 2000)
        operator = await open_asker("operator", mesh.server)
        before = await status_of(operator, 2000)
        shard = mesh.children["s0.0"]
        assert shard.process is not None
        stopped = shard.process
        shard.send(signal.SIGTERM)
        await stopped.wait()
        spoil(tmp_path / "shards" / "s0.0" / name)
        while True:
            with suppress(MnemeshError):  # by the first read or write that meets the damage
                await memory.set_context("e:0", attributes={"n": 0})
                assert await is_full(memory, 2000)
                after = await status_of(operator, 2001)
                break
        assert (after.entities, after.vectors) == (before.entities, before.vectors)
        assert (await memory.search_embedding([7.0, 1.0], space="v", k=1)).hits


async def test_a_second_process_on_a_shards_folder_is_refused_and_told_why(
    own_mesh_server: NatsServer, open_link: OpenLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory_shards.folder.HANDOVER_S", 0.2)
    folder = tmp_path / "shard"
    async with hosted(whole_shard(await open_link("shard", own_mesh_server), folder)):
        with pytest.raises(Unavailable, match=re.escape(f"{folder} is in use by process {os.getpid()}")):
            async with hosted(whole_shard(await open_link("shard", own_mesh_server), folder)):
                pass
    async with hosted(whole_shard(await open_link("shard", own_mesh_server), folder)):
        pass


async def test_a_new_process_waits_while_the_old_one_drains(
    own_mesh_server: NatsServer, open_link: OpenLink, tmp_path: Path
) -> None:
    old = Host(whole_shard(await open_link("shard", own_mesh_server), tmp_path / "shard"))
    new = Host(whole_shard(await open_link("shard", own_mesh_server), tmp_path / "shard"))
    async with asyncio.TaskGroup() as hosts:
        hosts.create_task(old.run())
        await old.ready.wait()
        hosts.create_task(new.run())
        old.stop()
        await new.ready.wait()
        new.stop()


# ── gateways and routers ────────────────────────────────────────────────────────────────────────────────────────


class Mute(Gateway):
    """A gateway that appends, and dies before it answers."""

    @handles(subjects.SET_CONTEXT)
    async def set_context(self, request: messages.SetContext, call: Call) -> messages.Written:
        await super().set_context(request, call)
        return await asyncio.Future()


async def test_a_retry_after_a_gateway_died_between_append_and_reply_is_a_duplicate(
    own_mesh_server: NatsServer, open_link: OpenLink, open_asker: OpenAsker
) -> None:
    dying = Host(Mute(await open_link("gateway", own_mesh_server), site=SITE))
    async with alice_on(own_mesh_server) as memory, asyncio.TaskGroup() as hosts:
        running = hosts.create_task(dying.run())
        await dying.ready.wait()
        with pytest.raises(Timeout):
            await memory.set_context("e", attributes={"n": 1}, message_id="m1", budget_ms=500)
        running.cancel()
        await asyncio.wait([running])
        async with hosted(Gateway(await open_link("gateway", own_mesh_server), site=SITE)):
            written = await memory.set_context("e", attributes={"n": 1}, message_id="m1")
        assert written.duplicate
        operator = await open_asker("operator", own_mesh_server)
        state = await stream_state(operator.inbox, subjects.log_stream(SITE))
        assert (state.messages, state.last_sequence) == (1, written.version)


async def test_a_batch_whose_beginning_was_lost_with_the_connection_may_be_repeated(
    own_mesh_server: NatsServer, open_asker: OpenAsker
) -> None:
    gateway = await open_asker("gateway", own_mesh_server)
    headers = {BATCH_ID: "b", BATCH_SEQUENCE: "3", BATCH_COMMIT: "1"}
    subject = subjects.log_event(SITE, "acme", "0", "e")
    reply = await gateway.inbox.request(subject, b"", budget_s=5, headers=headers)
    with pytest.raises(Unavailable, match="incomplete"):
        check(json.loads(reply.data))


async def test_a_gateway_that_is_told_to_stop_answers_every_write_that_it_took(
    own_mesh_server: NatsServer, open_link: OpenLink, open_asker: OpenAsker
) -> None:
    alice = await open_asker("acme.alice", own_mesh_server)
    subject = subjects.set_context("acme", "alice")
    answered = asyncio.Event()

    async def write(number: int) -> int | Unavailable:
        """The sequence, or that nobody took it; any other error fails the test."""
        try:
            reply = await alice.ask(subjects.SET_CONTEXT, subject, {"entity_id": f"e:{number}"})
        except Unavailable as error:
            return error
        finally:
            answered.set()
        return reply.version

    async with hosted(Gateway(await open_link("gateway", own_mesh_server), site=SITE)) as host:
        writes = [asyncio.ensure_future(write(number)) for number in range(2000)]
        await answered.wait()
        host.stop()
        outcomes = await asyncio.gather(*writes)
    versions = [outcome for outcome in outcomes if isinstance(outcome, int)]
    operator = await open_asker("operator", own_mesh_server)
    state = await stream_state(operator.inbox, subjects.log_stream(SITE))
    assert sorted(versions) == list(range(1, state.last_sequence + 1))


async def test_two_gateways_and_two_routers_share_the_load_and_each_entity_keeps_its_order(
    own_mesh_server: NatsServer, open_link: OpenLink, tmp_path: Path
) -> None:
    async def gateway(ahead_ms: int) -> Gateway:
        clock = HybridClock(lambda: wall_ms() + ahead_ms)
        return Gateway(await open_link("gateway", own_mesh_server), site=SITE, clock=clock)

    gateways = [await gateway(HOUR_MS), await gateway(-HOUR_MS)]
    routers = [Router(await open_link("router", own_mesh_server), peers=Devices(SitePolicy(SITE))) for _ in range(2)]
    shards = [
        Shard(
            await open_link("shard", own_mesh_server),
            name=f"s{half}",
            site=SITE,
            partitions=range(half * PARTITIONS // 2, (half + 1) * PARTITIONS // 2),
            folder=tmp_path / f"s{half}",
        )
        for half in range(2)
    ]
    async with hosted(*gateways, *routers, *shards), alice_on(own_mesh_server) as memory:
        for number in range(60):
            entity_id = f"e:{number % 3}"
            written = await memory.set_context(entity_id, text=f"word{number}", attributes={"n": number})
            context = await memory.get_context(entity_id, consistency=STRONG)
            assert (context.attributes, context.version) == ({"n": number}, written.version)
            found = await memory.search_text(f"word{number}", consistency=STRONG)
            assert [hit.entity_id for hit in found.hits] == [entity_id]
    for servers, operation in ((gateways, "set_context"), (routers, "search_text")):
        shares = [server.stats[operation].requests for server in servers]
        assert sum(shares) == 60
        assert min(shares) > 0


async def test_a_connection_that_is_down_with_data_waiting_closes_quietly_on_uvloop(
    own_mesh_server: NatsServer,
) -> None:
    async def close_while_down() -> None:
        link = await Link.open(own_mesh_server.credentials.load("gateway").link_options())
        lost = asyncio.Event()
        link.on_lost(lost.set)
        assert own_mesh_server.pid is not None
        os.kill(own_mesh_server.pid, signal.SIGKILL)
        await lost.wait()
        await link.publish(subjects.log_event(SITE, "acme", "0", "e"), b"")
        await link.close()

    def on_uvloop() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(close_while_down())

    await asyncio.to_thread(on_uvloop)


async def test_a_flush_on_a_socket_that_closed_unnoticed_is_unavailable_on_uvloop(own_mesh_server: NatsServer) -> None:
    async def flush_when_closed() -> None:
        link = await Link.open(own_mesh_server.credentials.load("gateway").link_options())
        assert link._client._socket is not None
        link._client._socket.abort()
        await asyncio.sleep(0)  # the round of the loop in which the socket has closed and nats-py does not know it
        assert link.is_connected
        with pytest.raises(Unavailable):
            await link.flush()
        await link.close()

    def on_uvloop() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(flush_when_closed())

    await asyncio.to_thread(on_uvloop)


# ── all of it ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_nats_server_that_is_killed_while_it_starts_is_started_again(tmp_path: Path) -> None:
    async with small_mesh(tmp_path) as mesh, alice_on(mesh.server) as memory:
        await fill(memory)
        first = mesh.server.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        while mesh.server.pid in (first, None):  # noqa: ASYNC110  # a start under way is no event
            await asyncio.sleep(0)
        os.kill(mesh.server.pid, signal.SIGKILL)
        await mesh.ready()
        assert await is_full(memory)


@needs_root
async def test_a_full_disk_costs_nothing_that_was_acknowledged_and_writes_go_on_once_there_is_room(
    tmp_path: Path,
) -> None:
    with disk(tmp_path / "disk", megabytes=24) as resize:
        async with small_mesh(tmp_path / "disk" / "data") as mesh, alice_on(mesh.server) as memory:
            acknowledged = 0
            with suppress(Timeout):
                while True:
                    blob = os.urandom(200_000).hex()
                    await memory.set_context(f"e:{acknowledged}", attributes={"blob": blob}, budget_ms=1000)
                    acknowledged += 1
            told = [finding async for finding in diagnose(mesh.options.server.data) if finding.verdict == "wrong"]
            assert len(told) == 1
            assert "no space left on device" in told[0].what
            assert "make room" in told[0].advice
            resize(400)
            while True:
                with suppress(MnemeshError):
                    await memory.set_context("late", attributes={"n": 1}, budget_ms=1000)
                    break
            for n in range(acknowledged):
                assert (await memory.get_context(f"e:{n}", consistency=STRONG)).version == n + 1


class Up:
    """`mnemesh up` as a process, with alice of tenant acme."""

    def __init__(self, folder: Path) -> None:
        self.server = NatsServer(server_options(folder / "data"))
        self.log_file = folder / "up.log"
        options = self.server.options
        self._command = [sys.executable, "-m", "cli.main", "up", "--data", str(options.data), "--site", SITE]
        self._command += ["--port", str(options.port), "--monitoring-port", str(options.monitoring_port)]
        self._command += ["--metrics-port", "0", "--shards", "1", "--agent", "acme.alice"]
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> Up:
        with self.log_file.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=log
            )
        assert self.process.stdout is not None
        while b"Ctrl-C" not in (line := await self.process.stdout.readline()):
            assert line, f"it ended before it was up: {self.log_file.read_text()}"
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()

    def server_pid(self) -> int:
        return int((self.server.options.data / "nats-server.pid").read_text())


async def test_mnemesh_up_killed_comes_back_with_all_data(tmp_path: Path) -> None:
    async with Up(tmp_path) as up:
        async with alice_on(up.server) as memory:
            await fill(memory)
        orphan = up.server_pid()
        up.process.kill()
        await up.process.wait()
    async with Up(tmp_path) as up:
        assert up.server_pid() != orphan
        async with alice_on(up.server) as memory:
            assert await is_full(memory)
            written = await memory.set_context("e:0", attributes={"n": 0})
            assert written.version == ENTITIES + 1
