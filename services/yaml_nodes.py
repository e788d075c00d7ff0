"""Files that operators write, in YAML or JSON, read as far as YAML's nodes and checked there.

Nodes know their lines, keep keys that are there twice (of objects the last would silently win), and aliases in them
cannot grow. What is wrong is a `BadRequest` that says where, what was expected and what is there. Looks at `mnemesh`.
"""

from __future__ import annotations

from collections.abc import Callable

import yaml

from mnemesh.errors import BadRequest, TooLarge

LARGEST = 131_072
"""Characters of a file. Reading as many takes a second."""

MOST_NAMES = 1000
"""Names in one list."""

LONGEST_WORD = 256
"""Characters of a type, an attribute's name or a relation, as in entities."""

_NODES: dict[str, type[yaml.Node]] = {"map": yaml.MappingNode, "seq": yaml.SequenceNode}
_STANDARD = "tag:yaml.org,2002:"

Check = Callable[[str, str], object]
"""Raises `BadRequest` on a name that a thing of this kind cannot have: what is said of it would hold for nothing."""


def root_of(text: str, what: str, expected: str) -> yaml.Node:
    """The node of a whole text (indented with spaces). `what` it is, with its article: `the policy`."""
    if len(text) > LARGEST:
        raise TooLarge(f"{what} may have at most {LARGEST} characters; this one has {len(text)}")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise BadRequest(f"{what} is nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two: escapes that are no characters
        raise BadRequest(f"{what} is neither YAML nor JSON: {' '.join(str(error).split())[:300]}") from error
    if root is None:
        raise BadRequest(f"{what} is empty; expected {expected}")
    return root


def kind_of(node: yaml.Node) -> str:
    """The node's type in YAML's words (map, seq, str, int, bool, null…); empty where its tag belies it."""
    kind = node.tag.removeprefix(_STANDARD)
    return kind if isinstance(node, _NODES.get(kind, yaml.ScalarNode)) else ""


def shown(node: yaml.Node) -> str:
    """What is there, for a message that says what was expected."""
    if isinstance(node, yaml.ScalarNode):
        hint = "" if kind_of(node) == "str" else f" (a YAML {kind_of(node)[:80]}; put text in quotes)"
        return f"{node.value[:80]!r}{hint}"
    return "a map" if isinstance(node, yaml.MappingNode) else "a list"


def line_of(node: yaml.Node) -> int:
    """The line where a node begins."""
    line: int = node.start_mark.line
    return line + 1


def fields_of(node: yaml.Node, what: str, keys: tuple[str, ...]) -> dict[str, yaml.Node]:
    """A map with some of these keys."""
    if kind_of(node) != "map":
        raise BadRequest(f"{what}: expected a map of {', '.join(keys)}, not {shown(node)}")
    fields: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if kind_of(key) != "str" or key.value not in keys:
            raise BadRequest(f"{what}: unknown key {shown(key)}; expected {', '.join(keys)}")
        if key.value in fields:
            raise BadRequest(f"{what}: {key.value} is there twice; expected it once")
        fields[key.value] = value
    return fields


def named_of(node: yaml.Node, what: str, kind: str, check: Check, most: int) -> dict[str, yaml.Node]:
    """A map from names of a kind."""
    if kind_of(node) != "map":
        raise BadRequest(f"{what}: expected a map with each {kind}'s name, not {shown(node)}")
    if len(node.value) > most:
        raise TooLarge(f"{what}: has {len(node.value)} entries; at most {most}")
    named: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = name_of(key, what, kind, check)
        if name in named:
            raise BadRequest(f"{what}: {name[:80]!r} is there twice; expected it once")
        named[name] = value
    return named


def list_of(node: yaml.Node, what: str, expected: str, most: int) -> list[yaml.Node]:
    """A list of at most so many."""
    if kind_of(node) != "seq":
        raise BadRequest(f"{what}: expected {expected}, not {shown(node)}")
    nodes: list[yaml.Node] = node.value
    if len(nodes) > most:
        raise TooLarge(f"{what}: has {len(nodes)} entries; at most {most}")
    return nodes


def names_of(
    node: yaml.Node, what: str, kind: str, check: Check, *, expected: str = "a list of names"
) -> frozenset[str]:
    """A list of at least one name of a kind."""
    nodes = list_of(node, what, expected, MOST_NAMES)
    if not nodes:
        raise BadRequest(f"{what}: is an empty list; expected at least one name, or no {kind} at all")
    return frozenset(name_of(item, what, kind, check) for item in nodes)


def name_of(node: yaml.Node, what: str, kind: str, check: Check) -> str:
    """A name of a kind."""
    if kind_of(node) != "str":
        raise BadRequest(f"{what}: expected a name, not {shown(node)}")
    try:
        # JSON spells a character beyond 16 bits as two escapes, which YAML reads as two.
        name: str = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        check(kind, name)
    except UnicodeError as error:
        raise BadRequest(f"{what}: {shown(node)} is not valid Unicode") from error
    except BadRequest as error:
        raise BadRequest(f"{what}: {error.message}") from error
    return name


def check_word(kind: str, name: str) -> None:
    """Whether entities may have this as a type, an attribute's name or a relation."""
    if not 1 <= len(name) <= LONGEST_WORD:
        raise BadRequest(f"{kind} {name[:80]!r} must have 1 to {LONGEST_WORD} characters")


def whole_number(node: yaml.Node, what: str, most: int) -> int:
    """A number from 1 on, written without signs, bases or leading zeros."""
    digits = node.value if kind_of(node) == "int" and node.value.isascii() and node.value.isdigit() else ""
    if not digits or digits[0] == "0" or len(digits) > len(str(most)) or int(digits) > most:
        raise BadRequest(f"{what}: expected a whole number from 1 to {most}, not {shown(node)}")
    return int(digits)
