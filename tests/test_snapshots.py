"""Snapshots: taken while writes go on, started from, and skipped where they are damaged or of something else.

Each test has a shard of its own name, with all partitions, on one server and log. A `Place` is a target that the test
can spoil; each test runs with a folder and with the Object Store.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from conftest import SITE, server_options, start_mesh_server
from disk import disk, needs_root

import mnemesh
from cli.main import main
from cli.mesh import Mesh, MeshOptions
from cli.server import NatsServer
from memory_shards.shard import Shard
from memory_shards.snapshots import keeper, taking
from memory_shards.snapshots.manifest import Manifest, decode, manifests_of, pieces_of
from memory_shards.snapshots.settings import SnapshotSettings, seconds_of
from memory_shards.snapshots.starting import manifests
from memory_shards.snapshots.targets import Target, open_target
from memory_shards.stores.by_url import files_of
from mnemesh import Memory, messages, subjects
from mnemesh.asker import Asker
from mnemesh.connection import Link
from mnemesh.errors import BadRequest, Unavailable
from mnemesh.host import hosted
from mnemesh.ids import PARTITIONS
from mnemesh.jetstream import api, stream_state
from services.gateway import Gateway

on_site = pytest.mark.asyncio(loop_scope="module")
"""Tests that share the module's site share its loop."""

NEVER_S = 1e9
WITHIN_S = 20.0


@dataclass
class Site:
    """A server with a gateway, an agent, and shards as a test starts them."""

    server: NatsServer
    memory: Memory
    asker: Asker
    names: Iterator[str] = field(default_factory=lambda: (f"shard{number}" for number in count()))
    written: Iterator[int] = field(default_factory=count)

    async def write(self, many: int) -> None:
        """So many entities with all that a store may keep of them."""
        numbers = [next(self.written) for _ in range(many)]
        await self.memory.ingest([_document(number) for number in numbers])

    @contextlib.asynccontextmanager
    async def shard(
        self, name: str, folder: Path, url: str = "", partitions: int = PARTITIONS, every_s: float = NEVER_S
    ) -> AsyncIterator[Shard]:
        """A replica that has all of the log."""
        shard = Shard(
            await Link.open(self.server.credentials.load("shard").link_options("shard")),
            name=name,
            site=SITE,
            partitions=range(partitions),
            folder=folder,
            snapshots=SnapshotSettings(url=url, every_s=every_s),
        )
        async with hosted(shard):
            await self.caught_up(shard)
            yield shard

    async def caught_up(self, shard: Shard) -> None:
        head = (await stream_state(self.asker.inbox, subjects.log_stream(SITE))).last_sequence
        for projection in shard.stores.projections:
            await projection.watermark.reached(head)

    async def take(self, name: str) -> messages.Snapshot:
        return await self.asker.ask(subjects.TAKE_SNAPSHOT, subjects.take_snapshot(name), messages.TakeSnapshot())

    async def snapshots(self, name: str) -> messages.Snapshots:
        return await self.asker.ask(subjects.LIST_SNAPSHOTS, subjects.list_snapshots(name), messages.ListSnapshots())


def _document(number: int) -> dict[str, object]:
    return {
        "entity_id": f"e:{number}",
        "type": "thing",
        "attributes": {"n": number},
        "text": f"number {number} of many",
        "edges": [{"relation": "follows", "target_id": f"e:{number - 1}"}],
        "vectors": {"v": [float(number), 1.0]},
    }


@contextlib.asynccontextmanager
async def site_on(data: Path) -> AsyncIterator[Site]:
    server = await start_mesh_server(data)
    try:
        link = await Link.open(server.credentials.load("gateway").link_options("gateway"))
        operator = await Link.open(server.credentials.load("operator").link_options("operator"))
        alice = server.credentials.load("acme.alice").path
        async with hosted(Gateway(link, site=SITE)), mnemesh.connect(credentials=alice) as memory:
            yield Site(server, memory, await Asker(operator).open())
        await operator.close()
    finally:
        await server.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with site_on(tmp_path_factory.mktemp("snapshots")) as site:
        await site.write(100)
        yield site


@dataclass
class Place:
    """A target by its URL, and what a shard keeps there."""

    url: str
    target: Target
    shard: str

    async def manifests(self) -> list[str]:
        return await self.target.names(manifests_of(SITE, self.shard))

    async def pieces(self) -> list[str]:
        return await self.target.names(pieces_of(SITE, self.shard))


BUCKET = os.environ.get("MNEMESH_TEST_BUCKET", "")
"""An empty bucket, such as s3://mnemesh-tests, that these tests may fill too."""


