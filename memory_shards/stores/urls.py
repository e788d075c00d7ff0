"""Which stores a shard has: a URL for each kind of what it remembers.

    attributes   sqlite: | redis://…
    edges        sqlite: | bolt://… | neo4j://…
    text         sqlite:
    vectors      faiss:cpu | faiss:gpu | cuda: | milvus: | milvus://…

Looks at `mnemesh` only: whoever starts a shard needs no driver for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from mnemesh.errors import BadRequest


@dataclass(frozen=True)
class StoreUrls:
    """Where a shard keeps what: a URL each. Raises `BadRequest` on one that it does not know."""

    attributes: str = "sqlite:"
    edges: str = "sqlite:"
    text: str = "sqlite:"
    vectors: str = "faiss:cpu"

    def __post_init__(self) -> None:
        for field in fields(self):
            url, known = getattr(self, field.name), KNOWN[field.name]
            if not any(url == scheme or (scheme.endswith("://") and url.startswith(scheme)) for scheme in known):
                told = without_password(url)
                raise BadRequest(f"{field.name}: {told!r} is no store of this kind; it may be {' or '.join(known)}")


KNOWN: Mapping[str, tuple[str, ...]] = {
    "attributes": ("sqlite:", "redis://", "rediss://"),
    "edges": ("sqlite:", "bolt://", "bolt+s://", "bolt+ssc://", "neo4j://", "neo4j+s://", "neo4j+ssc://"),
    "text": ("sqlite:",),
    "vectors": (
        *("faiss:cpu", "faiss:gpu", "cuda:", "cuda:cupy", "cuda:torch", "cuda:numpy"),
        *("milvus:", "milvus://", "milvus+s://"),
    ),
}

EMBEDDED = StoreUrls()


def environment(setting: str) -> str:
    """The variable that may hold a URL, which may hold a password: command lines are for all to see."""
    return f"MNEMESH_{setting.upper()}"


def without_password(url: str) -> str:
    """A URL as it may be told: without who logs in and how, whatever characters that has."""
    scheme, separator, rest = url.partition("://")
    host = rest.rpartition("@")[2].partition("?")[0]
    return f"{scheme}{separator}{'…@' if '@' in rest else ''}{host}"
