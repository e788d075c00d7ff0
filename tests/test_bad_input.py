"""What bad input gets: a typed error that says what was wrong, at once, and a service that still answers.

Raw requests go to the real subjects, so nothing that the SDK checks first stands between them and the services.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import msgpack
import numpy as np
import pytest
import pytest_asyncio
from conftest import SITE, Raw, open_raw
from desk import Held, SmallDesk, set_context
from mesh import STRONG, Mesh, ask_raw, body_of, code_of

from mnemesh import Memory, subjects
from mnemesh.call import BUDGET, MESSAGE_ID
from mnemesh.errors import BadRequest, Busy, Denied, NotFound, Timeout, TooLarge, Unavailable
from mnemesh.host import hosted
from mnemesh.ids import MAX_ID_BYTES

pytestmark = pytest.mark.asyncio(loop_scope="module")

ME = "acme", "alice"
SUBJECTS = {
    "set_context": subjects.set_context(*ME),
    "upsert_embedding": subjects.upsert_embedding(*ME),
    "forget": subjects.forget(*ME),
    "ingest": subjects.ingest(*ME),
    "get_context": subjects.get_context(*ME, "known"),
    "timeline": subjects.timeline(*ME, "known"),
    "search_embedding": subjects.search_embedding(*ME),
    "search_text": subjects.search_text(*ME),
    "traverse": subjects.traverse(*ME),
    "timeline_range": subjects.timeline_range(*ME),
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def raw(mesh: Mesh, alice: Memory) -> AsyncIterator[Raw]:
    """`acme.alice` with nothing but a NATS client. There is an entity `known` and a space `known` of 2 dimensions."""
    await alice.set_context("known", attributes={"n": 1}, vectors={"known": [1, 0]}, text="known")
    await alice.search_embedding([1, 0], space="known", consistency=STRONG)
    raw = await open_raw(mesh.server, "acme.alice")
    yield raw
    await raw.client.close()


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def still_answers(request: pytest.FixtureRequest, alice: Memory) -> AsyncIterator[None]:
    """Whatever a test sent, every service answers afterwards."""
    yield
    await alice.set_context("after", attributes={"test": request.node.name}, text="after", vectors={"after": [1, 0]})
    assert (await alice.get_context("after", consistency=STRONG)).attributes == {"test": request.node.name}
    found = await alice.search_embedding([1, 0], space="after", consistency=STRONG)
    assert [hit.entity_id for hit in found.hits] == ["after"]
    assert found.coverage is not None
    assert found.coverage.complete


async def refused(raw: Raw, operation: str, payload: bytes, **headers: str) -> tuple[str, str]:
    """The code and message of the error that a request gets."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    reply = await ask_raw(raw.client, SUBJECTS[operation], payload, named)
    code = code_of(reply)
    assert code is not None, f"{operation} took {payload[:100]!r}: {reply.data[:200]!r}"
    return code, body_of(reply)["message"]


# ── bytes that are no document ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operation", SUBJECTS)
@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"\xc1", "not valid MessagePack"),
        (b"\x81\xa1a", "not valid MessagePack"),
        (b"\x80\x80", "not valid MessagePack"),
        (b"\xa1\xff", "not valid MessagePack"),
        (b"\x91" * 5000, "not valid MessagePack|nested too deeply"),
        (b"\x81\x01\x01", "not valid MessagePack: int is not allowed"),
        (b"\x81\xc4\x01a\x01", "Expected `str`|unknown|not valid"),
        (b"\x81\xa1v\xd4\x09\x00", "unknown MessagePack extension type 9"),
        (b"\x81\xa1v\xc7\x03\x01abc", "not a whole number of 4-byte floats"),
        (b"\x93\x01\x02\x03", "Expected `object`, got `array`"),
        (b"\x05", "Expected `object`, got `int`"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"entity_id": "\\ud800"}', "not valid JSON.*surrogates"),
        (b'{"entity_id": "\xff"}', "not valid JSON"),
        (b'{"a":' * 10_000, "nested too deeply"),
        (b'{"no such field": 1}', "unknown field `no such field`"),
    ],
    ids=lambda value: repr(value[:18]) if isinstance(value, bytes) else "",
)
async def test_bytes_that_are_no_request_are_told_why(raw: Raw, operation: str, payload: bytes, says: str) -> None:
    code, message = await refused(raw, operation, payload)
    assert code == "bad_request"
    assert message

    assert re.search(says, message), message


