"""A policy of consistency from its text, checked: how fresh reads must be, by tenant and type.

    otherwise: eventual                   # tenants that are not named; `eventual` if left out
    tenants:
      acme:
        otherwise: {level: bounded, max_lag_ms: 5000}    # types that are not named, and no type; as above if left out
        types:
          reading: {level: bounded, max_lag_ms: 500}
          invoice: strong
        access_control: [role, grant]     # always strong, whatever a request says

A level is `eventual`, `strong`, or `bounded` with its `max_lag_ms`; `session` needs a token, which only a request has.
What the levels mean is in `mnemesh.messages.Consistency`, what follows from the rules in `memory_shards.demand`. Not to
be taken for the policy of what may leave a site (`sovereignty`). Looks at `yaml_nodes`, `memory_shards.demand` and
`mnemesh`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import yaml

from memory_shards.demand import EVENTUAL, OPEN, STRONG, Rules
from mnemesh.errors import BadRequest
from mnemesh.ids import check_name
from mnemesh.messages import Consistency
from services.yaml_nodes import (
    check_word,
    fields_of,
    kind_of,
    line_of,
    named_of,
    names_of,
    root_of,
    shown,
    whole_number,
)

WHAT = "the consistency policy"

MOST_TENANTS = 1000
MOST_TYPES = 1000
"""Types that one tenant may have rules for."""

LONGEST_LAG_MS = 86_400_000
"""As in requests."""

_WORDS = {"eventual": EVENTUAL, "strong": STRONG}
_LEVEL = "eventual, strong or {level: bounded, max_lag_ms: 500}"


@dataclass(frozen=True)
class ConsistencyPolicy:
    """The rules of the tenants that a policy names, and those of all others."""

    tenants: dict[str, Rules] = field(default_factory=dict)
    others: Rules = OPEN

    def rules(self, tenant: str) -> Rules:
        return self.tenants.get(tenant, self.others)


def parse(text: str) -> ConsistencyPolicy:
    """The policy in a YAML or JSON text (indented with spaces).

    Raises `BadRequest` that says where what is wrong and what was expected; `TooLarge`. Also a type that has a level
    and is access control is an error: its author believes that the level holds.
    """
    fields = fields_of(root_of(text, WHAT, "a map of otherwise and tenants"), WHAT, ("otherwise", "tenants"))
    if not fields:
        raise BadRequest(f"{WHAT} says nothing; expected otherwise, tenants or both")
    otherwise = _level(fields["otherwise"], "otherwise") if "otherwise" in fields else EVENTUAL
    tenants = named_of(fields["tenants"], "tenants", "tenant", check_name, MOST_TENANTS) if "tenants" in fields else {}
    return ConsistencyPolicy(
        {name: _rules(node, f"tenant {name} (line {line_of(node)})", otherwise) for name, node in tenants.items()},
        Rules(otherwise=otherwise),
    )


def _rules(node: yaml.Node, what: str, otherwise: Consistency) -> Rules:
    fields = fields_of(node, what, ("otherwise", "types", "access_control"))
    if "otherwise" in fields:
        otherwise = _level(fields["otherwise"], f"{what}: otherwise")
    types: dict[str, Consistency] = {}
    if "types" in fields:
        named = named_of(fields["types"], f"{what}: types", "type", check_word, MOST_TYPES)
        types = {name: _level(level, f"{what}: type {name[:80]!r}") for name, level in named.items()}
    access_control: frozenset[str] = frozenset()
    if "access_control" in fields:
        access_control = names_of(fields["access_control"], f"{what}: access_control", "type", check_word)
    if twice := sorted(access_control & types.keys()):
        raise BadRequest(
            f"{what}: type {twice[0][:80]!r} is under access_control, which is always strong, and has a level, too; "
            "expected it in one of them"
        )
    return Rules(otherwise=otherwise, types=types, access_control=access_control)


def _level(node: yaml.Node, what: str) -> Consistency:
    if kind_of(node) == "map":
        return _bounded(node, what)
    if kind_of(node) != "str":
        raise BadRequest(f"{what}: expected {_LEVEL}, not {shown(node)}")
    if node.value in _WORDS:
        return _WORDS[node.value]
    raise BadRequest(f"{what}: {_not_a_level(node)}; expected {_LEVEL}")


def _bounded(node: yaml.Node, what: str) -> Consistency:
    """A level with its fields, as requests have it."""
    fields = fields_of(node, what, ("level", "max_lag_ms"))
    level = fields.get("level")
    if level is None:
        raise BadRequest(f"{what}: has no level; expected {_LEVEL}")
    if kind_of(level) == "str" and level.value in _WORDS:
        if "max_lag_ms" in fields:
            raise BadRequest(f"{what}: max_lag_ms says nothing beside {level.value}; expected it with bounded alone")
        return _WORDS[level.value]
    if kind_of(level) != "str" or level.value != "bounded":
        raise BadRequest(f"{what}: {_not_a_level(level)}; expected {_LEVEL}")
    if "max_lag_ms" not in fields:
        raise BadRequest(f"{what}: bounded does not say by how much; expected {_LEVEL}")
    lag_ms = whole_number(fields["max_lag_ms"], f"{what}: max_lag_ms", LONGEST_LAG_MS)
    return Consistency(level="bounded", max_lag_ms=lag_ms)


def _not_a_level(node: yaml.Node) -> str:
    if node.value == "session":
        return "session needs a token, which only a request has"
    if node.value == "bounded":
        return "bounded does not say by how much"
    return f"unknown level {shown(node)}"
