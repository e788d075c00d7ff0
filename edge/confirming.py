"""Telling the hub what was erased here: each receipt once it is kept, until the hub has it.

Of an entity that the policy keeps back also the receipt stays here, unless the hub forgot it or others wrote it, and so
it knows of it; and so does that of a tenant that the device was not enrolled for. Looks at `services.disclosure`,
`services.site_policy`, `router.portions` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import msgspec

from mnemesh import kv, subjects
from mnemesh.asker import Asker
from mnemesh.errors import MnemeshError, Timeout, Unavailable
from mnemesh.follower import Follower
from mnemesh.jetstream import Stored, stream_state
from mnemesh.messages import ConfirmErased, Receipt
from router.portions import portions
from services.disclosure import Disclosure
from services.site_policy import SitePolicy

logger = logging.getLogger("mnemesh.confirming")

MOST = 500
MOST_BYTES = 512 * 1024
RETRY_S = 2.0
TOLD = "told"
"""The key under which the bucket holds up to where the hub has been told."""


class Confirming:
    """Sends the receipts of one device. `run` for ever.

    `hub` returns once that is in reach, and what it says of the device is kept.
    """

    def __init__(
        self,
        asker: Asker,
        disclosure: Disclosure,
        policy: SitePolicy,
        *,
        site: str,
        hub: Callable[[], Awaitable[str]],
    ) -> None:
        self._asker = asker
        self._disclosure = disclosure
        self._policy = policy
        self._site = site
        self._reaches = hub

    async def run(self) -> None:
        """Follow the receipts' bucket, from up to where the hub has been told."""
        inbox, bucket = self._asker.inbox, subjects.RECEIPTS.name
        stream = f"KV_{bucket}"
        state = await stream_state(inbox, stream)
        told = int((await kv.get(inbox, bucket, TOLD) or b"0").decode())
        follower = Follower(
            self._asker.link, inbox, stream, after=min(told, state.last_sequence), incarnation=state.incarnation
        )
        async with aclosing(follower.batches(MOST)) as batches:
            async for batch in batches:
                own = [stored.message.data for stored in batch if stored.message.data and self._is_own(stored)]
                for some in portions(own, most=MOST, most_bytes=MOST_BYTES, size_of=len):
                    await self._tell([msgspec.json.decode(data, type=Receipt) for data in some])
                if own:
                    await kv.put(inbox, bucket, TOLD, str(batch[-1].sequence).encode())

    def _is_own(self, stored: Stored) -> bool:
        """Whether this is a receipt, and of this device: its key is that of a forget, and the site that erased."""
        _, _, *key = stored.message.subject.split(".")
        return len(key) == 2 and key[1] == self._site

    async def _may_leave(self, receipt: Receipt) -> bool:
        if not self._policy.tells_hub_of(receipt.tenant):
            return False
        if receipt.forget.rsplit("-", 2)[0] != self._site or not self._disclosure.restricts(receipt.tenant):
            return True
        return await self._disclosure.tells_forgotten(receipt.tenant, receipt.entity_id, receipt.sequence)

    async def _tell(self, receipts: list[Receipt]) -> None:
        """Tell the hub what may leave, for as long as it takes; what may, may have changed at each try."""
        while True:
            await self._reaches()
            try:
                if leaving := [receipt for receipt in receipts if await self._may_leave(receipt)]:
                    asked = ConfirmErased(receipts=leaving)
                    await self._asker.ask(subjects.CONFIRM_ERASED, subjects.confirm_erased(self._site), asked)
            except (Unavailable, Timeout) as error:
                logger.debug("the hub cannot be told what was erased: %s", error)
            except MnemeshError as error:
                logger.error("the hub does not take what was erased here: %s", error)
            else:
                return
            await asyncio.sleep(random.uniform(RETRY_S / 2, RETRY_S))