# ── fields that are wrong ───────────────────────────────────────────────────────────────────────────────────────

BAD_FLOATS = np.asarray([1, np.nan], "<f4").tobytes()
DEEP: Any = 0
for _ in range(40):
    DEEP = [DEEP]

BAD_FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    # writes
    ("set_context", {}, "bad_request", "entity_id"),
    ("set_context", {"entity_id": 5}, "bad_request", r"\$\.entity_id"),
    ("set_context", {"entity_id": None}, "bad_request", r"\$\.entity_id"),
    ("set_context", {"entity_id": ""}, "bad_request", r"length >= 1.*\$\.entity_id"),
    ("set_context", {"entity_id": "x" * (MAX_ID_BYTES + 1)}, "bad_request", "at most 16384 bytes"),
    ("set_context", {"entity_id": "e", "type": ""}, "bad_request", r"\$\.type"),
    ("set_context", {"entity_id": "e", "type": "x" * 300}, "bad_request", r"\$\.type"),
    ("set_context", {"entity_id": "e", "attributes": []}, "bad_request", r"\$\.attributes"),
    ("set_context", {"entity_id": "e", "attributes": {"": 1}}, "bad_request", "attribute's name"),
    ("set_context", {"entity_id": "e", "attributes": {"x": b"raw"}}, "bad_request", "attributes.x: a bytes"),
    ("set_context", {"entity_id": "e", "attributes": {"x": {"y": b"raw"}}}, "bad_request", "attributes.x.y: a bytes"),
    ("set_context", {"entity_id": "e", "attributes": {"x": float("nan")}}, "bad_request", "attributes.x: NaN"),
    ("set_context", {"entity_id": "e", "attributes": {"x": [float("inf")]}}, "bad_request", "attributes.x: NaN"),
    ("set_context", {"entity_id": "e", "attributes": {"x": DEEP}}, "bad_request", "attributes.x: nested more than 32"),
    ("set_context", {"entity_id": "e", "attributes": {"x": datetime.now(UTC)}}, "bad_request", "attributes.x: a datet"),
    ("set_context", {"entity_id": "e", "attributes": {"state_vector": True}}, "bad_request", "attributes.state_vector"),
    ("set_context", {"entity_id": "e", "attributes": {"state_vector": "%%%"}}, "bad_request", "not valid base64"),
    ("set_context", {"entity_id": "e", "attributes": {"state_vector": []}}, "bad_request", "shape"),
    ("set_context", {"entity_id": "e", "edges": [{"relation": "r"}]}, "bad_request", r"target_id.*\$\.edges"),
    ("set_context", {"entity_id": "e", "edges": [{"relation": "", "target_id": "t"}]}, "bad_request", "relation"),
    ("set_context", {"entity_id": "e", "edges": [{"relation": "r", "target_id": ""}]}, "bad_request", "target_id"),
    (
        "set_context",
        {"entity_id": "e", "edges": [{"relation": "r", "target_id": "t", "properties": {"p": b"x"}}]},
        "bad_request",
        "edge 'r'.p: a bytes",
    ),
    ("set_context", {"entity_id": "e", "vectors": {"no spaces": [1]}}, "bad_request", "space 'no spaces'"),
    ("set_context", {"entity_id": "e", "vectors": {"s": [True, False]}}, "bad_request", "every item must be a number"),
    ("set_context", {"entity_id": "e", "vectors": {"s": ["1"]}}, "bad_request", "every item must be a number"),
    ("set_context", {"entity_id": "e", "vectors": {"known": [1, 2, 3]}}, "bad_request", "2 dimensions.*has 3"),
    ("set_context", {"entity_id": "e", "vectors": {"s": [0.0] * 5000}}, "too_large", "5000 dimensions; at most 4096"),
    ("set_context", {"entity_id": "e", "valid_from": "2020-01-01T00:00:00"}, "bad_request", r"\$\.valid_from"),
    ("set_context", {"entity_id": "e", "valid_from": "yesterday"}, "bad_request", r"\$\.valid_from"),
    (
        "set_context",
        {"entity_id": "e", "valid_from": "0001-01-01T00:00:00+10:00"},
        "bad_request",
        "valid_from: .*years",
    ),
    ("set_context", {"entity_id": "e", "valid_to": "9999-12-31T23:59:59.9999Z"}, "bad_request", "valid_to: .*years"),
    ("set_context", {"entity_id": "e", "expected_version": -1}, "bad_request", r"\$\.expected_version"),
    ("set_context", {"entity_id": "e", "expected_version": True}, "bad_request", r"\$\.expected_version"),
    ("set_context", {"entity_id": "e", "expected_version": 2**64 - 1}, "bad_request", r"\$\.expected_version"),
    ("upsert_embedding", {"entity_id": "e"}, "bad_request", "vector"),
    ("upsert_embedding", {"entity_id": "e", "vector": "!"}, "bad_request", "not valid base64"),
    ("upsert_embedding", {"entity_id": "e", "vector": base64.b64encode(b"abc").decode()}, "bad_request", "4 bytes"),
    ("upsert_embedding", {"entity_id": "e", "vector": base64.b64encode(BAD_FLOATS).decode()}, "bad_request", "NaN"),
    ("upsert_embedding", {"entity_id": "e", "vector": [1.0, float("inf")]}, "bad_request", "NaN or infinity"),
    ("upsert_embedding", {"entity_id": "e", "vector": [1e300]}, "bad_request", "NaN or infinity"),
    (
        "upsert_embedding",
        {"entity_id": "e", "vector": msgpack.ExtType(1, BAD_FLOATS)},
        "bad_request",
        "NaN or infinity",
    ),
    ("upsert_embedding", {"entity_id": "e", "vector": msgpack.ExtType(1, b"")}, "bad_request", "shape"),
    ("upsert_embedding", {"entity_id": "e", "vector": 5}, "bad_request", "vector"),
    ("upsert_embedding", {"entity_id": "e", "vector": [1], "space": "a.b"}, "bad_request", "space 'a.b'"),
    ("upsert_embedding", {"entity_id": "e", "vector": [1], "space": "*"}, "bad_request", r"space '\*'"),
    ("upsert_embedding", {"entity_id": "e", "vector": [1], "metric": "cosinus"}, "bad_request", "cosinus"),
    ("upsert_embedding", {"entity_id": "e", "vector": [1], "type": "x" * 300}, "bad_request", r"\$\.type"),
    ("forget", {"entity_id": ""}, "bad_request", "entity_id"),
    ("forget", {"entity_id": "e", "expected_version": "1"}, "bad_request", "expected_version"),
    ("ingest", {"entities": {}}, "bad_request", r"\$\.entities"),
    ("ingest", {"entities": []}, "bad_request", "at least one"),
    ("ingest", {"entities": [{}], "atomic": 1}, "bad_request", r"\$\.atomic"),
    ("ingest", {"entities": [{"entity_id": "e"}, 5], "atomic": True}, "bad_request", "entity 1: Expected `object`"),
    # reads
    ("get_context", {"entity_id": "another"}, "bad_request", "not the one that the subject is about"),
    ("get_context", {"as_of": "2020-01-01T00:00:00"}, "bad_request", r"\$\.as_of"),
    ("get_context", {"as_of": 1600000000}, "bad_request", r"\$\.as_of"),
    ("get_context", {"include_vectors": 1}, "bad_request", r"\$\.include_vectors"),
    ("get_context", {"consistency": "strong"}, "bad_request", r"\$\.consistency"),
    ("get_context", {"consistency": {"level": "perfect"}}, "bad_request", "perfect"),
    ("get_context", {"consistency": {"level": "session", "token": {"hub": "1"}}}, "bad_request", r"\$\.consistency"),
    ("get_context", {"consistency": {"level": "bounded", "max_lag_ms": 0}}, "bad_request", "max_lag_ms"),
    ("get_context", {"consistency": {"level": "bounded", "max_lag_ms": 2**63}}, "bad_request", "max_lag_ms"),
    ("timeline", {"limit": 0}, "bad_request", r"\$\.limit"),
    ("timeline", {"limit": -5}, "bad_request", r"\$\.limit"),
    ("timeline", {"limit": 1001}, "bad_request", r"\$\.limit"),
    ("timeline", {"limit": 1.5}, "bad_request", r"\$\.limit"),
    ("timeline", {"after": -1}, "bad_request", r"\$\.after"),
    ("timeline", {"after": 2**63}, "bad_request", r"\$\.after"),
    ("timeline_range", {"after": 2**63}, "bad_request", r"\$\.after"),
    ("timeline_range", {"start": "2020-13-01T00:00:00Z"}, "bad_request", r"\$\.start"),
    ("timeline_range", {"limit": True}, "bad_request", r"\$\.limit"),
    ("search_embedding", {}, "bad_request", "vector"),
    ("search_embedding", {"vector": [1, 0], "space": "known", "k": 0}, "bad_request", r"\$\.k"),
    ("search_embedding", {"vector": [1, 0], "space": "known", "k": 1001}, "bad_request", r"\$\.k"),
    ("search_embedding", {"vector": [1, 0], "space": "unknown"}, "not_found", "'unknown'"),
    ("search_embedding", {"vector": [1, 0, 0], "space": "known"}, "bad_request", "3 dimensions"),
    ("search_embedding", {"vector": [1, float("nan")], "space": "known"}, "bad_request", "NaN"),
    ("search_embedding", {"vector": msgpack.ExtType(1, BAD_FLOATS), "space": "known"}, "bad_request", "NaN"),
    ("search_embedding", {"vector": [1, 0], "space": "known", "filter": {"n": {"near": 1}}}, "bad_request", "near"),
    ("search_embedding", {"vector": [1, 0], "space": "known", "filter": {"n": {}}}, "bad_request", "no operator"),
    ("search_embedding", {"vector": [1, 0], "space": "known", "filter": {"n": {"in": 5}}}, "bad_request", "'n'"),
    ("search_embedding", {"vector": [1, 0], "space": "known", "filter": {"n": {"lt": None}}}, "bad_request", "'n'"),
    ("search_embedding", {"vector": [1, 0], "space": "known", "filter": {"n": b"x"}}, "bad_request", "'n'"),
    ("search_embedding", {"vector": [1, 0], "space": "known", "filter": {"n": [1]}}, "bad_request", "'n'"),
    ("search_embedding", {"vector": [1, 0], "space": "known", "output_fields": [1]}, "bad_request", "output_fields"),
    ("search_text", {"query": ""}, "bad_request", r"\$\.query"),
    ("search_text", {"query": "x" * 5000}, "bad_request", r"\$\.query"),
    ("search_text", {"query": ["x"]}, "bad_request", r"\$\.query"),
    ("traverse", {"start": []}, "bad_request", "at least one start"),
    ("traverse", {"start": ""}, "bad_request", "non-empty"),
    ("traverse", {"start": [""]}, "bad_request", "non-empty"),
    ("traverse", {"start": [5]}, "bad_request", r"\$\.start"),
    ("traverse", {"start": "e", "depth": 0}, "bad_request", r"\$\.depth"),
    ("traverse", {"start": "e", "depth": 1000}, "bad_request", r"\$\.depth"),
    ("traverse", {"start": "e", "limit": -1}, "bad_request", r"\$\.limit"),
    ("traverse", {"start": "e", "limit": 10**6}, "bad_request", r"\$\.limit"),
    ("traverse", {"start": "e", "direction": "up"}, "bad_request", "up"),
    ("traverse", {"start": "e", "relations": ["r"] * 2000}, "bad_request", r"\$\.relations"),
]


