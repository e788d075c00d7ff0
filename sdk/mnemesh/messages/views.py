"""What views ask and are told: vectors that follow from attributes."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from mnemesh.messages.base import Kind, Reply, Request, Sequence
from mnemesh.wire import Vector


class Derivation(msgspec.Struct, frozen=True, kw_only=True):
    """What a vector was made of: these attributes of its entity, which these sites wrote, by this `definition` of a
    view. Where one of them may not leave a site, the vector may not.
    """

    definition: Annotated[str, Meta(max_length=64)]
    attributes: Annotated[list[Kind], Meta(min_length=1)]
    sites: list[str]


class Derive(Request, frozen=True, kw_only=True):
    """Request of `derive`: one vector of an entity that is at version `expected_version`; `None` removes it."""

    entity_id: Annotated[str, Meta(min_length=1)]
    space: str
    vector: Vector | None = None
    model: Annotated[str, Meta(max_length=256)]
    derived: Derivation
    expected_version: Sequence


class ViewSeen(Reply, frozen=True, kw_only=True):
    """A view, and where it stands: it has the log up to `place`, and `waiting` messages are beyond.

    It is not `filled` as long as it has not gone through the entities that were there before it. `definition` is a hash
    of the one that it is kept by. It could not make the vectors of `refused` entities; `trouble` says, in words, what
    went wrong last, if it still does.
    """

    name: str
    tenant: str
    type: str
    attributes: list[str]
    space: str
    embedder: str
    definition: str = ""
    place: int = 0
    waiting: int = 0
    filled: bool = False
    refused: int = 0
    trouble: str = ""
    removed: bool = False


class ViewsSeen(Reply, frozen=True, kw_only=True):
    """Reply of `view_status`, by name. `definition` is empty where no replica has begun with a view."""

    views: list[ViewSeen]
