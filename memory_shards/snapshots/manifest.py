"""What a snapshot is: its manifest, and the names of its parts. Looks at `mnemesh` only."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import msgspec
import nats.nuid

from mnemesh import messages

PIECE = 1024 * 1024
"""Bytes of a file in one piece: what is damaged is damaged by so much, and a few of them are in memory at a time."""


class Damaged(Exception):
    """What is at the target is not what was written there."""


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """So many bytes of a file, and as they are at the target: how many, whether deflated, and their BLAKE2b."""

    size: int
    stored: int
    is_deflated: bool
    checksum: str


class SnapshotFile(msgspec.Struct, frozen=True, kw_only=True):
    """One store's file of one moment: up to where it has the log, and what it was built for (`stores.provenance`)."""

    name: str
    watermark: int
    built_for: str
    pieces: list[Piece]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One snapshot. `seconds` is how long it took, reading it back included."""

    id: str
    site: str
    shard: str
    taken_at: datetime
    seconds: float
    files: list[SnapshotFile]

    @property
    def watermark(self) -> int:
        """All of it has the log up to there."""
        return min(file.watermark for file in self.files)

    @property
    def stored(self) -> int:
        """Bytes at the target."""
        return sum(piece.stored for file in self.files for piece in file.pieces)

    def file(self, name: str) -> SnapshotFile | None:
        return next((file for file in self.files if file.name == name), None)

    def encode(self) -> bytes:
        """The checksum of the rest, and the rest on a line of JSON."""
        body = msgspec.json.encode(self)
        return checksum_of(body).encode() + b"\n" + body + b"\n"

    def told(self, unfit: str | None = None) -> messages.Snapshot:
        """As an operator is told of it."""
        return messages.Snapshot(
            id=self.id,
            shard=self.shard,
            taken_at=self.taken_at,
            seconds=round(self.seconds, 3),
            files={file.name: file.watermark for file in self.files},
            bytes=sum(file.size for file in self.files),
            stored=self.stored,
            unfit=unfit,
        )


def decode(content: bytes) -> Manifest:
    """Raises `Damaged`."""
    checksum, _, body = content.partition(b"\n")
    if checksum.decode(errors="replace") != checksum_of(body.rstrip(b"\n")):
        raise Damaged("the manifest is not as it was written: its checksum differs")
    try:
        return msgspec.json.decode(body, type=Manifest)
    except msgspec.ValidationError as error:
        raise Damaged(f"the manifest is of another version: {error}") from error


def checksum_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_TIME = "%Y%m%dT%H%M%SZ"


def new_id() -> str:
    """When it was begun, and by whom: no two are alike."""
    return f"{datetime.now(UTC):{_TIME}}-{nats.nuid.NUID().next().decode()[-8:]}"


def age_s(id: str) -> float:
    """For how long a snapshot has been begun; without end where the name tells no time."""
    try:
        begun = datetime.strptime(id.partition("-")[0], _TIME).replace(tzinfo=UTC)
    except ValueError:
        return float("inf")
    return (datetime.now(UTC) - begun).total_seconds()


def manifests_of(site: str, shard: str) -> str:
    """What the names of a shard's manifests begin with, and end in the snapshot's id."""
    return f"{site}/{shard}/manifests/"


def pieces_of(site: str, shard: str) -> str:
    """What the names of a shard's pieces begin with."""
    return f"{site}/{shard}/pieces/"


def piece_at(site: str, shard: str, id: str, file: str, number: int) -> str:
    return f"{pieces_of(site, shard)}{id}/{file}/{number:06}"
