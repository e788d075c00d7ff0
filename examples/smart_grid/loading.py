"""Documents into the mesh: several `ingest` requests in flight, each under the server's `max_payload`.

Looks at the client's `ingest` only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from examples.smart_grid.documents import Document
from mnemesh.errors import MnemeshError
from mnemesh.messages import Ingested, Token

BATCH_DOCUMENTS = 500
BATCH_EDGES = 4_000
"""An edge is some 60 bytes on the wire and a day some 800: both bounds keep a request under half of 1 MiB."""

IN_FLIGHT = 8


class Ingesting(Protocol):
    """The part of `mnemesh.client.Memory` that loading needs."""

    async def ingest(self, entities: Sequence[dict[str, Any]], *, atomic: bool = False) -> Ingested: ...


class Refused(RuntimeError):
    """The mesh refused a document: the first one is named, with the mesh's reason."""


async def load(
    memory: Ingesting, documents: Iterable[Document], *, advance: Callable[[int], None] = lambda count: None
) -> Token:
    """Write all documents; `advance` hears of each batch. Returns the token that covers them all.

    Raises `Refused` if one is refused, `MnemeshError` if a request fails for good.
    """
    waiting = batches(documents)
    token: Token = {}

    async def write() -> None:
        for batch in waiting:
            ingested = await memory.ingest(batch)
            if ingested.errors:
                first = next(iter(ingested.errors.values()))
                raise Refused(f"{ingested.refused} documents, {first.entity_id} first: {first.message}")
            for site, sequence in ingested.token.items():
                token[site] = max(sequence, token.get(site, 0))
            advance(len(batch))

    try:
        async with asyncio.TaskGroup() as writers:
            for _ in range(IN_FLIGHT):
                writers.create_task(write())
    except* (Refused, MnemeshError) as failed:
        raise failed.exceptions[0] from None
    return token


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Cut a stream of documents where either bound would be passed."""
    batch: list[Document] = []
    edges = 0
    for document in documents:
        more = len(document.get("edges", ()))
        if batch and (len(batch) == BATCH_DOCUMENTS or edges + more > BATCH_EDGES):
            yield batch
            batch, edges = [], 0
        batch.append(document)
        edges += more
    if batch:
        yield batch
