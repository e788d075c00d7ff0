"""Bytes on the wire and back: MessagePack, JSON for people, vectors as extension types.

* A payload that begins with `{` is JSON and is answered in JSON; all else is MessagePack.
* MessagePack ext 1 is a vector of little-endian float32, ext 2 one of float16. Both decode without a copy,
  into a read-only array of shape (d,).
* In JSON a vector is a list of numbers, or base64 of little-endian float32.
* A request must fit its type exactly: an unknown field is refused with its name. In a reply unknown fields are
  skipped, so an older client can talk to a newer mesh.

Knows no subjects and no operations; looks only at `errors`.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any, TypeAlias, TypeVar

import msgpack
import msgspec
import numpy as np

from mnemesh.errors import BadRequest, TooLarge

Vector: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
"""A vector of shape (d,): float32, or float16 where a store keeps halves."""

EXT_FLOAT32 = 1
EXT_FLOAT16 = 2
MAX_DIMENSION = 4096
_LITTLE_FLOAT32 = np.dtype("<f4")
_LITTLE_FLOAT16 = np.dtype("<f2")
_VECTOR_TYPES: dict[int, np.dtype[Any]] = {EXT_FLOAT32: _LITTLE_FLOAT32, EXT_FLOAT16: _LITTLE_FLOAT16}

T = TypeVar("T")


def is_json(payload: bytes) -> bool:
    """Whether a payload is JSON by the mesh's rule: its first byte is `{`."""
    return payload[:1] == b"{"


def encode(message: object, *, as_json: bool = False) -> bytes:
    """A `msgspec.Struct` or a map as MessagePack (or JSON). Fields that hold their default are left out.

    Raises `BadRequest` on what cannot travel: integers over 64 bits, lone surrogates, NaN in JSON, foreign types.
    """
    try:
        if as_json:
            return json.dumps(message, default=_to_json, ensure_ascii=False, allow_nan=False).encode()
        return _ENCODER.encode(message)
    except BadRequest:
        raise
    except (ValueError, OverflowError, TypeError, RecursionError) as error:
        raise BadRequest(f"this cannot travel in a message: {str(error)[:200]!r}") from error


def decode(payload: bytes) -> Any:
    """MessagePack or JSON as plain maps, lists, texts, numbers and vectors.

    Raises `BadRequest` that says what was wrong with the bytes.
    """
    if not payload:
        return {}
    try:
        if is_json(payload):
            value = json.loads(payload, parse_constant=_refuse_constant)
            if b"\\u" in payload:
                json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate fails here, not in some store
            return value
        return msgpack.unpackb(payload, ext_hook=_from_ext, strict_map_key=True, timestamp=3)
    except BadRequest:
        raise
    except RecursionError as error:
        raise BadRequest("the payload is nested too deeply") from error
    except (ValueError, msgpack.exceptions.UnpackException, UnicodeDecodeError, OverflowError) as error:
        kind = "JSON" if is_json(payload) else "MessagePack"
        raise BadRequest(f"the payload is not valid {kind}: {str(error)[:200]}") from error


def convert(value: object, kind: type[T]) -> T:
    """Validate a decoded value into a Struct type. Raises `BadRequest` or `TooLarge` naming the field at fault."""
    if kind not in _described:
        _describe(kind)
    try:
        return msgspec.convert(value, kind, dec_hook=_to_field)
    except msgspec.ValidationError as error:
        reason = TooLarge if isinstance(error.__cause__, TooLarge) else BadRequest
        raise reason(str(error)) from error
    except RecursionError as error:
        raise BadRequest("the payload is nested too deeply") from error
    except AttributeError as error:  # an array where a map belongs, which msgspec takes for one
        raise BadRequest(f"a value has another type than it must: {error}") from error


_described: set[Any] = set()
_describing = threading.Lock()


def _describe(kind: Any) -> None:
    """Have msgspec work out what a type is, on one thread: 0.22 reads the half of it that another thread has so far,
    and the process dies."""
    with _describing:
        msgspec.msgpack.Decoder(kind)
        _described.add(kind)


