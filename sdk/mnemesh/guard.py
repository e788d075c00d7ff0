"""Who may do what: the protocol that every door asks before it acts.

The broker has already made sure of who the caller is. A guard decides what that caller may do; policy engines
implement it, and the composition of a mesh hands one to each actor. Doors never import a policy engine.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from mnemesh.call import Call
from mnemesh.connection import Link
from mnemesh.inbox import Inbox


class Guard(Protocol):
    """Decides on each request of the actor that it was handed to."""

    async def follow(self, link: Link, inbox: Inbox) -> None:
        """Keep what the decisions rest on current, for ever. The actor runs and supervises it."""

    async def ready(self) -> None:
        """Return once decisions can be made; the actor takes no request before."""

    def check(self, call: Call, request: msgspec.Struct) -> None:
        """Return to let the request pass; raise `Denied` (or another `MnemeshError`) to refuse it."""


class AllowAll:
    """Lets everybody do what the broker lets them do."""

    async def follow(self, link: Link, inbox: Inbox) -> None:
        return None

    async def ready(self) -> None:
        return None

    def check(self, call: Call, request: msgspec.Struct) -> None:
        return None
