"""Forgets that devices missed: each wrote, maybe cut off, what had been forgotten already, and is to hear of it.

They are kept, in the bucket of receipts, until the device has them. Looks at `roster` and `mnemesh`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import msgspec

from mnemesh import kv, subjects
from mnemesh.ids import to_token
from mnemesh.inbox import Inbox
from services.roster import Key

OWED = "owed="
"""What the keys of debts begin with; those of receipts begin with a forget's name, which a device says and where no
`=` may be."""


class Debts:
    """What each device is owed. `load` first what the bucket has."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._bucket = subjects.RECEIPTS.name
        self._owed: dict[str, set[Key]] = defaultdict(set)

    def load(self, entries: Mapping[str, bytes]) -> None:
        for name, value in entries.items():
            if name.startswith(f"{OWED}."):
                self._owed[name.split(".")[1]].add(msgspec.json.decode(value, type=Key))

    def to(self, device: str) -> set[Key]:
        """The entities whose forgets a device is owed, now and as it changes."""
        return self._owed[device]

    async def add(self, device: str, key: Key) -> None:
        if key in self._owed[device]:
            return
        await kv.put(self._inbox, self._bucket, _name(device, key), msgspec.json.encode(key))
        self._owed[device].add(key)

    async def settle(self, device: str, key: Key) -> None:
        """The device has it. What is added meanwhile is owed anew."""
        self._owed[device].discard(key)
        await kv.delete(self._inbox, self._bucket, _name(device, key))


def _name(device: str, key: Key) -> str:
    tenant, entity_id = key
    return f"{OWED}.{device}.{tenant}.{to_token(entity_id)}"
