"""What a read demands: what its request says, and what a policy says of the tenant and the types that it is about.

    the request says nothing   →  what the policy says of the type
    the request says a level   →  that, whatever the policy says of the type
    access control             →  `strong`, whatever either says; and the request's token as well

Where the types are not known, it is the strictest of what may apply. Pure data, and the protocol by which a shard gets
it; who reads a policy's text, and follows it, is elsewhere. Looks at `mnemesh` only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from functools import cached_property
from typing import Protocol, TypeVar

import msgspec
from msgspec.structs import replace

from mnemesh.connection import Link
from mnemesh.inbox import Inbox
from mnemesh.messages import Consistency, Token

Result = TypeVar("Result")

EVENTUAL = Consistency()
STRONG = Consistency(level="strong")

Types = Collection[str | None]
"""The types that a read is about, `None` for what has none. Nothing in it: any may be."""


class Rules(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """What a policy says of one tenant: by type, of every other type and of none, and which are `access_control`.

    Where that is not known, `any_may_be`.
    """

    otherwise: Consistency = EVENTUAL
    types: dict[str, Consistency] = {}
    access_control: frozenset[str] = frozenset()
    any_may_be: bool = False

    def demand(self, asked: Consistency | None, types: Types = ()) -> Consistency:
        """What a read about these types must wait for that asks for this."""
        if self.is_access_control(types):
            return STRONG if asked is None or asked.level == "eventual" else replace(asked, level="strong")
        if asked is not None:
            return asked
        if types:
            return min((self.types.get(type or "", self.otherwise) for type in types), key=lag_ms)
        return min((self.otherwise, *self.types.values()), key=lag_ms)

    def least(self, asked: Consistency | None) -> Consistency:
        """What any read that asks for this waits for, whatever it turns out to be about."""
        return asked or self._weakest

    def is_access_control(self, types: Types) -> bool:
        """Whether they are, or may be."""
        if not types:
            return self.has_access_control
        return self.any_may_be or not self.access_control.isdisjoint(types)

    @property
    def has_access_control(self) -> bool:
        return self.any_may_be or bool(self.access_control)

    @cached_property
    def says_nothing(self) -> bool:
        """Whether reads are what they would be without a policy."""
        return self == OPEN

    @cached_property
    def _weakest(self) -> Consistency:
        return max((self.otherwise, *self.types.values()), key=lag_ms)


OPEN = Rules()
"""Without a policy: what a request does not ask for is not waited for."""

CLOSED = Rules(otherwise=STRONG, any_may_be=True)
"""What holds where a policy cannot be read."""


def lag_ms(demand: Consistency) -> float:
    """How far behind the log a read may be; a token's own demand is not counted."""
    if demand.level == "strong":
        return 0
    if demand.level == "bounded" and demand.max_lag_ms is not None:
        return demand.max_lag_ms
    return float("inf")


async def read_as_demanded(
    rules: Rules,
    asked: Consistency | None,
    *,
    fresh: Callable[[Consistency], Awaitable[Token]],
    read: Callable[[], Awaitable[tuple[Result, Types]]],
    has_all: Callable[[Token], Awaitable[bool]],
) -> tuple[Consistency, Token, Result]:
    """Read one thing as fresh as what it turns out to be demands: what was waited for, what was seen, what was read.

    `fresh` waits, and says what a read then sees; `read` reads, and says of which types that is; `has_all` says whether
    the log has nothing more of it now than a read saw that saw so much.
    """
    demand = rules.least(asked)
    while True:
        seen = await fresh(demand)
        found, types = await read()
        stricter = rules.demand(asked, types)
        may_turn_out = rules.has_access_control and lag_ms(demand) and lag_ms(stricter)
        if may_turn_out and not await has_all(seen):
            stricter = rules.demand(asked)  # what this replica lacks may say that it is access control
        if demand == stricter or lag_ms(demand) <= lag_ms(stricter):
            return demand, seen, found
        demand = stricter


class ReadPolicy(Protocol):
    """Where a shard gets its tenants' rules from. The composition of a mesh hands it one."""

    async def follow(self, link: Link, inbox: Inbox) -> None:
        """Keep it current, for ever. The shard runs and supervises it."""

    async def ready(self) -> None:
        """Return once it is known."""

    def rules(self, tenant: str) -> Rules: ...


class NoPolicy:
    """Leaves all to the requests."""

    async def follow(self, link: Link, inbox: Inbox) -> None:
        return None

    async def ready(self) -> None:
        return None

    def rules(self, tenant: str) -> Rules:
        return OPEN
