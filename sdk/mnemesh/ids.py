"""Names in and out of NATS subjects: the token of an id, and the partition of an entity.

A NATS token may not hold dots, spaces, wildcards or control characters; an entity id may hold anything.
`to_token` maps every non-empty text to one safe token, injectively:

* letters, digits, `-` and `_` stand for themselves, so ordinary ids stay readable in `nats sub`;
* every other UTF-8 byte becomes `=XX` (two upper-case hex digits), which `from_token` reverses;
* a token that would pass 200 characters becomes `==` and the unpadded base64url SHA-256 of the id.
  That one cannot be reversed, so such a request names the id in its body too (see `docs/decisions.md`).

Also KV keys accept these characters. Looks only at `errors`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache

from mnemesh.errors import BadRequest

PARTITIONS = 64
"""How many fixed slices the entities of all tenants fall into. Part of the contract: it never changes."""

LONGEST_TOKEN = 200
MAX_ID_BYTES = 16_384
HOT = 4_096
"""Ids whose token and partition are remembered, at 230 bytes each. 50,000 took a device 11 MiB, to save 1 µs a use."""

_SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_ESCAPES = {byte: f"={byte:02X}" for byte in range(256) if chr(byte) not in _SAFE}
_ESCAPE = re.compile(rb"=([0-9A-F]{2})")
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")


@lru_cache(maxsize=HOT)
def to_token(text: str) -> str:
    """The subject token of an id.

    Raises `BadRequest` if the id is empty, longer than `MAX_ID_BYTES` in UTF-8, or not encodable.
    """
    if not isinstance(text, str) or not text:
        raise BadRequest("an id must be a non-empty text")
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest("an id must be valid Unicode; this one holds a lone surrogate") from error
    if len(raw) > MAX_ID_BYTES:
        raise BadRequest(f"an id may have at most {MAX_ID_BYTES} bytes in UTF-8; this one has {len(raw)}")
    token = raw.decode("latin-1").translate(_ESCAPES)
    if len(token) <= LONGEST_TOKEN:
        return token
    return "==" + base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()


@lru_cache(maxsize=HOT)
def from_token(token: str) -> str | None:
    """The id behind a token, or `None` where the token is a digest. Raises `BadRequest` on a stranger."""
    if token.startswith("=="):
        return None
    try:
        text = _ESCAPE.sub(lambda match: bytes((int(match.group(1), 16),)), token.encode()).decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"{token!r} is not the token of an id") from error
    if not text or to_token(text) != token:
        raise BadRequest(f"{token!r} is not the token of an id")
    return text


def check_name(kind: str, name: str, *, longest: int = 64) -> str:
    """A tenant, agent, shard, site or space name: 1 to 64 of `A-Z a-z 0-9 _ -`, so it is its own token."""
    if len(name) > longest or not _PLAIN.fullmatch(name):
        raise BadRequest(f"{kind} {name[:80]!r} must be 1 to {longest} letters, digits, '-' or '_'")
    return name


def partition_of_tokens(tenant: str, entity_token: str) -> int:
    """The partition of an entity: FNV-1a 32 over the joined tokens, mod `PARTITIONS`.

    The same as nats-server's `{{partition(64, tenant, entity)}}` mapping function; a test compares the two.
    """
    value = _FNV_BASIS % PARTITIONS
    for byte in f"{tenant}{entity_token}".encode():
        value = _FNV_STEP[value ^ byte]
    return value


@lru_cache(maxsize=HOT)
def partition_of(tenant: str, entity_id: str) -> int:
    """The partition of an entity by its id."""
    return partition_of_tokens(tenant, to_token(entity_id))


# FNV-1a, 32 bits (draft-eastlake-fnv). Its low bits owe nothing to its high ones, and `PARTITIONS` is a power of two.
_FNV_BASIS, _FNV_PRIME = 0x811C9DC5, 0x01000193
_FNV_STEP = [value * _FNV_PRIME % PARTITIONS for value in range(256)]
