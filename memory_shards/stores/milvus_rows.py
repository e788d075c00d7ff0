"""Rows as Milvus holds them, and filters as it evaluates them: an expression that lets pass whatever may meet them, and
a little more.

Milvus and `columns` agree on nearly all of it; where they differ (numbers beyond what a float holds, lists that are
measurements, text that an expression cannot hold) the expression lets the row pass, and whoever reads it checks it
against the file. So a condition is never missed, and seldom checked in vain. Looks at `columns` and `vector_reader`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memory_shards.digests import Digests
from memory_shards.stores.columns import Condition, is_tag
from memory_shards.stores.vector_reader import VectorReader, VectorSpace
from memory_shards.stores.vector_state import VectorState
from mnemesh.wire import Vector

MOST_BYTES = 60_000
"""Of a row's attributes as JSON; Milvus takes 65,536."""

MOST_PUSHED = 64
"""Values of one `in`: a longer list makes an expression that takes longer to read than to leave out."""

COLUMNS = ("id", "vector", "type", "attributes", "complete")

_SYMBOLS = {"lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
_EXACT = 1 << 53
"""Beyond this integers are compared as floats, here as there."""


def row_of(space: VectorSpace, entity: VectorState, vector: Vector) -> dict[str, Any]:
    """The row of an entity's vector in one space."""
    attributes, complete = pushed(entity.attributes)
    return {
        "id": entity.entity_id,
        "vector": vector if space.dimension > 1 else np.append(vector, np.float32(0)),  # it takes two numbers at least
        "type": entity.type or "",
        "attributes": attributes,
        "complete": complete,
    }


def facts_of(space: VectorSpace, row: Mapping[str, Any]) -> object:
    """What is told of a row in a digest."""
    vector = np.asarray(row["vector"], np.float32).tobytes()
    return space.name, vector, row["type"], row["attributes"], row["complete"]


def digests_of_index(file: VectorReader) -> Digests:
    """Of the rows that Milvus has to have, by the file."""
    digests = Digests()
    for space in file.spaces():
        for some in file.vectors_in(space):
            for each in some:
                told = facts_of(space, row_of(space, each.entity, each.vector))
                digests.add(space.tenant, each.entity.entity_id, told)
    return digests


def pushed(attributes: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Attributes as a row keeps them to be filtered by, and whether that is all of them.

    What can only be asked to exist is there by its kind.
    """
    kept = {name: _kept(value) for name, value in attributes.items() if value is not None}
    complete = all(math.isfinite(value) for value in kept.values() if isinstance(value, float))
    kept = {name: value for name, value in kept.items() if not isinstance(value, float) or math.isfinite(value)}
    sizes = {name: len(json.dumps({name: value}, ensure_ascii=False).encode()) for name, value in kept.items()}
    size = sum(sizes.values())
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if size <= MOST_BYTES:
            break
        size -= sizes[name]
        del kept[name]
        complete = False
    return kept, complete


def expression(kind: str | None, conditions: Sequence[Condition]) -> str:
    """What rows have to meet, of a type (any if `None`); empty where that is nothing."""
    demands = [demand for condition in conditions if (demand := _demand(condition))]
    parts = []
    if demands:
        parts.append(f"(complete == false or ({' and '.join(demands)}))")
    if kind is not None and _is_plain(kind):
        parts.append(f"type == {_literal(kind)}")
    return " and ".join(parts)


def _kept(value: Any) -> Any:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return _number(value)
    if isinstance(value, float):
        return {"opaque": "nan"} if math.isnan(value) else value
    if isinstance(value, list) and all(map(is_tag, value)):
        return [_kept(int(item)) if isinstance(item, float) else _kept(item) for item in value]
    return {"opaque": type(value).__name__}


def _number(value: int) -> int | float:
    return value if abs(value) <= _EXACT else float(value)


def _demand(condition: Condition) -> str | None:
    """One condition, or something that it implies; `None` where there is nothing to say."""
    if not _is_plain(condition.attribute):
        return None
    field = f"attributes[{_literal(condition.attribute)}]"
    is_there = f"(exists {field})"
    op, operand = condition.op, condition.operand
    if op == "exists":
        return is_there if operand else f"(not {is_there})"
    values = list(operand) if op == "in" else [operand]
    if not all(map(_is_plain, values)) or len(values) > MOST_PUSHED:
        return is_there
    if op in _SYMBOLS:
        return f"{field} {_SYMBOLS[op]} {_literal(operand)}"
    one_of = ", ".join(map(_literal, values))
    equal = " or ".join(
        [*(f"{field} == {_literal(value)}" for value in values), f"json_contains_any({field}, [{one_of}])"]
    )
    if op == "ne":
        if operand in (0, 1):
            return is_there  # to Milvus Lite they are what false and true are
        return f"({is_there} and not ({equal}))"
    return f"({equal})" if values else f"({is_there} and not {is_there})"


def _is_plain(value: object) -> bool:
    """Whether an expression can hold it as it is."""
    return not isinstance(value, str) or (value.isprintable() and len(value) <= 1_000)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return repr(_number(value))
    if isinstance(value, float):
        return _literal(int(value)) if value.is_integer() and abs(value) <= _EXACT else repr(value)
    return json.dumps(value, ensure_ascii=False)
