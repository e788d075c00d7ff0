"""Columns of attributes by row, and the filters that pick rows from them.

A filter maps attribute names to a value (equality) or to a map of operators; all conditions must hold:

    eq ne     text, number or bool; on a list attribute: contains, does not contain
    lt lte gt gte   text with text, number with number
    in        a list of texts, numbers, bools: equal to one of them
    exists    true or false

An absent attribute meets only `exists: false`. Texts, bools and lists of scalars are dictionary-encoded, so
a predicate runs once per distinct value, not once per row; numbers compare as float64. Any other value can only be
asked to exist: a map, a time, a list with fractions in it, which is a measurement and not a set of tags (47,000
lists of 24 such numbers took 0.4 s to renumber). Looks at `errors` only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from mnemesh.errors import BadRequest

Rows: TypeAlias = NDArray[np.intp]
"""Row numbers, ascending."""

_ORDERINGS: dict[str, Callable[[Any, Any], Any]] = {
    "lt": operator.lt,
    "lte": operator.le,
    "gt": operator.gt,
    "gte": operator.ge,
}
_OPERATORS = ("eq", "ne", *_ORDERINGS, "in", "exists")

# The first codes of every dictionary. Absence is zero, so a column that few rows use stays untouched pages of
# `np.zeros`, which cost no memory.
_ABSENT, _NUMBER, _OPAQUE = _RESERVED = range(3)
_SPARE_VALUES = 1024
_BEYOND_FLOAT = 1 << 1000

_Scalar = TypeVar("_Scalar", bound=np.generic)


class Condition(NamedTuple):
    """One demand of a filter: `operand` has the type that `op` needs."""

    attribute: str
    op: str
    operand: Any


def parse_filter(wanted: Mapping[str, Any]) -> list[Condition]:
    """The conditions of a filter. Raises `BadRequest` that names the attribute and the operator at fault."""
    conditions = []
    for attribute, demand in wanted.items():
        operators = demand if isinstance(demand, Mapping) else {"eq": demand}
        if not operators:
            raise BadRequest(f"filter on {attribute!r}: names no operator; use {', '.join(_OPERATORS)}")
        conditions += [_checked(Condition(attribute, op, operand)) for op, operand in operators.items()]
    return conditions


class Columns:
    """The types and attributes of the rows of one vector space."""

    def __init__(self) -> None:
        self._types = Column()
        self._attributes: dict[str, Column] = {}

    def describe(self, row: int, kind: str | None, attributes: Mapping[str, object], names: Iterable[str]) -> None:
        """Set the row's type, and those of its attributes that are in `names`; absent ones are cleared."""
        self._types.set(row, kind)
        for name in names:
            value = attributes.get(name)
            column = self._attributes.get(name)
            if column is None:
                if value is None:
                    continue
                column = self._attributes[name] = Column()
            column.set(row, value)

    def clear(self, row: int) -> None:
        """Take the row's type and attributes away."""
        for column in (self._types, *self._attributes.values()):
            column.set(row, None)

    def select(self, live: NDArray[np.bool_], kind: str | None, conditions: Sequence[Condition]) -> Rows:
        """The live rows of this type (any if `None`) that meet every condition."""
        # Each condition looks only at the rows that the ones before it left: the selective go first.
        demands = [(self._attributes.get(wanted.attribute, Column()), wanted) for wanted in conditions]
        demands.sort(key=lambda demand: demand[1].op not in ("eq", "in"))
        if kind is not None:
            demands.append((self._types, Condition("type", "eq", kind)))
        rows: Rows | None = None
        for column, wanted in demands:
            rows = column.select(wanted, len(live), rows)
        return np.flatnonzero(live) if rows is None else rows[live[rows]]

    def take(self, order: Rows) -> None:
        """Renumber: new row i is old row `order[i]`."""
        for column in (self._types, *self._attributes.values()):
            column.take(order)


