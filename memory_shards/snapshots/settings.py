"""Where a shard's snapshots go, and how often one is taken. Whoever starts a shard needs no driver for it.

    nats:          the Object Store of the site
    file:///…      a folder
    s3://…, gs://…  a bucket, and a prefix in it; credentials are the environment's

The last three take the extra `snapshots`. Looks at `stores.urls` and `mnemesh`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from memory_shards.stores.urls import without_password
from mnemesh.errors import BadRequest

KNOWN = ("nats:", "file:///", "s3://", "gs://")

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


@dataclass(frozen=True, kw_only=True)
class SnapshotSettings:
    """No `url`: none are taken. Raises `BadRequest` on one that it does not know."""

    url: str = ""
    every_s: float = 3_600.0

    def __post_init__(self) -> None:
        if self.url and self.url != "nats:" and not self.url.startswith(KNOWN[1:]):
            told = without_password(self.url)
            raise BadRequest(f"snapshots: {told!r} is no place for snapshots; it may be {' or '.join(KNOWN)}")


NONE = SnapshotSettings()


def seconds_of(text: str) -> float:
    """How long `30m`, `1h` or `90` (seconds) is. Raises `BadRequest`."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    seconds = float(matched[1]) * _UNITS[matched[2] or "s"] if matched else 0.0
    if not seconds:
        raise BadRequest(f"{text!r} is no length of time; expected a number and s, m, h or d, such as 30m or 1h")
    return seconds
