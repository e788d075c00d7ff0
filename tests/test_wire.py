"""Bytes on the wire: what goes in comes out, and nothing that comes in can do worse than be refused."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mnemesh import subjects, wire
from mnemesh.contract import AnyOperation
from mnemesh.errors import BadRequest, TooLarge
from mnemesh.messages import Context, SetContext, UpsertEmbedding, Written

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
MOMENTS = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXT
JSON_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | TEXT
    | st.floats(allow_nan=False, allow_infinity=False)
)
HALVES = arrays.arrays(np.float16, st.integers(0, 40), elements=st.floats(-1000, 1000, width=16))
OPERATIONS = st.sampled_from(list(subjects.OPERATIONS.values()))
VECTORS = arrays.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))


def documents(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(TEXT, nested(leaves), max_size=5)


# ── MessagePack ─────────────────────────────────────────────────────────────────────────────────────────────────


@given(documents(SCALARS | MOMENTS))
def test_messagepack_returns_what_was_put_in(document: dict[str, Any]) -> None:
    payload = wire.encode(document)
    assert wire.decode(payload) == document
    assert not wire.is_json(payload)


@given(VECTORS | HALVES)
def test_a_vector_travels_bit_for_bit_as_an_extension_that_is_read_without_a_copy(vector: np.ndarray[Any, Any]) -> None:
    payload = wire.encode({"v": vector})
    decoded = wire.decode(payload)["v"]
    assert decoded.dtype == vector.dtype
    assert decoded.tobytes() == vector.tobytes()
    assert not decoded.flags.writeable
    assert not decoded.flags.owndata
    raw = msgpack.unpackb(payload)["v"]
    assert raw.code == (wire.EXT_FLOAT32 if vector.dtype == np.float32 else wire.EXT_FLOAT16)
    assert raw.data == vector.astype(vector.dtype.newbyteorder("<")).tobytes()


@given(st.binary(max_size=64), OPERATIONS)
def test_no_bytes_can_do_worse_than_be_refused(payload: bytes, operation: AnyOperation) -> None:
    with contextlib.suppress(BadRequest, TooLarge):
        wire.decode_as(payload, operation.request)


@given(documents(SCALARS | MOMENTS | st.binary(max_size=8) | VECTORS), OPERATIONS, st.data())
def test_no_document_can_do_worse_than_be_refused(
    document: dict[str, Any], operation: AnyOperation, data: st.DataObject
) -> None:
    """Real field names with values of any kind."""
    mixed = document
    if fields := operation.request.__struct_fields__:
        mixed |= data.draw(st.dictionaries(st.sampled_from(fields), nested(SCALARS | VECTORS), max_size=3))
    with contextlib.suppress(BadRequest, TooLarge):
        wire.convert(mixed, operation.request)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x81\x01\x01",  # a key that is a number
        b"\xd4\x09\x00",  # an extension that nobody knows
        b"\xc7\x03\x01abc",  # three bytes of float32
        b"\x91" * 2000,  # bottomless
        b"{" + b'"a":{' * 100_000,
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": "\\udc00"}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1} trailing',
        b"\x80\x80",
        b"{\xff}",
        b"\xd6\xff\xff\xff\xff",  # a timestamp cut short
        b"\xc7\x0c\xff" + b"\xff" * 12,  # a timestamp past the end of time
    ],
)
def test_what_is_broken_is_a_bad_request(payload: bytes) -> None:
    with pytest.raises(BadRequest):
        wire.decode(payload)


def test_nothing_is_an_empty_map() -> None:
    assert wire.decode(b"") == {}


@pytest.mark.parametrize(
    ("value", "as_json"),
    [(2**64, False), (-(2**63) - 1, False), (math.nan, True)]
    + [(value, as_json) for value in ("\ud800", object(), 1j) for as_json in (False, True)],
)
def test_what_cannot_travel_is_a_bad_request(value: object, as_json: bool) -> None:
    with pytest.raises(BadRequest):
        wire.encode({"value": value}, as_json=as_json)


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(documents(JSON_SCALARS))
def test_json_returns_what_was_put_in_and_is_told_by_its_first_byte(document: dict[str, Any]) -> None:
    payload = wire.encode(document, as_json=True)
    assert wire.is_json(payload)
    assert wire.decode(payload) == document
    assert json.loads(payload) == document
    assert wire.decode(json.dumps(document).encode()) == document


@given(arrays.arrays(np.float32, st.integers(1, 20), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_a_vector_in_json_is_numbers_or_base64(vector: np.ndarray[Any, Any]) -> None:
    text = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    for form in (vector.tolist(), text):
        payload = json.dumps({"entity_id": "x", "vector": form}).encode()
        assert np.array_equal(wire.decode_as(payload, UpsertEmbedding).vector, vector)
    reply = Context(entity_id="x", attributes={}, edges=[], spaces=[], version=1, watermark={}, vectors={"a": vector})
    assert json.loads(wire.encode(reply, as_json=True))["vectors"]["a"] == vector.tolist()


def test_times_and_zones_survive_both_forms() -> None:
    moment = datetime(2024, 2, 29, 12, 30, 0, 123456, tzinfo=UTC)
    request = SetContext(entity_id="x", valid_from=moment, valid_to=moment + timedelta(days=1))
    for as_json in (False, True):
        assert wire.decode_as(wire.encode(request, as_json=as_json), SetContext) == request
    with pytest.raises(BadRequest, match="valid_from"):
        wire.decode_as(b'{"entity_id": "x", "valid_from": "2024-02-29T12:30:00"}', SetContext)


# ── types ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_field_of_a_request_is_named_and_one_of_a_reply_is_skipped() -> None:
    with pytest.raises(BadRequest, match="colour"):
        wire.convert({"entity_id": "x", "colour": "red"}, SetContext)
    reply = wire.convert({"entity_id": "x", "version": 1, "token": {}, "colour": "red"}, Written)
    assert reply == Written(entity_id="x", version=1, token={})


def test_a_wrong_field_is_named_with_its_path() -> None:
    with pytest.raises(BadRequest, match=r"edges\[0\]\.relation"):
        wire.convert({"entity_id": "x", "edges": [{"relation": 7, "target_id": "y"}]}, SetContext)


@pytest.mark.parametrize("as_json", [False, True])
def test_fields_that_hold_their_default_are_left_out(as_json: bool) -> None:
    full = SetContext(entity_id="x", attributes={"a": None}, text="")
    assert wire.decode(wire.encode(SetContext(entity_id="x"), as_json=as_json)) == {"entity_id": "x"}
    assert wire.decode(wire.encode(full, as_json=as_json)) == {"entity_id": "x", "attributes": {"a": None}, "text": ""}


# ── vectors ─────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32) | st.integers(-1000, 1000), min_size=1, max_size=50))
def test_numbers_base64_and_arrays_make_the_same_vector(numbers: list[float]) -> None:
    vector = np.asarray(numbers, np.float32)
    text = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    for form in (numbers, tuple(numbers), text, vector, vector.astype(np.float64), vector.astype(">f4")):
        made = wire.as_vector(form)
        assert made.dtype == np.float32
        assert np.array_equal(made, vector)


@pytest.mark.parametrize(
    "value",
    [
        [],
        [math.nan],
        [math.inf],
        [1e39],
        [True],
        ["1"],
        [[1.0]],
        [10**400],
        "not base64!",
        base64.b64encode(b"abc").decode(),
        "",
        7,
        None,
        {},
        b"abcd",
        np.zeros((2, 2), np.float32),
        np.zeros(0, np.float32),
        np.array([np.nan], np.float16),
        np.array(["a"]),
        np.array([1j]),
        np.array([None]),
    ],
)
def test_what_is_no_vector_is_a_bad_request_that_names_it(value: object) -> None:
    with pytest.raises(BadRequest, match=r"attributes\.home"):
        wire.as_vector(value, what="attributes.home")


def test_too_many_dimensions_are_too_large() -> None:
    assert wire.as_vector(np.zeros(wire.MAX_DIMENSION)).shape == (wire.MAX_DIMENSION,)
    with pytest.raises(TooLarge, match="4097"):
        wire.as_vector(np.zeros(wire.MAX_DIMENSION + 1))


@given(documents(JSON_SCALARS | VECTORS))
def test_plain_leaves_no_vector(document: dict[str, Any]) -> None:
    text = json.dumps(wire.plain(document))
    assert isinstance(json.loads(text), dict)


def test_threads_may_meet_a_type_for_the_first_time_at_once() -> None:
    """In a process of its own, which msgspec took with it."""
    done = subprocess.run([sys.executable, "-c", _MEETING], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


_MEETING = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import msgspec

from mnemesh import wire

sys.setswitchinterval(1e-6)
both = Barrier(2)

def meet(kind):
    both.wait()
    return wire.convert({"of": []}, kind)

with ThreadPoolExecutor(2) as threads:
    for number in range(1000):
        part = msgspec.defstruct(f"Part{number}", [("relation", str), ("target", str)])
        kind = msgspec.defstruct(f"Whole{number}", [("of", list[part]), ("more", dict[str, part], {})])
        list(threads.map(meet, [kind, kind]))
"""
