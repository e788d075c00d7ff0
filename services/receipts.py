"""The receipts of a hub: for each forget, which sites have confirmed that they erased, and which are still to.

A receipt of the hub's own tells what was forgotten. A device that had nothing to erase sends none: it says up to where
it has erased (`presence`). Looks at `presence`, `site_policy`, `erasure`, `debts` and `mnemesh`.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from mnemesh import subjects
from mnemesh.asker import Asker
from mnemesh.errors import Denied
from mnemesh.ids import check_name, to_token
from mnemesh.kv import BucketView
from mnemesh.messages import AskErasures, Erasure, PendingSite, Receipt
from services.debts import OWED
from services.erasure import PLACE, keep
from services.presence import Presence
from services.site_policy import SitePolicy

LONGEST_FORGET = 96
"""Characters in the name of a forget: that of a site, and of a place in its log."""


class Receipts:
    """The receipts that the hub `site` has, and the debts beside them, in a `view` for its owner to follow."""

    def __init__(self, asker: Asker, policy: SitePolicy, presence: Presence, *, site: str) -> None:
        self._asker = asker
        self._policy = policy
        self._presence = presence
        self._site = site
        self.view = BucketView(subjects.RECEIPTS.name)

    async def take(self, device: str, receipts: Sequence[Receipt]) -> None:
        """Keep what a device confirms. Of a tenant that is not its, nobody waits for that.

        Raises `Denied` where it speaks for another.
        """
        for receipt in receipts:
            if receipt.site != device:
                raise Denied(f"{device} cannot confirm for {receipt.site[:64]!r}")
            check_name("forget", receipt.forget, longest=LONGEST_FORGET)
            check_name("tenant", receipt.tenant)
            to_token(receipt.entity_id)
            if self._policy.deals_with(device, receipt.tenant):
                await keep(self._asker, receipt)

    def erasures(self, request: AskErasures) -> list[Erasure]:
        """What was forgotten, the latest first."""
        receipts: dict[str, list[Receipt]] = defaultdict(list)
        for key, value in self.view.entries.items():
            if key != PLACE and not key.startswith(f"{OWED}."):
                receipts[key.partition(".")[0]].append(msgspec.json.decode(value, type=Receipt))
        wanted = [
            receipt
            for several in receipts.values()
            for receipt in several
            if receipt.site == self._site
            and request.tenant in (None, receipt.tenant)
            and request.entity_id in (None, receipt.entity_id)
        ]
        latest = heapq.nlargest(request.limit, wanted, key=lambda receipt: receipt.sequence)
        return [self._erasure(receipt, receipts[receipt.forget]) for receipt in latest]

    def _erasure(self, own: Receipt, receipts: Sequence[Receipt]) -> Erasure:
        confirmed = {receipt.site for receipt in receipts}
        concerned = [
            site for site in sorted(self._policy.sites - confirmed) if self._policy.deals_with(site, own.tenant)
        ]
        nothing = [site for site in concerned if self._presence.has_erased(site, own.sequence)]
        return Erasure(
            tenant=own.tenant,
            entity_id=own.entity_id,
            sequence=own.sequence,
            receipts=sorted(receipts, key=lambda receipt: receipt.site),
            nothing=nothing,
            pending=[
                PendingSite(site=site, silent_s=self._presence.silent_s(site))
                for site in concerned
                if site not in nothing
            ],
        )
