"""A policy of data sovereignty from its text, checked. What it means is in `sovereignty`.

The text is read as far as YAML's nodes and not into objects: nodes know their lines, keep keys that are there twice
(the last would silently win, and let out what the first keeps), and aliases in them cannot grow.
Looks at `sovereignty` and `mnemesh`.
"""

from __future__ import annotations

from collections.abc import Callable

import yaml

from mnemesh.errors import BadRequest, TooLarge
from mnemesh.ids import check_name
from services.sovereignty import ALL, NOTHING, SCORES, Leaves, Policy, Rule

LARGEST = 131_072
"""Characters of a policy. Reading as many takes a second."""

MOST_RULES = 1000
MOST_NAMES = 1000
"""Names in one list of a rule."""

LONGEST_WORD = 256
"""Characters of a type, an attribute's name or a relation, as in entities."""

_WORDS = {"nothing": NOTHING, "scores": SCORES, "all": ALL}
_NODES: dict[str, type[yaml.Node]] = {"map": yaml.MappingNode, "seq": yaml.SequenceNode}
_STANDARD = "tag:yaml.org,2002:"
_LARGEST_VERSION = 10**18 - 1

Check = Callable[[str, str], object]
"""Raises `BadRequest` on a name that a thing of this kind cannot have: a rule for it would protect nothing."""


