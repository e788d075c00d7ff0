"""Devices and their keys: whom a hub lets connect as a leaf, and a device's own key.

A device proves who it is by an NKey (Ed25519). Its private half, the seed, is made on the device and stays there; the
hub keeps the public half, one file a device under `<data>/devices`. nats-server does the signing.

https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/nkey_auth
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cli.private import write_private
from mnemesh.errors import BadRequest, Conflict, NotFound
from mnemesh.ids import check_name

_SEED, _USER = 18 << 3, 20 << 3
"""The prefixes of NKeys, which show as `S` and `U` (github.com/nats-io/nkeys)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One device that a hub knows: its site's name and its public key; where it is, and whose memory it may have."""

    name: str
    key: str
    enrolled_at: str
    region: str = ""
    tenants: Sequence[str] = ()


class Devices:
    """The devices of a hub's data folder."""

    def __init__(self, data: Path) -> None:
        self._folder = data.absolute() / "devices"

    def list(self) -> list[Device]:
        """Every device, in the order of their names."""
        return [self.load(path.stem) for path in sorted(self._folder.glob("*.json"))]

    def load(self, name: str) -> Device:
        """One device. Raises `NotFound`."""
        try:
            held = json.loads(self._path(name).read_text())
        except FileNotFoundError as error:
            raise NotFound(f"no device {name}: there is no {self._path(name)}") from error
        return Device(name=name, **held)

    def enrol(self, name: str, key: str, *, region: str = "", tenants: Sequence[str] = ()) -> Device:
        """Let the device with this public key connect as `name`; it does once the server is reloaded.

        It may have the memory of all tenants if none is named.

        Raises `BadRequest` where the key is none, `Conflict` where the name has another key, or the key another name.
        """
        check_public(key)
        for other in self.list():
            if (other.name == name) != (other.key == key):
                taken = f"the name {name}" if other.name == name else "this key"
                raise Conflict(
                    f"{taken} is that of device {other.name} already: `mnemesh edge revoke {other.name}` first"
                )
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        enrolled_at = datetime.now(UTC).isoformat(timespec="seconds")
        held = {"key": key, "enrolled_at": enrolled_at, "region": region, "tenants": list(tenants)}
        write_private(self._path(name), json.dumps(held, indent=2) + "\n")
        return self.load(name)

    def revoke(self, name: str) -> None:
        """Forget a device; the server disconnects it once it is reloaded. Raises `NotFound`."""
        self.load(name)
        self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self._folder / f"{check_name('device', name)}.json"


def seed_of(data: Path) -> str:
    """The seed of the device whose data folder this is, made at first: a private file."""
    path = data.absolute() / "device.nk"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(path, new_seed() + "\n")
    return path.read_text().strip()


def new_seed() -> str:
    """The seed of a new pair of keys."""
    return _encoded(bytes((_SEED | _USER >> 5, (_USER & 31) << 3)) + os.urandom(32))


def public_of(seed: str) -> str:
    """The public key of a seed. Raises `BadRequest` where the extra `edge` is not installed: nobody else needs it."""
    try:
        from nacl.signing import SigningKey
    except ImportError as error:
        raise BadRequest("a device's key needs PyNaCl: `pip install 'mnemesh-server[edge]'` brings it") from error
    raw = _decoded(seed)[2:]
    return _encoded(bytes((_USER,)) + bytes(SigningKey(raw).verify_key))


def check_public(key: str) -> None:
    """Raise `BadRequest` if this is not a user's public NKey."""
    if key[:1] != "U" or len(_decoded(key)) != 33:
        raise BadRequest(f"{key[:80]!r} is not the public key of a device; it begins with U and has 56 characters")


def _encoded(raw: bytes) -> str:
    checksum = binascii.crc_hqx(raw, 0).to_bytes(2, "little")
    return base64.b32encode(raw + checksum).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    try:
        whole = base64.b32decode(text + "=" * (-len(text) % 8))
    except binascii.Error as error:
        raise BadRequest(f"{text[:80]!r} is not an NKey") from error
    if binascii.crc_hqx(whole[:-2], 0).to_bytes(2, "little") != whole[-2:]:
        raise BadRequest(f"{text[:4]}… is not an NKey: its checksum is wrong")
    return whole[:-2]
