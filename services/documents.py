"""From a caller's document to an event's body: what is checked, and where vectors hidden in attributes go.

Pure functions; the gateway calls them before anything is sent. Each `BadRequest` names the part that is wrong.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

import numpy as np

from mnemesh import messages
from mnemesh.clock import from_ms, to_ms
from mnemesh.errors import BadRequest
from mnemesh.ids import check_name, to_token
from mnemesh.wire import Vector, as_vector

STATE_VECTOR = "state_vector"
"""The attribute that is a vector also when it comes as base64 text or as a list of numbers. Null removes it."""

DEEPEST = 32
LONGEST_NAME = 256


def body_of(entity: messages.Entity) -> dict[str, Any]:
    """The body of the put event that a document stands for. Raises `BadRequest` or `TooLarge`."""
    to_token(entity.entity_id)
    _check_time("valid_from", entity.valid_from)
    _check_time("valid_to", entity.valid_to)
    if entity.valid_from and entity.valid_to and entity.valid_from >= entity.valid_to:
        raise BadRequest("valid_from must be before valid_to")
    attributes, vectors = _split_vectors(entity.attributes)
    remove_vectors = entity.remove_vectors
    if entity.attributes.get(STATE_VECTOR, ...) is None:
        remove_vectors = [*remove_vectors, STATE_VECTOR]
    for space, vector in entity.vectors.items():
        if space in vectors:
            raise BadRequest(f"the vector of space {space!r} is there twice, as attribute and under vectors")
        vectors[space] = as_vector(vector, what=f"vectors.{space}")
    for space in (*vectors, *remove_vectors):
        check_name("space", space)
    body: dict[str, Any] = {}
    if entity.type is not None:
        body["type"] = entity.type
    if attributes:
        body["attributes"] = attributes
    if entity.edges:
        body["edges"] = [_edge(edge) for edge in entity.edges]
    for gone in entity.remove_edges:
        to_token(gone.target_id)
    if entity.remove_edges:
        body["remove_edges"] = [
            {"relation": edge.relation, "target_id": edge.target_id} for edge in entity.remove_edges
        ]
    if vectors:
        body["vectors"] = vectors
    if remove_vectors:
        body["remove_vectors"] = remove_vectors
    if entity.text is not None:
        body["text"] = entity.text
    return body


def _check_time(what: str, moment: datetime | None) -> None:
    """What passes can be shown again, in UTC and milliseconds."""
    try:
        if moment is not None:
            from_ms(to_ms(moment))
    except (OverflowError, ValueError) as error:
        raise BadRequest(f"{what}: {moment} is outside the years 1 to 9999") from error


def _split_vectors(attributes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Vector]]:
    plain: dict[str, Any] = {}
    vectors: dict[str, Vector] = {}
    for name, value in attributes.items():
        if not name or len(name) > LONGEST_NAME:
            raise BadRequest(f"an attribute's name must have 1 to {LONGEST_NAME} characters")
        if isinstance(value, np.ndarray) or (name == STATE_VECTOR and value is not None):
            vectors[name] = as_vector(value, what=f"attributes.{name}")
        elif name != STATE_VECTOR:
            check_plain(value, f"attributes.{name}", DEEPEST)
            plain[name] = value
    return plain, vectors


def check_plain(value: object, path: str, depth: int = DEEPEST + 4) -> None:
    """Values that every store and both encodings can hold: no NaN, no bytes, no ext, no bottomless nesting.

    A body holds the values of callers up to four levels down.
    """
    kind = type(value)
    if kind in (str, bool) or value is None:
        return
    if kind is int:
        if not -(2**63) <= value < 2**64:  # type: ignore[operator]  # an int, by the line above
            raise BadRequest(f"{path}: an integer must fit 64 bits")
    elif kind is float:
        if not math.isfinite(value):  # type: ignore[arg-type]  # a float, by the line above
            raise BadRequest(f"{path}: NaN and infinity are not values")
    elif not depth:
        raise BadRequest(f"{path}: nested more than {DEEPEST} deep")
    elif isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise BadRequest(f"{path}: the keys of a map must be texts")
            check_plain(item, f"{path}.{name}", depth - 1)
    elif isinstance(value, list):
        for item in value:
            check_plain(item, path, depth - 1)
    else:
        raise BadRequest(f"{path}: a {kind.__name__} is not a value; use text, number, boolean, list or map")


def _edge(edge: messages.Edge) -> dict[str, Any]:
    to_token(edge.target_id)
    plain: dict[str, Any] = {"relation": edge.relation, "target_id": edge.target_id}
    if edge.properties:
        check_plain(edge.properties, f"edge {edge.relation!r}", DEEPEST)
        plain["properties"] = edge.properties
    return plain
