"""Documents to measure with, and writing many of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mnemesh import Memory
from mnemesh.messages import Token

ATTRIBUTES: dict[str, Any] = {"name": "MV1.101 Bus 7", "kv": 20.0, "zone": 3, "active": True}
IN_A_REQUEST = 500


def buses(numbers: Iterable[int]) -> list[Mapping[str, Any]]:
    """Small documents: five attributes and two edges each."""
    return [
        {
            "entity_id": f"bus:{number}",
            "type": "bus",
            "attributes": {**ATTRIBUTES, "number": number},
            "edges": [
                {"relation": "feeds", "target_id": f"bus:{number + 1}"},
                {"relation": "supplies", "target_id": f"load:{number}"},
            ],
        }
        for number in numbers
    ]


async def write_all(memory: Memory, documents: Sequence[Mapping[str, Any]], *, senders: int) -> Token:
    """Write documents, so many requests under way; returns the token that covers all of them."""
    requests = iter([documents[start : start + IN_A_REQUEST] for start in range(0, len(documents), IN_A_REQUEST)])
    covered: Token = {}

    async def send() -> None:
        for request in requests:
            done = await memory.ingest(request)
            assert done.accepted == len(request), "an entity was refused"
            covered.update({site: max(sequence, covered.get(site, 0)) for site, sequence in done.token.items()})

    await asyncio.gather(*(send() for _ in range(senders)))
    return covered
