"""How documents lie in Redis: the keys of a partition, and what is in them.

All keys of a partition begin with `mnemesh:{<site>.<partition>}`, so Redis Cluster keeps them in one hash slot, and one
transaction can write them. Then the tenant, so that an ACL can say `~mnemesh:*:<tenant>:*`. A shard itself needs
`~mnemesh:*` and `+@all -@dangerous +info`: a script that an ACL refuses half-way has half of its effects.

    …:<tenant>:entity:<id>   hash    what is so now: attributes as JSON by their names, and `:type`, `:text`, `:spaces`,
                                     `:version`, `:exact_from`. Gone when it is forgotten, or all of it has expired.
    …:<tenant>:ledger:<id>   string  what merging needs (`Stored`), also of what was forgotten
    …:<tenant>:events:<id>   zset    its history: each a `Kept`, by the log's sequence
    …:<tenant>:ids           zset    the ids of those that are remembered, in the order of their bytes
    …:<tenant>:gone          zset    the ids of the others
    …:<tenant>:log           zset    "<sequence> <id>" of each event by its sequence
    …:<tenant>:valid         zset    the same by `valid_from`
    …:tenants                set     the tenants that have any of these
    …:erasures               hash    the sequence of each forget, and how many events it erased
    …:quarantine             hash    the sequence of each event that is put aside, and a `Quarantined`
    …:meta                   hash    `applied`: up to which sequence; `incarnation` and `layout` of what is here

and a key for each shard, `mnemesh:{<site>.shard.<name>}`: a hash of its `watermark` and of what that counts. Looks at
`memory_shards.merge` and `merger`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from memory_shards.merge import State
from memory_shards.merger import Kept, Quarantined, Stored

LAYOUT = 2
"""Goes up with every change of the above; what was written by another is rebuilt."""


class Keys:
    """The keys of one partition of a site."""

    def __init__(self, site: str, partition: int) -> None:
        self._prefix = f"mnemesh:{{{site}.{partition}}}:".encode()
        self.meta = self._prefix + b"meta"
        self.erasures = self._prefix + b"erasures"
        self.quarantine = self._prefix + b"quarantine"
        self.tenants = self._prefix + b"tenants"
        self.every = self._prefix + b"*"
        self._tenants: dict[str, Tenant] = {}

    def of(self, tenant: str) -> Tenant:
        """The keys of a tenant in it."""
        found = self._tenants.get(tenant)
        if found is None:
            found = self._tenants[tenant] = Tenant(self._prefix + tenant.encode() + b":", self.tenants)
        return found


class Tenant:
    """The keys of one tenant in one partition."""

    __slots__ = ("_entity", "_events", "_ledger", "gone", "ids", "log", "tenants", "valid")

    def __init__(self, prefix: bytes, tenants: bytes) -> None:
        self.tenants = tenants
        """The key of the partition's tenants."""
        self.ids = prefix + b"ids"
        self.gone = prefix + b"gone"
        self.log = prefix + b"log"
        self.valid = prefix + b"valid"
        self._entity = prefix + b"entity:"
        self._ledger = prefix + b"ledger:"
        self._events = prefix + b"events:"

    def entity(self, entity_id: str) -> bytes:
        return self._entity + entity_id.encode()

    def ledger(self, entity_id: str) -> bytes:
        return self._ledger + entity_id.encode()

    def events(self, entity_id: str) -> bytes:
        return self._events + entity_id.encode()


def shard_key(site: str, shard: str) -> bytes:
    return f"mnemesh:{{{site}.shard.{shard}}}".encode()


# ── what is in them ─────────────────────────────────────────────────────────────────────────────────────────────────

TYPE, TEXT, SPACES, VERSION, EXACT_FROM = b":type", b":text", b":spaces", b":version", b":exact_from"

_stored_encoder = msgspec.msgpack.Encoder()
_stored_decoder = msgspec.msgpack.Decoder(Stored)
_kept_decoder = msgspec.msgpack.Decoder(Kept)
_quarantined_decoder = msgspec.msgpack.Decoder(Quarantined)
_json_encode = msgspec.json.Encoder().encode
_json_decode = msgspec.json.Decoder().decode

encode = _stored_encoder.encode
"""A `Stored`, `Kept` or `Quarantined` as MessagePack."""

decode_stored = _stored_decoder.decode
decode_kept = _kept_decoder.decode
decode_quarantined = _quarantined_decoder.decode


def fields_of(state: State, version: int) -> list[bytes]:
    """The hash of an entity, each field before its value: its attributes, and all else that a reader is told."""
    fields = [VERSION, b"%d" % version]
    for name, value in state.attributes.items():
        fields += (field(name), _json_encode(value))
    if state.exact_from:
        fields += (EXACT_FROM, b"%d" % state.exact_from)
    if state.type is not None:
        fields += (TYPE, _json_encode(state.type))
    if state.text is not None:
        fields += (TEXT, _json_encode(state.text))
    if spaces := state.spaces:
        fields += (SPACES, _json_encode(spaces))
    return fields


def field(attribute: str) -> bytes:
    """The field of an attribute. Those that begin with a colon get another one, so that none is one of ours."""
    return _known_field(attribute) if len(attribute) <= 256 else _field(attribute)


def _field(attribute: str) -> bytes:
    name = attribute.encode()
    return b":" + name if name.startswith(b":") else name


_known_field = lru_cache(4_096)(_field)


def attributes_in(fields: dict[bytes, bytes]) -> dict[str, Any]:
    """The attributes of an entity's hash."""
    return {
        (name[1:] if name.startswith(b"::") else name).decode(): _json_decode(value)
        for name, value in fields.items()
        if not name.startswith(b":") or name.startswith(b"::")
    }


def text_in(value: bytes | None) -> str | None:
    """A field that holds a text."""
    found: str | None = None if value is None else _json_decode(value)
    return found


def names_in(value: bytes | None) -> list[str]:
    """A field that holds names."""
    found: list[str] = [] if value is None else _json_decode(value)
    return found
