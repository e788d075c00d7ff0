"""What the generated operation table is made of.

`mnemesh.subjects` holds the table itself, generated from `subjects.yaml`. Looks at nothing else in the package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Generic, Literal, TypeVar

import msgspec

Role = Literal["agent", "gateway", "router", "shard", "operator", "hub", "edge", "views"]

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)

_PLACEHOLDER = re.compile(r"<(\w+)>")


@dataclass(frozen=True, kw_only=True)
class Operation(Generic[Q, R]):
    """One entry of the contract, from requests `Q` to replies `R`.

    `served` is the subject the owner listens on, `inboxes` are the callers' inbox prefixes. Of one site no more than
    `per_site` requests may be under way or wait, whatever others leave free.
    """

    name: str
    owner: Role
    callers: tuple[Role, ...]
    inboxes: tuple[str, ...]
    subject: str
    served: str
    request: type[Q]
    reply: type[R]
    budget_ms: int
    max_bytes: int
    idempotent: Literal["always", "by_id"]
    concurrency: int
    mailbox: int
    per_site: int | None = None

    def pattern(self, **bound: str) -> str:
        """The subject to subscribe to: `served` with the bound tokens filled in and `*` for the others."""
        return _PLACEHOLDER.sub(lambda match: bound.get(match.group(1), "*"), self.served)

    @cached_property
    def positions(self) -> dict[str, int]:
        """Where each named token stands in `served`."""
        return {
            match.group(1): index
            for index, token in enumerate(self.served.split("."))
            if (match := _PLACEHOLDER.fullmatch(token))
        }


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One KV bucket of the contract, or one of objects."""

    name: str
    about: str


AnyOperation = Operation[Any, Any]


def reply_is_private(operation: AnyOperation, tokens: Mapping[str, str], reply: str) -> bool:
    """Whether a reply to this request would go to the inbox of the caller that its tokens name, and to nobody else.

    The server checks where a caller publishes, not where it wants the reply. A service may publish on the inboxes of
    all its callers, so without this check one caller could have it publish on another's inbox. Ask before anything is
    sent to a reply subject, refusals included.

    A request without one is private, but not across a leaf: it may be the answer to a question of another device's.
    """
    if not reply:
        return operation.inboxes != (SERVICE_REPLY,)
    identity = tokens.get("tenant", ""), tokens.get("agent", ""), tokens.get("site", "")
    return reply.startswith(_private(operation.inboxes, *identity))


@lru_cache(maxsize=16_384)
def _private(inboxes: tuple[str, ...], tenant: str, agent: str, site: str) -> tuple[str, ...]:
    """A subject that names no site is served to its own site alone, so any edge that asks there is this site's."""
    return tuple(
        inbox.partition(_SITE)[0]
        if _SITE in inbox and not site
        else f"{fill(inbox, tenant=tenant, agent=agent, site=site)}."
        for inbox in inboxes
    )


SERVICE_REPLY = "_R_"
"""What nats-server's own reply subjects begin with, for requests from another account. No client can name one."""

_SITE = "<site>"


def fill(template: str, **tokens: str) -> str:
    """A template with every `<token>` replaced. Raises `KeyError` on one that is not given."""
    return _PLACEHOLDER.sub(lambda match: tokens[match.group(1)], template)
