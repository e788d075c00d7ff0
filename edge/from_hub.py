"""What a device does not hold, asked of its hub: as long as the hub answers, and with a deadline of its own.

Looks at `mnemesh` only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from mnemesh import messages, subjects
from mnemesh.asker import Asker
from mnemesh.call import Call
from mnemesh.contract import Operation, R
from mnemesh.errors import Timeout, Unavailable

PATIENCE_S = 0.5
"""How long an answer of the hub is waited for, at most; over half of what is left is never waited."""

REST_S = 1.0
"""For how long the hub is not asked after it did not answer in time."""


class FromHub:
    """Asks the hub on behalf of a device's agents. `is_linked` tells whether the hub answers the device at all."""

    def __init__(self, asker: Asker, *, site: str, is_linked: Callable[[], bool]) -> None:
        self._asker = asker
        self._site = site
        self._is_linked = is_linked
        self._rests_until = float("-inf")

    async def get_context(self, request: messages.GetContext, call: Call) -> messages.Context:
        return await self.ask(subjects.HUB_GET_CONTEXT, subjects.hub_get_context, request, call)

    async def timeline(self, request: messages.Timeline, call: Call) -> messages.TimelinePage:
        return await self.ask(subjects.HUB_TIMELINE, subjects.hub_timeline, request, call)

    async def ask(
        self, operation: Operation[Any, R], subject: Callable[[str, str, str], str], request: object, call: Call
    ) -> R:
        """One question of the device's agent. Raises `Unavailable` where the hub is out of reach, `Timeout`."""
        now = asyncio.get_running_loop().time()
        if not self._is_linked() or now < self._rests_until:
            raise Unavailable("the hub is out of reach")
        budget_s = min(PATIENCE_S, call.remaining_s() / 2)
        caller = call.caller
        try:
            return await self._asker.ask(
                operation, subject(self._site, caller.tenant, caller.agent), request, budget_s=budget_s
            )
        except Timeout:
            self._rests_until = now + REST_S
            raise
