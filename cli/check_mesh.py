"""What `mnemesh doctor` looks at as the operator: storage, the services that answer, how far the shards are."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from cli.finding import Finding, named, ok, warning, wrong
from cli.server import NO_ROOM, monitoring
from cli.server_config import ServerOptions
from mnemesh import kv, messages, subjects, wire
from mnemesh.asker import Asker, reply_of
from mnemesh.discovery import ping_all
from mnemesh.errors import MnemeshError, NotFound
from mnemesh.ids import PARTITIONS
from mnemesh.inbox import Inbox
from mnemesh.jetstream import api, bucket_config, last_of, log_config, objects_config, stream_state
from router.shard_map import ShardEntry, decode_entry

PING_S = 1.0
"""How long services may take to answer discovery; all of it is spent, so that nobody is overlooked."""
STATUS_S = 10.0
MOST_SERVICES = 10_000
LARGEST_LAG = 10_000
"""Events that a shard may be behind; a shard that works applies them in about a second."""

SERVICES = {"gateway": "nothing can be written", "router": "searches and traversals are not answered"}


# ── storage ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def storage(inbox: Inbox, options: ServerOptions) -> AsyncIterator[Finding]:
    """Whether JetStream is on and the log and the buckets are there, configured as they must be."""
    up = f"`mnemesh up --data {options.data}`"
    try:
        await api(inbox, "INFO")
    except MnemeshError as error:
        yield wrong(f"JetStream does not answer: {error.message}", f"restart the mesh ({up}), which turns it on")
        return
    if (ill := (await monitoring(options, "/healthz")).get("error")) is not None:
        advice = f"make room on the disk of {options.data}; `mnemesh up` then starts its server again, and writes go on"
        yield wrong(f"nats-server is not well: {ill}", advice if NO_ROOM in ill else f"restart the mesh ({up})")
        return
    yield ok("JetStream is on")
    right = True
    buckets = [bucket_config(bucket.name) for bucket in subjects.BUCKETS]
    if options.kind == "hub":
        buckets += [objects_config(bucket.name) for bucket in subjects.OBJECTS]
    for meant in (log_config(options.site, kind=options.kind), *buckets):
        name = meant["name"]
        try:
            found = (await api(inbox, f"STREAM.INFO.{name}"))["config"]
        except NotFound:
            right = False
            yield wrong(f"there is no stream {name}", f"{up} makes it")
            continue
        if differing := _differing(found, meant):
            right = False
            yield wrong(f"stream {name} is not as it must be: {', '.join(differing)}", f"{up} again, which corrects it")
    if right:
        yield ok(f"the log and {len(buckets)} buckets are there")


def _differing(found: dict[str, Any], meant: dict[str, Any]) -> list[str]:
    """The settings that differ. JetStream leaves out those that are false; how many copies are kept is free."""
    return [
        f"{setting} is {found.get(setting)}, not {value}"
        for setting, value in meant.items()
        if setting != "num_replicas" and (found.get(setting) or False) != value
    ]


async def shard_map(inbox: Inbox) -> tuple[dict[str, ShardEntry], list[Finding]]:
    """The shards that are meant to run, by name."""
    bucket = subjects.SHARDS.name
    shards, findings = {}, []
    for name in await kv.keys(inbox, bucket):
        value = (await last_of(inbox, f"KV_{bucket}", f"$KV.{bucket}.{name}")).message.data
        if not value:  # a delete marker
            continue
        try:
            shards[name] = decode_entry(name, value)
        except (ValueError, KeyError, TypeError):
            findings.append(
                wrong(
                    f"the shard map's entry of {name} cannot be read: {value[:80]!r}", f"`nats kv del {bucket} {name}`"
                )
            )
    if not shards:
        findings.append(wrong("the shard map is empty, so no partition is served", "`mnemesh up` fills it"))
    return shards, findings


# ── services ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Service:
    """One process that answers discovery. `partitions` is how many a shard serves."""

    role: str
    instance: str
    contract: str
    shard: str
    partitions: int

    def __str__(self) -> str:
        return f"{self.role} {self.shard}".strip() + f" ({self.instance})"


async def running(asker: Asker) -> list[Service]:
    """Every service of the mesh that answers `$SRV.PING`."""
    return [
        Service(
            role=answer["name"].removeprefix("mnemesh-"),
            instance=answer["id"],
            contract=answer["metadata"].get("contract", ""),
            shard=answer["metadata"].get("shard", ""),
            partitions=int(answer["metadata"].get("partitions", 0)),
        )
        for answer in await ping_all(asker, at_least=MOST_SERVICES, wait_s=PING_S)
        if answer["name"].startswith("mnemesh-")
    ]


def replicas(found: list[Service]) -> Counter[str]:
    """How many replicas of each shard run."""
    return Counter(service.shard for service in found if service.role == "shard")


def services(found: list[Service], shards: dict[str, ShardEntry]) -> Iterator[Finding]:
    """Whether all that is meant to run does, and every partition is served."""
    complete = True
    for role, consequence in SERVICES.items():
        if not any(service.role == role for service in found):
            complete = False
            yield wrong(
                f"no {role} runs: {consequence}", f"`mnemesh up`, or `mnemesh run {role}`; its log says why it ended"
            )
    running = replicas(found)
    for name, entry in shards.items():
        if running[name] >= entry.replicas:
            continue
        complete = False
        say = wrong if not running[name] else warning
        yield say(
            f"{running[name]} of {entry.replicas} replicas of shard {name} run",
            f"`mnemesh up`, or `mnemesh run shard --shard {name}`; its log says why it ended",
        )
    for service in found:
        if service.role != "shard":
            continue
        if service.shard not in shards:
            complete = False
            yield warning(f"{service} runs but is not in the shard map", "stop it, or add it to the map")
        elif service.partitions != len(shards[service.shard].partitions):
            complete = False
            yield wrong(
                f"{service} serves {service.partitions} partitions; the shard map gives it "
                f"{len(shards[service.shard].partitions)}",
                "restart it: it reads the map when it starts",
            )
    served: set[int] = set().union(*(entry.partitions for name, entry in shards.items() if running[name]))
    if unserved := sorted(set(range(PARTITIONS)) - served):
        complete = False
        yield wrong(
            f"{len(unserved)} of {PARTITIONS} partitions are not served: {named(unserved)}",
            "start the shards that have them, or give them to others in the shard map",
        )
    if complete:
        yield ok(f"{len(found)} services run; all {PARTITIONS} partitions are served")


async def views(inbox: Inbox, found: list[Service]) -> AsyncIterator[Finding]:
    """Whether somebody keeps the views that there are."""
    bucket = subjects.VIEWS.name
    there = [name for name in await kv.keys(inbox, bucket) if await kv.get(inbox, bucket, name)]
    if there and not any(service.role == "views" for service in found):
        yield wrong(
            f"no views service runs: the vectors of {named(there)} are not kept up to date",
            "`mnemesh up`, or `mnemesh run views`; its log says why it ended",
        )


def contracts(found: list[Service]) -> Iterator[Finding]:
    """Whether every service was built from the contract that this command was built from."""
    strangers = [service for service in found if service.contract != subjects.CONTRACT]
    for service in strangers:
        yield wrong(
            f"{service} runs contract {service.contract or 'unknown'}; this command has {subjects.CONTRACT}",
            "restart it from the same release as this command",
        )
    if found and not strangers:
        yield ok(f"every service runs contract {subjects.CONTRACT}")


async def lag(asker: Asker, options: ServerOptions, found: list[Service]) -> AsyncIterator[Finding]:
    """How far each replica of each shard is behind the log."""
    head = (await stream_state(asker.inbox, subjects.log_stream(options.site))).last_sequence
    furthest = 0
    current = True
    for shard, count in sorted(replicas(found).items()):
        asked = subjects.shard_status(shard)
        answers = await asker.inbox.gather(asked, wire.encode(messages.Status()), most=count, wait_s=STATUS_S)
        if len(answers) < count:
            current = False
            yield warning(
                f"{count - len(answers)} of {count} replicas of shard {shard} did not say where they stand",
                "they are overloaded or stuck; their logs say more",
            )
        for answer in answers:
            try:
                status = reply_of(subjects.SHARD_STATUS, answer)
            except MnemeshError as error:
                current = False
                yield warning(f"a replica of shard {shard} cannot say where it stands: {error}", "see its log")
                continue
            for store in status.missing:
                current = False
                yield warning(
                    f"the store of the {store} of shard {shard} does not answer",
                    "see whether its server runs; what it lacks comes to it when it is back",
                )
            if status.skipped:
                yield warning(
                    f"a replica of shard {shard} skipped {status.skipped:,} events that it could not read",
                    "see its log: somebody wrote them by hand, or from code that is newer than the shard's",
                )
            behind = head - status.watermark.get(options.site, 0)
            furthest = max(furthest, behind)
            if behind > LARGEST_LAG:
                current = False
                yield warning(
                    f"a replica of shard {shard} is {behind:,} events behind the log",
                    "wait if it has just started; if the number grows, give its partitions to more shards",
                )
    if current and replicas(found):
        yield ok(f"the shards are at most {furthest:,} events behind the log, which ends at {head:,}")
