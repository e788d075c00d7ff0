"""Suspects: what lost to a write that did not know of it, told alike wherever the whole history is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_merge import FUTURE, SITES, bodies, put
from test_sqlite_store import opened

from memory_shards import merge
from memory_shards.merge import Change
from memory_shards.suspects import suspects
from mnemesh.clock import from_ms
from mnemesh.event import Birth, Event, Record
from mnemesh.messages import Suspect

HUB, ONE, TWO, THREE, LISTENER = SITES


class Story:
    """Sites write about one pump, and hear of each other by way of the hub when they are told to.

    `known` is what the site of an event had when it wrote it, as ids: what suspects must come to without being told.
    """

    def __init__(self) -> None:
        self.logs: dict[str, list[Record]] = {site: [] for site in SITES}
        self.place = dict.fromkeys(SITES, 0)
        self.sent = dict.fromkeys(SITES, 0)
        self.known: dict[str, frozenset[str]] = {}

    def put(self, site: str, ms: int, **fields: Any) -> Event:
        event = put(site, ms, **{"id": f"{site}-{len(self.known)}"} | fields)
        event = msgspec.structs.replace(event, saw=None if site == HUB else self.place[site])
        self.known[event.id] = frozenset(record.event.id for record in self.logs[site])
        self._append(site, event, None)
        return event

    def _append(self, site: str, event: Event, birth: Birth | None, hub: int | None = None) -> None:
        sequence = len(self.logs[site]) + 1
        self.logs[site].append(Record(sequence, sequence, 0, event, birth, sequence if site == HUB else hub))

    def up(self, device: str, count: int | None = None) -> None:
        own = [record for record in self.logs[device] if record.event.site == device][self.sent[device] :][:count]
        for record in own:
            self._append(HUB, record.event, Birth(f"{device} 1", record.sequence))
        self.sent[device] += len(own)

    def down(self, device: str, count: int | None = None) -> None:
        for record in self.logs[HUB][self.place[device] :][:count]:
            self.place[device] = record.sequence
            if record.event.site != device:
                birth = record.birth or Birth(f"{HUB} 1", record.sequence)
                self._append(device, record.event, birth, record.sequence)

    def carry_all(self) -> None:
        for device in SITES[1:]:
            self.up(device)
        for device in SITES[1:]:
            self.down(device)

    def tell_places(self, device: str) -> None:
        """Tell a device where its own events are in the hub's log."""
        places = {record.event.id: record.sequence for record in self.logs[HUB]}
        self.logs[device] = [record._replace(hub=places.get(record.event.id)) for record in self.logs[device]]

    def at(self, site: str) -> list[Suspect]:
        return suspects(changes(self.logs[site]))


def changes(log: Iterable[Record]) -> list[Change]:
    stamps: dict[str, int] = {}
    return [merge.stamped(record, merge.patch_of(record.event), stamps) for record in log]


def told(found: list[Suspect]) -> list[tuple[str, str, Any, str]]:
    return [(each.part, each.name, each.value, each.site) for each in found]


@pytest.fixture
def story() -> Story:
    return Story()


# ── who is one ──────────────────────────────────────────────────────────────────────────────────────────────


def test_of_two_writes_that_did_not_know_each_other_the_loser_is_a_suspect_everywhere(story: Story) -> None:
    story.put(ONE, 10, attributes={"level": 1})
    story.put(TWO, 20, attributes={"level": 2})
    story.carry_all()
    loser = Suspect(part="attribute", name="level", value=1, site=ONE, written_at=from_ms(10))
    assert [story.at(site) for site in SITES] == [[loser]] * 5


def test_a_write_of_the_hub_that_a_device_had_not_heard_of_is_a_suspect(story: Story) -> None:
    story.put(HUB, 10, attributes={"level": 1})
    story.put(ONE, 20, attributes={"level": 2})
    story.carry_all()
    assert [told(story.at(site)) for site in SITES] == [[("attribute", "level", 1, HUB)]] * 5


@pytest.mark.parametrize(("first", "second"), [(ONE, HUB), (ONE, TWO), (HUB, ONE)])
def test_a_site_that_overwrites_what_it_knows_makes_no_suspect(story: Story, first: str, second: str) -> None:
    story.put(first, 10, attributes={"level": 1})
    story.carry_all()
    story.put(second, 20, attributes={"level": 2})
    story.carry_all()
    story.tell_places(first)
    assert [story.at(site) for site in SITES] == [[]] * 5


def test_a_device_that_is_not_told_where_its_own_writes_are_at_the_hub_doubts_what_overwrote_them(story: Story) -> None:
    story.put(ONE, 10, attributes={"level": 1})
    story.carry_all()
    story.put(HUB, 20, attributes={"level": 2})
    story.carry_all()
    assert told(story.at(ONE)) == [("attribute", "level", 1, ONE)]
    story.tell_places(ONE)
    assert story.at(ONE) == []


