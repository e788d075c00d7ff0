"""Events: what one version of the code writes, every other can carry."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_wire import SCALARS, TEXT, documents

from mnemesh import wire
from mnemesh.clock import COUNTER_BITS
from mnemesh.errors import BadRequest
from mnemesh.event import SCHEMA, Event, decode_event

FIELDS = {name for name in Event.__struct_fields__ if name != "extra"}
INTEGERS = st.integers(0, 2**63 - 1)

EVENTS = st.builds(
    Event,
    id=TEXT,
    tenant=TEXT,
    entity_id=TEXT,
    op=st.sampled_from(["put", "forget"]),
    agent=TEXT,
    site=TEXT,
    hlc=INTEGERS,
    body=documents(SCALARS),
    valid_from=st.none() | INTEGERS,
    valid_to=st.none() | INTEGERS,
    schema=st.integers(1, 9),
    extra=documents(SCALARS).map(lambda extra: {name: extra[name] for name in extra.keys() - FIELDS}),
)

WRITTEN = Event(
    id="1", tenant="acme", entity_id="bus:7", op="put", agent="alice", site="hub", hlc=1_700_000_000_000 << COUNTER_BITS
)


@given(EVENTS)
def test_an_event_returns_from_the_log_as_it_was_with_the_fields_that_nobody_here_knows(event: Event) -> None:
    assert decode_event(event.encode()) == event


def test_a_later_version_of_an_event_passes_through_this_one_unharmed() -> None:
    later = msgpack.unpackb(WRITTEN.encode()) | {"schema": SCHEMA + 1, "mood": {"calm": True}, "extra": 7}
    event = decode_event(msgpack.packb(later))
    assert event.extra == {"mood": {"calm": True}, "extra": 7}
    assert event.schema == SCHEMA + 1
    assert msgpack.unpackb(event.encode()) == later


def test_vectors_in_a_body_come_back_as_vectors() -> None:
    vector = np.arange(4, dtype=np.float32)
    event = Event(**{name: getattr(WRITTEN, name) for name in FIELDS - {"body"}}, body={"vectors": {"home": vector}})
    assert np.array_equal(decode_event(event.encode()).body["vectors"]["home"], vector)


def test_an_event_is_true_from_when_its_writer_said_or_from_when_it_was_written() -> None:
    assert WRITTEN.valid_from_ms == 1_700_000_000_000
    said = decode_event(wire.encode(msgpack.unpackb(WRITTEN.encode()) | {"valid_from": 0}))
    assert said.valid_from_ms == 0


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc0", b"[1]", b"\x93\x01\x02\x03", b"{}", b"junk", WRITTEN.encode()[:-1], b"\x01"],
)
def test_what_is_no_event_is_a_bad_request(payload: bytes) -> None:
    with pytest.raises(BadRequest):
        decode_event(payload)


@pytest.mark.parametrize(("name", "value"), [("op", "destroy"), ("hlc", "soon"), ("tenant", None), ("body", [])])
def test_a_field_that_is_wrong_is_named(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=name):
        decode_event(wire.encode(msgpack.unpackb(WRITTEN.encode()) | {name: value}))
