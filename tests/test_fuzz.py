"""Fuzz of the wire: whatever bytes reach the real subject of any operation, a typed reply comes, and services go on.

The inputs are random bytes, and valid requests with a few changes that know the structure: a field gets a value of
another kind, a text a strange character, a number an extreme, the encoded bytes a flip, a cut or a repeat.

`tests/corpus/<operation>/` holds inputs as files that are sent on every run. What the fuzz finds goes there: when an
input gets no good reply, the failure names the file that it was written to; keep it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import pytest_asyncio
from conftest import Raw, open_raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mesh import STRONG, Mesh

from mnemesh import Memory, subjects, wire
from mnemesh.call import BUDGET, ERROR_CODE
from mnemesh.contract import AnyOperation
from mnemesh.errors import BY_CODE, Internal, Timeout

CORPUS = Path(__file__).parent / "corpus"
BUDGET_MS = 1000
EXAMPLES = int(os.environ.get("MNEMESH_FUZZ_EXAMPLES", "200"))
"""Some 5 s; more of them where the fuzz is to search for longer."""
A_ROUND = 40
"""Requests that one example sends at once, so that they also meet each other in the services."""

OPERATIONS = {name: operation for name, operation in subjects.OPERATIONS.items() if "agent" in operation.callers}

# ── valid requests, the ground that mutations start from ────────────────────────────────────────────────────────

VECTOR = msgpack.ExtType(1, bytes(8))
CONSISTENCY = {"level": "session", "token": {"hub": 1}}
TIME = "2020-01-01T00:00:00Z"
EDGES = [{"relation": "r", "target_id": "t", "properties": {"weight": 1}}]
DOCUMENT = {
    "entity_id": "fuzzed",
    "type": "t",
    "attributes": {"n": 1, "name": "x", "deep": {"list": [1, None, True]}, "state_vector": [1.0, 2.0]},
    "edges": EDGES,
    "remove_edges": [{"relation": "r", "target_id": "u"}],
    "vectors": {"s": VECTOR},
    "remove_vectors": ["gone"],
    "text": "some words",
    "valid_from": TIME,
    "valid_to": "2030-01-01T00:00:00Z",
}
VALID: dict[str, dict[str, Any]] = {
    "set_context": DOCUMENT,
    "upsert_embedding": {"entity_id": "fuzzed", "vector": VECTOR, "space": "s", "metric": "cosine", "attributes": {}},
    "forget": {"entity_id": "fuzzed"},
    "ingest": {"entities": [DOCUMENT, {"entity_id": "other"}], "atomic": False},
    "get_context": {"as_of": TIME, "valid_at": TIME, "include_vectors": True, "consistency": CONSISTENCY},
    "timeline": {"after": 0, "limit": 5, "consistency": CONSISTENCY},
    "search_embedding": {
        "vector": VECTOR,
        "space": "s",
        "k": 3,
        "type": "t",
        "filter": {"n": {"gte": 1, "in": [1, 2]}, "name": "x"},
        "output_fields": ["n"],
        "include_vectors": True,
        "consistency": CONSISTENCY,
    },
    "search_text": {"query": "some words", "k": 3, "type": "t"},
    "traverse": {"start": ["fuzzed"], "relations": ["r"], "direction": "both", "depth": 3, "limit": 10},
    "timeline_range": {"start": TIME, "end": "2030-01-01T00:00:00Z", "type": "t", "after": 0, "limit": 5},
}
TOKENS = st.sampled_from(["fuzzed", "=", "==", "=F0=9F", "x" * 200, "-"])

# ── mutations ───────────────────────────────────────────────────────────────────────────────────────────────────

STRANGE = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 1e308, -0.0])
    | st.sampled_from([float("nan"), float("inf"), float("-inf")])
    | st.floats(width=32)
    | st.text(max_size=8)
    | st.sampled_from(["", "\x00", "\n", "*", ">", ".", "a" * 5000, "\u202e", "%s", "'", '"', "{}", TIME, "AACAPw=="])
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.sampled_from([0, 1, 2, 3, 127]), st.binary(max_size=12))
    | st.sampled_from([[], {}, [[]], [{}], {"": ""}, {"eq": {}}, [None], [1, "1"], {"level": "strong"}])
    | st.lists(st.floats(width=32), max_size=5)
    | st.datetimes().map(lambda moment: moment.isoformat() + "Z")
    | st.sampled_from(["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999Z", "2020-02-30T00:00:00Z", "24:00"])
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """The value with one place in it changed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        name = draw(st.sampled_from(sorted(value)))
        match draw(st.sampled_from(["deeper", "deeper", "deeper", "drop", "rename", "add"])):
            case "deeper":
                return value | {name: draw(changed(value[name]))}
            case "drop":
                return {key: item for key, item in value.items() if key != name}
            case "rename":
                return {(draw(st.text(max_size=6)) if key == name else key): item for key, item in value.items()}
            case "add":
                return value | {draw(st.text(max_size=6)): draw(STRANGE)}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        index = draw(st.integers(0, len(value) - 1))
        item = draw(changed(value[index]))
        return value[:index] + [item] * draw(st.sampled_from([0, 1, 1, 1, 2, 50])) + value[index + 1 :]
    return draw(STRANGE)


