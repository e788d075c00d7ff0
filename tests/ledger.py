"""The ledger test: nothing that was acknowledged is lost, doubled or out of order, whatever dies meanwhile.

    python -m tests.ledger --seconds 600 --seed 7

Writers go through the SDK and keep a ledger of what was acknowledged. Chaos kills (SIGKILL), freezes (SIGSTOP) and
stops (SIGTERM) nats-server, gateway, router and shards at random, and takes replicas' folders away. Then the audit
compares the ledger with the log itself, with what the SDK reads, and the replicas of each shard with each other.

A write whose outcome is unknown is repeated under its own id until it is answered, so in the end each is acknowledged
or refused. The exception are the atomic ingests that a writer gives up on: all of one may be there, or nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

import mnemesh
from cli.mesh import Child, Mesh, MeshOptions
from cli.server import free_port
from cli.server_config import ServerOptions
from mnemesh import Consistency, Memory, messages, subjects, wire
from mnemesh.asker import Asker, reply_of
from mnemesh.connection import Link
from mnemesh.errors import BY_CODE, Busy, Conflict, NotFound, Stale, Timeout, Unavailable
from mnemesh.event import Event, decode_event
from mnemesh.follower import Follower
from mnemesh.jetstream import stream_state

SITE = TENANT = SPACE = "ledger"
DIMENSION = 16
SHARDS = REPLICAS = 2
COUNTERS = 3
ENTITIES = 6
"""How many entities each writer has of its own, for each kind of write."""
BUDGET_MS = 2000
"""Short, so that many a write ends without an answer and is repeated."""
PATIENCE_S = 90.0
"""How long the last writes, and the mesh to be whole again, may take when the chaos is over."""
ANSWER_S = 5.0
"""How long one status is waited for: a replica that ends over the question does not answer it."""
HANDS = 2
"""How many deeds of chaos may be under way at once."""
STRONG = Consistency(level="strong")

T = TypeVar("T")


# ── what is known ───────────────────────────────────────────────────────────────────────────────────────────────


class Entry(NamedTuple):
    """One acknowledged write. `patch` is what it said, as keywords of `set_context`; `None` for a forget."""

    event_id: str
    entity_id: str
    sequence: int
    patch: Mapping[str, Any] | None


@dataclass
class Ledger:
    """What the writers know. `acknowledged` holds each writer's entries in the order in which it made them."""

    acknowledged: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    abandoned: list[dict[str, Entry]] = field(default_factory=list)
    increments: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)

    def entries(self) -> list[Entry]:
        """All, in the order of the log."""
        return sorted((entry for own in self.acknowledged.values() for entry in own), key=lambda entry: entry.sequence)


# ── the writers ─────────────────────────────────────────────────────────────────────────────────────────────────


