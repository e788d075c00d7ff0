"""Other sites that answer a question, too: a hub's devices, a device's hub.

Each has a deadline of its own, so that a slow line does not hold up what is here; a site that is out of reach is not
asked, and the answer says so. What sites answer with is what their policies let out. Looks at `mnemesh` only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence, Set
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from msgspec.structs import replace

from mnemesh import messages, subjects
from mnemesh.asker import Asker
from mnemesh.call import Call
from mnemesh.connection import Link
from mnemesh.contract import AnyOperation
from mnemesh.errors import Denied, MnemeshError, NotFound, Timeout, Unavailable
from mnemesh.inbox import Inbox
from mnemesh.messages import DeviceSeen, Node, SiteCoverage

PATIENCE_S = 0.25
"""How long another site may take, at most; it never gets more than half of what is left of the budget."""

LOOK_S = 2.0
"""How often the hub is asked which of its devices are there."""

Question: TypeAlias = Literal["search", "search_text", "traverse"]
Subject: TypeAlias = Callable[[str, str, str], str]
"""From (site, tenant, agent)."""

Edge: TypeAlias = tuple[str, str, str]
"""(near, relation, far) as it is walked, whichever of them holds it."""

TO_DEVICE: dict[Question, tuple[AnyOperation, Subject]] = {
    "search": (subjects.DEVICE_SEARCH, subjects.device_search),
    "search_text": (subjects.DEVICE_SEARCH_TEXT, subjects.device_search_text),
    "traverse": (subjects.DEVICE_TRAVERSE, subjects.device_traverse),
}
TO_HUB: dict[Question, tuple[AnyOperation, Subject]] = {
    "search": (subjects.HUB_SEARCH, subjects.hub_search),
    "search_text": (subjects.HUB_SEARCH_TEXT, subjects.hub_search_text),
    "traverse": (subjects.HUB_TRAVERSE, subjects.hub_traverse),
}


class Answer(NamedTuple):
    """What a site said, if it said something, and what that is worth. `error` is why it could not be reached."""

    coverage: SiteCoverage
    reply: Any = None
    error: MnemeshError | None = None


class Peers(Protocol):
    """The sites that a router asks beside its own shards.

    They `hold_the_rest` where this site knows of an entity whether there can be more of it elsewhere.
    """

    hold_the_rest: bool

    async def follow(self, asker: Asker) -> None:
        """Keep current which they are, for ever."""

    async def ready(self) -> None:
        """Return once it is known which they are, and what they may know."""

    async def may_know(self, edges: Sequence[Edge], upto: int, call: Call) -> set[Edge]:
        """Those of these edges, seen in the log up to a sequence, which any of them may know of. Never raises."""

    async def ask(
        self, question: Question, request: Any, call: Call, *, without: Set[str] = frozenset()
    ) -> list[Answer]:
        """Ask all at once that are in reach, but those named; an answer for each, in the order of their names.

        Never raises.
        """


class Rules(Protocol):
    """What an operator says of a site's devices, and of what may leave."""

    @property
    def sites(self) -> set[str]:
        """The devices that may connect."""

    def deals_with(self, site: str, tenant: str) -> bool:
        """Whether a device that may connect may have the memory of a tenant."""

    def restricts(self, tenant: str) -> bool:
        """Whether anything of a tenant may be kept back here."""

    async def follow(self, link: Link, inbox: Inbox) -> None:
        """Keep them current, for ever."""

    async def ready(self) -> None:
        """Return once they are known."""


class Devices:
    """The devices that may connect to the site whose router this is, as far as they deal with the asker's tenant.

    What may leave depends on types, which a router may not look up. So where the site's policy keeps anything of a
    tenant back, devices may know of no edge: what there is about entities beyond they have sent, but for what has yet
    to come.
    """

    hold_the_rest = False

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._seen: dict[str, DeviceSeen] = {}
        """What the hub said of them last."""
        self._seen_at = 0.0
        self._asker: Asker | None = None

    async def follow(self, asker: Asker) -> None:
        self._asker = asker
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._rules.follow(asker.link, asker.inbox))
            tasks.create_task(self._look(asker))

    async def ready(self) -> None:
        await self._rules.ready()

    async def may_know(self, edges: Sequence[Edge], upto: int, call: Call) -> set[Edge]:
        closed = self._meant(call.caller.tenant) and self._rules.restricts(call.caller.tenant)
        return set() if closed else set(edges)

    async def _look(self, asker: Asker) -> None:
        while True:
            try:
                told = await asker.ask(subjects.DEVICES, subjects.devices(), messages.AskDevices())
            except MnemeshError:
                self._seen = {name: replace(device, linked=False) for name, device in self._seen.items()}
            else:
                self._seen = {device.site: device for device in told.devices}
                self._seen_at = asyncio.get_running_loop().time()
            await asyncio.sleep(LOOK_S)

    async def ask(
        self, question: Question, request: Any, call: Call, *, without: Set[str] = frozenset()
    ) -> list[Answer]:
        if request.scope == "here":
            return []
        meant = [site for site in self._meant(call.caller.tenant) if site not in without]
        return await asyncio.gather(*(self._one(site, question, request, call) for site in meant))

    def _meant(self, tenant: str) -> list[str]:
        return sorted(site for site in self._rules.sites if self._rules.deals_with(site, tenant))

    async def _one(self, site: str, question: Question, request: Any, call: Call) -> Answer:
        seen, asker = self._seen.get(site), self._asker
        if seen is None or asker is None:
            return unreachable(site, None)
        if not seen.linked:
            return unreachable(site, seen.silent_s + asyncio.get_running_loop().time() - self._seen_at)
        operation, subject = TO_DEVICE[question]
        asked = request
        if request.consistency is not None:
            asked = replace(request, consistency=request.consistency.of_site(site))
        return await ask_site(asker, site, operation, subject, site, asked, call)


async def ask_site(
    asker: Asker, named: str, operation: AnyOperation, subject: Subject, site: str, request: Any, call: Call
) -> Answer:
    """Ask the site that an answer calls `named`, by the subject of `site`."""
    caller = call.caller
    budget_s = min(PATIENCE_S, call.remaining_s() / 2)
    try:
        reply = await asker.ask(operation, subject(site, caller.tenant, caller.agent), request, budget_s=budget_s)
    except NotFound:  # it has no such space
        return Answer(SiteCoverage(site=named, state="answered"))
    except Denied:
        return Answer(SiteCoverage(site=named, state="refused"))
    except (Timeout, Unavailable) as error:
        return unreachable(named, 0.0, error)
    except MnemeshError as error:
        return Answer(SiteCoverage(site=named, state="answered", complete=False, code=error.code))
    told = SiteCoverage(
        site=named,
        state="answered",
        watermark=reply.watermark,
        restricted=reply.restricted,
        complete=reply.coverage is None or reply.coverage.complete,
    )
    return Answer(told, reply)


def unreachable(site: str, silent_s: float | None, error: MnemeshError | None = None) -> Answer:
    return Answer(SiteCoverage(site=site, state="unreachable", silent_s=silent_s), error=error)


def edge_to(node: Node) -> Edge | None:
    """The edge by which a walk came to a node; `None` where it began."""
    return None if node.via is None or node.relation is None else (node.via, node.relation, node.entity_id)