@pytest_asyncio.fixture(loop_scope="module", params=["folder", "nats", *(["bucket"] if BUCKET else [])])
async def place(request: pytest.FixtureRequest, site: Site, tmp_path: Path) -> AsyncIterator[Place]:
    url = {"nats": "nats:", "folder": f"file://{tmp_path}/target", "bucket": BUCKET}[request.param]
    link = await Link.open(site.server.credentials.load("shard").link_options("target"))
    inbox = (await Asker(link).open()).inbox
    yield Place(url, open_target(url, inbox), next(site.names))
    await link.close()


async def digests(shard: Shard) -> list[str]:
    return [(await facet.counted(digest=True)).digest for facet in shard.stores.facets]


def applied(shard: Shard) -> list[int]:
    return [projection.applied for projection in shard.stores.projections]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not holds():  # noqa: ASYNC110  # what is waited for is files and counts
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def replicas(site: Site, place: Place, folder: Path, every_s: float) -> AsyncIterator[tuple[Shard, Shard]]:
    """Two of one shard."""
    async with (
        site.shard(place.shard, folder / "a", place.url, every_s=every_s) as one,
        site.shard(place.shard, folder / "b", place.url, every_s=every_s) as other,
    ):
        yield one, other


# ── taking and starting ─────────────────────────────────────────────────────────────────────────────────────────────


@on_site
async def test_a_snapshot_taken_while_writes_go_on_and_the_tail_of_the_log_make_an_equal_replica(
    site: Site, place: Place, tmp_path: Path
) -> None:
    async with site.shard(place.shard, tmp_path / "old", place.url) as old:
        taking_it = asyncio.ensure_future(site.take(place.shard))
        while not taking_it.done():
            await site.write(20)
        taken = await taking_it
        await site.write(30)
        await site.memory.forget("e:3")
        await site.caught_up(old)
        async with site.shard(place.shard, tmp_path / "new", place.url) as new:
            assert await digests(new) == await digests(old)
            head = new.stores.documents.projection.watermark.value
            assert applied(new) == [head - at for at in taken.files.values()]
            assert await new.stores.documents.get("acme", "e:3") is None
            assert (await new.stores.texts.search_text("acme", "7", 1, None))[0][0].entity_id == "e:7"
    assert not (tmp_path / "new" / "from-snapshot").exists()
    assert not (tmp_path / "old" / "to-snapshot").exists()


