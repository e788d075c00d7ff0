"""A view: vectors that follow from attributes. Which entities, which text of each, by which embedder, in which space.

    name: notes
    tenant: acme
    type: note
    attributes: [title, body]
    template: "{title}: {body}"   # left out: a line `name: value` for each attribute that an entity has
    space: notes                  # this view's alone: what others write there for its entities is overwritten
    embedder: hashing:384

A value that is no text is written as JSON. An entity without any of the attributes has no text, and so no vector.
Pure functions over plain data: no NATS, no clock. Looks at `mnemesh` only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from hashlib import blake2b
from typing import Annotated

import msgspec
import yaml
from msgspec import Meta

from mnemesh import wire
from mnemesh.embedding import embedder
from mnemesh.errors import BadRequest, TooLarge
from mnemesh.event import Event
from mnemesh.ids import check_name
from mnemesh.messages import Context, Kind

LARGEST = 16_384
"""Characters of a view's file."""

LONGEST_TEXT = 65_536
"""Characters of an entity's text that are embedded; what is beyond is cut off."""

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
"""In a template: an escaped brace, an attribute's name in braces, or a brace that is neither."""


class View(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, dict=True):
    """One view. Where it is `removed`, no entity has a text, so that its vectors go."""

    name: str
    tenant: str
    type: Kind
    attributes: Annotated[list[Kind], Meta(min_length=1, max_length=64)]
    template: str | None = None
    space: str
    embedder: str
    removed: bool = False

    @cached_property
    def definition(self) -> str:
        """A hash of all that it says: vectors of another one are to be made anew."""
        return blake2b(self.encode(), digest_size=16).hexdigest()

    @property
    def agent(self) -> str:
        """In whose name its vectors are written. No agent can be called so."""
        return f"view:{self.name}"

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    def check(self) -> None:
        """Raises `BadRequest` where it cannot be kept, which says what is wrong."""
        check_name("view", self.name)
        check_name("tenant", self.tenant)
        check_name("space", self.space)
        embedder(self.embedder)
        if twice := {name for name in self.attributes if self.attributes.count(name) > 1}:
            raise BadRequest(f"attributes: {', '.join(sorted(twice))} is there twice")
        if self.template is None:
            return
        braces = [match for match in _BRACES.finditer(self.template) if match.group() not in ("{{", "}}")]
        if any(match.group(1) is None for match in braces):
            raise BadRequest("template: a brace that belongs to none; expected {attribute}, and {{ or }} for a brace")
        used = {match.group(1) for match in braces}
        if strangers := used - set(self.attributes):
            raise BadRequest(f"template: {{{sorted(strangers)[0][:80]}}} is none of the attributes that the view names")
        if unused := set(self.attributes) - used:
            raise BadRequest(
                f"template: does not use {sorted(unused)[0][:80]!r}; take it from the attributes, or use it"
            )

    def is_moved_by(self, event: Event) -> bool:
        """Whether an event, of its tenant, may change what the vector of its entity is to be, or is."""
        if event.op != "put":
            return event.op == "forget"
        told = event.body.get("attributes")
        return (
            "type" in event.body
            or (isinstance(told, dict) and not told.keys().isdisjoint(self.attributes))
            or self.is_written_by(event)
        )

    def is_written_by(self, event: Event) -> bool:
        """Whether an event sets a vector in its space, or removes one."""
        parts = (event.body.get("vectors"), event.body.get("remove_vectors"))
        return any(isinstance(part, dict | list) and self.space in part for part in parts)

    def text_of(self, context: Context) -> str | None:
        """The text of an entity; `None` where it has none, or is of another type."""
        if self.removed or context.type != self.type:
            return None
        values = {
            name: _written(value) for name in self.attributes if (value := context.attributes.get(name)) is not None
        }
        if not values:
            return None
        if self.template is None:
            text = "\n".join(f"{name}: {value}" for name, value in values.items())
        else:
            text = _BRACES.sub(lambda match: _filled(match, values), self.template)
        return text.strip()[:LONGEST_TEXT] or None


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(wire.plain(value), ensure_ascii=False)


def _filled(match: re.Match[str], values: Mapping[str, str]) -> str:
    name = match.group(1)
    return match.group()[0] if name is None else values.get(name, "")


def decode_view(value: bytes) -> View:
    """The view in an entry of the bucket. Raises `msgspec.MsgspecError` where it is none."""
    return msgspec.json.decode(value, type=View)


def parse(text: str) -> View:
    """The view in a YAML or JSON text. Raises `BadRequest` that says what is wrong and what it must be, `TooLarge`."""
    if len(text) > LARGEST:
        raise TooLarge(f"a view may have at most {LARGEST} characters; this one has {len(text)}")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        fields = yaml.safe_load(text)
    except RecursionError as error:
        raise BadRequest("the view is nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two: escapes that are no characters
        raise BadRequest(f"the view is neither YAML nor JSON: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(root, yaml.MappingNode) or not isinstance(fields, dict):
        raise BadRequest(f"a view is a map of {_EXPECTED}")
    names = [key.value for key, _ in root.value]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BadRequest(f"the view says {', '.join(sorted(map(str, twice)))} twice")
    if unknown := [name for name in names if name not in _FIELDS]:
        raise BadRequest(f"the view says {str(unknown[0])[:80]!r}, which is nothing of a view; expected {_EXPECTED}")
    try:
        view = wire.convert(fields, View)
    except BadRequest as error:
        raise BadRequest(f"the view: {error.message}; expected {_EXPECTED}") from error
    view.check()
    return view


_FIELDS = ("name", "tenant", "type", "attributes", "template", "space", "embedder")
_EXPECTED = "name, tenant, type, attributes, space, embedder and, if need be, template"