@pytest.mark.parametrize("third", [HUB, THREE])
def test_a_write_that_knew_both_clears_the_suspect(story: Story, third: str) -> None:
    story.put(ONE, 10, attributes={"level": 1})
    story.put(TWO, 20, attributes={"level": 2})
    story.carry_all()
    story.put(third, 30, attributes={"level": 3})
    story.carry_all()
    for site in (ONE, TWO):
        story.tell_places(site)
    assert [story.at(site) for site in SITES] == [[]] * 5


def test_a_write_that_knew_one_of_two_clears_only_that(story: Story) -> None:
    story.put(ONE, 10, attributes={"level": 1})
    story.up(ONE)
    story.put(TWO, 20, attributes={"level": 2})
    story.down(THREE)
    story.put(THREE, 30, attributes={"level": 3})
    story.carry_all()
    assert told(story.at(HUB)) == told(story.at(LISTENER)) == [("attribute", "level", 2, TWO)]


def test_of_the_writes_of_one_site_only_the_last_can_be_a_suspect(story: Story) -> None:
    for level in range(3):
        story.put(ONE, 10 + level, attributes={"level": level})
    story.put(TWO, 20, attributes={"level": 9})
    story.carry_all()
    assert told(story.at(HUB)) == [("attribute", "level", 2, ONE)]


def test_a_write_that_was_dated_back_on_purpose_is_none(story: Story) -> None:
    story.put(HUB, 10, attributes={"level": 1})
    story.down(ONE)
    story.put(ONE, 20, valid_from=5, attributes={"level": 0})
    story.put(HUB, 30, valid_from=3, attributes={"level": 7})
    story.carry_all()
    assert story.at(HUB) == story.at(LISTENER) == []


def test_a_write_dated_back_below_a_suspect_does_not_hide_it(story: Story) -> None:
    story.put(ONE, 10, attributes={"level": 1})
    story.put(ONE, 11, valid_from=5, attributes={"level": 0})
    story.put(TWO, 20, attributes={"level": 2})
    story.carry_all()
    assert told(story.at(HUB)) == [("attribute", "level", 1, ONE)], "which the device showed, and nobody overwrote"


def test_a_plan_for_the_future_loses_and_wins_as_any_write_does(story: Story) -> None:
    story.put(ONE, 10, valid_from=FUTURE, attributes={"level": 1})
    story.put(TWO, 20, attributes={"level": 2})
    story.carry_all()
    assert told(story.at(HUB)) == [("attribute", "level", 2, TWO)]


def test_what_a_forget_erased_is_no_suspect(story: Story, tmp_path: Path) -> None:
    story.put(ONE, 10, attributes={"level": 1})
    story.put(TWO, 20, attributes={"level": 2})
    story.carry_all()
    store = opened(tmp_path)
    store.apply(story.logs[HUB], 2)
    assert told(store.suspects("acme", "pump")) == [("attribute", "level", 1, ONE)]
    forget = Event(id="f", tenant="acme", entity_id="pump", op="forget", agent="ann", site=HUB, hlc=15 << 16)
    store.apply([Record(3, 3, 0, forget, hub=3)], 3)
    assert store.suspects("acme", "pump") == store.suspects("acme", "nobody") == []
    store.close()


def test_a_store_tells_suspects_from_what_it_kept(story: Story, tmp_path: Path) -> None:
    story.put(ONE, 10, attributes={"level": 1})
    story.up(ONE)
    story.put(TWO, 20, attributes={"level": 2}, text="two")
    story.down(TWO)
    story.put(TWO, 30, text="three")
    story.carry_all()
    store = opened(tmp_path, LISTENER)
    store.apply(story.logs[LISTENER], 9)
    store.close()
    store = opened(tmp_path, LISTENER)
    assert told(store.suspects("acme", "pump")) == [("attribute", "level", 1, ONE)]
    store.close()


# ── of what ─────────────────────────────────────────────────────────────────────────────────────────────────

EDGE = {"relation": "feeds", "target_id": "tank"}
VECTOR = {"shape": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    ("lost", "won", "expected"),
    [
        ({"attributes": {"level": None}}, {"attributes": {"level": 2}}, ("attribute", "level", None)),
        ({"attributes": {"level": 1}}, {"attributes": {"level": None}}, ("attribute", "level", 1)),
        ({"type": "pump"}, {"type": "valve"}, ("type", "", "pump")),
        ({"text": "leaks"}, {"text": ""}, ("text", "", "leaks")),
        ({"text": ""}, {"text": "hums"}, ("text", "", None)),
        ({"edges": [EDGE]}, {"remove_edges": [EDGE]}, ("edge", "feeds tank", {})),
        ({"remove_edges": [EDGE]}, {"edges": [EDGE]}, ("edge", "feeds tank", None)),
        ({"edges": [EDGE | {"properties": {"m": 3}}]}, {"edges": [EDGE]}, ("edge", "feeds tank", {"m": 3})),
        ({"vectors": VECTOR}, {"vectors": VECTOR}, ("vector", "shape", None)),
        ({"vectors": VECTOR}, {"remove_vectors": ["shape"]}, ("vector", "shape", None)),
        ({"remove_vectors": ["shape"]}, {"vectors": VECTOR}, ("vector", "shape", None)),
    ],
)
def test_each_part_of_an_entity_has_suspects(
    story: Story, lost: dict[str, Any], won: dict[str, Any], expected: tuple[str, str, Any]
) -> None:
    story.put(ONE, 10, **lost)
    story.put(TWO, 20, **won)
    story.carry_all()
    assert [told(story.at(site)) for site in SITES] == [[(*expected, ONE)]] * 5


