"""Five sites that write, are cut off, hear of each other in pieces and crash: they end in the same state.

The stores and the clocks are the real ones. Logs are lists, and what goes from one to another is the least that the
uplink and the feed promise: a device's events come to the hub in their order, the hub's to a device in theirs, and who
is sent something again is sent all that came after it again. A forget takes what its site had said of the entity out of
every log that it comes to, as the broker's rollup does: what a store that lags or is rebuilt reads is less than what
others have read.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from test_merge import FUTURE, SITES, bodies
from test_sqlite_store import Model, shown

from memory_shards.stores import VectorQuery
from memory_shards.stores.memory_vectors import MemoryVectors
from memory_shards.stores.sqlite import SqliteStore
from mnemesh.clock import HybridClock, is_too_far_ahead, wall_ms
from mnemesh.event import Birth, Event, Record
from mnemesh.messages import Description

HUB, *DEVICES = SITES
ENTITIES = ("pump", "valve")
START_MS = 631_152_000_000
"""1990, so that ten years ahead of it are behind the real clock, by which the stores say what holds now."""

TEN_YEARS_MS = 10 * 365 * 86_400_000
PARTITIONS = frozenset({0})
STORES = ("documents", "vectors")

_sites, _devices, _entities = st.sampled_from(SITES), st.sampled_from(DEVICES), st.sampled_from(ENTITIES)
_some = st.integers(0, 6)
_again = st.sampled_from((0, 0, 1, 3, 9))
_vectors = st.dictionaries(
    st.sampled_from("xy"), st.sampled_from((1, 2, 3)).map(lambda n: np.array([n, 1, 2], np.float32)), max_size=2
)
_times = st.fixed_dictionaries(
    {},
    optional={
        "valid_from": st.sampled_from((0, START_MS, START_MS + 5_000, FUTURE)),
        "valid_to": st.sampled_from((START_MS + 2_000, FUTURE, FUTURE * 2)),
    },
)
_puts = st.builds(lambda body, vectors: body | {"vectors": vectors}, bodies, _vectors)
_attributes = st.fixed_dictionaries({"attributes": st.dictionaries(st.sampled_from("xy"), st.integers(0, 3))})
_found = st.builds(lambda body, vectors: body | {"vectors": vectors}, _attributes, _vectors)
_writes = st.one_of(
    st.tuples(_entities, _puts, _times),
    st.tuples(_entities, _attributes, st.just({})),
    st.tuples(_entities, _found, st.just({})),
    st.tuples(_entities, st.none(), st.just({})),
)


class Site:
    """A wall clock, a log and two stores. `head` goes up with marks, too, which are no events."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.wall_ms = START_MS
        self.newest = 0
        """The newest stamp that came here, as the marks in the log tell it."""
        self.log: list[Record] = []
        self.head = 0
        self.place = 0
        """Up to where a device has the hub's log."""
        self.sent = 0
        """Up to where the hub has a device's log."""
        self.released: set[str] = set()
        self.held: set[str] = set()
        self.folder = folder
        self.start_clock()
        self.documents: SqliteStore
        self.vectors: MemoryVectors
        for which in STORES:
            self.open(which)

    # ── the gateway ─────────────────────────────────────────────────────────────────────────────────────────

    def start_clock(self) -> None:
        self.clock = HybridClock(lambda: self.wall_ms)
        self.clock.observe(self.newest)
        own = [record.event.hlc for record in self.log if _is_event(record) and record.event.site == self.name]
        self.clock.observe(own[-1] if own else 0)

    def hear(self, stamps: Iterable[int]) -> None:
        """Note a mark of another log, and what it says of the stamps that came with it."""
        self.head += 1
        newest = max(stamps, default=0)
        if self.name != HUB or not is_too_far_ahead(newest, self.wall_ms):
            self.newest = max(self.newest, newest)
            self.clock.observe(newest)

    # ── the log ─────────────────────────────────────────────────────────────────────────────────────────────

    def append(self, event: Event, birth: Birth | None = None, hub: int | None = None) -> Record:
        self.head += 1
        is_hub = self.name == HUB
        quarantined = is_hub and birth is not None and is_too_far_ahead(event.hlc, self.wall_ms)
        if event.op == "forget" and not quarantined:
            self.purge(event.entity_id, [event.site])
        hub = self.head if is_hub else hub
        self.log.append(Record(self.head, self.wall_ms, 0, event, birth, hub, quarantined))
        return self.log[-1]

    def note(self, op: Any, entity_id: str, **body: Any) -> None:
        """Note what is held. Of the notes of an entity the log keeps the last."""
        self.log = [record for record in self.log if _is_event(record) or record.event.entity_id != entity_id]
        told = Event(id="", tenant="acme", entity_id=entity_id, op=op, agent="", site=self.name, hlc=0, body=body)
        self.append(told)

    def purge(self, entity_id: str, origins: Iterable[str]) -> None:
        self.log = [
            record
            for record in self.log
            if not (_is_event(record) and record.event.entity_id == entity_id and record.event.site in origins)
        ]

    def events(self, entity_id: str, *, upto: int) -> list[Record]:
        return [each for each in self.log if each.sequence <= upto and each.event.entity_id == entity_id]

    # ── the stores ──────────────────────────────────────────────────────────────────────────────────────────

    def open(self, which: str) -> None:
        if which == "documents":
            self.documents = SqliteStore(self.folder, site=self.name, partitions=PARTITIONS, incarnation="1")
        else:
            self.vectors = MemoryVectors(self.folder, PARTITIONS, site=self.name, incarnation="1")

    def store(self, which: str) -> SqliteStore | MemoryVectors:
        return self.documents if which == "documents" else self.vectors

    def apply(self, which: str, upto: int) -> None:
        store = self.store(which)
        store.apply([record for record in self.log if store.watermark < record.sequence <= upto], upto)

    def catch_up(self) -> None:
        for which in STORES:
            self.apply(which, self.head)

    def crash(self, which: str, *, lost: bool) -> None:
        self.store(which).close()
        if lost:
            for file in self.folder.glob("memory.db*" if which == "documents" else "vectors.db*"):
                file.unlink()
        self.open(which)

    def sizes(self) -> dict[int, int]:
        """What the documents say of the size of each entity that has events."""
        return dict(self.documents._connection.execute("SELECT id, size FROM entity WHERE size <> 0"))

    def sizes_of_events(self) -> dict[int, int]:
        return dict(self.documents._connection.execute("SELECT entity, sum(length(body)) FROM event GROUP BY entity"))

    def digests(self) -> tuple[str, str]:
        return self.documents.digest(), self.vectors.digest()

    def shows(self, entity_id: str) -> object:
        """All that reads tell of an entity, of that which must not depend on the site."""
        times = ({}, {"valid_at_ms": FUTURE + 1})
        return [shown(self.documents.get("acme", entity_id, **at)) for at in times], {
            name: vector.tolist() for name, vector in self.vectors.vectors_of("acme", entity_id).items()
        }

    def finds(self) -> tuple[list[str], list[tuple[str, list[list[str]]]]]:
        """What searches find: the index of texts, and the vectors and columns in memory."""
        texts = [hit.entity_id for hit in self.documents.search_text("acme", "leaks hums", 9)]
        filters: list[dict[str, Any]] = [{}, *({name: {"exists": True}} for name in "xyz")]
        found = []
        for space in sorted(self.vectors.stored.spaces.values(), key=lambda space: space.name):
            queries = [
                VectorQuery(tenant="acme", space=space.name, vector=np.ones(3, np.float32), filter=wanted, type=kind)
                for wanted in filters
                for kind in (None, "pump")
            ]
            hits = [sorted(hit.entity_id for hit in hits) for hits in self.vectors.search(queries)]  # type: ignore[union-attr]
            if any(hits):
                found.append((space.name, hits))
        return sorted(texts), found

    def close(self) -> None:
        self.documents.close()
        self.vectors.close()


