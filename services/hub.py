"""The hub: what a site that has devices does for them.

It tells each up to where it has the device's log, feeds it what it wants to hold, answers for what it does not, and
keeps what it confirms to have erased. Of a device it remembers what that last said of itself (`presence`), and its feed
as long as it asks on; the rest is the log's marks. Looks at `services`, `router` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from msgspec.structs import replace

from mnemesh import messages, subjects
from mnemesh.actor import Actor, handles
from mnemesh.call import Call
from mnemesh.clock import wall_ms
from mnemesh.connection import Link
from mnemesh.errors import BadRequest, Conflict, Denied, NotFound, TooLarge
from mnemesh.event import Event
from mnemesh.follower import StreamShrank
from mnemesh.guard import Guard
from mnemesh.ids import check_name, to_token
from mnemesh.jetstream import Stored, StreamState, last_of, last_of_each, message_at, stream_state
from mnemesh.messages import DeviceSeen, HeldState, Holding
from mnemesh.origin import Mark, birth_of, hash_of, mark_in, place_of
from mnemesh.stats import Gauge
from router.inventory import Inventory
from router.shard_map import ShardMap
from services.debts import Debts
from services.disclosure import Disclosure
from services.erasure import Eraser
from services.feed import Feed
from services.log_tail import LogTail
from services.presence import Presence, since_s
from services.read_policy import SiteReadPolicy
from services.receipts import Receipts
from services.roster import Key
from services.selection import Selection
from services.site_policy import SitePolicy, policy_hash
from services.uplinks import Uplinks

NO_MARK = Mark(incarnation="", sequence=0)
"""What counts where a device's mark cannot be read: the device sends its log from the beginning."""

MOST_HELD_BYTES = 256 * 1024 * 1024
"""What the names of all that a device holds may take in memory: a million of them."""
NAME_BYTES = 200
"""What one takes beside its characters."""

FEED_WAIT_S = 4.0
FEED_MARGIN_S = 1.0
FORGOTTEN_S = 600.0
"""How long a feed is kept that its device does not ask for. It can open another, which costs a listing."""


class _Opening:
    """How a device opens a feed, one request at a time: what it said that it has, so far."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.turn = asyncio.Lock()
        self.has: dict[Key, Holding] = {}
        self._bytes = 0
        self.opened: messages.FeedOpened | None = None

    def add(self, held: Sequence[tuple[str, str, int, HeldState]]) -> None:
        """Keep what the device has, too. Raises `TooLarge` where that is more than a hub keeps."""
        has = {(one[0], one[1]): Holding(*one) for one in held}
        self._bytes += sum(NAME_BYTES + sum(map(len, key)) for key in has.keys() - self.has.keys())
        if self._bytes > MOST_HELD_BYTES:
            self.has = {}
            raise TooLarge("this device holds more than its hub can keep the names of; let it want less")
        self.has |= has


class _Feeding:
    """A device's feed, one request at a time."""

    def __init__(self, session: str, feed: Feed, rules: object) -> None:
        self.session = session
        self.feed = feed
        self.rules = rules
        """What was said of the device and of what may leave when this was opened."""
        self.turn = asyncio.Lock()
        self.asked_at = asyncio.get_running_loop().time()