@st.composite
def requests(draw: st.DrawFn, operation: str) -> bytes:
    """A payload: a changed request as MessagePack or JSON, perhaps with its bytes spoilt; or just bytes."""
    if not draw(st.integers(0, 9)):
        return draw(st.binary(max_size=64))
    request = VALID[operation]
    for _ in range(draw(st.integers(0, 3))):
        request = draw(changed(request))
    if draw(st.booleans()):
        payload = msgpack.packb(request)
    else:
        payload = json.dumps(request, default=lambda item: "AAAAAAAAgD8=").encode()
    match draw(st.sampled_from(["", "", "", "flip", "cut", "twice", "insert"])) if payload else "":
        case "flip":
            place = draw(st.integers(0, len(payload) - 1))
            payload = payload[:place] + bytes([payload[place] ^ draw(st.integers(1, 255))]) + payload[place + 1 :]
        case "cut":
            payload = payload[: draw(st.integers(0, len(payload)))]
        case "twice":
            payload += payload
        case "insert":
            place = draw(st.integers(0, len(payload)))
            payload = payload[:place] + draw(st.binary(min_size=1, max_size=4)) + payload[place:]
    return payload


@st.composite
def rounds(draw: st.DrawFn) -> list[tuple[str, str, bytes]]:
    """Operations, the entity tokens where their subjects have one, and payloads."""
    names = draw(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=A_ROUND))
    return [(name, draw(TOKENS), draw(requests(name))) for name in names]


# ── the mesh under fuzz ─────────────────────────────────────────────────────────────────────────────────────────


class Target:
    """A mesh, and an agent with a plain NATS client and with the SDK."""

    def __init__(self, mesh: Mesh, raw: Raw, memory: Memory) -> None:
        self._raw = raw
        self._memory = memory
        self.failed: tuple[str, bytes] | None = None
        self._me = memory.tenant, memory.agent
        self._mesh = mesh

    async def send(self, operation: str, token: str, payload: bytes) -> dict[str, Any]:
        """The body of the reply. Fails if there is none in time, or one that tells of a bug."""
        known = OPERATIONS[operation]
        tenant, agent = self._me
        subject = known.subject.replace("<tenant>", tenant).replace("<agent>", agent).replace("<entity>", token)
        try:
            reply = await self._raw.client.request(
                subject, payload, timeout=3 * BUDGET_MS / 1000, headers={BUDGET: str(BUDGET_MS)}
            )
            return self._checked(known, payload, reply.headers or {}, reply.data)
        except Exception as error:
            self.failed = operation, payload
            raise AssertionError(f"{operation} of {token} got {payload!r}: {error!r}") from error

    def _checked(self, operation: AnyOperation, payload: bytes, headers: dict[str, str], data: bytes) -> dict[str, Any]:
        assert wire.is_json(data) == wire.is_json(payload)
        code = headers.get(ERROR_CODE)
        body: dict[str, Any] = wire.decode(data)
        if code is None:
            wire.convert(body, operation.reply)
            return body
        assert body["code"] == code
        assert body["message"]
        assert BY_CODE[code] not in (Internal, Timeout), body
        return body

    async def works(self) -> None:
        """A normal request of every service still works."""
        written = await self._memory.set_context("normal", text="normal", vectors={"normal": [1, 0]})
        context = await self._memory.get_context("normal", consistency=STRONG)
        assert context.version == written.version
        found = await self._memory.search_embedding([1, 0], space="normal", consistency=STRONG)
        assert [hit.entity_id for hit in found.hits] == ["normal"]
        assert found.coverage is not None
        assert found.coverage.complete
        for name in ("s0", "s1"):
            shard = self._mesh.shard(name)
            assert shard._intake.undecodable == 0
            assert [projection.store.rejected for projection in shard.stores.projections] == [0, 0]


def _kept(operation: str, payload: bytes) -> Path:
    """The payload as a file of the corpus."""
    file = CORPUS / operation / hashlib.sha256(payload).hexdigest()[:16]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(payload)
    return file


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def target(mesh: Mesh, alice: Memory) -> AsyncIterator[Target]:
    await alice.set_context("fuzzed", vectors={"s": [1, 2]}, edges=EDGES, text="some words")
    raw = await open_raw(mesh.server, "acme.alice")
    yield Target(mesh, raw, alice)
    await raw.client.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def loop(mesh: Mesh) -> asyncio.AbstractEventLoop:
    """The loop that the mesh lives in; hypothesis drives it from outside, example by example."""
    return asyncio.get_running_loop()


def test_whatever_is_sent_gets_a_typed_reply(loop: asyncio.AbstractEventLoop, target: Target) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rounds())
    def fuzz(sent: list[tuple[str, str, bytes]]) -> None:
        loop.run_until_complete(one_round(sent))

    async def one_round(sent: list[tuple[str, str, bytes]]) -> None:
        await asyncio.gather(*(target.send(*each) for each in sent))
        await target.works()

    try:
        fuzz()
    except AssertionError as error:
        if target.failed is not None:  # hypothesis shows the smallest example last
            error.add_note(f"kept as {_kept(*target.failed)}")
        raise


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*/*")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_what_was_found_once_gets_a_typed_reply(loop: asyncio.AbstractEventLoop, target: Target, file: Path) -> None:
    payload = file.read_bytes()

    async def replay() -> None:
        await target.send(file.parent.name, "fuzzed", payload)
        await target.works()

    loop.run_until_complete(replay())


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_the_ground_that_mutations_start_from_is_valid(
    loop: asyncio.AbstractEventLoop, target: Target, operation: str
) -> None:
    async def send() -> None:
        body = await target.send(operation, "fuzzed", msgpack.packb(VALID[operation]))
        assert body.get("code") in (None, "not_found"), body

    loop.run_until_complete(send())
