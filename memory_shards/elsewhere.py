"""Reads of what a device's shard does not hold, or may not have all of: its hub is asked, as long as it answers.

What a device never says is that something does not exist which it merely does not hold. What it wrote itself it tells
also while the hub is out of reach, or was not told all of it, and says then that this may not be all. Looks at
`mnemesh` only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

from msgspec.structs import replace

from mnemesh.call import Call
from mnemesh.errors import Denied, MnemeshError, Stale, Timeout, Unavailable
from mnemesh.messages import Consistency, Context, GetContext, Timeline, TimelinePage

OF_HUB = 1 << 62
"""Added to the `next_after` of a page of the hub: what follows is to be had there, for it counts in the hub's log."""

NOT_HELD_RETRY_MS = 10_000
"""Longer than a read's budget, so that a client does not ask again in vain."""


class Elsewhere(Protocol):
    """Where a device's shard asks for what it does not hold. Raises `Unavailable` where that is out of reach."""

    def keeps_back(self, tenant: str, types: Callable[[], Collection[str]]) -> bool:
        """Whether the hub may lack some of what was written here of an entity of these types, which cost a read."""

    async def get_context(self, request: GetContext, call: Call) -> Context: ...

    async def timeline(self, request: Timeline, call: Call) -> TimelinePage: ...


async def get_context(
    elsewhere: Elsewhere,
    request: GetContext,
    call: Call,
    *,
    own: tuple[str, int] | None,
    types: Callable[[], Collection[str]],
    here: Callable[[], Awaitable[Context]],
) -> Context:
    """The hub's answer, if it knows what was written here; else that from `here`, if it is anything.

    `own` is the (site, version) of what is here, if something is, and `types` reads those that it was given.
    """
    if own is not None and elsewhere.keeps_back(call.caller.tenant, types):
        return replace(await here(), complete=False)
    try:
        asked = request if own is None else replace(request, consistency=_with_own(request.consistency, *own))
        return await elsewhere.get_context(asked, call)
    except (Unavailable, Timeout, Stale) as error:
        if own is None:
            raise _not_held(request.entity_id, error) from error
    except Denied:
        if own is None:
            raise
    return replace(await here(), complete=False)


async def timeline(elsewhere: Elsewhere, request: Timeline, call: Call) -> TimelinePage:
    """A page of the hub's."""
    try:
        page = await elsewhere.timeline(replace(request, after=request.after % OF_HUB), call)
    except (Unavailable, Timeout) as error:
        raise _not_held(request.entity_id, error) from error
    return page if page.next_after is None else replace(page, next_after=page.next_after + OF_HUB)


def _with_own(asked: Consistency | None, site: str, version: int) -> Consistency:
    """What the read demands, and the last write of this device too."""
    if asked is None or asked.level == "eventual":
        return Consistency(level="session", token={site: version})
    return replace(asked, token=asked.token | {site: max(version, asked.token.get(site, 0))})


def _not_held(entity_id: str | None, error: MnemeshError) -> Unavailable:
    return Unavailable(
        f"{entity_id or '':.200}: not held here, and the hub does not answer for it: {error.message}",
        retry_after_ms=NOT_HELD_RETRY_MS,
    )