def decode_as(payload: bytes, kind: type[T]) -> T:
    """`decode`, then `convert`."""
    return convert(decode(payload), kind)


def as_vector(value: object, *, what: str = "vector") -> Vector:
    """A float32 array of shape (d,), 1 ≤ d ≤ 4096, all finite, from an array, numbers or base64.

    Raises `BadRequest` on anything else, `TooLarge` on more dimensions.
    """
    if isinstance(value, str):
        try:
            raw = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRequest(f"{what}: not valid base64") from error
        if len(raw) % 4:
            raise BadRequest(f"{what}: base64 of float32 must hold a multiple of 4 bytes, not {len(raw)}")
        value = np.frombuffer(raw, _LITTLE_FLOAT32)
    if isinstance(value, list | tuple):
        if not all(type(item) in (int, float) for item in value):
            raise BadRequest(f"{what}: every item must be a number")
        try:
            with np.errstate(over="ignore"):  # infinity is refused below
                value = np.asarray(value, dtype=np.float32)
        except (OverflowError, ValueError) as error:
            raise BadRequest(f"{what}: a number is out of range") from error
    if not isinstance(value, np.ndarray):
        raise BadRequest(f"{what}: expected a vector, base64 text or a list of numbers")
    if value.dtype.kind not in "fiu":
        raise BadRequest(f"{what}: every item must be a number, not {value.dtype}")
    if value.ndim != 1 or not value.size:
        raise BadRequest(f"{what}: expected shape (d,) with d of at least 1, not {value.shape}")
    if value.size > MAX_DIMENSION:
        raise TooLarge(f"{what}: {value.size} dimensions; at most {MAX_DIMENSION}")
    vector: Vector = value.astype(np.float32, copy=False)
    if b"\0" in np.isfinite(vector).tobytes():  # a third of the time that `all` takes
        raise BadRequest(f"{what}: holds NaN or infinity")
    return vector


def _refuse_constant(name: str) -> float:
    raise BadRequest(f"{name} is not a JSON number")


@cache
def _defaults(kind: type[msgspec.Struct]) -> tuple[tuple[str, Any], ...]:
    """Each field with its default; an empty list or map where the default is made by a factory."""
    return tuple(
        (field.name, field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory())
        for field in msgspec.structs.fields(kind)
    )


def _fields(message: msgspec.Struct) -> dict[str, Any]:
    fields = {}
    for name, default in _defaults(type(message)):
        value = getattr(message, name)
        if value is default or (type(value) in (list, dict) and not value and default == value):
            continue
        fields[name] = value
    return fields


def _to_msgpack(value: object) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype == np.float16:
            return msgspec.msgpack.Ext(EXT_FLOAT16, value.astype(_LITTLE_FLOAT16, copy=False).tobytes())
        return msgspec.msgpack.Ext(EXT_FLOAT32, value.astype(_LITTLE_FLOAT32, copy=False).tobytes())
    if isinstance(value, np.generic):
        return value.item()
    raise BadRequest(f"a {type(value).__name__} cannot travel in a message")


# msgspec's own encoder: it writes a Struct 10 times as fast as msgpack.packb with a hook for each nested one.
_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_msgpack)


def _to_json(value: object) -> Any:
    if isinstance(value, msgspec.Struct):
        return _fields(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise BadRequest(f"a {type(value).__name__} cannot travel in a message")


def _from_ext(code: int, data: bytes) -> Any:
    kind = _VECTOR_TYPES.get(code)
    if kind is None:
        raise BadRequest(f"unknown MessagePack extension type {code}")
    if len(data) % kind.itemsize:
        raise BadRequest(f"ext {code}: {len(data)} bytes is not a whole number of {kind.itemsize}-byte floats")
    return np.frombuffer(data, kind)


def _to_field(kind: Any, value: object) -> Any:
    if getattr(kind, "__origin__", kind) is np.ndarray:
        return as_vector(value)
    raise NotImplementedError(f"no conversion to {kind}")


def plain(value: object) -> object:
    """A decoded value with vectors replaced by lists, for stores and people that know only plain data."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value