@pytest.mark.parametrize(("operation", "request_", "code", "says"), BAD_FIELDS)
async def test_a_field_that_is_wrong_is_named(
    raw: Raw, operation: str, request_: dict[str, Any], code: str, says: str
) -> None:

    got, message = await refused(raw, operation, msgpack.packb(request_, datetime=True))
    assert (got, bool(re.search(says, message))) == (code, True), (got, message)


@pytest.mark.parametrize(
    ("operation", "text", "says"),
    [
        ("set_context", '{"entity_id": "e", "attributes": {"x": ENDLESS}}', "64 bits"),
        ("set_context", '{"entity_id": "e", "expected_version": ENDLESS}', "expected_version"),
        ("timeline", '{"after": ENDLESS}', "after"),
        ("timeline", '{"after": 1e400}', "after"),
        ("timeline", '{"limit": -ENDLESS}', "limit"),
        ("get_context", '{"consistency": {"level": "bounded", "max_lag_ms": ENDLESS}}', "max_lag_ms"),
        ("upsert_embedding", '{"entity_id": "e", "vector": [ENDLESS]}', "out of range"),
        ("search_embedding", '{"vector": [1, 0], "space": "known", "filter": {"n": {"in": [[1]]}}}', "'n'"),
        ("set_context", '{"entity_id": "e", "attributes": {"x": "\\udfff"}}', "surrogate"),
    ],
)
async def test_a_number_or_text_that_only_json_can_spell_is_refused(
    raw: Raw, operation: str, text: str, says: str
) -> None:
    code, message = await refused(raw, operation, text.replace("ENDLESS", "9" * 400).encode())
    assert code == "bad_request"
    assert says in message


