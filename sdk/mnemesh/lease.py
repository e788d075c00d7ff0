"""A lease in KV: which of several replicas does what only one of them is to do.

The holder renews it every `RENEW_S` by compare-and-set. Whoever else wants it watches its revision by its own clock,
and takes it by compare-and-set once that has not moved for `EXPIRES_S`: no two clocks are compared. A holder that hears
nothing for that long may have lost it, and does not know until then; so what it guards must bear two at once. The
stores that a shard's replicas share are fenced by sequence, and a view's vectors by the version that they are of.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from mnemesh import kv
from mnemesh.errors import Conflict, MnemeshError
from mnemesh.inbox import Inbox

logger = logging.getLogger("mnemesh.lease")

RENEW_S = 0.3
EXPIRES_S = 1.2


class Held:
    """What nobody else can have: a lease that is always held."""

    def __init__(self) -> None:
        self.taken = asyncio.Event()
        self.lost = asyncio.Event()
        self.taken.set()

    @property
    def is_held(self) -> bool:
        return True


HELD = Held()


class Lease:
    """Wants a key of a bucket for `holder`, for as long as `run` runs. `held` tells whether it has it."""

    def __init__(self, inbox: Inbox, bucket: str, key: str, holder: str) -> None:
        self._inbox = inbox
        self._bucket = bucket
        self._key = key
        self._holder = holder.encode()
        self._revision = 0
        self._moved_at = 0.0
        self.taken = asyncio.Event()
        self.lost = asyncio.Event()
        self.lost.set()

    @property
    def is_held(self) -> bool:
        return self.taken.is_set()

    async def run(self) -> None:
        """Take it when nobody has it, and keep it, for ever. Gives it back at the end."""
        try:
            while True:
                await self._turn()
                await asyncio.sleep(RENEW_S)
        finally:
            if self.is_held:
                self._let_go()
                with contextlib.suppress(MnemeshError):
                    await asyncio.shield(self._write(b""))

    async def _turn(self) -> None:
        now = asyncio.get_running_loop().time()
        try:
            if self.is_held:
                await self._write(self._holder)
                self._moved_at = now
            else:
                await self._contend(now)
        except Conflict:
            self._let_go()
        except MnemeshError as error:
            if self.is_held and now - self._moved_at > EXPIRES_S:
                logger.warning("the lease on %s cannot be renewed: %s", self._key, error.message)
                self._let_go()

    async def _contend(self, now: float) -> None:
        revision, holder = await kv.entry(self._inbox, self._bucket, self._key)
        if revision != self._revision:
            self._revision, self._moved_at = revision, now
        if holder and holder != self._holder and now - self._moved_at < EXPIRES_S:
            return
        await self._write(self._holder)
        self._moved_at = now
        logger.info("this replica has the lease on %s", self._key)
        self.lost.clear()
        self.taken.set()

    def _let_go(self) -> None:
        if self.is_held:
            logger.info("this replica has the lease on %s no more", self._key)
        self.taken.clear()
        self.lost.set()

    async def _write(self, value: bytes) -> None:
        self._revision = await kv.update(self._inbox, self._bucket, self._key, value, self._revision)