class Hub(Actor):
    """Answers the devices of a site, and operators about them.

    Of two, each has what it was asked last of each device: they take uplinks all the same, but feeds open anew each
    time that the other is asked. So run one, and another only while it takes over.
    """

    role = "hub"

    def __init__(self, link: Link, *, site: str, guard: Guard | None = None) -> None:
        super().__init__(link, guard=guard)
        self.site = site
        self._log = subjects.log_stream(site)
        self._presence = Presence()
        self._policy = SitePolicy(site)
        self._reads = SiteReadPolicy()
        self._shards = ShardMap()
        self._inventory = Inventory(self.asker, self._shards, site=site, name=self.role)
        self._tail = LogTail(link, self.asker.inbox, self._log)
        self._eraser = Eraser(
            self.asker, self._inventory, site=site, on_late=self._owe_forget, next_after=self._tail.next
        )
        self._uplinks = Uplinks(link, self.asker.inbox)
        self._disclosure = Disclosure(self.asker, self._inventory, self._policy, made_of=self._uplinks.spaces.made_of)
        self._debts = Debts(self.asker.inbox)
        self._receipts = Receipts(self.asker, self._policy, self._presence, site=site)
        self._openings: dict[str, _Opening] = {}
        """What each device began last."""
        self._feeds: dict[str, _Feeding] = {}

    def metadata(self) -> dict[str, str]:
        return {"site": self.site}

    def gauges(self) -> list[Gauge]:
        return [*self._presence.gauges(), *self._eraser.gauges(), *self._uplinks.gauges()]

    def background(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        return {
            "policy": partial(self._policy.follow, self.link, self.asker.inbox),
            "read_policy": partial(self._reads.follow, self.link, self.asker.inbox),
            "shard_map": partial(self._shards.follow, self.link, self.asker.inbox),
            "spaces": partial(self._uplinks.spaces.follow, self.link, self.asker.inbox),
            "receipts": partial(self._receipts.view.follow, self.link, self.asker.inbox),
            "log_tail": self._tail.run,
            "feeds": self._forget_feeds,
            "erase": self._erase,
        }

    async def _erase(self) -> None:
        await self.ready()
        self._debts.load(self._receipts.view.entries)
        await self._eraser.run()

    async def ready(self) -> None:
        await self._policy.ready()
        await self._reads.ready()
        await self._shards.ready.wait()
        await self._uplinks.spaces.ready.wait()
        await self._receipts.view.ready.wait()

    async def drain(self) -> None:
        """Devices that wait for news are told at once that their feeds end, for those end here."""
        await self._close_feeds()
        await super().drain()

    async def release(self) -> None:
        await self._close_feeds()

    async def _close_feeds(self) -> None:
        for device in list(self._feeds):
            await self._close_feed(device)

    @handles(subjects.UPLINK)
    async def uplink(self, request: messages.OwnEvents, call: Call) -> messages.Uplinked:
        device = call.tokens["site"]
        self._check_enrolled(device)
        return await self._uplinks.take(device, request, self._policy.entry(device).tenants)

    @handles(subjects.UPLINK_POSITION)
    async def uplink_position(self, request: messages.AskPosition, call: Call) -> messages.Position:
        device = call.tokens["site"]
        self._check_enrolled(device)
        self._presence.hear(device, request)
        policy = self._policy.text if policy_hash(self._policy.text) != request.policy else ""
        consistency = self._reads.text if policy_hash(self._reads.text) != request.consistency else ""
        entry = self._policy.entry(device)
        place, mark = await self._last_mark(device)
        if request.log:
            mark = await self._unmarked(device, request.log, mark) or mark
        return messages.Position(
            hub=self.site,
            place=place,
            incarnation=mark.incarnation,
            sequence=mark.sequence,
            last=mark.last,
            hlc=mark.hlc,
            clock_ms=wall_ms(),
            contract=subjects.CONTRACT,
            policy=policy,
            consistency=consistency,
            region=entry.region,
            tenants=entry.tenants,
        )

    async def _last_mark(self, device: str) -> tuple[int, Mark]:
        try:
            stored = await last_of(self.asker.inbox, self._log, subjects.log_mark(device))
        except NotFound:
            return 0, NO_MARK
        return stored.sequence, mark_in(stored.message) or NO_MARK

    async def _unmarked(self, device: str, log: str, mark: Mark) -> Mark | None:
        """What a mark would say of an event that came alone, where its mark did not come."""
        try:
            stored = await last_of(self.asker.inbox, self._log, subjects.log_event(device, "*", "*", "*"))
            birth = birth_of(stored.message, device)
        except (NotFound, BadRequest):
            return None
        if birth is None or birth.incarnation != log or (mark.incarnation == log and mark.sequence >= birth.sequence):
            return None
        return Mark(incarnation=log, sequence=birth.sequence)

    # ── what a device is to hold ────────────────────────────────────────────────────────────────────────────

    @handles(subjects.OPEN_FEED)
    async def open_feed(self, request: messages.OpenFeed, call: Call) -> messages.FeedOpened:
        device = call.tokens["site"]
        self._check_enrolled(device)
        opening = self._openings.get(device)
        if opening is None or opening.session != request.session:
            opening = self._openings[device] = _Opening(request.session)
        async with opening.turn:
            if opening.opened is not None:  # the request is repeated
                return opening.opened
            opening.add(request.held)
            state = await stream_state(self.asker.inbox, self._log)
            opened = messages.FeedOpened(hub=self.site, incarnation=state.incarnation)
            if request.more:
                return opened
            rules = self._rules(device)
            feed = await self._feed(device, request, opening.has, state)
            if self._openings[device] is not opening:
                await feed.close()
                raise Conflict(f"{device} began to open another feed meanwhile")
            before, self._feeds[device] = self._feeds.get(device), _Feeding(request.session, feed, rules)
            opening.opened, opening.has = opened, {}
            if before is not None:
                await before.feed.close()
            return opened

    async def _feed(
        self, device: str, request: messages.OpenFeed, has: Mapping[Key, Holding], state: StreamState
    ) -> Feed:
        """A feed that is open. Raises what keeps it from that."""
        for want in request.interest.wants:
            self._check_tenant(device, want.tenant)
            if want.hops and not want.entities:
                raise BadRequest("a want with hops must name the entities that they are counted from")
        has_it = request.incarnation == state.incarnation and await self._is_ours(request, state)
        after, last = (request.after, request.last) if has_it else (0, "")
        selection = Selection(
            self._inventory,
            request.interest,
            site=self.site,
            device=device,
            leaves=self._policy.leaves,
            region_of=self._policy.region_of,
        )
        feed = Feed(
            self.asker,
            selection,
            site=self.site,
            device=device,
            may_have=partial(self._policy.deals_with, device),
            has=has,
            after=after,
            last=last,
            debts=self._debts,
            own_log=request.log,
            log=state,
            tail=self._tail,
        )
        try:
            await feed.open()
        except BaseException:
            await feed.close()
            raise
        return feed

    async def _is_ours(self, request: messages.OpenFeed, state: StreamState) -> bool:
        """Whether the log goes on from what the device has of it. One that was restored does not, and is sent anew."""
        if request.after > state.last_sequence:
            return False
        try:
            stored = await message_at(self.asker.inbox, self._log, request.after)
        except NotFound:  # erased since, or the beginning
            return True
        return request.last in ("", hash_of(stored.message))

    @handles(subjects.NEXT_FEED)
    async def next_feed(self, request: messages.NextFeed, call: Call) -> messages.FeedBatch:
        device = call.tokens["site"]
        feeding = self._feeds.get(device)
        if feeding is None or feeding.session != request.session:
            raise Conflict(f"there is no such feed of {device}; open another")
        async with feeding.turn:
            wait_s = min(FEED_WAIT_S, call.remaining_s() - FEED_MARGIN_S)
            try:
                batch = await feeding.feed.next(request.turn, request.most_bytes, wait_s)
            except StreamShrank as error:
                await self._close_feed(device)
                raise Conflict(f"the feed of {device} ended; open another") from error
            feeding.asked_at = asyncio.get_running_loop().time()
        if feeding.rules != self._rules(device):  # what waits in the feed may not leave any more
            await self._close_feed(device)
            raise Conflict(f"what {device} may have has changed; open another feed")
        return batch

    def _rules(self, device: str) -> object:
        return self._policy.text, self._policy.entry(device)

    async def _owe_forget(self, event: Event) -> None:
        """A device wrote what was forgotten already: it is to hear of that, whether or not it holds the entity."""
        await self._debts.add(event.site, (event.tenant, event.entity_id))

    async def _forget_feeds(self) -> None:
        while True:
            await asyncio.sleep(FORGOTTEN_S / 4)
            now = asyncio.get_running_loop().time()
            for device, feeding in list(self._feeds.items()):
                if not feeding.turn.locked() and now - feeding.asked_at > FORGOTTEN_S:
                    await self._close_feed(device)

    async def _close_feed(self, device: str) -> None:
        if (feeding := self._feeds.pop(device, None)) is not None:
            await feeding.feed.close()

    # ── what a device does not hold ─────────────────────────────────────────────────────────────────────────

    @handles(subjects.HUB_GET_CONTEXT)
    async def get_context(self, request: messages.GetContext, call: Call) -> messages.Context:
        entity_id = self._asked_entity(request.entity_id, call)
        subject = subjects.get_context(call.caller.tenant, call.caller.agent, to_token(entity_id))
        return await self._disclosure.context(await self.asker.ask(subjects.GET_CONTEXT, subject, request), call)

    @handles(subjects.HUB_TIMELINE)
    async def timeline(self, request: messages.Timeline, call: Call) -> messages.TimelinePage:
        entity_id = self._asked_entity(request.entity_id, call)
        tenant = call.caller.tenant
        subject = subjects.timeline(tenant, call.caller.agent, to_token(entity_id))
        page = await self.asker.ask(subjects.TIMELINE, subject, request)
        if self._disclosure.restricts(tenant):
            upto = max([page.watermark.get(self.site, 0), *(event.sequence for event in page.events)])
            leaves = await self._disclosure.leaves(tenant, [entity_id], upto)
            if not leaves[entity_id].is_all:
                raise Denied("the policy of the hub keeps part of this entity back, and so its timeline")
        return page

    @handles(subjects.HUB_SEARCH)
    async def search(self, request: messages.SearchEmbedding, call: Call) -> messages.Hits:
        self._check_asker(call)
        return await self._disclosure.search(request, call)

    @handles(subjects.HUB_SEARCH_TEXT)
    async def search_text(self, request: messages.SearchText, call: Call) -> messages.Hits:
        self._check_asker(call)
        return await self._disclosure.search_text(request, call)

    @handles(subjects.HUB_TRAVERSE)
    async def traverse(self, request: messages.Traverse, call: Call) -> messages.Traversal:
        self._check_asker(call)
        return await self._disclosure.traverse(request, call)

    def _asked_entity(self, entity_id: str | None, call: Call) -> str:
        self._check_asker(call)
        if entity_id is None:
            raise BadRequest("a device names the entity that it asks for")
        return entity_id

    def _check_enrolled(self, device: str) -> None:
        """Nothing is said of a device that is not, so also not whose memory it may have."""
        if not self._policy.may_connect(device):
            raise Denied(f"{device} is not enrolled here")

    def _check_asker(self, call: Call) -> None:
        """A device says for whom it asks, and the hub asks on in that name."""
        check_name("agent", call.caller.agent)
        self._check_tenant(call.tokens["site"], call.caller.tenant)

    def _check_tenant(self, device: str, tenant: str) -> None:
        self._check_enrolled(device)
        check_name("tenant", tenant)
        if not self._policy.deals_with(device, tenant):
            raise Denied(f"{device} was not enrolled for tenant {tenant!r}")

    # ── what was forgotten ──────────────────────────────────────────────────────────────────────────────────

    @handles(subjects.CONFIRM_ERASED)
    async def confirm_erased(self, request: messages.ConfirmErased, call: Call) -> messages.Confirmed:
        self._check_enrolled(call.tokens["site"])
        await self._receipts.take(call.tokens["site"], request.receipts)
        return messages.Confirmed()

    @handles(subjects.ERASURES)
    async def erasures(self, request: messages.AskErasures, call: Call) -> messages.Erasures:
        return messages.Erasures(erasures=self._receipts.erasures(request))

    # ── what operators see ──────────────────────────────────────────────────────────────────────────────────

    @handles(subjects.DEVICES)
    async def devices(self, request: messages.AskDevices, call: Call) -> messages.DevicesSeen:
        marks = {
            place_of(stored.message.subject).origin: stored
            for stored in await last_of_each(self.asker.inbox, self._log, subjects.log_mark("*"))
        }
        head = (await stream_state(self.asker.inbox, self._log)).last_sequence
        quarantined = await self._quarantined() if request.quarantined else Counter()
        seen = [
            replace(await self._seen(site, marks.get(site), head), quarantined=quarantined[site])
            for site in sorted(marks.keys() | self._presence.devices)
        ]
        return messages.DevicesSeen(devices=seen)

    async def _quarantined(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        for shard in self._shards.shards:
            status = await self.asker.ask(subjects.SHARD_STATUS, subjects.shard_status(shard), messages.Status())
            counted.update(status.quarantined)
        return counted

    async def _seen(self, site: str, mark: Stored | None, head: int) -> DeviceSeen:
        entry = self._policy.entry(site)
        seen = self._presence.seen(site, mark)
        refused = max(seen.refused, self._uplinks.refused[site])
        seen = replace(seen, region=entry.region, tenants=entry.tenants, refused=refused)
        if seen.downlinked is None:
            return seen
        feeding = self._feeds.get(site)
        downlinked = max(seen.downlinked, feeding.feed.place if feeding else 0)
        return replace(
            seen,
            downlinked=downlinked,
            downlink_waiting=max(0, head - downlinked),
            downlink_lag_s=await self._age_s(downlinked + 1) if head > downlinked else 0.0,
        )

    async def _age_s(self, sequence: int) -> float | None:
        """How old the message at a place of the log is, where it is still there."""
        try:
            return since_s((await message_at(self.asker.inbox, self._log, sequence)).recorded_at)
        except NotFound:
            return None
