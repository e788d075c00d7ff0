"""What of an event may go to a device, by the policy of its hub and the types of the entity."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from test_merge import forget, put

from mnemesh.event import Event
from mnemesh.messages import Interest
from services.selection import Selection
from services.sovereignty_text import parse


def selection(policy: str) -> Selection:
    return Selection(
        cast(Any, None),  # no shard is asked
        Interest(),
        site="hub",
        device="sub7",
        leaves=parse(policy).leaves_under,
        region_of=lambda site: {"sub9": "north"}.get(site, ""),
    )


BUS_ALONE = "{version: 1, rules: [{type: bus, leaves: all}], otherwise: nothing}"


def test_a_patch_that_names_no_type_goes_as_its_entity_does() -> None:
    may = selection(BUS_ALONE)
    patch = put(attributes={"n": 1})
    assert may.reduced(patch, "hub", {"bus"}) is patch
    assert may.reduced(patch, "hub", {"meter"}) is None
    assert may.reduced(patch, "hub", ()) is None


def test_a_forget_goes_to_whoever_is_to_erase_whatever_the_type() -> None:
    may = selection(BUS_ALONE)
    event = forget()
    assert may.reduced(event, "hub", {"bus"}) is event
    for types in ({"meter"}, set()):
        told = may.reduced(event, "hub", types)
        assert told is not None
        assert (told.op, told.entity_id, told.hlc) == ("forget", "pump", event.hlc)


def test_what_a_view_made_stays_where_what_it_is_made_of_does() -> None:
    def vector(*sites: str, attributes: tuple[str, ...] = ("title",)) -> Event:
        derived = {"definition": "d", "attributes": list(attributes), "sites": list(sites)}
        return put(vectors={"notes": np.ones(2, np.float32)}, derived=derived)

    may = selection("{version: 1, rules: [{region: north, leaves: nothing}]}")
    assert may.reduced(vector("hub", "sub7"), "hub", {"note"}) is not None
    assert may.reduced(vector("hub", "sub9"), "hub", {"note"}) is None
    may = selection("{version: 1, rules: [{type: note, leaves: {attributes: [title], vectors: [notes]}}]}")
    told = may.reduced(vector("hub"), "hub", {"note"})
    assert told is not None
    assert told.body.keys() == {"vectors", "derived"}
    for kept in (vector("hub", attributes=("title", "body")), put(vectors={"notes": np.ones(2)}, derived=5)):
        told = may.reduced(kept, "hub", {"note"})
        assert told is not None
        assert told.body == {}
