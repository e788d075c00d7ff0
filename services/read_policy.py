"""A site's policy of consistency, kept in a KV bucket and followed live by whoever serves reads.

It is handed from a hub to its devices, as the one of what may leave is (`site_policy`); a device's own copy wins.
Looks at `consistency_text`, `memory_shards.demand` and `mnemesh`.
"""

from __future__ import annotations

import logging

from memory_shards.demand import CLOSED, Rules
from mnemesh import kv, subjects
from mnemesh.connection import Link
from mnemesh.errors import MnemeshError
from mnemesh.inbox import Inbox
from mnemesh.kv import BucketView
from services.consistency_text import ConsistencyPolicy, parse
from services.site_policy import policy_hash

logger = logging.getLogger("mnemesh.consistency")

OWN, HANDED = "own", "handed"

ALL_STRONG = ConsistencyPolicy(others=CLOSED)
"""What holds where a site has a policy that it cannot read."""


class SiteReadPolicy:
    """How fresh the reads of one site must be. `follow` keeps it current."""

    def __init__(self) -> None:
        self._texts = BucketView(subjects.CONSISTENCY.name)
        self._policy = ConsistencyPolicy()
        self._version = 0
        """The version of the texts that the policy was read from."""

    async def follow(self, link: Link, inbox: Inbox) -> None:
        await self._texts.follow(link, inbox)

    async def ready(self) -> None:
        await self._texts.ready.wait()

    def rules(self, tenant: str) -> Rules:
        """What holds for a tenant's reads."""
        if self._version != self._texts.version:
            self._version, self._policy = self._texts.version, self._parsed(self._text)
        return self._policy.rules(tenant)

    @property
    def text(self) -> str:
        """The text of what holds here; empty where it is left to the requests."""
        return self._text.decode(errors="replace")

    @property
    def handed(self) -> str:
        """A hash of the text that the hub handed here last; empty where it has not."""
        return policy_hash(self._texts.entries.get(HANDED, b"").decode(errors="replace"))

    async def take(self, inbox: Inbox, text: str) -> None:
        """Keep what the hub hands, if it does. What this device cannot read it takes for the strictest there is."""
        if text:
            await self._texts.reached(await kv.put(inbox, subjects.CONSISTENCY.name, HANDED, text.encode()))

    @property
    def _text(self) -> bytes:
        entries = self._texts.entries
        return entries.get(OWN) or entries.get(HANDED) or b""

    def _parsed(self, text: bytes) -> ConsistencyPolicy:
        try:
            return parse(text.decode()) if text else ConsistencyPolicy()
        except (MnemeshError, UnicodeDecodeError) as error:
            logger.error("the consistency policy cannot be read, so every read is strong: %s", error)
            return ALL_STRONG
