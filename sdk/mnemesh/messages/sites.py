"""What devices and their hubs tell each other, and operators."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from mnemesh.messages.base import Count, HeldState, Kind, Reply, Request, Sequence, Time

# ── between a device and its hub ──────────────────────────────────────────────────────────────────────────────


class AskPosition(Request, frozen=True, kw_only=True):
    """Request of `uplink_position`, with what a device says of itself every few seconds.

    `waiting` events are still to be sent, the oldest for `lag_s`; it has the hub's log up to `downlinked`, of what it
    wants, and has erased what was forgotten there up to `erased`. `clock_ms` is the device's time, in milliseconds
    since 1970, and `log_bytes` the size of its log. It holds so many entities and bytes of the hub's. Of its own events
    the hub `refused` so many, in whole or in part. `policy` is a hash of the policy that it was handed, `consistency`
    one of that of how fresh reads must be. One that names the incarnation of its `log` asks for an event beyond its
    mark, too.
    """

    waiting: Sequence = 0
    lag_s: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    downlinked: Sequence = 0
    erased: Sequence = 0
    held: Sequence = 0
    held_bytes: Sequence = 0
    contract: Annotated[str, Meta(max_length=64)] = ""
    clock_ms: Annotated[int, Meta(ge=0, lt=253_402_300_800_000)] = 0
    log_bytes: Sequence = 0
    refused: Sequence = 0
    policy: Annotated[str, Meta(max_length=64)] = ""
    consistency: Annotated[str, Meta(max_length=64)] = ""
    log: Annotated[str, Meta(max_length=255)] = ""


class Position(Reply, frozen=True, kw_only=True):
    """Up to where a hub has a device's log. The device's last mark is at `place` of the hub's log; 0: there is none.

    `incarnation` tells the device's log from another of the same name made later; `last` is a hash of the last message,
    empty where it is not known, and `hlc` the newest stamp that came. `clock_ms` is the hub's time, in ms since
    1970. `policy` and `consistency` are there where the device has others. The device was enrolled with this `region`
    and these `tenants`; none: all.
    """

    hub: str
    place: int = 0
    incarnation: str = ""
    sequence: int = 0
    last: str = ""
    hlc: int = 0
    clock_ms: int = 0
    contract: str = ""
    policy: str = ""
    consistency: str = ""
    region: str = ""
    tenants: list[str] = []


class OwnEvent(msgspec.Struct, frozen=True, array_like=True):
    """An event of a device: its sequence in the device's log, and its bytes as they may leave.

    One that is to be put `aside` was stamped while the device's clock was ahead.
    """

    sequence: Sequence
    payload: bytes
    aside: bool = False


class OwnEvents(Request, frozen=True, kw_only=True):
    """Request of `uplink`: the next `events` of a device, for a hub that has its last mark at `place` of its log.

    Of the log of this `incarnation` the hub then has all that may leave up to `sequence`; `last` is a hash of the
    message there, and `hlc` the newest stamp up to it that is not ahead.
    """

    events: Annotated[list[OwnEvent], Meta(max_length=999)] = []
    place: Sequence
    incarnation: Annotated[str, Meta(pattern=r"^[0-9A-Za-z.:+-]{1,64}$")]
    sequence: Sequence
    last: Annotated[str, Meta(max_length=64)] = ""
    hlc: Sequence = 0


class Refused(Reply, frozen=True, kw_only=True):
    """An event that the hub does not take, or not with all its vectors, and never will."""

    sequence: int
    reason: str


class Uplinked(Reply, frozen=True, kw_only=True):
    """Reply of `uplink`: the device's mark is at `place` of the hub's log now."""

    place: int
    refused: list[Refused] = []


class Want(Request, frozen=True, kw_only=True):
    """Entities of one tenant that a device is to hold: those of all that is named here.

    Of `types`, with an event born in one of `regions`, one of `entities` or up to `hops` edges away from one. What is
    empty does not matter.
    """

    tenant: Annotated[str, Meta(min_length=1)]
    types: list[Kind] = []
    regions: list[str] = []
    entities: list[Annotated[str, Meta(min_length=1)]] = []
    hops: Annotated[int, Meta(ge=0, le=8)] = 0


class Interest(Request, frozen=True, kw_only=True):
    """What a device wants to hold of what was written elsewhere, and how much of that it may.

    Wants come in the order of their weight. Where not all fits, what is evicted is of the last want, and in it the
    entity that has not changed for longest. What was written on the device itself is always held, and does not count.
    """

    wants: list[Want] = []
    most_entities: Annotated[int, Meta(ge=0)] = 100_000
    most_bytes: Annotated[int, Meta(ge=0)] = 256 * 1024 * 1024


class OpenFeed(Request, frozen=True, kw_only=True):
    """Request of `open_feed`. `held` are the (tenant, entity, bytes, state) of which the device has something, in as
    many requests as it takes, all but the last with `more`. It has the hub's log `incarnation` up to `after`, where
    `last` is a hash of what stood there: in a log that was restored from an older copy, something else does. `log` is
    the incarnation of the device's own: what it wrote in an earlier one comes back.
    """

    session: Annotated[str, Meta(min_length=1, max_length=64)]
    interest: Interest
    held: list[tuple[str, str, int, HeldState]] = []
    more: bool = False
    incarnation: str = ""
    after: Sequence = 0
    last: str = ""
    log: Annotated[str, Meta(max_length=255)] = ""


class FeedOpened(Reply, frozen=True, kw_only=True):
    """Reply of `open_feed`: the hub's name and the incarnation of its log."""

    hub: str
    incarnation: str


