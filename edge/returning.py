"""A device that comes back after a long time: it first erases what was forgotten meanwhile, and then serves.

While its hub is out of reach there is nothing to wait for; a device that was away shortly serves all along. A guard
for the device's doors. Looks at `mnemesh` only.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from mnemesh.call import Call
from mnemesh.connection import Link
from mnemesh.errors import Unavailable
from mnemesh.guard import Guard
from mnemesh.inbox import Inbox


class Homecoming(Protocol):
    """What the guard must know of the device."""

    @property
    def must_erase_first(self) -> bool: ...


class ReturnGuard:
    """Lets agents pass whom `inner` lets pass, once the device has erased what it missed."""

    def __init__(self, inner: Guard, device: Homecoming) -> None:
        self._inner = inner
        self._device = device

    async def follow(self, link: Link, inbox: Inbox) -> None:
        await self._inner.follow(link, inbox)

    async def ready(self) -> None:
        await self._inner.ready()

    def check(self, call: Call, request: msgspec.Struct) -> None:
        self._inner.check(call, request)
        if "agent" in call.operation.callers and self._device.must_erase_first:
            raise Unavailable("this device was away for long, and erases first what was forgotten", retry_after_ms=200)
