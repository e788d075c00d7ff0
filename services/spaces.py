"""The vector spaces of every tenant: the first vector settles dimension, metric, index and model.

Kept in a KV bucket, where the first gateway to create a space, or the first device, wins and all others follow. Of
vectors that follow from attributes it also keeps which: where one of those may not leave a site, they may not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from mnemesh import subjects
from mnemesh.connection import Link
from mnemesh.errors import BadRequest, Conflict
from mnemesh.inbox import Inbox
from mnemesh.kv import BucketView, create, entry, update
from mnemesh.wire import Vector

LARGEST = float(np.finfo(np.float16).max)
"""Stores keep vectors as fp16. Those of cosine spaces are brought to unit length first."""


class Space(msgspec.Struct, frozen=True):
    """One named vector space. `model` names what made the vectors, `made_of` the attributes that any of them was."""

    dimension: int
    metric: str = "cosine"
    index: str = "auto"
    model: str | None = None
    made_of: list[str] = []

    def settings(self) -> dict[str, Any]:
        """What a store needs beside the dimension, where it is not the default."""
        defaults = Space(self.dimension)
        return {
            name: getattr(self, name)
            for name in ("metric", "index", "model")
            if getattr(self, name) != getattr(defaults, name)
        }


class Spaces:
    """The known spaces; `follow` keeps them current."""

    def __init__(self) -> None:
        self._view = BucketView(subjects.SPACES.name)
        self._known: dict[str, Space] = {}
        self._noting = asyncio.Lock()

    @property
    def ready(self) -> asyncio.Event:
        return self._view.ready

    async def follow(self, link: Link, inbox: Inbox) -> None:
        await self._view.follow(link, inbox)

    async def settle(
        self,
        inbox: Inbox,
        tenant: str,
        name: str,
        vector: Vector,
        wanted: dict[str, Any] | None = None,
        preferred: dict[str, Any] | None = None,
        made_of: Collection[str] = (),
    ) -> Space:
        """The space that is to hold a vector, made if it is new: as `wanted`, and else as `preferred`.

        It says by then that vectors in it are `made_of` these attributes.

        Raises `BadRequest` if it has another dimension, metric, index or model, or cannot hold the vector's numbers.
        """
        key = f"{tenant}.{name}"
        dimension = len(vector)
        space = self._known.get(key)
        if space is None:
            fresh = Space(dimension, **((preferred or {}) | (wanted or {})))
            space = self._known[key] = await self._find_or_create(inbox, key, fresh)
        if space.dimension != dimension:
            raise BadRequest(f"space {name!r} has {space.dimension} dimensions; this vector has {dimension}")
        for setting, value in (wanted or {}).items():
            if getattr(space, setting) != value:
                raise BadRequest(
                    f"space {name!r} has {setting} {getattr(space, setting)!r}, not {value!r}; "
                    "it was settled by its first vector"
                )
        if space.metric != "cosine" and np.abs(vector).max() > LARGEST:
            raise BadRequest(f"space {name!r} of metric {space.metric!r} holds numbers up to ±{LARGEST:.0f}")
        if not set(made_of).issubset(space.made_of):
            async with self._noting:
                space = self._known[key]
                if not set(made_of).issubset(space.made_of):
                    space = self._known[key] = await self._note(inbox, key, made_of)
        return space

    def made_of(self, tenant: str, name: str) -> Collection[str]:
        """The attributes that vectors of a space are made of; none where they are what somebody wrote."""
        held = self._view.entries.get(f"{tenant}.{name}")
        return msgspec.json.decode(held, type=Space).made_of if held else ()

    async def _note(self, inbox: Inbox, key: str, made_of: Collection[str]) -> Space:
        while True:
            revision, held = await entry(inbox, subjects.SPACES.name, key)
            space = msgspec.json.decode(held or b"", type=Space)
            noted = replace(space, made_of=sorted({*space.made_of, *made_of}))
            try:
                await update(inbox, subjects.SPACES.name, key, msgspec.json.encode(noted), revision)
            except Conflict:
                continue
            return noted

    async def _find_or_create(self, inbox: Inbox, key: str, space: Space) -> Space:
        held = self._view.entries.get(key)
        if held is None:
            try:
                await create(inbox, subjects.SPACES.name, key, msgspec.json.encode(space))
            except Conflict:
                held = await self._view.wait_for(key)
            else:
                return space
        return msgspec.json.decode(held, type=Space)