class NextFeed(Request, frozen=True, kw_only=True):
    """Request of `next_feed`. The same `turn` again gives the same again; the next one says that the last was kept."""

    session: str
    turn: Annotated[int, Meta(ge=1)]
    most_bytes: Annotated[int, Meta(ge=1_024, le=4_194_304)] = 524_288


class Carried(msgspec.Struct, frozen=True, array_like=True, tag="event"):
    """One event on its way to a device: where it stands in the log of its origin, its bytes, and its headers."""

    origin: str
    tenant: str
    partition: str
    entity: str
    payload: bytes
    born: str
    hub: int
    rollup: bool


class Holding(msgspec.Struct, frozen=True, array_like=True, tag="holding"):
    """From here on the device has so much of an entity, by so many `bytes`; `None`: it is to drop it."""

    tenant: str
    entity_id: str
    bytes: int | None
    state: HeldState = "whole"


class FeedBatch(Reply, frozen=True, kw_only=True):
    """What a device appends to its log, all at once and in this order: events and holdings, then the marks.

    `place` is up to where the hub's log then is in the device's; `marks` of other origins as they are in the hub's log.
    `hlc` is the newest stamp among the events, `last` a hash of the message at `place`. `current`: there was no more.
    """

    turn: int
    place: int
    items: list[Carried | Holding] = []
    marks: dict[str, bytes] = {}
    hlc: int = 0
    last: str = ""
    current: bool = False


class EdgeStatus(Reply, frozen=True, kw_only=True):
    """Where a device stands with its hub.

    `linked` while its hub answers; `silent_s` is since when it does not. `waiting` is how many of its events the hub
    lacks, and `lag_s` for how long the oldest of them has waited. `downlinked` is up to where it has the hub's log of
    what it wants, and `current` whether there was no more. `put_aside` is how many of its events the hub quarantined,
    and `refused` how many it did not take, or not with all their vectors. Of the `untold` tenants it passed over some
    since it started, for it was not enrolled for them. `trouble` says, in words, what an operator must mend.
    """

    site: str
    hub: str
    linked: bool
    silent_s: float
    uplinked: int
    waiting: int
    lag_s: float
    downlinked: int = 0
    current: bool = False
    clock_offset_ms: int = 0
    hub_contract: str = ""
    put_aside: int = 0
    refused: int = 0
    untold: list[str] = []
    trouble: str = ""


class AskDevices(Request, frozen=True, kw_only=True):
    """Request of `devices`. Their `quarantined` events are counted only if asked for."""

    quarantined: bool = False


class DeviceSeen(Reply, frozen=True, kw_only=True):
    """What a hub knows of one device: up to where it has its log, and what the device last said of itself.

    `silent_s` is how long ago that was, in seconds; after a restart of the hub it is when the last events came, and
    the rest is unknown. `clock_offset_ms` is how far the device's clock is ahead of the hub's; `downlinked` up to where
    it has the hub's log, of what it wants, `downlink_waiting` how many messages of that log are beyond, and
    `downlink_lag_s` how old the first of them is; up to `erased` it has erased what was forgotten. It holds so much of
    the hub's. Of no `tenants`: it may have the memory of all. So many of its events were `refused`, in whole or in
    part: as it says itself, or as its hub counted since that started.
    """

    site: str
    linked: bool
    silent_s: float
    uplinked: int
    region: str = ""
    tenants: list[str] = []
    contract: str | None = None
    downlinked: int | None = None
    downlink_waiting: int | None = None
    downlink_lag_s: float | None = None
    erased: int | None = None
    held: int | None = None
    held_bytes: int | None = None
    quarantined: int = 0
    refused: int = 0
    waiting: int | None = None
    lag_s: float | None = None
    clock_offset_ms: int | None = None
    log_bytes: int | None = None


class DevicesSeen(Reply, frozen=True, kw_only=True):
    """Reply of `devices`, by name. Devices that never sent anything are not in it."""

    devices: list[DeviceSeen]


# ── what was forgotten ────────────────────────────────────────────────────────────────────────────────────────


class Receipt(Reply, frozen=True, kw_only=True):
    """What one site erased for one forget, which is at `sequence` of its log: so many events of its stores.

    `forget` names the forget, the same at every site.
    """

    forget: str
    site: str
    tenant: str
    entity_id: str
    sequence: int
    events: int
    erased_at: Time


class ConfirmErased(Request, frozen=True, kw_only=True):
    """Request of `confirm_erased`."""

    receipts: Annotated[list[Receipt], Meta(max_length=1000)]


class Confirmed(Reply, frozen=True, kw_only=True):
    """Reply of `confirm_erased`: the hub keeps the receipts."""


class AskErasures(Request, frozen=True, kw_only=True):
    """Request of `erasures`: the latest, of one tenant or entity if named."""

    tenant: str | None = None
    entity_id: str | None = None
    limit: Count = 100


class PendingSite(Reply, frozen=True, kw_only=True):
    """A device that has still to hear of a forget, and how long it has been silent; `None`: since the hub started."""

    site: str
    silent_s: float | None


class Erasure(Reply, frozen=True, kw_only=True):
    """One forget: the receipts of those who erased something, the sites that had nothing of it, and those who wait."""

    tenant: str
    entity_id: str
    sequence: int
    receipts: list[Receipt]
    nothing: list[str]
    pending: list[PendingSite]


class Erasures(Reply, frozen=True, kw_only=True):
    """Reply of `erasures`, the latest first."""

    erasures: list[Erasure]
