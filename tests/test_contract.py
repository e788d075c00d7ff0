"""The contract and everything that is generated from it agree; names travel through subjects unharmed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from cli import contract
from mnemesh import messages, subjects
from mnemesh.errors import BadRequest
from mnemesh.ids import LONGEST_TOKEN, PARTITIONS, check_name, from_token, partition_of, to_token

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300)


def test_the_generated_files_are_what_the_contract_says() -> None:
    assert contract.drifted() == []


@pytest.mark.parametrize("path", list(contract.FILES), ids=lambda path: path.name)
def test_a_generated_file_that_somebody_edited_is_found(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / path.name
    copy.write_text(path.read_text() + "# edited\n")
    monkeypatch.setattr(contract, "FILES", {copy: contract.FILES[path]})
    assert contract.drifted() == [copy]
    assert contract.generate() == [copy]
    assert contract.drifted() == []


def test_no_other_file_spells_a_subject() -> None:
    assert contract.spelled_elsewhere() == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("request: SetContext", "request: Nonsense", "no type Nonsense"),
        ("owner: gateway", "owner: janitor", "no role janitor"),
        ("memory.forget.<tenant>", "memory.forget.<landlord>", "no token landlord"),
    ],
)
def test_a_contract_that_names_what_does_not_exist_is_refused(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    source = tmp_path / "subjects.yaml"
    source.write_text(contract.SOURCE.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=complaint):
        contract.load(source)


def test_the_operation_table_holds_every_operation_with_its_types() -> None:
    declared = contract.load()["operations"]
    assert list(subjects.OPERATIONS) == list(declared)
    for name, operation in subjects.OPERATIONS.items():
        assert operation.request is getattr(messages, declared[name]["request"])
        assert operation.reply is getattr(messages, declared[name]["reply"])


def test_every_builder_fills_the_subject_that_its_operation_has() -> None:
    for name, operation in subjects.OPERATIONS.items():
        tokens = {token: f"the-{token}" for token in re.findall(r"<(\w+)>", operation.subject)}
        expected = re.sub(r"<(\w+)>", r"the-\1", operation.subject)
        assert getattr(subjects, name)(**tokens) == expected


def test_the_contract_and_python_agree_on_the_number_of_partitions() -> None:
    assert contract.load()["partitions"] == PARTITIONS


# ── AsyncAPI ────────────────────────────────────────────────────────────────────────────────────────────────────


def references(node: Any) -> list[str]:
    """Every `$ref` in a document."""
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [found for value in node.values() for found in references(value)]
    if isinstance(node, list):
        return [found for value in node for found in references(value)]
    return []


def test_every_reference_in_the_asyncapi_document_leads_somewhere() -> None:
    document = yaml.safe_load((contract.ROOT / "docs/asyncapi.yaml").read_text())
    found = references(document)
    assert found
    for reference in found:
        node = document
        for step in reference.removeprefix("#/").split("/"):
            assert step in node, f"{reference} leads nowhere"
            node = node[step]


def test_the_asyncapi_document_describes_every_operation_and_its_parameters() -> None:
    document = yaml.safe_load((contract.ROOT / "docs/asyncapi.yaml").read_text())
    assert document["asyncapi"] == "3.0.0"
    assert list(document["operations"]) == list(subjects.OPERATIONS)
    for channel in document["channels"].values():
        assert set(re.findall(r"\{(\w+)\}", channel["address"])) == set(channel["parameters"])


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(TEXT)
def test_any_id_becomes_one_safe_token_that_leads_back_to_it(text: str) -> None:
    token = to_token(text)
    assert re.fullmatch(r"[A-Za-z0-9_=-]+", token)
    assert len(token) <= LONGEST_TOKEN
    assert from_token(token) == (None if token.startswith("==") else text)


@given(TEXT, TEXT)
def test_different_ids_have_different_tokens(one: str, other: str) -> None:
    assume(one != other)
    assert to_token(one) != to_token(other)


@given(st.from_regex(r"[A-Za-z0-9_=-]{1,40}", fullmatch=True))
def test_a_token_is_either_the_only_one_of_its_id_or_refused(token: str) -> None:
    try:
        text = from_token(token)
    except BadRequest:
        return
    assert text is None or to_token(text) == token


@pytest.mark.parametrize("text", ["", "\ud800", "x" * 16_385])
def test_an_id_that_cannot_travel_is_a_bad_request(text: str) -> None:
    with pytest.raises(BadRequest):
        to_token(text)


@pytest.mark.parametrize("name", ["", "a.b", "a b", "*", ">", "$SYS", "ö", "x" * 65, "a\n"])
def test_a_name_that_is_not_plain_is_a_bad_request(name: str) -> None:
    with pytest.raises(BadRequest):
        check_name("agent", name)


@given(TEXT)
def test_an_entity_falls_into_one_of_the_partitions(text: str) -> None:
    assert 0 <= partition_of("acme", text) < PARTITIONS
