"""What `mnemesh doctor --stores` looks at: whether every store of every shard holds what the log says.

    ask each replica for its digests → replay the log into stores of our own, up to where each of those was → compare

The replay is what a shard does that begins from empty, on this machine, in a temporary folder. A store that is written
meanwhile, or by another replica, may be told as it was between two moments: what differs is asked again, until it
agrees, the log has not moved in between, or the same partitions differed each time.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from cli.finding import Finding, named, ok, warning, wrong
from cli.server_config import ServerOptions
from memory_shards.intake import Intake
from memory_shards.origins import Origins
from memory_shards.snapshots.starting import was_cut
from memory_shards.stores.milvus_rows import digests_of_index
from memory_shards.stores.sqlite import SqliteStore
from memory_shards.stores.vector_file import VectorFile
from mnemesh import messages, subjects, wire
from mnemesh.asker import Asker, reply_of
from mnemesh.connection import Link
from mnemesh.errors import MnemeshError
from mnemesh.event import Record
from mnemesh.follower import Follower
from mnemesh.ids import PARTITIONS
from mnemesh.jetstream import StreamState, stream_state
from mnemesh.messages import PartDigest, StoreDigest
from router.shard_map import ShardEntry

DIGEST_S = subjects.SHARD_STATUS.budget_ms / 1000
"""How long a replica may take to read all that it has."""

MOST_FOLLOWED = 1_000
MOST_APPLIED = 4_000
SURE_AFTER, MOST_ROUNDS = 3, 10
"""How often in a row a partition differs that is wrong, under writes; and how often is looked."""

STORES = {"attributes": "attributes", "edges": "edges", "text": "text", "vectors": "vectors", "index": "vectors"}
"""The store that holds a part, as `mnemesh rebuild --store` names it."""


@dataclass(frozen=True)
class Told:
    """What a replica tells of one part of its stores."""

    shard: str
    digest: StoreDigest


async def stores(
    link: Link, asker: Asker, options: ServerOptions, replicas: Mapping[str, int], shards: Mapping[str, ShardEntry]
) -> AsyncIterator[Finding]:
    """Whether the stores of the shards, each with so many replicas, hold what the log says of their partitions."""
    log = subjects.log_stream(options.site)
    asked = {shard: count for shard, count in replicas.items() if shard in shards}
    right: set[tuple[str, str]] = set()
    rounds: dict[tuple[str, str, str], int] = {}
    for _ in range(MOST_ROUNDS):
        state = await stream_state(asker.inbox, log)
        if await was_cut(asker.inbox, log, state):
            yield warning(
                f"the log begins at {state.first_sequence:,}, so the stores cannot be compared with it",
                "it was cut off there: what was before may be in the shards' snapshots",
            )
            return
        told, findings = await _told(asker, asked)
        for finding in findings:
            yield finding
        expected = await _expected(link, asker, options, state, {each.digest.at for each in told})
        apart: dict[tuple[str, str, str], str] = {}
        for each in told:
            found = _apart(each.digest, expected[each.digest.at], shards[each.shard].partitions)
            apart |= {(each.shard, each.digest.part, partition): said for partition, said in found.items()}
            right.add((each.shard, each.digest.part))
        rounds = {differing: rounds.get(differing, 0) + 1 for differing in apart}
        asked = {shard: replicas[shard] for shard, _, _ in apart}
        is_quiet = (await stream_state(asker.inbox, log)).last_sequence == state.last_sequence
        if not apart or is_quiet or max(rounds.values()) >= SURE_AFTER:
            break
    sure = defaultdict(list)
    for (shard, part, partition), times in sorted(rounds.items(), key=lambda each: (*each[0][:2], int(each[0][2]))):
        if is_quiet or times >= SURE_AFTER:
            sure[shard, part].append(apart[shard, part, partition])
    indexed = {shard for shard, part in right if part == "index"}
    for (shard, part), partitions in sure.items():
        advice = f"`mnemesh rebuild --shard {shard} --store {STORES[part]}` builds it anew from the log"
        if part == "vectors" and shard in indexed:
            advice = (
                "stop that replica, remove its vectors.db and start it; then rebuild the index, which is made of it"
            )
        yield wrong(
            f"the store of the {part} of shard {shard} does not hold what the log says of partition "
            f"{named(partitions)}",
            advice,
        )
    if not apart:
        yield ok(f"{len(right)} stores hold what the log says, up to {state.last_sequence:,}")
    elif not sure:
        yield warning(
            "the stores are written to so fast that they cannot be compared with the log", "ask when less is written"
        )


async def _told(asker: Asker, replicas: Mapping[str, int]) -> tuple[list[Told], list[Finding]]:
    """What each replica says that its stores hold."""
    told: list[Told] = []
    findings = []
    request = wire.encode(messages.Status(digest=True))
    for shard, count in sorted(replicas.items()):
        answers = await asker.inbox.gather(subjects.shard_status(shard), request, most=count, wait_s=DIGEST_S)
        if len(answers) < count:
            findings.append(
                warning(
                    f"{count - len(answers)} of {count} replicas of shard {shard} did not say what they hold",
                    "they are overloaded or stuck; their logs say more",
                )
            )
        for answer in answers:
            try:
                status = reply_of(subjects.SHARD_STATUS, answer)
            except MnemeshError as error:
                findings.append(warning(f"a replica of shard {shard} cannot say what it holds: {error}", "see its log"))
            else:
                told += [Told(shard, digest) for digest in status.digests]
    return told, findings


async def _expected(
    link: Link, asker: Asker, options: ServerOptions, state: StreamState, places: Collection[int]
) -> dict[int, dict[str, dict[str, PartDigest]]]:
    """What is to be held at each of these places of the log: of each part, by partition."""
    expected = {}
    loop = asyncio.get_running_loop()
    intake = Intake(
        site=options.site, kind=options.kind, partitions=range(PARTITIONS), origins=Origins(may_go_back=True)
    )
    follower = Follower(link, asker.inbox, subjects.log_stream(options.site), incarnation=state.incarnation)
    with tempfile.TemporaryDirectory(prefix="mnemesh-doctor-") as folder, ThreadPoolExecutor(1) as worker:
        replay = await loop.run_in_executor(worker, _Replay, Path(folder), options.site, state.incarnation)
        async with aclosing(follower.batches(MOST_FOLLOWED)) as batches:
            waiting: list[Record] = []
            reached = 0
            for place in sorted(places):
                while reached < place:
                    batch = await anext(batches)
                    waiting += intake.records(batch)
                    reached = batch[-1].sequence
                now = [record for record in waiting if record.sequence <= place]
                waiting = waiting[len(now) :]
                expected[place] = await loop.run_in_executor(worker, replay.digests_at, now, place)
        await loop.run_in_executor(worker, replay.close)
    return expected


class _Replay:
    """Stores of our own, of all partitions, which the log is applied to. Belongs to one thread."""

    def __init__(self, folder: Path, site: str, incarnation: str) -> None:
        every = frozenset(range(PARTITIONS))
        self._memory = SqliteStore(folder, site=site, partitions=every, incarnation=incarnation)
        self._vectors = VectorFile(folder, every, site=site, incarnation=incarnation)

    def digests_at(self, records: Sequence[Record], place: int) -> dict[str, dict[str, PartDigest]]:
        for start in range(0, max(1, len(records)), MOST_APPLIED):
            some = records[start : start + MOST_APPLIED]
            last = place if start + MOST_APPLIED >= len(records) else some[-1].sequence
            self._memory.apply(some, last)
            self._vectors.apply(some, last)
        digests = {
            **self._memory.digests(),
            "vectors": self._vectors.read.digests(),
            "index": digests_of_index(self._vectors.read),
        }
        return {part: digest.by_partition() for part, digest in digests.items()}

    def close(self) -> None:
        self._memory.close()
        self._vectors.close()


def _apart(
    told: StoreDigest, expected: Mapping[str, Mapping[str, PartDigest]], partitions: Iterable[int]
) -> dict[str, str]:
    """The partitions that a store holds otherwise, and what is to be said of each."""
    nothing = PartDigest(count=0, hash="")
    apart = {}
    for partition in map(str, sorted(partitions)):
        has = told.partitions.get(partition, nothing)
        wanted = expected[told.part].get(partition, nothing)
        if has != wanted:
            counts = f"{has.count} for {wanted.count}" if has.count != wanted.count else f"other than the {has.count}"
            apart[partition] = f"{partition} ({counts})"
    return apart
