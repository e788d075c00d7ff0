"""Sovereignty: what a policy keeps at its site is in nothing that leaves, and a wrong policy is told what is wrong."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_event import EVENTS
from test_merge import changes, forget, interleaved, put, site_logs
from test_wire import SCALARS, TEXT, documents, nested

from memory_shards import merge
from mnemesh import messages
from mnemesh.errors import BadRequest, TooLarge
from mnemesh.event import Event, decode_event
from services.sovereignty import (
    ALL,
    NOTHING,
    OPEN,
    SCORES,
    Leaves,
    Level,
    Policy,
    Rule,
    allows_search,
    opaque_id,
    reduced_context,
    reduced_event,
    reduced_hit,
)
from services.sovereignty_text import MOST_RULES, parse
from services.yaml_nodes import LARGEST, MOST_NAMES

EXAMPLE = """
version: 3
rules:
  - {tenant: acme, type: meter, region: north, leaves: nothing}
  - {tenant: acme, type: forecast, leaves: scores}
  - {type: transformer, leaves: {attributes: [kv, name], edges: [feeds], vectors: [shape], text: false}}
otherwise: all
"""
TRANSFORMER = Leaves(
    attributes=frozenset({"kv", "name"}), edges=frozenset({"feeds"}), vectors=frozenset({"shape"}), text=False
)

NAMES = ("x", "y", "z")
RELATIONS = ("near", "feeds")
_some = {size: st.frozensets(st.sampled_from(size), max_size=3) for size in (NAMES, RELATIONS)}
FIELDS = st.builds(Leaves, attributes=_some[NAMES], edges=_some[RELATIONS], vectors=_some[NAMES], text=st.booleans())
LEAVES = st.sampled_from((NOTHING, SCORES, ALL)) | FIELDS

TENANTS, TYPES, REGIONS = ("acme", "zen"), ("meter", "bus"), ("north", "south")
RULES = st.builds(
    Rule,
    tenants=st.frozensets(st.sampled_from(TENANTS)),
    types=st.frozensets(st.sampled_from(TYPES)),
    regions=st.frozensets(st.sampled_from(REGIONS)),
    leaves=LEAVES,
)
POLICIES = st.builds(
    Policy, version=st.integers(1, 10**18 - 1), rules=st.lists(RULES, max_size=6).map(tuple), otherwise=LEAVES
)
ANY_TENANT, ANY_REGION = st.sampled_from((*TENANTS, "other")), st.sampled_from((*REGIONS, "other"))
ALL_TYPES = (*TYPES, "other", None)


def first_match(policy: Policy, tenant: str, type: str | None, region: str) -> Leaves:
    for rule in policy.rules:
        wanted = ((rule.tenants, tenant), (rule.types, type), (rule.regions, region))
        if all(not names or name in names for names, name in wanted):
            return rule.leaves
    return policy.otherwise


def plain_leaves(leaves: Leaves) -> object:
    if leaves.level is not Level.FIELDS:
        return leaves.level.name.lower()
    lists = {name: sorted(getattr(leaves, name)) for name in ("attributes", "edges", "vectors")}
    return {name: names for name, names in lists.items() if names} | {"text": leaves.text}


def plain_policy(policy: Policy) -> dict[str, Any]:
    rules = []
    for rule in policy.rules:
        lists = {"tenant": rule.tenants, "type": rule.types, "region": rule.regions}
        named: dict[str, Any] = {kind: sorted(names) for kind, names in lists.items() if names}
        rules.append(named | {"leaves": plain_leaves(rule.leaves)})
    return {"version": policy.version, "rules": rules, "otherwise": plain_leaves(policy.otherwise)}


# ── what both let out ───────────────────────────────────────────────────────────────────────────────────────


@given(LEAVES, LEAVES, LEAVES)
def test_what_all_let_out_does_not_depend_on_their_order(one: Leaves, two: Leaves, three: Leaves) -> None:
    assert one & two == two & one
    assert (one & two) & three == one & (two & three)
    assert one & one == one


@given(LEAVES)
def test_all_takes_nothing_away_and_nothing_leaves_nothing(leaves: Leaves) -> None:
    assert ALL & leaves == leaves
    assert NOTHING & leaves == NOTHING


@given(FIELDS)
def test_scores_are_stricter_than_any_fields(fields: Leaves) -> None:
    assert SCORES & fields == SCORES


@given(LEAVES, LEAVES, st.sampled_from((*NAMES, *RELATIONS)))
def test_both_tell_what_each_of_them_tells(one: Leaves, other: Leaves, name: str) -> None:
    def told(leaves: Leaves) -> tuple[bool, ...]:
        by_name = leaves.tells_attribute(name), leaves.tells_edges(name), leaves.tells_vectors(name)
        return (leaves.is_all, leaves.tells_scores, leaves.tells_fields, leaves.tells_text, *by_name)

    assert told(one & other) == tuple(a and b for a, b in zip(told(one), told(other), strict=True))


# ── rules ───────────────────────────────────────────────────────────────────────────────────────────────────


@given(POLICIES, ANY_TENANT, st.sampled_from(ALL_TYPES), ANY_REGION)
def test_the_first_rule_that_matches_decides(policy: Policy, tenant: str, type: str | None, region: str) -> None:
    assert policy.leaves(tenant, type, region) == first_match(policy, tenant, type, region)


@given(POLICIES, ANY_TENANT, ANY_REGION)
def test_a_policy_restricts_a_tenant_if_it_could_keep_back_data_of_some_type(
    policy: Policy, tenant: str, region: str
) -> None:
    told = [first_match(policy, tenant, type, region) for type in ALL_TYPES]
    assert policy.restricts(tenant, region) == any(leaves != ALL for leaves in told)
    assert policy.refuses(tenant, region) == all(leaves == NOTHING for leaves in told)


def test_data_without_a_type_matches_only_rules_that_name_no_type() -> None:
    policy = parse("{version: 1, rules: [{type: meter, leaves: nothing}, {region: north, leaves: scores}]}")
    assert policy.leaves("acme", None, "north") == SCORES
    assert policy.leaves("acme", None, "south") == ALL
    assert policy.leaves("acme", "meter", "north") == NOTHING


def test_of_an_entity_that_was_given_several_types_leaves_what_all_of_them_let_out() -> None:
    policy = parse("{version: 1, rules: [{type: bus, leaves: all}, {type: meter, leaves: scores}], otherwise: nothing}")
    for types, leaves in ({"bus"}, ALL), ({"bus", "meter"}, SCORES), ({"bus", "x"}, NOTHING), ((), NOTHING):
        assert policy.leaves_under("acme", types, "north") == leaves


def test_without_a_policy_all_may_leave() -> None:
    assert OPEN.leaves("acme", "meter", "north") is ALL
    assert not OPEN.restricts("acme", "north")
    assert not OPEN.refuses("acme", "north")


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=20, max_size=20))
def test_a_policy_remembers_no_more_than_its_rules_tell_apart(asked: list[tuple[str, str, str]]) -> None:
    policy = parse(EXAMPLE)
    for tenant, type, region in asked:
        policy.leaves(tenant, type, region)
    assert len(policy._tables) <= 4  # acme or not, in the north or not


# ── the text ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_policy_is_read_as_it_is_written() -> None:
    policy = parse(EXAMPLE)
    assert policy.version == 3
    assert policy.leaves("acme", "meter", "north") == NOTHING
    assert policy.leaves("acme", "meter", "south") == ALL
    assert policy.leaves("acme", "forecast", "south") == SCORES
    assert policy.leaves("zen", "transformer", "south") == TRANSFORMER
    assert policy.otherwise == ALL
    assert parse("version: 1") == Policy(version=1)


@given(POLICIES)
def test_a_policy_returns_from_yaml_and_from_json_as_it_was(policy: Policy) -> None:
    shadowed = any(
        earlier.takes_all_of(rule)
        for index, rule in enumerate((*policy.rules, Rule(leaves=policy.otherwise)))
        for earlier in policy.rules[:index]
    )
    for text in (yaml.safe_dump(plain_policy(policy)), json.dumps(plain_policy(policy), indent=1)):
        if shadowed:
            with pytest.raises(BadRequest, match="can never match"):
                parse(text)
        else:
            assert parse(text) == policy


def test_one_name_stands_for_a_list_of_one() -> None:
    assert parse("{version: 1, rules: [{tenant: a, leaves: all}]}") == parse(
        "{version: 1, rules: [{tenant: [a], leaves: all}]}"
    )


def test_json_may_spell_characters_as_escapes() -> None:
    policy = {"version": 1, "rules": [{"leaves": {"attributes": ["größe", "🔥"]}}]}
    assert parse(json.dumps(policy)).leaves("acme", None, "north") == Leaves(attributes=frozenset({"größe", "🔥"}))


@pytest.mark.parametrize(
    ("rules", "wrong"),
    [
        ("[{type: a, leaves: all}, {tennant: acme, leaves: nothing}]", "rule 2.*unknown key 'tennant'.*tenant"),
        ("[{leaves: nothing, leaves: all}]", "rule 1.*leaves is there twice"),
        ("[{type: meter}]", "rule 1.*does not say what leaves.*nothing, scores, all"),
        ("[{leaves: some}]", "rule 1.*leaves: unknown word 'some'.*nothing, scores, all"),
        ("[{leaves: 7}]", "rule 1.*leaves: expected nothing, scores, all.*not '7'"),
        ("[{leaves: null}]", "rule 1.*leaves: expected"),
        ("[{leaves: [kv]}]", "rule 1.*leaves: expected.*not a list"),
        ("[{leaves: {attribute: [kv]}}]", "rule 1.*leaves: unknown key 'attribute'.*attributes"),
        ("[{leaves: {attributes: all}}]", "rule 1.*leaves.attributes: expected a list of names, not 'all'"),
        ("[{leaves: {edges: []}}]", "rule 1.*leaves.edges: is an empty list"),
        ("[{leaves: {vectors: [a b]}}]", "rule 1.*leaves.vectors.*'a b'.*letters"),
        ("[{leaves: {text: 'true'}}]", "rule 1.*leaves.text: expected true or false, not 'true'"),
        ("[{leaves: {text: !!bool maybe}}]", "rule 1.*leaves.text: expected true or false"),
        ("[{tenant: [], leaves: all}]", "rule 1.*tenant: is an empty list"),
        ("[{tenant: 'acme*', leaves: all}]", r"rule 1.*tenant.*'acme\*'.*letters"),
        ("[{region: NO, leaves: all}]", "rule 1.*region: expected a name or a list of names, not 'NO'.*quotes"),
        ("[{type: , leaves: all}]", "rule 1.*type: expected a name or a list"),
        ("[{type: [a, [b]], leaves: all}]", "rule 1.*type: expected a name, not a list"),
        ("[{type: '', leaves: all}]", "rule 1.*type.*1 to 256 characters"),
        (f"[{{type: {'a' * 257}, leaves: all}}]", "rule 1.*type.*1 to 256 characters"),
        (r'[{type: "\ud800", leaves: all}]', "rule 1.*type.*not valid Unicode"),
        ("[{<<: {type: a}, leaves: all}]", "rule 1.*unknown key '<<'"),
        ("[{? [a] : b}]", "rule 1.*unknown key a list"),
        ("[!!map [a]]", "rule 1.*expected a map"),
        ("[nothing]", "rule 1.*expected a map.*not 'nothing'"),
        ("{type: meter, leaves: nothing}", "rules: expected a list of rules, not a map"),
        ("", "rules: expected a list of rules"),
    ],
)
def test_a_wrong_rule_is_told_by_its_number_with_what_was_expected(rules: str, wrong: str) -> None:
    with pytest.raises(BadRequest, match=wrong):
        parse(f"version: 1\nrules: {rules}")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "is empty"),
        ("rules: []", "no version"),
        ("all", "expected a map.*not 'all'"),
        ("version: 1\nversion: 2", "version is there twice"),
        ("version: 1\nrule: []", "unknown key 'rule'"),
        ("version: 1\notherwise: none", "otherwise: unknown word 'none'"),
        ("version: 1\n---\nversion: 2", "neither YAML nor JSON"),
        ("version: [", "neither YAML nor JSON"),
        ("version: \t1\n\t", "neither YAML nor JSON"),
        ('version: "\\U00110000"', "neither YAML nor JSON"),
        ("\x00", "neither YAML nor JSON"),
        ("[" * 10_000, "nested too deeply"),
        ("version: 1\nrules: &a [*a]", "rule 1.*expected a map"),
    ]
    + [
        (f"version: {version}", "version: expected a whole number from 1")
        for version in (
            "0",
            "-1",
            "03",
            "1.0",
            "'3'",
            "true",
            "0x1",
            "1_0",
            "1:30",
            "null",
            "[1]",
            "9" * 5000,
            "!!int x",
        )
    ],
)
def test_a_text_that_is_no_policy_is_told_why(text: str, wrong: str) -> None:
    with pytest.raises(BadRequest, match=wrong):
        parse(text)


@pytest.mark.parametrize(
    ("rules", "otherwise"),
    [
        ("[{leaves: all}, {tenant: acme, leaves: nothing}]", ""),
        ("[{type: [meter, bus], leaves: all}, {tenant: acme, type: bus, leaves: nothing}]", ""),
        ("[{type: meter, leaves: all}, {type: meter, leaves: nothing}]", ""),
        ("[{leaves: all}]", "otherwise: nothing"),
    ],
)
def test_a_rule_behind_one_that_takes_all_it_would_is_refused(rules: str, otherwise: str) -> None:
    with pytest.raises(BadRequest, match="can never match, because rule 1 takes all"):
        parse(f"version: 1\nrules: {rules}\n{otherwise}")


def test_an_exception_before_the_wider_rule_is_no_mistake() -> None:
    parse("{version: 1, rules: [{type: bus, leaves: all}, {type: [meter, bus], leaves: nothing}, {leaves: scores}]}")


@pytest.mark.parametrize(
    "text",
    [
        "#" * (LARGEST + 1),
        f"version: 1\nrules: [{'a,' * (MOST_RULES + 1)}]",
        f"version: 1\nrules: [{{type: [{'a,' * (MOST_NAMES + 1)}], leaves: all}}]",
    ],
)
def test_a_policy_beyond_the_limits_is_too_large(text: str) -> None:
    with pytest.raises(TooLarge):
        parse(text)


_yaml_scalars = SCALARS | st.floats() | st.binary(max_size=8) | st.datetimes() | st.dates()
_keys = TEXT | st.none() | st.booleans() | st.integers() | st.dates()
_yaml = st.recursive(
    _yaml_scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3), max_leaves=8
)
_words = st.sampled_from(["all", "nothing", "scores", "meter", "", True, 1, None, [], {}, ["a"], ["a", 1]]) | _yaml
_near_leaves = st.dictionaries(st.sampled_from(["attributes", "edges", "vectors", "text", "x"]), _words, max_size=4)
_near_rules = st.dictionaries(
    st.sampled_from(["tenant", "type", "region", "leaves", "x"]), _words | _near_leaves, max_size=4
)
_near_policies = st.fixed_dictionaries(
    {},
    optional={"version": st.just(1) | _yaml, "rules": st.lists(_near_rules | _yaml, max_size=3), "otherwise": _words},
)


@given(_yaml | _near_policies)
def test_no_object_can_do_worse_than_be_refused(value: object) -> None:
    with contextlib.suppress(BadRequest, TooLarge):
        assert isinstance(parse(yaml.safe_dump(value, allow_unicode=True)), Policy)


@given(st.text() | st.text("{}[]:,-&*!?|>#%@'\"\\ \n\tab10<=~", max_size=30), st.integers(0, len(EXAMPLE)))
def test_no_text_can_do_worse_than_be_refused(text: str, at: int) -> None:
    for tried in (text, EXAMPLE[:at] + text + EXAMPLE[at:]):
        with contextlib.suppress(BadRequest, TooLarge):
            parse(tried)


# ── events ──────────────────────────────────────────────────────────────────────────────────────────────────

MARK = "tell-no1"
"""What must stay. As long as two float32, so a vector can hold it, too."""

MARKED_VECTOR = np.frombuffer(MARK.encode(), "<f4")
FREE = np.ones(2, np.float32)
NAMED = Leaves(attributes=frozenset(NAMES), edges=frozenset(RELATIONS), vectors=frozenset(NAMES))

_marked = TEXT.map(lambda text: text + MARK)
_secret = nested(SCALARS | _marked) | _marked
_free_name, _free_relation = st.sampled_from(NAMES), st.sampled_from(RELATIONS)
_stray = st.dictionaries(_marked, _secret, max_size=1)
_edge_keys = st.builds(
    lambda key, stray: key | stray,
    st.fixed_dictionaries({"relation": _free_relation, "target_id": st.sampled_from(NAMES)})
    | st.fixed_dictionaries({"relation": _marked, "target_id": _marked}),
    _stray,
)
_edges = st.builds(
    lambda key, free, secret: key | {"properties": free if key["relation"] in RELATIONS else secret},
    _edge_keys,
    documents(SCALARS),
    documents(_marked),
)
_whole = st.fixed_dictionaries(
    {},
    optional={
        "type": _free_name,
        "attributes": st.dictionaries(_free_name, nested(SCALARS), max_size=2)
        | st.dictionaries(_marked, _secret, max_size=2),
        "edges": st.lists(_edges, max_size=3),
        "remove_edges": st.lists(_edge_keys, max_size=3),
        "vectors": st.dictionaries(_free_name, st.just(FREE))
        | st.dictionaries(_marked, st.sampled_from([FREE, MARKED_VECTOR])),
        "remove_vectors": st.lists(_free_name | _marked, max_size=3),
        "spaces": st.dictionaries(_free_name, st.just({"metric": "l2", "model": "m"}) | _stray | _secret)
        | st.dictionaries(_marked, st.just({"metric": "l2"}) | _stray),
        "text": _marked,
    },
)
_broken = st.dictionaries(
    st.sampled_from(["attributes", "edges", "remove_edges", "vectors", "remove_vectors", "spaces", "text"]),
    st.dictionaries(_marked, _secret) | st.lists(_secret) | _marked,
)
_bodies = st.builds(lambda whole, broken, stray: whole | broken | stray, _whole, st.just({}) | _broken, _stray)
_names_of_writes = _marked.map(lambda name: f"acme.ann.{name}") | _marked

MARKED = st.builds(
    Event,
    id=_names_of_writes,
    tenant=st.just("acme"),
    entity_id=st.just("pump"),
    op=st.sampled_from(("put", "put", "put", "forget")),
    agent=st.just("ann"),
    site=st.just("edge-1"),
    hlc=st.integers(0, 2**50),
    body=_bodies,
    valid_from=st.none() | st.integers(0, 2**40),
    valid_to=st.none() | st.integers(0, 2**40),
    extra=_stray,
)


@given(MARKED)
def test_nothing_that_is_protected_is_in_what_leaves(event: Event) -> None:
    assert MARK.encode() in event.encode()
    reduced = reduced_event(event, NAMED)
    if reduced is not None:
        assert MARK.encode() not in reduced.encode()
        assert decode_event(reduced.encode()).body.keys() == reduced.body.keys()


@given(EVENTS, LEAVES)
def test_no_event_can_do_worse_than_stay(event: Event, leaves: Leaves) -> None:
    reduced = reduced_event(event, leaves)
    if reduced is not None and not leaves.is_all:
        merge.patch_of(reduced)


@given(MARKED | EVENTS)
def test_under_all_an_event_leaves_as_it_is_and_under_nothing_and_scores_it_stays(event: Event) -> None:
    assert reduced_event(event, ALL) is event
    assert reduced_event(event, NOTHING) is None
    assert reduced_event(event, SCORES) is None


def unnamed(event: Event | None) -> bytes | None:
    """All of it but the id, as bytes: so vectors can be compared, too."""
    return None if event is None else msgspec.structs.replace(event, id="").encode()


@given(site_logs(), LEAVES, LEAVES)
def test_what_is_cut_down_twice_is_cut_down_to_what_both_let_out(
    logs: list[list[Event]], one: Leaves, other: Leaves
) -> None:
    for event in (event for log in logs for event in log):
        once = reduced_event(event, one)
        assert unnamed(once and reduced_event(once, other)) == unnamed(reduced_event(event, one & other))


@given(MARKED, FIELDS, FIELDS)
def test_that_holds_for_strange_events_too(event: Event, one: Leaves, other: Leaves) -> None:
    once = reduced_event(event, one)
    assert unnamed(once and reduced_event(once, other)) == unnamed(reduced_event(event, one & other))


def context_of(state: merge.State) -> messages.Context | None:
    document = state.document("pump", 1)
    if document is None:
        return None
    return messages.Context(**msgspec.structs.asdict(document), watermark={"hub": 1})


@given(st.data(), site_logs(), FIELDS)
def test_a_site_that_gets_the_reduced_events_knows_what_a_reduced_reply_would_tell(
    data: st.DataObject, logs: list[list[Event]], fields: Leaves
) -> None:
    log = data.draw(interleaved(logs))
    there = [reduced for event in log if (reduced := reduced_event(event, fields))]
    assert len(there) == len(log)
    here = context_of(merge.fold(changes(log)))
    assert context_of(merge.fold(changes(there))) == (here and reduced_context(here, fields))


def test_of_a_put_leaves_what_is_named() -> None:
    feeds = {"relation": "feeds", "target_id": "valve", "properties": {"n": 1}}
    owned = {"relation": "owned", "target_id": "ann"}
    event = put(
        valid_from=5,
        valid_to=9,
        extra={"mood": "calm"},
        type="transformer",
        attributes={"kv": 110, "name": None, "owner": "ann"},
        edges=[feeds, owned],
        remove_edges=[{"relation": "feeds", "target_id": "tank"}, owned],
        vectors={"shape": FREE, "habits": FREE},
        remove_vectors=["habits"],
        spaces={"shape": {"metric": "l2", "model": "m", "note": 1}, "habits": {"metric": "ip"}},
        text="hums",
        later=1,
    )
    reduced = reduced_event(event, TRANSFORMER)
    assert reduced is not None
    assert reduced.body == {
        "type": "transformer",
        "attributes": {"kv": 110, "name": None},
        "edges": [feeds],
        "remove_edges": [{"relation": "feeds", "target_id": "tank"}],
        "vectors": {"shape": FREE},
        "spaces": {"shape": {"metric": "l2", "model": "m"}},
    }
    assert not reduced.extra
    for name in ("tenant", "entity_id", "op", "agent", "site", "hlc", "valid_from", "valid_to", "schema"):
        assert getattr(reduced, name) == getattr(event, name)


@pytest.mark.parametrize("text", ["hums", ""])
def test_text_and_its_removal_leave_where_text_may(text: str) -> None:
    assert reduced_event(put(text=text), Leaves(text=True)).body == {"text": text}
    assert reduced_event(put(text=text), TRANSFORMER).body == {}


def test_a_put_of_unnamed_fields_still_tells_that_the_entity_is_there() -> None:
    history = [put(ms=10, attributes={"kv": 1}), forget(ms=20), put(ms=30, attributes={"owner": "ann"})]
    there = [reduced for event in history if (reduced := reduced_event(event, TRANSFORMER))]
    document = merge.fold(changes(there)).document("pump", 3)
    assert document is not None
    assert document.attributes == {}


def test_a_forget_leaves_with_nothing_but_itself() -> None:
    event = msgspec.structs.replace(forget(), body={"why": "asked"})
    reduced = reduced_event(event, TRANSFORMER)
    assert reduced is not None
    assert (reduced.op, reduced.entity_id, reduced.body) == ("forget", "pump", {})


def test_an_event_that_no_store_takes_does_not_leave_in_part() -> None:
    assert reduced_event(put(attributes={"kv": 1}, edges="all of them"), TRANSFORMER) is None


def test_an_id_tells_whose_write_it_was_and_not_how_it_was_named() -> None:
    named = [put(id=f"acme.ann.{name}") for name in ("order-7", "order-7.0", "order-8")]
    ids = [opaque_id(event) for event in named]
    assert len({*ids}) == 3
    assert ids == [opaque_id(event) for event in named]
    for event, told in zip(named, ids, strict=True):
        assert told.startswith("acme.ann.")
        assert "order" not in told
        reduced = reduced_event(event, TRANSFORMER)
        assert reduced is not None
        assert reduced.id == told


# ── replies ─────────────────────────────────────────────────────────────────────────────────────────────────

CONTEXT = messages.Context(
    entity_id="pump",
    type="transformer",
    attributes={"kv": 110, "owner": "ann"},
    edges=[
        {"relation": "feeds", "target_id": "valve", "properties": {"n": 1}},
        {"relation": "owned", "target_id": "ann"},
    ],
    spaces=["habits", "shape"],
    text="hums",
    version=7,
    watermark={"hub": 9},
    vectors={"habits": FREE, "shape": FREE},
)
HIT = messages.Hit(entity_id="pump", score=0.5, attributes={"kv": 110, "owner": "ann"}, vector=FREE)


def test_a_reply_tells_the_named_fields_of_an_entity() -> None:
    assert reduced_context(CONTEXT, TRANSFORMER) == messages.Context(
        entity_id="pump",
        type="transformer",
        attributes={"kv": 110},
        edges=CONTEXT.edges[:1],
        spaces=["shape"],
        version=7,
        watermark={"hub": 9},
        vectors={"shape": FREE},
    )
    assert reduced_context(CONTEXT, ALL) is CONTEXT
    assert reduced_context(CONTEXT, SCORES) is None
    assert reduced_context(CONTEXT, NOTHING) is None


def test_a_reply_without_vectors_stays_without() -> None:
    reduced = reduced_context(msgspec.structs.replace(CONTEXT, vectors=None), TRANSFORMER)
    assert reduced is not None
    assert reduced.vectors is None


def test_a_hit_tells_no_more_than_it_may() -> None:
    assert reduced_hit(HIT, ALL, "habits") is HIT
    assert reduced_hit(HIT, NOTHING, "shape") is None
    assert reduced_hit(HIT, SCORES, "shape") == messages.Hit(entity_id="pump", score=0.5)
    assert reduced_hit(HIT, TRANSFORMER, "shape") == msgspec.structs.replace(HIT, attributes={"kv": 110})
    for space in ("habits", None):
        reduced = reduced_hit(HIT, TRANSFORMER, space)
        assert reduced == messages.Hit(entity_id="pump", score=0.5, attributes={"kv": 110})


def test_a_search_considers_only_data_that_may_tell_what_it_asks_for() -> None:
    assert allows_search(TRANSFORMER, "transformer", ["kv", "name"])
    assert not allows_search(TRANSFORMER, None, ["kv", "owner"])
    assert allows_search(SCORES, None, [])
    assert not allows_search(SCORES, None, ["kv"])
    assert not allows_search(SCORES, "forecast", [])
    assert not allows_search(NOTHING, None, [])
    assert allows_search(ALL, "transformer", ["owner"])


@given(LEAVES, LEAVES, st.sampled_from([None, *NAMES]))
def test_hits_that_are_cut_down_twice_are_cut_down_to_what_both_let_out(
    one: Leaves, other: Leaves, space: str | None
) -> None:
    hit = msgspec.structs.replace(HIT, attributes=dict.fromkeys(NAMES, 1))
    once = reduced_hit(hit, one, space)
    twice = once and reduced_hit(once, other, space)
    assert repr(twice) == repr(reduced_hit(hit, one & other, space))