class Writer:
    """One agent that writes, one thing after the other, to entities of its own and to counters that all share."""

    def __init__(self, memory: Memory, ledger: Ledger, seed: int) -> None:
        self._memory = memory
        self._ledger = ledger
        self._random = random.Random(f"{seed} {memory.agent}")
        self._made = 0

    async def run(self, enough: asyncio.Event) -> None:
        """Write until it is `enough`, and see the last write through."""
        verbs = (self._patch, self._increment, self._embed, self._ingest, self._give_up, self._forget)
        while not enough.is_set():
            (verb,) = self._random.choices(verbs, weights=(8, 6, 4, 3, 1, 2))
            await verb()

    async def _patch(self) -> None:
        entity_id, message_id, patch = self._own("note"), self._next_id(), self._note()
        written = await self._settled(
            lambda: self._memory.set_context(entity_id, **patch, message_id=message_id, budget_ms=BUDGET_MS)
        )
        self._enter(message_id, entity_id, written.version, patch)

    async def _increment(self) -> None:
        """A compare-and-set on a counter that every writer wants to raise."""
        entity_id, message_id = f"counter:{self._random.randrange(COUNTERS)}", self._next_id()
        version, value = await self._settled(lambda: self._counter(entity_id))
        patch: dict[str, Any] = {"attributes": {"value": value + 1}}
        try:
            written = await self._settled(
                lambda: self._memory.set_context(
                    entity_id, **patch, expected_version=version, message_id=message_id, budget_ms=BUDGET_MS
                )
            )
        except Conflict:
            self._ledger.outcomes["refused"] += 1
        else:
            self._ledger.increments[entity_id] += 1
            self._enter(message_id, entity_id, written.version, patch)

    async def _counter(self, entity_id: str) -> tuple[int, int]:
        try:
            context = await self._memory.get_context(entity_id, budget_ms=BUDGET_MS)
        except NotFound:
            return 0, 0
        return context.version, context.attributes["value"]

    async def _embed(self) -> None:
        entity_id, message_id = self._own("vector"), self._next_id()
        vector = [self._random.gauss(0, 1) for _ in range(DIMENSION)]
        attributes = {"n": self._made}
        written = await self._settled(
            lambda: self._memory.upsert_embedding(
                entity_id, vector, space=SPACE, attributes=attributes, message_id=message_id, budget_ms=BUDGET_MS
            )
        )
        self._enter(message_id, entity_id, written.version, {"attributes": attributes, "vectors": {SPACE: vector}})

    async def _ingest(self) -> None:
        """Several documents, some of them about one entity; all or nothing every other time."""
        message_id, atomic = self._next_id(), self._random.random() < 0.5
        documents = [(self._own("document"), self._note()) for _ in range(self._random.randint(1, ENTITIES))]

        async def ask() -> list[int]:
            reply = await self._memory.ingest(
                _entities(documents), atomic=atomic, message_id=message_id, budget_ms=5000
            )
            for outcome in reply.errors.values():  # of one that may pass, all is repeated under the same id
                raise BY_CODE[outcome.code](outcome.message)
            return [version for version in reply.versions if version is not None]

        versions = await self._settled(ask)
        for index, ((entity_id, patch), version) in enumerate(zip(documents, versions, strict=True)):
            self._enter(f"{message_id}.{index}", entity_id, version, patch)

    async def _give_up(self) -> None:
        """An atomic ingest of new entities with hardly any budget, and no second try."""
        message_id = self._next_id()
        documents = [(f"{self._memory.agent}:once:{self._made}:{index}", self._note()) for index in range(5)]
        budget_ms = self._random.choice((2, 5, 20, 100))
        try:
            reply = await self._memory.ingest(
                _entities(documents), atomic=True, message_id=message_id, budget_ms=budget_ms
            )
        except (Timeout, Unavailable, Busy):
            self._ledger.outcomes["given up"] += 1
            entries = [
                Entry(self._event_id(f"{message_id}.{index}"), entity_id, 0, patch)
                for index, (entity_id, patch) in enumerate(documents)
            ]
            self._ledger.abandoned.append({entry.event_id: entry for entry in entries})
            return
        for index, ((entity_id, patch), version) in enumerate(zip(documents, reply.versions, strict=True)):
            assert version is not None
            self._enter(f"{message_id}.{index}", entity_id, version, patch)

    async def _forget(self) -> None:
        entity_id, message_id = self._own(self._random.choice(("note", "vector", "document"))), self._next_id()
        written = await self._settled(
            lambda: self._memory.forget(entity_id, message_id=message_id, budget_ms=BUDGET_MS)
        )
        self._enter(message_id, entity_id, written.version, None)

    async def _settled(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until the answer is known."""
        while True:
            try:
                return await ask()
            except (Timeout, Unavailable, Busy, Stale) as error:
                self._ledger.outcomes[f"repeated after {error.code}"] += 1

    def _note(self) -> dict[str, Any]:
        """A patch that adds, replaces and removes."""
        pick = self._random
        attributes = {"n": self._made, f"a{pick.randrange(4)}": pick.choice((None, self._made))}
        edge = {"relation": pick.choice(("near", "feeds")), "target_id": f"counter:{pick.randrange(COUNTERS)}"}
        if pick.random() < 0.3:
            return {"attributes": attributes, "remove_edges": [edge]}
        edges = [edge | {"properties": {"n": self._made}}]
        return {"type": "note", "attributes": attributes, "edges": edges, "text": f"note {self._made}"}

    def _own(self, kind: str) -> str:
        return f"{self._memory.agent}:{kind}:{self._random.randrange(ENTITIES)}"

    def _next_id(self) -> str:
        self._made += 1
        return str(self._made)

    def _event_id(self, message_id: str) -> str:
        return f"{self._memory.tenant}.{self._memory.agent}.{message_id}"

    def _enter(self, message_id: str, entity_id: str, sequence: int, patch: Mapping[str, Any] | None) -> None:
        entry = Entry(self._event_id(message_id), entity_id, sequence, patch)
        self._ledger.acknowledged[self._memory.agent].append(entry)
        self._ledger.outcomes["acknowledged"] += 1


def _entities(documents: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    return [{"entity_id": entity_id, **patch} for entity_id, patch in documents]


# ── the chaos ───────────────────────────────────────────────────────────────────────────────────────────────────


class Chaos:
    """Kills, freezes, stops and robs the processes of a mesh, which keeps itself alive. `deeds` counts it."""

    def __init__(self, mesh: Mesh, seed: int) -> None:
        self._mesh = mesh
        self._random = random.Random(f"{seed} chaos")
        self.deeds: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """Do harm for so long, with so many hands; when it returns, nothing is frozen any more."""
        until = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as hands:
            for _ in range(HANDS):
                hands.create_task(self._hand(until))

    async def _hand(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        while (left := until - loop.time()) > 0:
            name = self._random.choice(["nats-server", *self._mesh.children])
            deeds = [self._kill, self._freeze, self._stop] + [self._rob] * ("." in name)
            deed = self._random.choice(deeds)
            self.deeds[f"{deed.__name__.strip('_')} {name}"] += 1
            await deed(name, left)
            await asyncio.sleep(self._random.uniform(0.1, 2.0))

    async def _kill(self, name: str, left: float) -> None:
        self._send(name, signal.SIGKILL)

    async def _stop(self, name: str, left: float) -> None:
        """Let it drain."""
        self._send(name, signal.SIGTERM)

    async def _freeze(self, name: str, left: float) -> None:
        """Mostly for a moment; now and then for longer than connections live without an answer."""
        seconds = self._random.uniform(11, 16) if self._random.random() < 0.1 else self._random.uniform(0.05, 3)
        self._send(name, signal.SIGSTOP)
        try:
            await asyncio.sleep(min(seconds, left))
        finally:
            self._send(name, signal.SIGCONT)

    async def _rob(self, name: str, left: float) -> None:
        """Kill a replica and take its stores away before it starts again."""
        process = self._mesh.children[name].process
        self._send(name, signal.SIGKILL)
        if process is not None:
            await process.wait()
            shutil.rmtree(self._mesh.options.server.data / "shards" / name, ignore_errors=True)

    def _send(self, name: str, signum: signal.Signals) -> None:
        process: Child | Any = self._mesh.server if name == "nats-server" else self._mesh.children[name]
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signum)


# ── the audit ───────────────────────────────────────────────────────────────────────────────────────────────────


class Logged(NamedTuple):
    """One event of the log and its place there."""

    sequence: int
    event: Event


class Audit:
    """Compares the ledger with everything that the mesh says. `findings` is what does not agree."""

    def __init__(self, mesh: Mesh, ledger: Ledger, memory: Memory, operator: Asker) -> None:
        self._mesh = mesh
        self._ledger = ledger
        self._memory = memory
        self._operator = operator
        self.findings: list[str] = []
        self.events = 0

    async def run(self) -> None:
        log = await self._read_log()
        self.events = len(log)
        by_id: dict[str, list[Logged]] = defaultdict(list)
        for logged in log:
            by_id[logged.event.id].append(logged)
        kept = self._log_is_the_ledger(by_id)
        self._writers_kept_their_order()
        self._counters_count(log)
        await self._reads_are_the_fold(kept, log)
        await self._replicas_are_alike(log[-1].sequence)

    async def _read_log(self) -> list[Logged]:
        """The log from its beginning, as the shards follow it."""
        link = await Link.open(self._mesh.server.credentials.load("shard").link_options("audit"))
        try:
            asker = await Asker(link).open()
            stream = subjects.log_stream(SITE)
            state = await stream_state(asker.inbox, stream)
            log: list[Logged] = []
            async for batch in Follower(link, asker.inbox, stream, incarnation=state.incarnation).batches(1000):
                log += [Logged(stored.sequence, decode_event(stored.message.data)) for stored in batch]
                if batch[-1].sequence >= state.last_sequence:
                    break
            return log
        finally:
            await link.close()

    def _log_is_the_ledger(self, by_id: Mapping[str, Sequence[Logged]]) -> list[Entry]:
        """Every acknowledged write once, at its sequence, unless erased; nothing else. Returns what is to be read."""
        entries = self._ledger.entries()
        forgotten = {entry.entity_id: entry.sequence for entry in entries if entry.patch is None}
        kept: list[Entry] = []
        for entry in entries:
            places = [logged.sequence for logged in by_id.get(entry.event_id, ())]
            wanted = [] if entry.sequence < forgotten.get(entry.entity_id, 0) else [entry.sequence]
            self._expect(places == wanted, f"{entry} is in the log at {places}, not {wanted}")
            if wanted:
                kept.append(entry)
        for batch in self._ledger.abandoned:
            present = [by_id[event_id] for event_id in batch if event_id in by_id]
            whole = len(present) in (0, len(batch)) and all(len(places) == 1 for places in present)
            self._expect(whole, f"of the atomic ingest {list(batch)} only {present} is there")
            kept += [batch[logged.event.id]._replace(sequence=logged.sequence) for (logged, *_) in present]
        known = {entry.event_id for entry in entries}.union(*self._ledger.abandoned)
        for stranger in by_id.keys() - known:
            self._expect(False, f"{by_id[stranger]} is in the log, but was refused or never sent")
        for entry in kept:
            for _, event in by_id.get(entry.event_id, ()):
                said = (event.entity_id, event.op, event.body.get("attributes", {}))
                wanted_said = (
                    (entry.entity_id, "forget", {})
                    if entry.patch is None
                    else (entry.entity_id, "put", entry.patch["attributes"])
                )
                self._expect(said == wanted_said, f"{entry} is in the log as {event}")
        return sorted(kept, key=lambda entry: entry.sequence)

    def _writers_kept_their_order(self) -> None:
        for agent, entries in self._ledger.acknowledged.items():
            last: dict[str, int] = {}
            for entry in entries:
                before = last.get(entry.entity_id, 0)
                self._expect(entry.sequence > before, f"{agent} wrote {entry} after what is at {before}")
                last[entry.entity_id] = entry.sequence

    def _counters_count(self, log: Sequence[Logged]) -> None:
        """Each acknowledged increment is one step, and there are no other steps."""
        for entity_id, increments in self._ledger.increments.items():
            values = [event.body["attributes"]["value"] for _, event in log if event.entity_id == entity_id]
            self._expect(values == list(range(1, increments + 1)), f"{entity_id}: {increments} increments, {values}")

    async def _reads_are_the_fold(self, kept: Sequence[Entry], log: Sequence[Logged]) -> None:
        history: dict[str, list[Entry]] = defaultdict(list)
        for entry in kept:
            history[entry.entity_id].append(entry)
        for entity_id, entries in history.items():
            await self._timeline_is(entity_id, [(entry.sequence, entry.event_id) for entry in entries])
            alive = [entry.patch for entry in entries if entry.patch is not None]
            try:
                context = await self._memory.get_context(entity_id, include_vectors=True, consistency=STRONG)
            except NotFound:
                self._expect(not alive, f"{entity_id} is not found")
                continue
            wanted = fold(entity_id, alive)
            self._expect(bool(alive), f"{entity_id} was forgotten, but there is {context}")
            seen = (context.type, context.text, context.attributes, context.edges)
            self._expect(seen == wanted[:4], f"{entity_id} is {seen}, not {wanted}")
            self._expect(context.version == entries[-1].sequence, f"{entity_id} has version {context.version}")
            if SPACE in wanted.vectors:
                await self._finds(entity_id, wanted.vectors[SPACE], context)

    async def _timeline_is(self, entity_id: str, wanted: list[tuple[int, str]]) -> None:
        seen: list[tuple[int, str]] = []
        after: int | None = 0
        while after is not None:
            page = await self._memory.timeline(entity_id, after=after, consistency=STRONG)
            seen += [(event.sequence, event.event_id) for event in page.events]
            after = page.next_after
        self._expect(seen == wanted, f"the timeline of {entity_id} is {seen}, not {wanted}")

    async def _finds(self, entity_id: str, vector: Sequence[float], context: messages.Context) -> None:
        held = (context.vectors or {}).get(SPACE)
        close = held is not None and np.allclose(held, vector, rtol=1e-2, atol=1e-2)
        self._expect(close, f"the vector of {entity_id} is {held}, not {vector}")
        found = await self._memory.search_embedding(vector, space=SPACE, k=1, consistency=STRONG)
        self._expect(
            [hit.entity_id for hit in found.hits] == [entity_id]
            and found.coverage is not None
            and found.coverage.complete,
            f"the vector of {entity_id} finds {found}",
        )

    async def _replicas_are_alike(self, head: int) -> None:
        for shard in {name.partition(".")[0] for name in self._mesh.children if "." in name}:
            replicas = await statuses(self._operator, shard, REPLICAS, head)
            says = {(status.digest, status.entities, status.edges, status.vectors) for status in replicas}
            self._expect(len(says) == 1, f"the replicas of {shard} differ: {replicas}")

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.findings.append(otherwise)


class Folded(NamedTuple):
    """What an entity's patches come to."""

    type: str | None
    text: str | None
    attributes: dict[str, Any]
    edges: list[dict[str, Any]]
    vectors: dict[str, Sequence[float]]


def fold(entity_id: str, patches: Iterable[Mapping[str, Any]]) -> Folded:
    """The plain reading of "a patch merges", in the order of the log; nothing of `memory_shards.merge`."""
    type: str | None = None
    text: str | None = None
    attributes: dict[str, Any] = {}
    edges: dict[tuple[str, str], dict[str, Any]] = {}
    vectors: dict[str, Sequence[float]] = {}
    for patch in patches:
        type, text = patch.get("type", type), patch.get("text", text)
        attributes |= patch["attributes"]
        for space in patch.get("remove_vectors", ()):
            vectors.pop(space, None)
        vectors |= patch.get("vectors", {})
        for edge in patch.get("remove_edges", ()):
            edges.pop((edge["relation"], edge["target_id"]), None)
        for edge in patch.get("edges", ()):
            edges[edge["relation"], edge["target_id"]] = edge
    present = {name: value for name, value in attributes.items() if value is not None}
    return Folded(type, text, present, [edge for _, edge in sorted(edges.items())], vectors)


async def statuses(operator: Asker, shard: str, replicas: int, head: int) -> list[messages.ShardStatus]:
    """What every replica of a shard says of itself, once all of them have applied the log up to `head`."""
    question = wire.encode(messages.Status(digest=True))
    async with asyncio.timeout(PATIENCE_S):
        while True:
            replies = await operator.inbox.gather(
                subjects.shard_status(shard), question, most=replicas, wait_s=ANSWER_S
            )
            told = [reply_of(subjects.SHARD_STATUS, reply) for reply in replies]
            if len(told) == replicas and all(max(status.watermark.values()) >= head for status in told):
                return told


# ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Report(NamedTuple):
    """What a run did. `findings` is empty when the mesh kept its word."""

    seconds: float
    seed: int
    events: int
    outcomes: Counter[str]
    deeds: Counter[str]
    findings: list[str]

    def __str__(self) -> str:
        kinds: Counter[str] = Counter()
        for deed, count in self.deeds.items():
            kinds[deed.partition(" ")[0]] += count
        lines = [f"{self.seconds:.0f} s of chaos, seed {self.seed}; {self.events} events are left in the log"]
        lines += [_counts("writes", self.outcomes), _counts("deeds", kinds), _counts("", self.deeds)]
        lines += [f"WRONG: {finding}" for finding in self.findings[:20]]
        lines.append(f"{len(self.findings)} findings" if self.findings else "the ledger agrees")
        return "\n".join(lines)


def _counts(title: str, counts: Mapping[str, int]) -> str:
    return f"{title:8}" + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


async def run(data: Path, *, seconds: float, seed: int, writers: int) -> Report:
    """Write through `seconds` of chaos on a mesh in `data`, then audit. Raises what the mesh should never raise."""
    agents = [(TENANT, f"w{index}") for index in range(writers)]
    server = ServerOptions(data=data, site=SITE, port=free_port(), monitoring_port=free_port(), durability="synced")
    options = MeshOptions(server=server, shards=SHARDS, replicas=REPLICAS, tenants=[TENANT], agents=agents)
    ledger = Ledger()
    async with Mesh(options) as mesh, contextlib.AsyncExitStack() as connections:
        memories = [
            await connections.enter_async_context(mnemesh.connect(credentials=mesh.credential(*agent).path))
            for agent in agents
        ]
        chaos = Chaos(mesh, seed)
        enough = asyncio.Event()
        async with asyncio.timeout(seconds + PATIENCE_S), asyncio.TaskGroup() as tasks:
            for memory in memories:
                tasks.create_task(Writer(memory, ledger, seed).run(enough))
            await chaos.run(seconds)
            enough.set()
        await mesh.ready()
        link = await Link.open(mesh.server.credentials.load("operator").link_options("audit"))
        try:
            audit = Audit(mesh, ledger, memories[0], await Asker(link).open())
            await audit.run()
        finally:
            await link.close()
    return Report(seconds, seed, audit.events, ledger.outcomes, chaos.deeds, audit.findings)


def main() -> int:
    """Run as long as asked; the folder of a run that found something stays."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.ledger", description="The ledger test, for as long as you like."
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="how long the chaos lasts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of the chaos and the writes")
    parser.add_argument("--writers", type=int, default=6)
    flags = parser.parse_args()
    data = Path(tempfile.mkdtemp(prefix="mnemesh-ledger-"))
    print(f"seed {flags.seed}, in {data}", flush=True)
    report = asyncio.run(run(data, seconds=flags.seconds, seed=flags.seed, writers=flags.writers))
    print(report)
    if report.findings:
        return 1
    shutil.rmtree(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
