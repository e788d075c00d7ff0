"""Every backend of a shard's stores, each on the real thing, for tests that must pass on all of them alike.

A `Backend` opens the stores of one shard of a site of its own, so that tests which share a server do not meet. What it
is told, `applied` brings to every store that has something of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from memory_shards.stores.by_url import Origin, Stores, open_stores
from memory_shards.stores.urls import StoreUrls
from mnemesh.event import Record
from mnemesh.ids import PARTITIONS

_SITES = count(1)

GPU_IS_HERE = Path("/dev/nvidia0").exists()
"""Or what would be on it runs on NumPy, and on another index of FAISS."""

IN_MEMORY = ("embedded", "cuda", *(("faiss-gpu",) if GPU_IS_HERE else ()))
"""Where this machine can search vectors in the shard's process."""


@dataclass(frozen=True)
class Backend:
    """Some stores by URL, for one shard with all partitions of a site that nobody else uses."""

    urls: StoreUrls
    origin: Origin

    @classmethod
    def of(cls, urls: StoreUrls, folder: Path) -> Backend:
        return cls(urls, Origin(f"site{next(_SITES)}", "s0", frozenset(range(PARTITIONS)), "1", folder))

    def elsewhere(self, folder: Path) -> Backend:
        """The same backend for another site."""
        return Backend.of(self.urls, folder)

    def of_log(self, incarnation: str) -> Backend:
        """The same stores, for another log."""
        return Backend(self.urls, replace(self.origin, incarnation=incarnation))

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Stores]:
        stores = await open_stores(self.urls, self.origin)
        try:
            for outside in stores.outside:
                await outside.begin(endless)
            searching = asyncio.ensure_future(stores.vectors.run())
            yield stores
            searching.cancel()
        finally:
            await stores.close()


async def endless() -> int:
    """Where a log ends that nothing is ahead of."""
    return 1 << 60


async def apply(stores: Stores, records: Sequence[Record], watermark: int | None = None) -> None:
    """Have every store apply these, in one go, and stand at `watermark` (that of the last, if none is given)."""
    for projection in stores.projections:
        at = records[-1].sequence if watermark is None else watermark
        await projection.on_worker(projection.store.apply, records, at)  # type: ignore[arg-type]
        projection.watermark.advance(projection.store.watermark)
