"""The SDK beyond its operations: what it exports, when it asks again, how long it takes at most, how it connects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from desk import Desk, set_context, written
from mesh import Mesh

import mnemesh
from cli.server import NatsServer, free_port
from mnemesh import Memory
from mnemesh.call import MESSAGE_ID, Call
from mnemesh.client import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, _backoff_s
from mnemesh.errors import BadRequest, Busy, Conflict, Denied, Internal, MnemeshError, Stale, Timeout, Unavailable
from mnemesh.host import hosted
from mnemesh.messages import SetContext, Written

in_the_mesh = pytest.mark.asyncio(loop_scope="module")


def test_the_exported_names_are_these() -> None:
    assert mnemesh.__all__ == [
        "BadRequest",
        "Busy",
        "Conflict",
        "Consistency",
        "Denied",
        "Edge",
        "Entity",
        "Internal",
        "Memory",
        "MnemeshError",
        "NotFound",
        "Stale",
        "Timeout",
        "TooLarge",
        "Unavailable",
        "connect",
    ]
    assert all(hasattr(mnemesh, name) for name in mnemesh.__all__)


def test_every_error_is_the_builtin_that_a_python_programmer_would_catch() -> None:
    for kind, builtin in (
        (mnemesh.BadRequest, ValueError),
        (mnemesh.Denied, PermissionError),
        (mnemesh.NotFound, LookupError),
        (mnemesh.Timeout, TimeoutError),
        (mnemesh.Unavailable, ConnectionError),
        (mnemesh.TooLarge, ValueError),
    ):
        assert issubclass(kind, builtin)
        assert issubclass(kind, mnemesh.MnemeshError)


# ── asking again ────────────────────────────────────────────────────────────────────────────────────────────────


def test_backoff_doubles_up_to_a_ceiling_with_full_jitter_after_what_the_far_side_asked_for() -> None:
    for failures in range(1, 12):
        ceiling = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2**failures)
        pauses = [_backoff_s(failures, Unavailable("gone")) for _ in range(300)]
        assert 0 <= min(pauses) < 0.2 * ceiling
        assert 0.8 * ceiling < max(pauses) <= ceiling
        assert all(0.5 <= _backoff_s(failures, Busy("full", retry_after_ms=500)) <= 0.5 + ceiling for _ in range(50))


class Reluctant:
    """A gateway's work that fails so many times; it notes the id of each try."""

    def __init__(self, error: MnemeshError, times: int) -> None:
        self.ids: list[str] = []
        self._error = error
        self._times = times

    async def __call__(self, request: SetContext, call: Call) -> Written:
        self.ids.append(call.headers[MESSAGE_ID])
        if len(self.ids) <= self._times:
            raise self._error
        return written(request.entity_id)


@pytest.fixture
def instead(mesh: Mesh) -> Callable[[Reluctant], Awaitable[Desk]]:
    async def desk(work: Reluctant) -> Desk:
        return Desk(await mesh.link("gateway"), work)

    return desk


@pytest.mark.parametrize("error", [Busy("full", retry_after_ms=1), Unavailable("gone"), Stale("behind")])
@in_the_mesh
async def test_a_failure_that_may_pass_is_asked_again_under_the_same_id(
    mesh: Mesh, alice: Memory, instead: Callable[[Reluctant], Awaitable[Desk]], error: MnemeshError
) -> None:
    work = Reluctant(error, times=3)
    async with mesh.without("gateway"), hosted(await instead(work)):
        await alice.set_context("e", message_id="mine")
        assert work.ids == ["mine"] * 4
        await alice.set_context("e")
        assert len(work.ids) == 5


@pytest.mark.parametrize("kind", [BadRequest, Conflict, Denied, Internal, Timeout])
@in_the_mesh
async def test_a_failure_that_stays_is_asked_once(
    mesh: Mesh, alice: Memory, instead: Callable[[Reluctant], Awaitable[Desk]], kind: type[MnemeshError]
) -> None:
    work = Reluctant(kind("as it is"), times=100)
    async with mesh.without("gateway"), hosted(await instead(work)):
        with pytest.raises(kind, match="as it is"):
            await alice.set_context("e")
        assert len(work.ids) == 1


@in_the_mesh
async def test_the_budget_bounds_the_whole_call_and_its_end_tells_the_last_failure(
    mesh: Mesh, alice: Memory, instead: Callable[[Reluctant], Awaitable[Desk]]
) -> None:
    work = Reluctant(Busy("always full", retry_after_ms=20), times=10_000)
    loop = asyncio.get_running_loop()
    async with mesh.without("gateway"), hosted(await instead(work)):
        began = loop.time()
        with pytest.raises(Busy, match="always full"):
            await alice.set_context("e", budget_ms=400)
        assert loop.time() - began < 2
        assert 1 < len(work.ids) <= 20


@in_the_mesh
async def test_a_last_try_without_time_does_not_hide_what_failed_before(mesh: Mesh, alice: Memory) -> None:
    async with mesh.without("s0", "s1"):
        for budget_ms in range(100, 260, 8):
            with pytest.raises(Unavailable):
                await alice.search_text("anything", budget_ms=budget_ms)