def _is_event(record: Record) -> bool:
    return record.event.op in ("put", "forget")


class Sites(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.sites = {name: Site(name, Path(self._folder.name) / name) for name in SITES}
        self.hub = self.sites[HUB]
        self.written = 0
        self.accepted: list[Event] = []
        """What the hub took: what all sites must come to."""
        self.births: dict[tuple[str, str], int] = {}
        self.put_aside: Counter[str] = Counter()
        self.astray: set[tuple[str, str]] = set()
        """(device, entity) where the device wrote something that the hub put aside."""

    # ── what sites do alone ─────────────────────────────────────────────────────────────────────────────────

    @rule(site=_sites, writes=st.lists(_writes, min_size=1, max_size=4))
    def write(self, site: str, writes: list[tuple[str, dict[str, Any] | None, dict[str, int]]]) -> None:
        for entity, body, times in writes:
            if body is None:
                self._write(site, entity, "forget", {}, {})
            else:
                self._write(site, entity, "put", body, times)

    def _write(self, name: str, entity: str, op: Any, body: dict[str, Any], times: dict[str, int]) -> None:
        site = self.sites[name]
        self.written += 1
        event = Event(
            id=str(self.written),
            tenant="acme",
            entity_id=entity,
            op=op,
            agent="ann",
            site=name,
            hlc=site.clock.now(),
            body=body,
            saw=None if name == HUB else site.place,
            **times,
        )
        known = [record.event.hlc for record in site.log if _is_event(record) and not record.quarantined]
        assert event.hlc > max(known, default=0), "a write comes after all that its site knows"
        site.append(event)
        if name == HUB:
            self.accepted.append(event)

    @rule(seconds=st.sampled_from((1, 40, 3_600)))
    def time_passes(self, seconds: int) -> None:
        for site in self.sites.values():
            site.wall_ms += seconds * 1_000

    @rule(device=_devices, off_ms=st.sampled_from((-START_MS, -3_000, 0, 50_000, TEN_YEARS_MS)), write=_writes)
    def a_clock_jumps(self, device: str, off_ms: int, write: tuple[str, dict[str, Any] | None, dict[str, int]]) -> None:
        self.sites[device].wall_ms = self.hub.wall_ms + off_ms
        self.write(device, [write])

    @rule(site=_sites)
    def a_gateway_starts_again(self, site: str) -> None:
        self.sites[site].start_clock()

    @rule(site=_sites, which=st.sampled_from((STORES[:1], STORES[1:], STORES)), share=st.integers(1, 4))
    def stores_follow(self, site: str, which: tuple[str, ...], share: int) -> None:
        """Take in a share of what they lack, as one batch."""
        at = self.sites[site]
        for name in which:
            behind = at.head - at.store(name).watermark
            at.apply(name, at.store(name).watermark + -(-behind // share))

    @rule(site=_sites, which=st.sampled_from(STORES), lost=st.booleans())
    def a_store_crashes(self, site: str, which: str, lost: bool) -> None:
        self.sites[site].crash(which, lost=lost)

    # ── what goes between them ──────────────────────────────────────────────────────────────────────────────

    @rule(device=_devices, count=_some, again=_again)
    def uplink(self, device: str, count: int, again: int) -> None:
        """The next events of a device, and before them some that the hub has had already."""
        site = self.sites[device]
        own = [record for record in site.log if _is_event(record) and record.event.site == device]
        had = sum(record.sequence <= site.sent for record in own)
        batch = own[max(0, had - again) : had + count]
        for record in batch:
            self._arrive(record, Birth(f"{device} 1", record.sequence))
        if batch:
            site.sent = max(site.sent, batch[-1].sequence)
            stamps = [record.event.hlc for record in batch]
            self.hub.hear(stamp for stamp in stamps if not is_too_far_ahead(stamp, self.hub.wall_ms))

    def _arrive(self, record: Record, birth: Birth) -> None:
        event = record.event
        if self.hub.append(event, birth).quarantined:
            self.put_aside[event.site] += 1
            self.astray.add((event.site, event.entity_id))
        elif birth.sequence > self.births.get((event.site, event.entity_id), 0):
            self.births[event.site, event.entity_id] = birth.sequence
            self.accepted.append(event)

    @rule(device=_devices, count=_some, again=_again)
    def downlink(self, device: str, count: int, again: int) -> None:
        """The next of the hub's log for a device, and before it some that it has had already."""
        had = sum(record.sequence <= self.sites[device].place for record in self.hub.log)
        batch = self.hub.log[max(0, had - again) : had + count]
        if batch:
            self._feed(device, batch)
            self.sites[device].place = max(self.sites[device].place, batch[-1].sequence)

    def _feed(self, device: str, batch: Iterable[Record]) -> None:
        site = self.sites[device]
        carried = []
        for record in batch:
            event = record.event
            wrote = (device, event.entity_id) in self.births
            lacks = event.entity_id in site.released and not (event.op == "forget" and wrote)
            if event.site == device or record.quarantined or lacks:
                continue
            birth = record.birth or Birth(f"{HUB} 1", record.sequence)
            site.append(event, birth, record.sequence)
            carried.append(event.hlc)
        site.hear(carried)

    @rule(device=_devices, entity=_entities, look=st.booleans())
    def release(self, device: str, entity: str, look: bool) -> None:
        site = self.sites[device]
        site.released.add(entity)
        site.held.discard(entity)
        site.note("release", entity)
        if not any(_is_event(each) and each.event.site == device for each in site.events(entity, upto=site.head)):
            site.purge(entity, SITES)
        if look:
            self.what_is_released_is_gone(device)

    @rule(device=_devices)
    def what_is_released_is_gone(self, device: str) -> None:
        """All of what the device did not write itself, and nothing else."""
        site = self.sites[device]
        site.catch_up()
        for entity in site.released:
            own = [record for record in site.events(entity, upto=site.head) if record.event.site == device]
            timeline = [event.event_id for event in site.documents.timeline("acme", entity)]
            if not any(map(_is_event, own)):
                assert timeline == []
                assert site.shows(entity) == ([None, None], {})
                assert site.documents.describe("acme", [entity]) == [Description()]
                texts, found = site.finds()
                assert entity not in texts
                assert not any(entity in hits for _, answers in found for hits in answers)
            elif (newest := [record.event for record in own if _is_event(record)][-1]).op == "put":
                is_forgotten = any(
                    each.event.op == "forget" and (each.event.hlc, each.event.site) > (newest.hlc, newest.site)
                    for each in site.events(entity, upto=site.head)
                )
                assert (newest.id in timeline) != is_forgotten

    @rule(device=_devices, entity=_entities)
    def hold(self, device: str, entity: str) -> None:
        """Send all that there was of an entity, whether or not the device has some of it."""
        site = self.sites[device]
        site.released.discard(entity)
        self._feed(device, self.hub.events(entity, upto=site.place))
        site.held.add(entity)
        site.note("hold", entity, bytes=0)

    @rule(device=_devices, entity=_entities)
    def begin(self, device: str, entity: str) -> None:
        """Send the same, as part of what there is."""
        site = self.sites[device]
        if entity not in site.held:
            site.released.discard(entity)
            self._feed(device, self.hub.events(entity, upto=site.place))
            site.note("hold", entity, bytes=0, state="begun")

    @rule(device=_devices)
    def a_link_is_back(self, device: str) -> None:
        self.uplink(device, self.written, 0)
        self.downlink(device, self.hub.head, 0)
        self.sites[device].catch_up()

    # ── what they come to ───────────────────────────────────────────────────────────────────────────────────

    @rule()
    def everything_is_carried_everywhere(self) -> None:
        for device in DEVICES:
            self.uplink(device, self.written, 0)
        for device in DEVICES:
            self.downlink(device, self.hub.head, 0)
            for entity in sorted(self.sites[device].released):
                self.hold(device, entity)
        for site in self.sites.values():
            site.catch_up()
            assert site.sizes() == site.sizes_of_events()
        self._check_the_hub()
        for device in DEVICES:
            self._check_device(self.sites[device])

    def _check_the_hub(self) -> None:
        documents = self.hub.documents
        in_log = Counter(record.event.site for record in self.hub.log if record.quarantined)
        told = documents.quarantined
        assert in_log <= told <= self.put_aside
        assert (documents.rejected, self.hub.vectors.rejected) == (0, 0)
        log = [Record(n, 0, 0, event) for n, event in enumerate(sorted(self.accepted, key=lambda event: event.hlc), 1)]
        model, now = Model(log), wall_ms()
        for entity in ENTITIES:
            assert shown(documents.get("acme", entity)) == model.get(entity, now, now)
            left = sorted(record.event.id for record, _ in model.left(entity))
            for site in self.sites.values():
                if (site.name, entity) not in self.astray:
                    assert sorted(each.event_id for each in site.documents.timeline("acme", entity)) == left

    def _check_device(self, device: Site) -> None:
        for entity in ENTITIES:
            if (device.name, entity) not in self.astray:
                assert device.shows(entity) == self.hub.shows(entity)
            assert device.documents.holds("acme", entity) == (entity in device.held)
        assert device.documents.quarantined == {}
        if not any(name == device.name for name, _ in self.astray):
            assert device.digests() == self.hub.digests()
            assert device.finds() == self.hub.finds()

    def teardown(self) -> None:
        try:
            self.everything_is_carried_everywhere()
        finally:
            for site in self.sites.values():
                site.close()
            self._folder.cleanup()


TestSites = Sites.TestCase
TestSites.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