@on_site
async def test_a_piece_is_deflated_where_that_pays_and_files_may_have_many(
    site: Site, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("manifest", "taking", "starting"):
        monkeypatch.setattr(f"memory_shards.snapshots.{module}.PIECE", 20_000)
    async with site.shard(place.shard, tmp_path / "old", place.url) as old:
        taken = await site.take(place.shard)
        assert len(await place.pieces()) > 8
        assert taken.stored < taken.bytes
        async with site.shard(place.shard, tmp_path / "new", place.url) as new:
            assert applied(new) == [0, 0]
            assert await digests(new) == await digests(old)


@on_site
async def test_a_replica_whose_file_is_corrupt_starts_from_the_snapshot(
    site: Site, place: Place, tmp_path: Path
) -> None:
    async with site.shard(place.shard, tmp_path / "shard", place.url) as shard:
        await site.take(place.shard)
        before = await digests(shard)
    (tmp_path / "shard" / "memory.db").write_bytes(b"no SQLite file" * 1000)
    with pytest.raises(BaseException, match="corrupt"):
        async with site.shard(place.shard, tmp_path / "shard", place.url):
            pass
    async with site.shard(place.shard, tmp_path / "shard", place.url) as shard:
        assert applied(shard) == [0, 0]
        assert await digests(shard) == before


@on_site
async def test_a_store_that_has_something_is_left_as_it_is(site: Site, place: Place, tmp_path: Path) -> None:
    async with site.shard(place.shard, tmp_path, place.url) as shard:
        await site.take(place.shard)
    (tmp_path / "vectors.db").unlink()
    held = (tmp_path / "memory.db").stat().st_ino
    async with site.shard(place.shard, tmp_path, place.url) as shard:
        assert applied(shard) == [0, 0]
        assert (tmp_path / "memory.db").stat().st_ino == held


@needs_root
@on_site
async def test_a_target_whose_disk_is_full_says_so_and_keeps_what_it_has(site: Site, tmp_path: Path) -> None:
    url, name = f"file://{tmp_path}/disk/target", next(site.names)
    with disk(tmp_path / "disk", megabytes=8) as resize:
        async with site.shard(name, tmp_path / "shard", url) as shard:
            before = await site.take(name)
            with contextlib.suppress(OSError), (tmp_path / "disk" / "filler").open("wb") as filler:
                while True:
                    filler.write(bytes(4096))
            await site.write(500)
            await site.caught_up(shard)
            with pytest.raises(Unavailable, match="No space left on device"):
                await site.take(name)
            assert [each.id for each in (await site.snapshots(name)).snapshots] == [before.id]
            resize(200)
            taken = await site.take(name)
            async with site.shard(name, tmp_path / "new", url) as new:
                assert applied(new) == [0, 0]
                assert await digests(new) == await digests(shard)
            assert taken.id in [each.id for each in (await site.snapshots(name)).snapshots]


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _damage_piece(place: Place, id: str) -> None:
    name = next(name for name in await place.pieces() if id in name)
    content = bytearray(await place.target.get(name))
    content[len(content) // 2] ^= 1
    await place.target.put(name, bytes(content))


async def _lose_piece(place: Place, id: str) -> None:
    await place.target.remove([name for name in await place.pieces() if id in name][-1:])


async def _damage_manifest(place: Place, id: str) -> None:
    (name,) = (name for name in await place.manifests() if id in name)
    await place.target.put(name, (await place.target.get(name)).replace(b"watermark", b"watermarx"))


async def _tear_manifest(place: Place, id: str) -> None:
    (name,) = (name for name in await place.manifests() if id in name)
    await place.target.put(name, (await place.target.get(name))[:50])


@pytest.mark.parametrize("damage", [_damage_piece, _lose_piece, _damage_manifest, _tear_manifest])
@on_site
async def test_a_damaged_snapshot_is_skipped_with_a_warning(
    site: Site, place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[..., object]
) -> None:
    async with site.shard(place.shard, tmp_path / "old", place.url) as old:
        older = await site.take(place.shard)
        await site.write(5)
        await site.caught_up(old)
        newer = await site.take(place.shard)
        await damage(place, newer.id)
        async with site.shard(place.shard, tmp_path / "second", place.url) as second:
            assert await digests(second) == await digests(old)
            assert applied(second) == [5, 5]
        (warning,) = (text for text in caplog.messages if "is damaged, and skipped" in text)
        assert newer.id in warning
        await damage(place, older.id)
        async with site.shard(place.shard, tmp_path / "third", place.url) as third:
            assert await digests(third) == await digests(old)
            assert min(applied(third)) >= 100


@on_site
async def test_a_target_that_is_not_there_keeps_no_shard_from_starting(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = next(site.names)
    url = f"file://{tmp_path}/target"
    async with site.shard(name, tmp_path / "old", url) as old:
        await site.take(name)
        (tmp_path / "target" / SITE / name / "manifests").rename(tmp_path / "away")
        (tmp_path / "target" / SITE / name / "manifests").write_bytes(b"a file")
        async with site.shard(name, tmp_path / "new", url) as new:
            assert await digests(new) == await digests(old)


# ── what does not fit ───────────────────────────────────────────────────────────────────────────────────────────────


@on_site
async def test_a_snapshot_of_something_else_is_not_used(site: Site, place: Place, tmp_path: Path) -> None:
    others: list[tuple[object, str]] = [
        ("elsewhere", "another site"),
        ([1, 2], "other partitions"),
        ("2001-01-01T00:00:00Z", "another incarnation"),
        (99, "another layout"),
        (["text"], "other parts"),
    ]
    async with site.shard(place.shard, tmp_path / "old", place.url):
        await site.take(place.shard)
        (name,) = await place.manifests()
        taken = decode(await place.target.get(name))
        for position, (other, told) in enumerate(others):
            await place.target.put(name, _built_for(taken, position, other).encode())
            (snapshot,) = (await site.snapshots(place.shard)).snapshots
            assert snapshot.unfit is not None
            assert told in snapshot.unfit
        async with site.shard(place.shard, tmp_path / "new", place.url) as new:
            assert min(applied(new)) >= 100


def _built_for(manifest: Manifest, position: int, other: object) -> Manifest:
    """Of files that were built for something else there."""
    files = []
    for file in manifest.files:
        built_for = json.loads(file.built_for)
        built_for[position] = other
        files.append(msgspec.structs.replace(file, built_for=json.dumps(built_for)))
    return msgspec.structs.replace(manifest, files=files)


@on_site
async def test_a_snapshot_of_other_partitions_or_beyond_the_log_is_not_used(
    site: Site, place: Place, tmp_path: Path
) -> None:
    async with site.shard(place.shard, tmp_path / "old", place.url):
        await site.take(place.shard)
    async with site.shard(place.shard, tmp_path / "half", place.url, partitions=32) as half:
        assert min(applied(half)) > 0
    (name,) = await place.manifests()
    taken = decode(await place.target.get(name))
    beyond = [msgspec.structs.replace(file, watermark=10**9) for file in taken.files]
    await place.target.put(name, msgspec.structs.replace(taken, files=beyond).encode())
    async with site.shard(place.shard, tmp_path / "new", place.url) as new:
        assert min(applied(new)) >= 100


# ── who takes, and what is kept ─────────────────────────────────────────────────────────────────────────────────────


@on_site
async def test_two_replicas_that_are_asked_at_once_take_one_after_the_other(
    site: Site, place: Place, tmp_path: Path
) -> None:
    async with replicas(site, place, tmp_path, NEVER_S) as (one, other):
        taken = await asyncio.gather(*(shard._snapshots.take(files_of(shard.stores)) for shard in (one, other)))
        found, damaged = await manifests(place.target, SITE, place.shard)
        assert {manifest.id for manifest in found} == {manifest.id for manifest in taken}
        first, second = sorted(taken, key=lambda manifest: manifest.taken_at)
        assert (second.taken_at - first.taken_at).total_seconds() >= second.seconds
        assert not damaged


@on_site
async def test_of_two_replicas_one_takes_the_snapshot_that_is_due(
    site: Site, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "LOOK_S", 0.02)
    async with replicas(site, place, tmp_path, 3600.0) as (one, other):
        await until(lambda: bool(one._snapshots.gauges() and other._snapshots.gauges()))
        (manifest,) = (await manifests(place.target, SITE, place.shard))[0]
        for shard in (one, other):
            gauges = {gauge.name: gauge.read() for gauge in shard.gauges()}
            assert gauges["snapshot_bytes"] == manifest.stored
            assert gauges["snapshot_seconds"] == manifest.seconds
            assert 0 <= gauges["snapshot_age_s"] < WITHIN_S


@on_site
async def test_a_snapshot_is_taken_again_when_there_is_something_new(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "LOOK_S", 0.02)
    name = next(site.names)
    async with site.shard(name, tmp_path / "a", f"file://{tmp_path}/target", every_s=0.05) as shard:
        await until(lambda: bool(shard._snapshots.gauges()))
        first = shard._snapshots._newest.id
        await site.write(1)
        await until(lambda: shard._snapshots._newest.id != first)


@on_site
async def test_the_newest_two_are_kept_and_nothing_of_others(site: Site, place: Place, tmp_path: Path) -> None:
    async with site.shard(place.shard, tmp_path / "a", place.url):
        taken = [await site.take(place.shard) for _ in range(4)]
        kept = {snapshot.id for snapshot in taken[2:]}
        told = await site.snapshots(place.shard)
        assert [snapshot.id for snapshot in told.snapshots] == [snapshot.id for snapshot in reversed(taken[2:])]
        assert {name.split("/")[-1] for name in await place.manifests()} == kept
        assert {name.split("/")[3] for name in await place.pieces()} == kept


@on_site
async def test_a_snapshot_of_another_log_is_left_alone(site: Site, place: Place, tmp_path: Path) -> None:
    async with site.shard(place.shard, tmp_path / "a", place.url):
        await site.take(place.shard)
        (name,) = await place.manifests()
        other = _built_for(decode(await place.target.get(name)), 2, "2001-01-01T00:00:00Z")
        await place.target.put(
            f"{manifests_of(SITE, place.shard)}other", msgspec.structs.replace(other, id="other").encode()
        )
        taken = [await site.take(place.shard) for _ in range(2)]
        assert {name.split("/")[-1] for name in await place.manifests()} == {"other", *(each.id for each in taken)}


@on_site
async def test_what_was_left_half_way_does_not_count_and_is_swept_once_it_is_old(
    site: Site, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site.shard(place.shard, tmp_path / "a", place.url) as shard:
        with monkeypatch.context() as broken:
            broken.setattr(taking, "_write", _never_written)
            with pytest.raises(Unavailable, match="the disk was full"):
                await site.take(place.shard)
        left = set(await place.pieces())
        assert left
        assert (await site.snapshots(place.shard)).snapshots == []
        await site.take(place.shard)
        assert left < set(await place.pieces())  # whoever began it a moment ago may still be at it
        monkeypatch.setattr(keeper, "LEFT_OVER_S", 0.0)
        await shard._snapshots.take(files_of(shard.stores))
        assert not left & set(await place.pieces())


async def _never_written(*_: object) -> None:
    raise OSError("the disk was full")


async def test_a_shard_killed_half_way_leaves_nothing_that_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, target = tmp_path / "mesh", tmp_path / "target"
    options = MeshOptions(
        server=server_options(data),
        shards=1,
        tenants=["acme"],
        agents=[("acme", "alice")],
        snapshots=SnapshotSettings(url=f"file://{target}", every_s=NEVER_S),
    )
    async with Mesh(options) as mesh:
        shard = mesh.children["s0.0"]
        async with mnemesh.connect(credentials=mesh.server.credentials.load("acme.alice").path) as memory:
            for start in range(0, 1000, 500):
                noise = [os.urandom(2000).hex() for _ in range(500)]
                await memory.ingest(
                    [{"entity_id": f"e:{start + n}", "attributes": {"noise": noise[n]}} for n in range(500)]
                )
            strong = mnemesh.Consistency(level="strong")
            await memory.get_context("e:0", consistency=strong, budget_ms=20_000)
            operator = await Link.open(mesh.server.credentials.load("operator").link_options("operator"))
            asker = await Asker(operator).open()
            asking = asyncio.create_task(
                asker.ask(subjects.TAKE_SNAPSHOT, subjects.take_snapshot("s0"), messages.TakeSnapshot())
            )
            pieces = target / SITE / "s0" / "pieces"
            await until(lambda: pieces.exists() and any(pieces.rglob("0*")))
            killed = shard.process
            shard.send(signal.SIGKILL)
            await killed.wait()
            assert not list(target.rglob("manifests/*"))
            half_way = [path.name for path in pieces.iterdir()]
            assert half_way
            asking.cancel()
            await operator.close()
            await mesh.ready()
            assert await memory.get_context("e:1", consistency=strong, budget_ms=20_000)
            assert await asyncio.to_thread(main, ["snapshot", "take", "s0", "--data", str(data)]) == 0
            assert "read back and compared" in capsys.readouterr().out
            assert await asyncio.to_thread(main, ["snapshot", "list", "--data", str(data)]) == 0
            told = capsys.readouterr().out
            assert all(manifest.name in told for manifest in target.rglob("manifests/*"))
            assert not any(id in told for id in half_way)
            assert await asyncio.to_thread(main, ["snapshot", "list", "s7", "--data", str(data)]) == 1


# ── holes in the log ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_shard_does_not_answer_from_a_hole_in_the_log(tmp_path: Path) -> None:
    async with site_on(tmp_path / "site") as site:
        await site.write(20)
        url = f"file://{tmp_path}/target"
        async with site.shard("s0", tmp_path / "old", url) as old:
            await site.take("s0")
            await site.write(20)
            await site.caught_up(old)
            await api(site.asker.inbox, f"STREAM.PURGE.{subjects.log_stream(SITE)}", {"seq": 16})
            with pytest.raises(Unavailable, match=r"begins at 16, and .*memory\.db has it up to 0"):
                async with site.shard("s0", tmp_path / "new"):
                    pass
            async with site.shard("s0", tmp_path / "new", url) as new:
                assert await digests(new) == await digests(old)
        async with site.shard("s0", tmp_path / "old", url):
            await api(site.asker.inbox, f"STREAM.PURGE.{subjects.log_stream(SITE)}", {"seq": 31})
        with pytest.raises(Unavailable, match=r"begins at 31, and .*memory\.db has it up to 20"):
            async with site.shard("s0", tmp_path / "late", url):
                pass


async def test_a_beginning_of_the_log_that_was_forgotten_is_no_hole(tmp_path: Path) -> None:
    async with site_on(tmp_path / "site") as site:
        await site.write(3)
        await site.memory.forget("e:0")
        assert (await stream_state(site.asker.inbox, subjects.log_stream(SITE))).first_sequence == 2
        async with site.shard("s0", tmp_path / "new") as new:
            assert await new.stores.documents.get("acme", "e:1") is not None


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


@on_site
async def test_a_shard_without_a_target_says_so(site: Site, tmp_path: Path) -> None:
    name = next(site.names)
    async with site.shard(name, tmp_path):
        with pytest.raises(BadRequest, match="start it with --snapshots URL"):
            await site.take(name)


def test_a_place_that_is_none_is_refused_without_its_password() -> None:
    with pytest.raises(BadRequest, match=r"snapshots: 'ftp://…@host/x' is no place for snapshots; it may be nats:"):
        SnapshotSettings(url="ftp://me:secret@host/x")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("30m", 1800), ("1.5h", 5400), ("2d", 172_800)])
def test_a_length_of_time_has_a_unit(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1w", "-1h", "0s", "soon"])
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="expected a number and s, m, h or d"):
        seconds_of(text)
