"""The stores of a shard as they are served: each is kept running, and another may take the place of one meanwhile.

Looks at `memory_shards.stores` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from memory_shards.stores import Facet
from memory_shards.stores.by_url import Stores
from mnemesh.supervision import first_of


class Served:
    """What readers read. A store is named by its projection. Belongs to the event loop."""

    def __init__(self, stores: Stores) -> None:
        self.stores = stores
        self.offered_to = max((projection.offered for projection in stores.embedded), default=0)
        """Up to where the log was handed to the stores that are files."""
        self.handing = asyncio.Lock()
        """Held while a batch is handed to them, and while one takes another's place."""
        self._changed = asyncio.Event()

    def named(self, name: str) -> Facet | None:
        """The store of this name, whichever it is now."""
        return next((facet for facet in self.stores.facets if facet.projection.name == name), None)

    async def keep(self, name: str, run: Callable[[Any], Awaitable[None]]) -> None:
        """Run the store of this name for ever, whichever it is."""
        while True:
            changed, facet = self._changed, self.named(name)
            await first_of(_running(run, facet), changed.wait())

    def put(self, new: Facet, old: Facet) -> None:
        """Have readers read `new` from now on, where they read `old`."""
        self.stores = self.stores.with_(new, instead_of=old)
        old.projection.watermark.succeeded_by(new.projection.watermark)
        self._changed.set()
        self._changed = asyncio.Event()


async def _running(run: Callable[[Any], Awaitable[None]], facet: Facet | None) -> None:
    await run(facet)
