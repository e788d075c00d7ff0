"""A policy of data sovereignty from its text, checked. What it means is in `sovereignty`.

Looks at `sovereignty`, `yaml_nodes` and `mnemesh`.
"""

from __future__ import annotations

import yaml

from mnemesh.errors import BadRequest
from mnemesh.ids import check_name
from services.sovereignty import ALL, NOTHING, SCORES, Leaves, Policy, Rule
from services.yaml_nodes import (
    Check,
    check_word,
    fields_of,
    kind_of,
    line_of,
    list_of,
    name_of,
    names_of,
    root_of,
    shown,
    whole_number,
)

MOST_RULES = 1000

_WORDS = {"nothing": NOTHING, "scores": SCORES, "all": ALL}
_LARGEST_VERSION = 10**18 - 1


def parse(text: str) -> Policy:
    """The policy in a YAML or JSON text (indented with spaces).

    Raises `BadRequest` that names the rule by its number, what is wrong and what was expected; `TooLarge`. Also a rule
    that can never match, because one earlier rule takes all that it would, is an error: its author believes that
    it protects something, or lets something out, and neither is so.
    """
    root = root_of(text, "the policy", "a map with version, rules and otherwise")
    fields = fields_of(root, "the policy", ("version", "rules", "otherwise"))
    if "version" not in fields:
        raise BadRequest("the policy has no version; expected a whole number, larger than that of the policy before")
    version = whole_number(fields["version"], "version", _LARGEST_VERSION)
    nodes = list_of(fields["rules"], "rules", "a list of rules", MOST_RULES) if "rules" in fields else []
    rules = {f"rule {number}": _rule(node, number) for number, node in enumerate(nodes, 1)}
    otherwise = ALL
    if "otherwise" in fields:
        otherwise = _leaves(fields["otherwise"], "otherwise")
    _check_all_can_match(rules | ({"otherwise": Rule(leaves=otherwise)} if "otherwise" in fields else {}))
    return Policy(version, tuple(rules.values()), otherwise)


def _rule(node: yaml.Node, number: int) -> Rule:
    what = f"rule {number} (line {line_of(node)})"
    fields = fields_of(node, what, ("tenant", "type", "region", "leaves"))
    if "leaves" not in fields:
        raise BadRequest(f"{what}: does not say what leaves; expected leaves: {_LEAVES}")
    checks: dict[str, Check] = {"tenant": check_name, "type": check_word, "region": check_name}
    tenants, types, regions = (
        _names(fields[kind], f"{what}: {kind}", kind, check) if kind in fields else frozenset()
        for kind, check in checks.items()
    )
    return Rule(tenants=tenants, types=types, regions=regions, leaves=_leaves(fields["leaves"], f"{what}: leaves"))


_LEAVES = "nothing, scores, all or a map of attributes, edges, vectors and text"


def _leaves(node: yaml.Node, what: str) -> Leaves:
    if kind_of(node) == "str":
        if (word := _WORDS.get(node.value)) is None:
            raise BadRequest(f"{what}: unknown word {shown(node)}; expected {_LEAVES}")
        return word
    if kind_of(node) != "map":
        raise BadRequest(f"{what}: expected {_LEAVES}, not {shown(node)}")
    fields = fields_of(node, what, ("attributes", "edges", "vectors", "text"))
    checks: dict[str, Check] = {"attributes": check_word, "edges": check_word, "vectors": check_name}
    attributes, edges, vectors = (
        # A list also of one: `attributes: all` must not pass for the attribute of that name.
        names_of(fields[kind], f"{what}.{kind}", kind, check) if kind in fields else frozenset()
        for kind, check in checks.items()
    )
    text = _boolean(fields["text"], f"{what}.text") if "text" in fields else False
    return Leaves(attributes=attributes, edges=edges, vectors=vectors, text=text)


def _check_all_can_match(rules: dict[str, Rule]) -> None:
    named = list(rules.items())
    for index, (name, rule) in enumerate(named):
        for earlier_name, earlier in named[:index]:
            if earlier.takes_all_of(rule):
                raise BadRequest(
                    f"{name}: can never match, because {earlier_name} takes all that it would; "
                    f"expected the narrower one first, or only one of them"
                )


def _names(node: yaml.Node, what: str, kind: str, check: Check) -> frozenset[str]:
    if kind_of(node) == "str":
        return frozenset((name_of(node, what, kind, check),))
    return names_of(node, what, kind, check, expected="a name or a list of names")


def _boolean(node: yaml.Node, what: str) -> bool:
    value = yaml.SafeLoader.bool_values.get(node.value.lower()) if kind_of(node) == "bool" else None
    if value is None:
        raise BadRequest(f"{what}: expected true or false, not {shown(node)}")
    return value