class Column:
    """One attribute: a code per row, and a float64 per row where numbers occur."""

    def __init__(self) -> None:
        self._codes = np.zeros(0, np.int32)
        self._numbers = np.zeros(0, np.float64)
        self._values: list[object] = [None] * len(_RESERVED)
        self._code_of: dict[object, int] = {}
        self._holders: dict[object, list[int]] = {}  # item of a list → the codes of the lists that hold it

    def set(self, row: int, value: object) -> None:
        """Give a row its value; `None` clears it."""
        if value is None:
            if row < len(self._codes):
                self._codes[row] = _ABSENT
            return
        self._codes = grown(self._codes, row + 1)
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
            self._numbers = grown(self._numbers, row + 1)
            self._numbers[row] = value
            self._codes[row] = _NUMBER
        else:
            self._codes[row] = self._code(value)

    def select(self, wanted: Condition, size: int, rows: Rows | None) -> Rows:
        """Which of `rows` (of all `size` rows if `None`) meet the condition."""
        self._codes = grown(self._codes, size)
        codes = self._codes[:size] if rows is None else self._codes[rows]
        met = self._met(wanted, codes, rows)
        return np.flatnonzero(met) if rows is None else rows[met]

    def take(self, order: Rows) -> None:
        """Renumber: new row i is old row `order[i]`."""
        size = int(order.max(initial=-1)) + 1
        self._codes = grown(self._codes, size)[order]
        if self._numbers.size:
            self._numbers = grown(self._numbers, size)[order]
        self._drop_unused()

    def _met(self, wanted: Condition, codes: NDArray[np.int32], rows: Rows | None) -> NDArray[np.bool_]:
        op, operand = wanted.op, wanted.operand
        if op in ("eq", "in"):
            return self._equal(operand if op == "in" else (operand,), codes, rows)
        if op in _ORDERINGS:
            if isinstance(operand, str):
                return self._ordered_texts(_ORDERINGS[op], operand, codes)
            return self._numbers_met(_ORDERINGS[op], operand, codes, rows)
        present: NDArray[np.bool_] = codes != _ABSENT
        if op == "ne":
            return present & ~self._equal((operand,), codes, rows)
        return present if operand else ~present

    def _equal(self, items: Iterable[object], codes: NDArray[np.int32], rows: Rows | None) -> NDArray[np.bool_]:
        met: NDArray[np.bool_] | None = None
        for item in items:
            # Scanning int32 codes costs 19 µs per 100,000 rows: posting lists would not earn their memory.
            equal: list[NDArray[np.bool_]] = [codes == code for code in self._codes_equal_to(item)]
            if isinstance(item, int | float) and not isinstance(item, bool):
                equal.append(self._numbers_met(operator.eq, item, codes, rows))
            for same in equal:
                met = same if met is None else met | same
        return np.zeros(len(codes), np.bool_) if met is None else met

    def _numbers_met(
        self, compare: Callable[[Any, Any], Any], operand: float, codes: NDArray[np.int32], rows: Rows | None
    ) -> NDArray[np.bool_]:
        if not self._numbers.size:
            return np.zeros(len(codes), np.bool_)
        self._numbers = grown(self._numbers, len(self._codes))
        numbers = self._numbers[: len(codes)] if rows is None else self._numbers[rows]
        met: NDArray[np.bool_] = (codes == _NUMBER) & compare(numbers, float(operand))
        return met

    def _ordered_texts(
        self, compare: Callable[[Any, Any], Any], operand: str, codes: NDArray[np.int32]
    ) -> NDArray[np.bool_]:
        values = self._values
        table = np.zeros(len(values), np.bool_)
        for code in range(len(values)) if len(codes) > len(values) else set(codes.tolist()):
            value = values[code]
            table[code] = isinstance(value, str) and compare(value, operand)
        return table[codes]

    def _codes_equal_to(self, item: object) -> list[int]:
        """The codes of the text or bool itself, and of the lists that contain the item."""
        code = self._code_of.get(item) if isinstance(item, str | bool) else None
        return self._holders.get((isinstance(item, bool), item), []) + ([] if code is None else [code])

    def _code(self, value: object) -> int:
        if isinstance(value, list) and all(map(is_tag, value)):
            # True equals 1 as a key, so the items of a list carry whether they are bools.
            value = tuple((isinstance(item, bool), item) for item in value)
        elif not isinstance(value, str | bool):
            return _OPAQUE
        code = self._code_of.get(value)
        if code is None:
            if len(self._values) > 2 * len(self._codes) + _SPARE_VALUES:
                self._drop_unused()
            code = self._intern(value)
        return code

    def _intern(self, value: object) -> int:
        code = self._code_of[value] = len(self._values)
        self._values.append(value)
        if isinstance(value, tuple):
            for item in set(value):
                self._holders.setdefault(item, []).append(code)
        return code

    def _drop_unused(self) -> None:
        """Forget values that no row holds any more: an ever-changing text must not fill the memory."""
        used = np.bincount(self._codes, minlength=len(self._values)) > 0
        used[: len(_RESERVED)] = True
        self._codes = (np.cumsum(used, dtype=np.int32) - 1)[self._codes]
        values = [self._values[code] for code in np.flatnonzero(used)[len(_RESERVED) :]]
        self._values, self._code_of, self._holders = [None] * len(_RESERVED), {}, {}
        for value in values:
            self._intern(value)


def is_tag(item: object) -> bool:
    return isinstance(item, str | int) or (isinstance(item, float) and item.is_integer())


def grown(array: NDArray[_Scalar], size: int) -> NDArray[_Scalar]:
    """The array itself if it has `size` items, else a copy with room to spare, padded with zeros."""
    if len(array) >= size:
        return array
    larger = np.zeros(max(size, 2 * len(array)), array.dtype)
    larger[: len(array)] = array
    return larger


def _checked(wanted: Condition) -> Condition:
    attribute, op, operand = wanted
    if op in ("eq", "ne"):
        right, expected = _is_scalar(operand), "a text, a number or a bool"
    elif op in _ORDERINGS:
        right, expected = _is_scalar(operand) and not isinstance(operand, bool), "a text or a number"
    elif op == "in":
        right = isinstance(operand, list | tuple) and all(map(_is_scalar, operand))
        expected = "a list of texts, numbers or bools"
    elif op == "exists":
        right, expected = isinstance(operand, bool), "true or false"
    else:
        raise BadRequest(f"filter on {attribute!r}: unknown operator {op!r}; use {', '.join(_OPERATORS)}")
    if not right:
        raise BadRequest(f"filter on {attribute!r}: {op} needs {expected}, not {operand!r:.80}")
    return wanted


def _is_scalar(value: object) -> bool:
    if isinstance(value, int):
        return abs(value) < _BEYOND_FLOAT
    return isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))