@pytest.mark.parametrize(
    "both",
    [
        {"attributes": {"level": 1, "tags": [{"a": 1}]}},
        {"attributes": {"level": None}},
        {"attributes": {"odd": np.ones(3, np.float32)}},
        {"type": "pump"},
        {"text": ""},
        {"edges": [EDGE]},
        {"edges": [EDGE | {"properties": {"m": 3}}]},
        {"remove_edges": [EDGE]},
        {"remove_vectors": ["shape"]},
    ],
)
def test_two_sites_that_say_the_same_are_not_at_odds(story: Story, both: dict[str, Any]) -> None:
    story.put(ONE, 10, **both)
    story.put(TWO, 20, **both)
    story.carry_all()
    assert [story.at(site) for site in SITES] == [[]] * 5


def test_writes_to_different_parts_are_not_at_odds(story: Story) -> None:
    story.put(ONE, 10, attributes={"a": 1}, edges=[EDGE])
    story.put(TWO, 20, attributes={"b": 1}, edges=[EDGE | {"target_id": "valve"}], text="hums")
    story.carry_all()
    assert story.at(HUB) == []


def test_an_event_that_removes_and_adds_a_thing_is_at_odds_only_with_others(story: Story) -> None:
    story.put(ONE, 10, remove_edges=[EDGE], edges=[EDGE])
    assert story.at(ONE) == []
    story.put(TWO, 20, remove_edges=[EDGE])
    story.carry_all()
    assert told(story.at(HUB)) == [("edge", "feeds tank", {}, ONE)]


# ── whatever happens ────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Any writes, and any carriage of any part; clocks that never fall behind what their site has heard."""
    story = Story()
    clocks = dict.fromkeys(SITES, 0)
    for _ in range(draw(st.integers(2, 14))):
        match draw(st.sampled_from(("put", "put", "up", "down"))):
            case "put":
                site = draw(st.sampled_from(SITES[:4]))
                heard = [record.event.hlc >> 16 for record in story.logs[site]]
                clocks[site] = max([clocks[site], *heard]) + draw(st.integers(1, 9))
                valid = draw(st.fixed_dictionaries({}, optional={"valid_from": st.integers(0, 60)}))
                story.put(site, clocks[site], **valid, **draw(bodies))
            case "up":
                story.up(draw(st.sampled_from(SITES[1:4])), draw(st.integers(0, 3)))
            case "down":
                story.down(draw(st.sampled_from(SITES[1:4])), draw(st.integers(0, 3)))
    story.carry_all()
    return story


def expected(story: Story) -> Iterator[tuple[str, str, Any, str]]:
    """Losers that are related to no write that wins over them, by what each site really had when it wrote."""
    writes: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
    for record in story.logs[HUB]:
        event, body = record.event, record.event.body
        said: list[tuple[str, str, Any]] = [("type", "", body["type"])] if "type" in body else []
        said += [("text", "", body["text"] or None)] if "text" in body else []
        said += [("attribute", name, value) for name, value in body.get("attributes", {}).items()]
        for call in ("remove_edges", "edges"):
            for edge in body.get(call, []):
                value = edge.get("properties", {}) if call == "edges" else None
                said.append(("edge", f"{edge['relation']} {edge['target_id']}", value))
        said += [("vector", name, None) for name in body.get("remove_vectors", [])]
        said += [("vector", name, "a vector") for name in body.get("vectors", {})]
        for turn, (part, name, value) in enumerate(said):
            key = event.valid_from_ms, event.hlc, event.site, turn
            writes.setdefault((part, name), []).append((key, value, event))
    for (part, name), said_of_it in sorted(writes.items()):
        ordered = sorted(said_of_it, key=lambda write: write[0], reverse=True)
        for rank, (_, value, event) in enumerate(ordered):
            above = [winner.id for _, _, winner in ordered[:rank]]
            related = {event.id, *story.known[event.id]}
            if not above or any(each in related or event.id in story.known[each] for each in above):
                continue
            if value != ordered[0][1] or value == "a vector":
                yield part, name, None if value == "a vector" else value, event.site


@given(stories())
def test_suspects_are_the_losers_that_no_winner_had_heard_of(story: Story) -> None:
    assert told(story.at(HUB)) == list(expected(story))


@given(stories())
def test_suspects_are_the_same_at_every_site(story: Story) -> None:
    found = story.at(HUB)
    for site in SITES[1:]:
        story.tell_places(site)
        assert story.at(site) == found


@given(st.data(), stories())
def test_suspects_do_not_depend_on_the_order_in_which_a_site_heard(data: st.DataObject, story: Story) -> None:
    heard = changes(story.logs[HUB])
    assert suspects(data.draw(st.permutations(heard))) == suspects(heard)
