"""A site's policy on what may leave it, and the regions of sites: kept in KV buckets, current everywhere in the site.

A policy is handed from a hub to its devices, and beside it what was said of the device as it was enrolled. For its own
data a site's own copy wins, whatever the other's version.
Looks at `sovereignty` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable
from functools import reduce
from hashlib import blake2b
from operator import and_
from typing import Literal

import msgspec

from mnemesh import kv, subjects
from mnemesh.connection import Link
from mnemesh.errors import MnemeshError
from mnemesh.inbox import Inbox
from mnemesh.kv import BucketView
from services.sovereignty import ALL, NOTHING, OPEN, Leaves, Policy
from services.sovereignty_text import parse

logger = logging.getLogger("mnemesh.policy")

Copy = Literal["own", "handed"]

CLOSED = Policy(version=0, otherwise=NOTHING)
"""What holds where a site has a policy that it cannot read."""


class SiteEntry(msgspec.Struct, frozen=True):
    """What an operator says of a site. A device of no `tenants` deals with all of them.

    One that was `revoked` may not connect any more; what it wrote is still of its region.
    """

    region: str = ""
    tenants: list[str] = []
    revoked: bool = False


def policy_hash(text: str) -> str:
    """A hash of a policy's text; empty where there is none."""
    return blake2b(text.encode(), digest_size=16).hexdigest() if text else ""


class SitePolicy:
    """What may leave one site. `follow` keeps it current."""

    def __init__(self, site: str) -> None:
        self.site = site
        self._texts = BucketView(subjects.POLICIES.name)
        self._sites = BucketView(subjects.SITES.name)
        self._parsed: dict[bytes, Policy] = {}

    async def follow(self, link: Link, inbox: Inbox) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._texts.follow(link, inbox))
            tasks.create_task(self._sites.follow(link, inbox))

    async def ready(self) -> None:
        await self._texts.ready.wait()
        await self._sites.ready.wait()

    @property
    def policy(self) -> Policy:
        """What holds for the site's own data."""
        entries = self._texts.entries
        text = entries.get("own") or entries.get("handed")
        return OPEN if text is None else self._read(text)

    @property
    def text(self) -> str:
        """The text of what holds here; empty where all may leave."""
        entries = self._texts.entries
        return (entries.get("own") or entries.get("handed") or b"").decode()

    @property
    def rules(self) -> object:
        """What decides what may leave of the site's own data: it does not, where this has changed."""
        return self.text, self.entry(self.site), self.enrolled

    @property
    def handed(self) -> str:
        """A hash of the text that the hub handed here last; empty where it has not."""
        return policy_hash(self._texts.entries.get("handed", b"").decode())

    @property
    def enrolled(self) -> SiteEntry:
        """What its hub says of this device; nothing as long as it has not."""
        held = self._texts.entries.get("enrolled")
        return SiteEntry() if held is None else msgspec.json.decode(held, type=SiteEntry)

    async def take(self, inbox: Inbox, text: str, entry: SiteEntry) -> None:
        """Keep what the hub hands, if it does, and says of this device; returns once it holds here.

        Raises `BadRequest` if it is no policy.
        """
        revision = 0
        if text:
            parse(text)
            revision = await kv.put(inbox, subjects.POLICIES.name, "handed", text.encode())
        if entry != self.enrolled:
            revision = await kv.put(inbox, subjects.POLICIES.name, "enrolled", msgspec.json.encode(entry))
        await self._texts.reached(revision)

    def leaves(self, tenant: str, types: Collection[str], region: str) -> Leaves:
        return self.policy.leaves_under(tenant, types, region)

    def restricts(self, tenant: str) -> bool:
        """Whether anything of a tenant may be kept back here."""
        return any(self.policy.restricts(tenant, region) for region in self.regions)

    def leaves_of(self, tenant: str, types: Collection[str], sites: Iterable[str]) -> Leaves:
        """What may leave of an entity that was given these types, and written at these sites."""
        regions = {region for site in sites for region in self.regions_of(site)}
        return reduce(and_, (self.leaves(tenant, types, region) for region in regions), ALL)

    def region_of(self, site: str) -> str:
        return self.entry(site).region

    def regions_of(self, site: str) -> set[str]:
        """The region of a site; where a device and its hub say different ones, the device is in both."""
        regions = {self.region_of(site)} | ({self.enrolled.region} if site == self.site else set())
        return regions - {""} or {""}

    @property
    def sites(self) -> set[str]:
        """The devices that may connect here."""
        return {site for site in self._sites.entries if self.may_connect(site)}

    def may_connect(self, site: str) -> bool:
        """Whether this is a device that was enrolled here and not revoked."""
        return site != self.site and site in self._sites.entries and not self.entry(site).revoked

    @property
    def regions(self) -> set[str]:
        """The regions of all sites that are known, and of those that are not."""
        return {region for site in self._sites.entries for region in self.regions_of(site)} | {""}

    def deals_with(self, site: str, tenant: str) -> bool:
        """Whether a device may connect here, and have the memory of a tenant."""
        tenants = self.entry(site).tenants
        return self.may_connect(site) and (not tenants or tenant in tenants)

    def tells_hub_of(self, tenant: str) -> bool:
        """Whether this device was enrolled for a tenant, as far as its hub said."""
        return not self.enrolled.tenants or tenant in self.enrolled.tenants

    def entry(self, site: str) -> SiteEntry:
        """What is said of a site; nothing of a stranger."""
        held = self._sites.entries.get(site)
        return SiteEntry() if held is None else msgspec.json.decode(held, type=SiteEntry)

    def _read(self, text: bytes) -> Policy:
        policy = self._parsed.get(text)
        if policy is None:
            try:
                policy = parse(text.decode())
            except (MnemeshError, UnicodeDecodeError) as error:
                logger.error("the policy of %s cannot be read, so nothing leaves: %s", self.site, error)
                policy = CLOSED
            self._parsed = {**self._parsed, text: policy} if len(self._parsed) < 8 else {text: policy}
        return policy