async def test_a_token_beyond_64_bits_is_stale_and_not_a_crash(raw: Raw) -> None:
    text = json.dumps({"consistency": {"level": "session", "token": {SITE: 10**400}}})
    code, _ = await refused(raw, "get_context", text.encode(), **{BUDGET.replace("-", "_"): "100"})
    assert code == "stale"


@pytest.mark.parametrize(
    "payload",
    [
        b'{"entity_id": "first", "entity_id": "twice"}',
        b"\x82\xa9entity_id\xa5first\xa9entity_id\xa5twice",
    ],
)
async def test_of_a_key_that_comes_twice_the_last_counts(raw: Raw, payload: bytes) -> None:
    reply = await ask_raw(raw.client, SUBJECTS["set_context"], payload)
    assert body_of(reply)["entity_id"] == "twice"


async def test_operators_on_what_an_entity_lacks_or_holds_as_another_kind_find_nothing(alice: Memory) -> None:
    for wanted in ({"absent": 1}, {"n": "1"}, {"n": True}, {"n": {"lt": "x"}}, {"n": 2**63}):
        assert (await alice.search_embedding([1, 0], space="known", filter=wanted)).hits == []


# ── ids ─────────────────────────────────────────────────────────────────────────────────────────────────────────

STRANGE_IDS = {
    "10 KB": "long/" * 2048,
    "10 KB of three bytes each": "€" * 3400,
    "dots": "a.b..c.",
    "spaces": " a  b ",
    "wildcards": "*.>",
    "emoji": "🚌🇪🇺",
    "control": "a\x00b\r\n\t\x1f\x7f",
    "only NUL": "\x00",
    "token-like": "==abc",
    "escape-like": "=41",
    "newline": "\n",
    "quotes": "'\"; DROP TABLE entity; --",
    "right to left": "\u202eabc\u202c",
    "a noncharacter": "\uffff\U0010ffff",
    "composed": "\u00e9",
    "decomposed": "e\u0301",
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def stranger(mesh: Mesh) -> AsyncIterator[Memory]:
    async with mesh.connect(f"{mesh.tenant()}.ann") as memory:
        yield memory


@pytest.mark.parametrize("kind", STRANGE_IDS)
async def test_any_text_is_an_id_in_every_operation(stranger: Memory, kind: str) -> None:
    name, target = STRANGE_IDS[kind], STRANGE_IDS[kind] + "2"
    number = list(STRANGE_IDS).index(kind)
    space, word = f"space{number}", f"word{number}"
    first = await stranger.set_context(
        name,
        type=kind,
        attributes={"name": name, name[:200]: 1},
        edges=[{"relation": name[:200], "target_id": target}],
        text=f"{word} {name}",
        expected_version=0,
    )
    await stranger.upsert_embedding(name, [1, 0], space=space, expected_version=first.version)
    context = await stranger.get_context(name, include_vectors=True, consistency=STRONG)
    assert context.entity_id == name
    assert context.attributes == {"name": name, name[:200]: 1}
    assert context.edges == [{"relation": name[:200], "target_id": target}]
    assert context.text == f"{word} {name}"
    (hit,) = (
        await stranger.search_embedding([1, 0], space=space, filter={"name": name}, type=kind, consistency=STRONG)
    ).hits
    assert hit.entity_id == name
    assert [hit.entity_id for hit in (await stranger.search_text(word)).hits] == [name]
    walk = await stranger.traverse(name, relations=[name[:200]])
    assert [node.entity_id for node in walk.nodes] == [name, target]
    walk = await stranger.traverse([target], direction="in")
    assert [(node.entity_id, node.via) for node in walk.nodes] == [(target, None), (name, target)]
    assert [event.entity_id for event in (await stranger.timeline(name)).events] == [name, name]
    assert [event.entity_id for event in (await stranger.timeline(type=kind)).events] == [name, name]
    ingested = await stranger.ingest([{"entity_id": name, "attributes": {"more": 1}}, {"entity_id": target}])
    assert ingested.refused == 0
    await stranger.forget(name)
    with pytest.raises(NotFound):
        await stranger.get_context(name, consistency=STRONG)
    assert (await stranger.get_context(target)).entity_id == target


async def test_a_word_after_a_nul_in_a_text_is_found(stranger: Memory) -> None:
    await stranger.set_context("nul", text="before\x00afterwards")
    found = await stranger.search_text("afterwards", consistency=STRONG)
    assert [hit.entity_id for hit in found.hits] == ["nul"]


async def test_a_wide_frontier_of_long_ids_goes_to_the_shards_in_rounds(stranger: Memory) -> None:
    """200 ids of 10 KB are more than one request to a shard may hold."""
    names = [f"{n:03}" + "x" * 10_000 for n in range(200)]
    for part in range(0, 200, 40):
        await stranger.set_context(
            f"hub{part}", edges=[{"relation": "r", "target_id": name} for name in names[part : part + 40]]
        )
    await stranger.set_context(names[7], edges=[{"relation": "r", "target_id": "end"}])
    hubs = [f"hub{part}" for part in range(0, 200, 40)]
    walk = await stranger.traverse(hubs, depth=2, consistency=STRONG)
    assert len(walk.nodes) == 5 + 200 + 1
    assert walk.nodes[-1].entity_id == "end"
    assert walk.coverage.complete


@pytest.mark.parametrize("name", ["", "\ud800", "a\udfffb", "x" * (MAX_ID_BYTES + 1), None, 5, b"bytes"])
async def test_what_is_no_id_is_refused_before_it_is_sent(alice: Memory, name: Any) -> None:
    for call in (
        lambda: alice.set_context(name),
        lambda: alice.upsert_embedding(name, [1]),
        lambda: alice.forget(name),
        lambda: alice.get_context(name),
        lambda: alice.traverse([name]),
        lambda: alice.set_context("e", edges=[{"relation": "r", "target_id": name}]),
    ):
        with pytest.raises(BadRequest):
            await call()


@pytest.mark.parametrize("token", ["=", "=4", "=zz", "a=41", "====", "==", "=FF"])
async def test_a_token_that_is_no_ids_is_refused(raw: Raw, token: str) -> None:
    for subject in (subjects.get_context(*ME, token), subjects.timeline(*ME, token)):
        reply = await ask_raw(raw.client, subject, b"")
        assert code_of(reply) == "bad_request"


# ── headers ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("budget", ["", "soon", "-1", "nan", "inf", "1e30", "0x10"])
async def test_a_budget_that_is_none_is_refused(raw: Raw, budget: str) -> None:
    for operation in SUBJECTS:
        reply = await ask_raw(raw.client, SUBJECTS[operation], b"{}", {BUDGET: budget})
        assert code_of(reply) == "bad_request"
        assert BUDGET in body_of(reply)["message"]


async def test_a_spent_budget_is_a_timeout(raw: Raw, alice: Memory) -> None:
    for operation in SUBJECTS:
        reply = await ask_raw(raw.client, SUBJECTS[operation], b"{}", {BUDGET: "0"})
        assert code_of(reply) == "timeout"
    for budget_ms in (0, -5):
        with pytest.raises(Timeout):
            await alice.get_context("known", budget_ms=budget_ms)


@pytest.mark.parametrize(
    "message_id", ["x" * 129, "a\r\nInjected: 1", "a\nb", "\x00", "\ud800", "tab\tbed", "ü", "", " x", "x "]
)
async def test_a_message_id_that_no_header_can_carry_is_refused(alice: Memory, message_id: str) -> None:
    """A line end would have let the caller write headers, and two ids that differ in blanks were one."""
    with pytest.raises(BadRequest, match=MESSAGE_ID):
        await alice.set_context("e", message_id=message_id)


@pytest.mark.parametrize("message_id", ["a b", "x", "colon: here", "*.>", "x" * 128])
async def test_a_message_id_of_any_printable_characters_works(alice: Memory, message_id: str) -> None:
    first = await alice.set_context(f"id {message_id}", message_id=message_id)
    again = await alice.set_context(f"id {message_id}", message_id=message_id)
    assert (again.duplicate, again.version) == (True, first.version)


# ── who and where ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_operation_that_nobody_serves_is_denied_at_once(raw: Raw, alice: Memory) -> None:
    began = asyncio.get_running_loop().time()
    known = subjects.set_context("acme", "alice")
    for subject in (known.replace("set_context", "remember_all"), known.replace(".v1.", ".v2.")):
        with pytest.raises(Denied, match=re.escape(subject)):
            await alice._asker.ask(subjects.SET_CONTEXT, subject, {}, budget_s=30)
    assert asyncio.get_running_loop().time() - began < 5


async def test_a_caller_on_a_subject_of_somebody_else_is_denied_at_once(mesh: Mesh, alice: Memory) -> None:
    began = asyncio.get_running_loop().time()
    async with mesh.connect("zeta.carol") as carol:
        for tenant, agent in (("acme", "alice"), ("zeta", "dave"), ("*", "carol")):
            for ask in (
                (subjects.SET_CONTEXT, subjects.set_context(tenant, agent)),
                (subjects.GET_CONTEXT, subjects.get_context(tenant, agent, "known")),
                (subjects.TRAVERSE, subjects.traverse(tenant, agent)),
                (subjects.SHARD_SEARCH, subjects.shard_search("s0", tenant, agent)),
            ):
                with pytest.raises((Denied, BadRequest)):
                    await carol._asker.ask(*ask, {"entity_id": "e"}, budget_s=30)
    assert asyncio.get_running_loop().time() - began < 5


async def test_a_tenant_that_the_mesh_does_not_have_is_denied_by_name(mesh: Mesh) -> None:
    async with mesh.connect("ghost.gus") as gus:
        for call in (
            lambda: gus.set_context("e"),
            lambda: gus.upsert_embedding("e", [1]),
            lambda: gus.forget("e"),
            lambda: gus.ingest([{"entity_id": "e"}]),
            lambda: gus.get_context("e"),
            lambda: gus.timeline("e"),
            lambda: gus.timeline(),
            lambda: gus.search_embedding([1]),
            lambda: gus.search_text("e"),
            lambda: gus.traverse("e"),
        ):
            with pytest.raises(Denied, match="no tenant 'ghost'"):
                await call()


# ── size ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_request_over_its_operations_limit_is_too_large(raw: Raw, alice: Memory) -> None:
    for operation, limit in (("set_context", 524_288), ("forget", 65_536), ("search_text", 65_536)):
        code, message = await refused(raw, operation, b"\x80" * (limit + 1))
        assert code == "too_large"
        assert str(limit) in message
    with pytest.raises(TooLarge, match="524288"):
        await alice.set_context("e", text="x" * 600_000)
    with pytest.raises(TooLarge):
        await alice.ingest([{"entity_id": "e", "text": "x" * 9_000_000}])
    await alice.set_context("large", text="x" * 500_000)
    assert len((await alice.get_context("large", consistency=STRONG)).text or "") == 500_000


async def test_a_reply_that_no_message_can_hold_is_too_large_and_a_smaller_one_comes(mesh: Mesh) -> None:
    async with mesh.connect(f"{mesh.tenant()}.ann") as memory:
        for n in range(20):
            await memory.set_context("e", text=f"{n}" + "x" * 500_000)
        await memory.get_context("e", consistency=STRONG)
        for ask in (lambda limit: memory.timeline("e", limit=limit), lambda limit: memory.timeline(limit=limit)):
            with pytest.raises(TooLarge):
                await ask(1000)
            assert len((await ask(10)).events) == 10


# ── services that are gone or full ──────────────────────────────────────────────────────────────────────────────


async def test_a_vanished_shard_is_unavailable_at_once_for_its_entities(mesh: Mesh, alice: Memory) -> None:
    began = asyncio.get_running_loop().time()
    async with mesh.without("s0", "s1"):
        for ask in (lambda: alice.get_context("known", budget_ms=200), lambda: alice.search_text("e", budget_ms=200)):
            with pytest.raises(Unavailable, match="nobody serves"):
                await ask()
    assert asyncio.get_running_loop().time() - began < 5


async def test_a_full_mailbox_is_busy_at_once_and_nothing_is_lost(mesh: Mesh, alice: Memory) -> None:
    """In the place of the gateway stands one that works on one request at a time and lets two wait."""
    held = Held()
    async with (
        mesh.without("gateway"),
        hosted(SmallDesk(await mesh.link("gateway"), held)),
        asyncio.TaskGroup() as tasks,
    ):
        taken = [tasks.create_task(set_context(alice._asker, f"e{n}")) for n in range(3)]
        await held.begun.acquire()
        outcomes = await asyncio.gather(
            *(set_context(alice._asker, f"more{n}") for n in range(5)), return_exceptions=True
        )
        assert all(isinstance(outcome, Busy) and outcome.retry_after_ms for outcome in outcomes)
        patient = tasks.create_task(alice.set_context("patient"))
        held.release.set()
        for request in (*taken, patient):
            assert (await request).version == 1