def parse(text: str) -> Policy:
    """The policy in a YAML or JSON text (indented with spaces).

    Raises `BadRequest` that names the rule by its number, what is wrong and what was expected; `TooLarge`. Also a rule
    that can never match, because one earlier rule takes all that it would, is an error: its author believes that
    it protects something, or lets something out, and neither is so.
    """
    if len(text) > LARGEST:
        raise TooLarge(f"a policy may have at most {LARGEST} characters; this one has {len(text)}")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise BadRequest("the policy is nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two: escapes that are no characters
        raise BadRequest(f"the policy is neither YAML nor JSON: {' '.join(str(error).split())[:300]}") from error
    if root is None:
        raise BadRequest("the policy is empty; expected a map with version, rules and otherwise")
    fields = _map(root, "the policy", ("version", "rules", "otherwise"))
    if "version" not in fields:
        raise BadRequest("the policy has no version; expected a whole number, larger than that of the policy before")
    version = _version(fields["version"])
    nodes = _list(fields["rules"], "rules", "a list of rules", MOST_RULES) if "rules" in fields else []
    rules = {f"rule {number}": _rule(node, number) for number, node in enumerate(nodes, 1)}
    otherwise = ALL
    if "otherwise" in fields:
        otherwise = _leaves(fields["otherwise"], "otherwise")
    _check_all_can_match(rules | ({"otherwise": Rule(leaves=otherwise)} if "otherwise" in fields else {}))
    return Policy(version, tuple(rules.values()), otherwise)


def _rule(node: yaml.Node, number: int) -> Rule:
    what = f"rule {number} (line {node.start_mark.line + 1})"
    fields = _map(node, what, ("tenant", "type", "region", "leaves"))
    if "leaves" not in fields:
        raise BadRequest(f"{what}: does not say what leaves; expected leaves: {_LEAVES}")
    checks: dict[str, Check] = {"tenant": check_name, "type": _check_word, "region": check_name}
    tenants, types, regions = (
        _names(fields[kind], f"{what}: {kind}", kind, check) if kind in fields else frozenset()
        for kind, check in checks.items()
    )
    return Rule(tenants=tenants, types=types, regions=regions, leaves=_leaves(fields["leaves"], f"{what}: leaves"))


_LEAVES = "nothing, scores, all or a map of attributes, edges, vectors and text"


def _leaves(node: yaml.Node, what: str) -> Leaves:
    if _kind(node) == "str":
        if (word := _WORDS.get(node.value)) is None:
            raise BadRequest(f"{what}: unknown word {_shown(node)}; expected {_LEAVES}")
        return word
    if _kind(node) != "map":
        raise BadRequest(f"{what}: expected {_LEAVES}, not {_shown(node)}")
    fields = _map(node, what, ("attributes", "edges", "vectors", "text"))
    checks: dict[str, Check] = {"attributes": _check_word, "edges": _check_word, "vectors": check_name}
    attributes, edges, vectors = (
        # A list also of one: `attributes: all` must not pass for the attribute of that name.
        _listed_names(fields[kind], f"{what}.{kind}", kind, check) if kind in fields else frozenset()
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


def _kind(node: yaml.Node) -> str:
    """The node's type in YAML's words (map, seq, str, int, bool, null…); empty where its tag belies it."""
    kind = node.tag.removeprefix(_STANDARD)
    return kind if isinstance(node, _NODES.get(kind, yaml.ScalarNode)) else ""


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        hint = "" if _kind(node) == "str" else f" (a YAML {_kind(node)[:80]}; put text in quotes)"
        return f"{node.value[:80]!r}{hint}"
    return "a map" if isinstance(node, yaml.MappingNode) else "a list"


def _map(node: yaml.Node, what: str, keys: tuple[str, ...]) -> dict[str, yaml.Node]:
    if _kind(node) != "map":
        raise BadRequest(f"{what}: expected a map of {', '.join(keys)}, not {_shown(node)}")
    fields: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if _kind(key) != "str" or key.value not in keys:
            raise BadRequest(f"{what}: unknown key {_shown(key)}; expected {', '.join(keys)}")
        if key.value in fields:
            raise BadRequest(f"{what}: {key.value} is there twice; expected it once")
        fields[key.value] = value
    return fields


def _list(node: yaml.Node, what: str, expected: str, most: int) -> list[yaml.Node]:
    if _kind(node) != "seq":
        raise BadRequest(f"{what}: expected {expected}, not {_shown(node)}")
    nodes: list[yaml.Node] = node.value
    if len(nodes) > most:
        raise TooLarge(f"{what}: has {len(nodes)} entries; at most {most}")
    return nodes


def _names(node: yaml.Node, what: str, kind: str, check: Check) -> frozenset[str]:
    if _kind(node) == "str":
        return frozenset((_name(node, what, kind, check),))
    return _listed_names(node, what, kind, check, expected="a name or a list of names")


def _listed_names(
    node: yaml.Node, what: str, kind: str, check: Check, *, expected: str = "a list of names"
) -> frozenset[str]:
    nodes = _list(node, what, expected, MOST_NAMES)
    if not nodes:
        raise BadRequest(f"{what}: is an empty list; expected at least one name, or no {kind} at all")
    return frozenset(_name(item, what, kind, check) for item in nodes)


def _name(node: yaml.Node, what: str, kind: str, check: Check) -> str:
    if _kind(node) != "str":
        raise BadRequest(f"{what}: expected a name, not {_shown(node)}")
    try:
        # JSON spells a character beyond 16 bits as two escapes, which YAML reads as two.
        name: str = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        check(kind, name)
    except UnicodeError as error:
        raise BadRequest(f"{what}: {_shown(node)} is not valid Unicode") from error
    except BadRequest as error:
        raise BadRequest(f"{what}: {error.message}") from error
    return name


def _check_word(kind: str, name: str) -> None:
    if not 1 <= len(name) <= LONGEST_WORD:
        raise BadRequest(f"{kind} {name[:80]!r} must have 1 to {LONGEST_WORD} characters")


def _boolean(node: yaml.Node, what: str) -> bool:
    value = yaml.SafeLoader.bool_values.get(node.value.lower()) if _kind(node) == "bool" else None
    if value is None:
        raise BadRequest(f"{what}: expected true or false, not {_shown(node)}")
    return value


def _version(node: yaml.Node) -> int:
    digits = node.value if _kind(node) == "int" and node.value.isascii() and node.value.isdigit() else ""
    if not digits or digits[0] == "0" or len(digits) > len(str(_LARGEST_VERSION)):
        raise BadRequest(f"version: expected a whole number from 1 to {_LARGEST_VERSION}, not {_shown(node)}")
    return int(digits)
