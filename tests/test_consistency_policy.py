"""Consistency by policy: what its text may say, what follows for each kind of read, and that it holds at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from conftest import SITE
from mesh import STRONG, Mesh
from sites import HubSite, alice_at, device
from test_operations import ALL_READS, read

from cli.main import main
from mnemesh import Consistency, Memory, kv, subjects
from mnemesh.asker import Asker
from mnemesh.errors import MnemeshError, NotFound, Stale
from services.consistency_text import parse
from services.read_policy import SiteReadPolicy

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVENTUAL = Consistency()
SHORT_MS = 250


def bounded(lag_ms: int) -> Consistency:
    return Consistency(level="bounded", max_lag_ms=lag_ms)


# ── reads under it ──────────────────────────────────────────────────────────────────────────────────────────────

SetPolicy = Callable[[str], Awaitable[None]]


@pytest_asyncio.fixture(loop_scope="module")
async def set_policy(mesh: Mesh) -> AsyncIterator[SetPolicy]:
    """Set the policy of the mesh, as the operator, and wait until all of its shards have it."""
    link = await mesh.link("operator")
    asker = await Asker(link).open()

    async def put(text: str) -> None:
        parse(text)
        revision = await kv.put(asker.inbox, subjects.CONSISTENCY.name, "own", text.encode())
        for name in ("s0", "s1"):
            reads = mesh.shard(name)._reads
            assert isinstance(reads, SiteReadPolicy)
            await reads._texts.reached(revision)

    yield put
    await put("otherwise: eventual")
    await link.close()


@contextlib.asynccontextmanager
async def lagging(mesh: Mesh) -> AsyncIterator[None]:
    """No shard learns anything new within the block."""
    async with mesh.shard("s0").paused(), mesh.shard("s1").paused():
        yield


async def is_stale(reading: Awaitable[Any]) -> None:
    with pytest.raises(Stale, match="did not catch up"):
        await reading


async def write_all(own: Memory) -> None:
    """Something for each kind of read, which all shards have."""
    await own.set_context("e", type="reading", vectors={"s": [1, 0]}, text="word")
    for name in ALL_READS:
        await read(own, name, consistency=STRONG)


@pytest.mark.parametrize(
    "rule", ["types: {reading: strong}", "otherwise: strong", "types: {reading: {level: bounded, max_lag_ms: 1}}"]
)
async def test_each_kind_of_read_is_as_fresh_as_the_policy_says_unless_the_request_says_otherwise(
    mesh: Mesh, own: Memory, set_policy: SetPolicy, rule: str
) -> None:
    await write_all(own)
    await set_policy(f"tenants: {{{own.tenant}: {{{rule}}}}}")
    async with lagging(mesh):
        await own.set_context("e", attributes={"n": 1})
        for name in ALL_READS:
            assert (await read(own, name, consistency=bounded(60_000))).watermark[SITE]
            assert (await read(own, name, consistency=EVENTUAL)).watermark[SITE]
        await asyncio.gather(*(is_stale(read(own, name, budget_ms=SHORT_MS)) for name in ALL_READS))
        waiting = [asyncio.ensure_future(read(own, name)) for name in ALL_READS]
    told = await asyncio.gather(*waiting)
    head = (await own.get_context("e", consistency=STRONG)).version
    assert all(reply.watermark[SITE] >= head for reply in told)


async def test_a_question_about_one_type_is_under_its_rule_and_others_under_the_strictest(
    mesh: Mesh, own: Memory, set_policy: SetPolicy
) -> None:
    await write_all(own)
    await set_policy(f"tenants: {{{own.tenant}: {{types: {{invoice: strong}}}}}}")
    async with lagging(mesh):
        await own.set_context("other", type="invoice")

        def questions(kind: str | None) -> list[Awaitable[Any]]:
            return [
                own.search_text("word", type=kind, budget_ms=SHORT_MS),
                own.search_embedding([1, 0], space="s", type=kind, budget_ms=SHORT_MS),
                own.timeline(type=kind, budget_ms=SHORT_MS),
            ]

        assert all(await asyncio.gather(*questions("reading")))
        assert (await own.get_context("e")).type == "reading"
        assert (await own.timeline("e")).events
        absent = own.get_context("other", budget_ms=SHORT_MS), own.timeline("other", budget_ms=SHORT_MS)
        walk = own.traverse("e", budget_ms=SHORT_MS)
        await asyncio.gather(*map(is_stale, [*questions("invoice"), *questions(None), walk, *absent]))


async def test_access_control_is_strong_whatever_a_request_says(mesh: Mesh, own: Memory, set_policy: SetPolicy) -> None:
    await write_all(own)
    await own.set_context("e", type="role")
    await own.get_context("e", consistency=STRONG)
    await set_policy(f"tenants: {{{own.tenant}: {{access_control: [role]}}}}")
    async with lagging(mesh):
        token = (await own.set_context("another", type="note")).token
        demands = (None, EVENTUAL, bounded(60_000), Consistency(level="session", token={SITE: 1}))
        await asyncio.gather(
            *(
                is_stale(read(own, name, consistency=demand, budget_ms=SHORT_MS))
                for name in ALL_READS
                for demand in demands
            )
        )
        assert (await own.search_text("word", type="reading")).hits is not None
        waiting = asyncio.ensure_future(own.get_context("e", consistency=EVENTUAL))
    assert (await waiting).watermark[SITE] >= token[SITE]


async def test_on_a_replica_that_lags_a_role_just_granted_is_seen_and_so_is_what_just_became_one(
    mesh: Mesh, own: Memory, set_policy: SetPolicy
) -> None:
    await own.set_context("turns", type="note", attributes={"admin": False})
    await own.set_context("stays", type="note")
    await own.set_context("revoked", type="role")
    for name in ("turns", "stays", "revoked"):
        await own.get_context(name, consistency=STRONG)
    await set_policy(f"tenants: {{{own.tenant}: {{access_control: [role]}}}}")
    async with lagging(mesh):
        await own.set_context("granted", type="role")
        await own.set_context("turns", type="role", attributes={"admin": True})
        await own.forget("revoked")
        assert (await own.get_context("stays")).type == "note"  # has nothing new
        assert (await own.timeline("stays")).events
        await asyncio.gather(
            *(
                is_stale(ask(name, consistency=demand, budget_ms=SHORT_MS))
                for ask in (own.get_context, own.timeline)
                for name in ("granted", "turns", "revoked")
                for demand in (None, EVENTUAL)
            )
        )
        granted, turned, revoked = (
            asyncio.ensure_future(own.get_context(name)) for name in ("granted", "turns", "revoked")
        )
    assert (await granted).type == "role"
    assert ((await turned).type, (await turned).attributes) == ("role", {"admin": True})
    with pytest.raises(NotFound):
        await revoked


async def test_an_unreadable_policy_makes_every_read_strong(mesh: Mesh, own: Memory, set_policy: SetPolicy) -> None:
    await write_all(own)
    link = await mesh.link("operator")
    asker = await Asker(link).open()
    revision = await kv.put(asker.inbox, subjects.CONSISTENCY.name, "own", b"otherwise: [")
    await link.close()
    for name in ("s0", "s1"):
        await mesh.shard(name)._reads._texts.reached(revision)  # type: ignore[attr-defined]
    async with lagging(mesh):
        await own.set_context("e", attributes={"n": 1})
        await is_stale(own.get_context("e", consistency=EVENTUAL, budget_ms=SHORT_MS))


async def test_the_command_sets_shows_and_removes_it_and_shards_follow_within_a_second(
    mesh: Mesh, own: Memory, set_policy: SetPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await write_all(own)
    file = tmp_path / "consistency.yaml"

    async def command(*words: str) -> str:
        data = ["--data", str(mesh.server.options.data)]
        assert await asyncio.to_thread(main, ["consistency", *words, *data]) == 0
        return capsys.readouterr().out

    async def answers(*, well: bool) -> None:
        async with asyncio.timeout(1):
            while True:
                try:
                    await own.get_context("e", budget_ms=60)
                except MnemeshError:
                    if not well:
                        return
                else:
                    if well:
                        return

    async with lagging(mesh):
        await own.set_context("e", attributes={"n": 1})
        file.write_text(text := f"tenants: {{{own.tenant}: {{otherwise: strong}}}}\n")
        await command("set", str(file))
        await answers(well=False)
        assert await command("show") == text
        await command("rm")
        await answers(well=True)
        assert await command("show") == "otherwise: eventual\n"
    file.write_text("otherwise: session")
    assert await asyncio.to_thread(main, ["consistency", "set", str(file), "--data", str(tmp_path)]) == 1
    assert "session needs a token" in capsys.readouterr().err


@pytest.mark.asyncio(loop_scope="function")
async def test_a_hub_hands_its_policy_to_its_devices(hub: HubSite, tmp_path: Path) -> None:
    link = await hub.link("operator")
    asker = await Asker(link).open()
    await kv.put(asker.inbox, subjects.CONSISTENCY.name, "own", b"tenants: {acme: {access_control: [role]}}")
    await link.close()
    async with device(hub, tmp_path / "device") as node, alice_at(node.server) as there:
        shard = next(actor for actor in node._host.actors if actor.role == "shard")
        reads = shard._reads  # type: ignore[attr-defined]
        assert isinstance(reads, SiteReadPolicy)
        async with asyncio.timeout(10):
            await reads._texts.wait_for("handed")
        written = await there.set_context("role:1", type="role")
        context = await there.get_context("role:1", consistency=EVENTUAL)
        assert context.watermark["sub7"] >= written.version
        async with alice_at(hub.server) as here:
            await here.set_context("role:2", type="role")
            assert (await there.get_context("role:2")).type == "role"  # asked of the hub, under the same rule
            await here.set_context("both", type="role", attributes={"at": "hub"})
            await there.set_context("both", attributes={"by": "device"})
            both = await there.get_context("both")  # what it wrote itself goes there first
            assert (both.complete, both.attributes) == (True, {"at": "hub", "by": "device"})
