"""Who may do what: the protocol that every door asks before it acts.

The broker has already made sure of who the caller is. A guard decides what that caller may do; policy engines
implement it, and the composition of a mesh hands one to each actor. Doors never import a policy engine.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from mnemesh.call import Call


class Guard(Protocol):
    """Decides on one request."""

    def check(self, call: Call, request: msgspec.Struct) -> None:
        """Return to let the request pass; raise `Denied` (or another `MnemeshError`) to refuse it."""


class AllowAll:
    """Lets everybody do what the broker lets them do."""

    def check(self, call: Call, request: msgspec.Struct) -> None:
        return None
