"""What a device does not hold, asked of its hub: as long as the hub answers, and with a deadline of its own.

Its shard asks about single entities, its router whatever spans them. Looks at `router.peers`, `services.disclosure`,
`services.site_policy` and `mnemesh`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence, Set
from typing import Any, Protocol

from mnemesh import messages, subjects
from mnemesh.asker import Asker
from mnemesh.call import Call
from mnemesh.contract import Operation, R
from mnemesh.errors import MnemeshError, Timeout, Unavailable
from router import peers
from router.peers import TO_HUB, Answer, Edge, Question, ask_site, unreachable
from services.disclosure import Disclosure
from services.site_policy import SitePolicy

HUB = "hub"
"""What a hub is called that was never heard of."""

PATIENCE_S = 0.5
"""How long an answer of the hub is waited for, at most; over half of what is left is never waited."""

REST_S = 1.0
"""For how long the hub is not asked after it did not answer."""


class HubLine(Protocol):
    """How the line to the hub is: the uplink knows, for it asks now and then."""

    @property
    def hub(self) -> str:
        """The hub's name; empty until it was heard of."""

    @property
    def linked(self) -> bool: ...

    @property
    def silent_s(self) -> float: ...


class FromHub:
    """Asks the hub on behalf of a device's agents."""

    hold_the_rest = True

    def __init__(self, asker: Asker, policy: SitePolicy, disclosure: Disclosure, *, site: str, line: HubLine) -> None:
        self._asker = asker
        self._policy = policy
        self._disclosure = disclosure
        self._site = site
        self._line = line
        self._rests_until = float("-inf")

    async def follow(self, asker: Asker) -> None:
        """There is one hub, and the uplink follows how it is."""

    async def ready(self) -> None:
        """The device's edge, which follows the policy, starts after its router."""

    async def ask(
        self, question: Question, request: Any, call: Call, *, without: Set[str] = frozenset()
    ) -> list[Answer]:
        name = self._line.hub or HUB
        if request.scope == "here" or name in without:
            return []
        if not self._is_in_reach():
            return [unreachable(name, self._line.silent_s)]
        operation, subject = TO_HUB[question]
        in_full = call.remaining_s() / 2 >= peers.PATIENCE_S
        answer = await ask_site(self._asker, name, operation, subject, self._site, request, call)
        self._note(answer.error, in_full=in_full)
        return [answer]

    async def may_know(self, edges: Sequence[Edge], upto: int, call: Call) -> set[Edge]:
        await self._policy.ready()
        tenant = call.caller.tenant
        if not self._disclosure.restricts(tenant):
            return set(edges)
        try:
            return await self._disclosure.edges(tenant, edges, upto)
        except MnemeshError:  # what cannot be looked up stays
            return set()

    def keeps_back(self, tenant: str, types: Callable[[], Collection[str]]) -> bool:
        """Whether the device's policy keeps any of what is written here of an entity of these types from its hub."""
        return self._disclosure.restricts(tenant) and not self._policy.leaves_of(tenant, types(), [self._site]).is_all

    async def get_context(self, request: messages.GetContext, call: Call) -> messages.Context:
        return await self._ask(subjects.HUB_GET_CONTEXT, subjects.hub_get_context, request, call)

    async def timeline(self, request: messages.Timeline, call: Call) -> messages.TimelinePage:
        return await self._ask(subjects.HUB_TIMELINE, subjects.hub_timeline, request, call)

    async def _ask(
        self, operation: Operation[Any, R], subject: Callable[[str, str, str], str], request: object, call: Call
    ) -> R:
        """One question of the device's agent. Raises `Unavailable` where the hub is out of reach, `Timeout`."""
        if not self._is_in_reach():
            raise Unavailable("the hub is out of reach")
        budget_s = min(PATIENCE_S, call.remaining_s() / 2)
        in_full = budget_s == PATIENCE_S
        caller = call.caller
        try:
            return await self._asker.ask(
                operation, subject(self._site, caller.tenant, caller.agent), request, budget_s=budget_s
            )
        except MnemeshError as error:
            self._note(error, in_full=in_full)
            raise

    def _is_in_reach(self) -> bool:
        return self._line.linked and asyncio.get_running_loop().time() >= self._rests_until

    def _note(self, error: MnemeshError | None, *, in_full: bool) -> None:
        """Let the hub rest where nobody serves, or no answer came though it was waited for `in_full`.

        Not for what one agent can bring about: a short budget, or a question that is answered with an error.
        """
        if isinstance(error, Unavailable) or (isinstance(error, Timeout) and in_full):
            self._rests_until = asyncio.get_running_loop().time() + REST_S