@in_the_mesh
async def test_a_service_that_does_not_answer_is_a_timeout_when_the_budget_ends(mesh: Mesh, alice: Memory) -> None:
    never = asyncio.Event()

    async def hang(request: SetContext, call: Call) -> Written:
        await never.wait()
        return written(request.entity_id)

    async with mesh.without("gateway"), hosted(Desk(await mesh.link("gateway"), hang)):
        with pytest.raises(Timeout):
            await alice.set_context("e", budget_ms=100)
        with pytest.raises(Timeout):
            await set_context(alice._asker, budget_s=0.1)


@pytest.mark.parametrize(("service", "name"), [("router", "search_text"), ("gateway", "set_context")])
@in_the_mesh
async def test_calls_do_not_notice_that_a_service_starts_again(
    mesh: Mesh, alice: Memory, service: str, name: str
) -> None:
    await alice.set_context("e", text="restart")

    async def ask(n: int) -> None:
        if name == "search_text":
            found = await alice.search_text("restart", budget_ms=20_000)
            assert found.coverage is not None
        else:
            await alice.set_context("e", attributes={f"n{n}": n}, budget_ms=20_000)

    stopped = asyncio.Event()

    async def keep_asking(first: int) -> int:
        asked = 0
        while not stopped.is_set() or asked < 3:
            await ask(first + asked)
            asked += 1
        return asked

    async with asyncio.TaskGroup() as tasks:
        callers = [tasks.create_task(keep_asking(1000 * n)) for n in range(8)]
        for _ in range(2):
            async with mesh.without(service):
                waiting = tasks.create_task(ask(9999))
                await asyncio.wait([waiting], timeout=0.1)
                assert not waiting.done()
        stopped.set()
    assert all(caller.result() >= 3 for caller in callers)


async def test_a_killed_server_that_comes_back_is_not_noticed_within_the_budget(
    own_mesh_server: NatsServer,
) -> None:
    mesh = Mesh(own_mesh_server, "hub")
    await mesh.start("gateway", "router", "s0", "s1")
    async with mesh.connect() as memory:
        await memory.set_context("e", attributes={"n": 1})
        await own_mesh_server.kill()
        write = asyncio.ensure_future(memory.set_context("e", attributes={"n": 2}, budget_ms=30_000))
        read = asyncio.ensure_future(memory.get_context("e", budget_ms=30_000))
        await own_mesh_server.start()
        await write
        await read
    await mesh.close()


# ── connecting ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_nobody_there_is_unavailable_at_once() -> None:
    began = asyncio.get_running_loop().time()
    with pytest.raises(Unavailable, match=r"no NATS server answers at nats://127\.0\.0\.1"):
        async with mnemesh.connect(f"nats://127.0.0.1:{free_port()}", tenant="acme", agent="alice", password="x"):
            pass
    assert asyncio.get_running_loop().time() - began < 1


async def test_a_server_that_says_nothing_is_unavailable_after_the_timeout() -> None:
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    with pytest.raises(Unavailable):
        async with mnemesh.connect(
            f"nats://127.0.0.1:{port}", tenant="acme", agent="alice", password="x", connect_timeout_s=0.3
        ):
            pass
    silent.close()


@pytest.mark.parametrize(("agent", "password"), [("alice", "wrong"), ("alice", None), ("nobody", "x")])
@in_the_mesh
async def test_who_the_server_does_not_know_is_denied(mesh: Mesh, agent: str, password: str | None) -> None:
    with pytest.raises(Denied, match=f"acme.{agent}"):
        async with mnemesh.connect(mesh.server.url, tenant="acme", agent=agent, password=password):
            pass


@in_the_mesh
async def test_arguments_override_the_credentials_file(mesh: Mesh) -> None:
    alice, bob = (mesh.server.credentials.load(f"acme.{name}") for name in ("alice", "bob"))
    async with mnemesh.connect(credentials=alice.path, agent="bob", password=bob.password) as memory:
        assert (memory.tenant, memory.agent) == ("acme", "bob")
        await memory.set_context("e")
    with pytest.raises(Unavailable):
        async with mnemesh.connect(f"nats://127.0.0.1:{free_port()}", credentials=alice.path):
            pass


async def test_a_credentials_file_that_is_none_is_a_bad_request(tmp_path: Path) -> None:
    (broken := tmp_path / "broken.json").write_text("{")
    (listed := tmp_path / "list.json").write_text("[]")
    (empty := tmp_path / "empty.json").write_text("{}")
    for path, says in (
        (tmp_path / "missing.json", "cannot read"),
        (broken, "not a credentials file"),
        (listed, "tenant ''|not a credentials file"),
        (empty, "tenant ''|not a credentials file"),
    ):
        with pytest.raises(BadRequest, match=says):
            async with mnemesh.connect(credentials=path):
                pass


@pytest.mark.parametrize(("tenant", "agent"), [("a.b", "x"), ("", "x"), ("acme", "*"), ("acme", "a b"), (None, None)])
async def test_names_that_are_no_tokens_are_refused_before_anything_is_sent(
    tenant: str | None, agent: str | None
) -> None:
    with pytest.raises(BadRequest):
        async with mnemesh.connect("nats://127.0.0.1:1", tenant=tenant, agent=agent):
            pass


@in_the_mesh
async def test_calls_after_the_block_are_unavailable_and_do_not_hang(mesh: Mesh) -> None:
    async with mesh.connect() as memory:
        pass
    with pytest.raises(Unavailable):
        await memory.get_context("e", budget_ms=300)
