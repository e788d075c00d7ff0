"""Which tenants exist: the guard that every door of a mesh gets.

The tenants are keys of a KV bucket, so adding one takes effect at once everywhere.
"""

from __future__ import annotations

import msgspec

from mnemesh import subjects
from mnemesh.call import Call
from mnemesh.connection import Link
from mnemesh.errors import Denied
from mnemesh.inbox import Inbox
from mnemesh.kv import BucketView


class TenantGuard:
    """Lets the agents of known tenants pass.

    What no agent may ask passes whatever the tenant: a device may have one that its hub has not, and what is forgotten
    of its data is still to be erased there.
    """

    def __init__(self) -> None:
        self._tenants = BucketView(subjects.TENANTS.name)

    async def follow(self, link: Link, inbox: Inbox) -> None:
        await self._tenants.follow(link, inbox)

    async def ready(self) -> None:
        await self._tenants.ready.wait()

    def check(self, call: Call, request: msgspec.Struct) -> None:
        tenant = call.caller.tenant
        if tenant and "agent" in call.operation.callers and tenant not in self._tenants.entries:
            raise Denied(f"there is no tenant {tenant!r} in this mesh")
