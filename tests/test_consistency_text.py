"""The text of a policy of consistency, and what follows from its rules for one read."""

from __future__ import annotations

import pytest

from memory_shards.demand import CLOSED, EVENTUAL, OPEN, STRONG, Rules
from mnemesh import Consistency
from mnemesh.errors import BadRequest, TooLarge
from services.consistency_text import parse


def bounded(lag_ms: int) -> Consistency:
    return Consistency(level="bounded", max_lag_ms=lag_ms)


# ── the text ────────────────────────────────────────────────────────────────────────────────────────────────────

WHOLE = """
otherwise: {level: bounded, max_lag_ms: 9000}
tenants:
  acme:
    otherwise: eventual
    types:
      reading: {level: bounded, max_lag_ms: 500}
      invoice: strong
      note: {level: eventual}
    access_control: [role, grant]
  zeta: {access_control: [role]}
"""


def test_a_policy_says_for_each_tenant_and_type_how_fresh_reads_must_be() -> None:
    policy = parse(WHOLE)
    assert policy.rules("acme") == Rules(
        otherwise=EVENTUAL,
        types={"reading": bounded(500), "invoice": STRONG, "note": EVENTUAL},
        access_control=frozenset({"role", "grant"}),
    )
    assert policy.rules("zeta") == Rules(otherwise=bounded(9000), access_control=frozenset({"role"}))
    assert policy.rules("nobody") == Rules(otherwise=bounded(9000))
    assert parse('{"tenants": {"acme": {"types": {"x": "strong"}}}}').rules("nobody") == OPEN


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the consistency policy is empty; expected a map of otherwise and tenants"),
        ("{}", "says nothing; expected otherwise, tenants or both"),
        ("- acme", "expected a map of otherwise, tenants, not a list"),
        ("tenant: {}", "unknown key 'tenant'; expected otherwise, tenants"),
        ("otherwise: fresh", "otherwise: unknown level 'fresh'; expected eventual, strong or"),
        ("otherwise: session", "otherwise: session needs a token, which only a request has; expected eventual"),
        ("otherwise: bounded", "otherwise: bounded does not say by how much; expected .*max_lag_ms: 500"),
        ("otherwise: {level: bounded}", "otherwise: bounded does not say by how much"),
        ("otherwise: {max_lag_ms: 5}", "otherwise: has no level"),
        ("otherwise: {level: session}", "session needs a token"),
        ("otherwise: {level: [strong]}", "unknown level a list"),
        ("otherwise: {level: strong, max_lag_ms: 5}", "max_lag_ms says nothing beside strong"),
        ("otherwise: {level: bounded, max_lag_ms: 0}", "max_lag_ms: expected a whole number from 1 to 86400000"),
        ("otherwise: {level: bounded, max_lag_ms: 86400001}", "expected a whole number from 1 to 86400000"),
        ("otherwise: {level: bounded, max_lag_ms: 0.5}", "not '0.5' .a YAML float"),
        ("otherwise: yes", "otherwise: expected eventual, strong or .*, not 'yes' .a YAML bool"),
        ("tenants: [acme]", "tenants: expected a map with each tenant's name, not a list"),
        ("tenants: {'a.b': {}}", "tenants: tenant .*'a.b'"),
        ("tenants: {acme: strong}", r"tenant acme \(line 1\): expected a map of otherwise, types, access_control"),
        ("tenants: {acme: {}, acme: {}}", "tenants: 'acme' is there twice"),
        ("tenants:\n  acme:\n    type: {}", r"tenant acme \(line 3\): unknown key 'type'"),
        ("tenants: {acme: {types: {x: strong, x: eventual}}}", "types: 'x' is there twice"),
        ("tenants: {acme: {types: {x: weak}}}", "type 'x': unknown level 'weak'"),
        ("tenants: {acme: {access_control: role}}", "access_control: expected a list of names, not 'role'"),
        ("tenants: {acme: {access_control: []}}", "access_control: is an empty list"),
        ("tenants: {acme: {types: {role: eventual}, access_control: [role]}}", "expected it in one of them"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_what_was_expected(text: str, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        parse(text)


def test_a_policy_has_bounds() -> None:
    with pytest.raises(TooLarge, match="at most 131072 characters"):
        parse("#" * 200_000)
    with pytest.raises(TooLarge, match="at most 1000"):
        parse("tenants: {acme: {types: {" + ", ".join(f"t{n}: strong" for n in range(1001)) + "}}}")


# ── the rules ───────────────────────────────────────────────────────────────────────────────────────────────────

TOKEN = {"hub": 7}
SESSION = Consistency(level="session", token=TOKEN)


def test_the_request_goes_before_the_rules_but_not_below_strong_for_access_control() -> None:
    rules = parse(WHOLE).rules("acme")
    assert rules.demand(None, ["note"]) == rules.demand(None, [None]) == rules.demand(None, ["other"]) == EVENTUAL
    assert rules.demand(None, ["reading", "note"]) == bounded(500)
    assert rules.demand(None, ["reading", "invoice"]) == STRONG
    assert rules.demand(EVENTUAL, ["invoice"]) == EVENTUAL
    assert rules.demand(SESSION, ["reading"]) == SESSION
    assert rules.demand(STRONG, ["note"]) == STRONG
    for asked in (None, EVENTUAL, bounded(9)):
        assert rules.demand(asked, ["role"]).level == rules.demand(asked).level == "strong"
    assert rules.demand(SESSION, ["note", "grant"]) == Consistency(level="strong", token=TOKEN)


def test_what_may_be_of_any_type_is_under_the_strictest_rule_of_the_tenant() -> None:
    assert Rules(otherwise=bounded(9), types={"a": bounded(3)}).demand(None) == bounded(3)
    assert Rules(otherwise=bounded(9), types={"a": EVENTUAL}).demand(None) == bounded(9)
    assert OPEN.demand(None) == EVENTUAL
    assert CLOSED.demand(EVENTUAL, ["a"]) == CLOSED.demand(None) == STRONG
