"""What a view says: which text an entity has, which events may change it, and which files are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_merge import forget, put

from cli.main import main
from mnemesh.errors import BadRequest, TooLarge
from mnemesh.messages import Context
from services.view import LARGEST, View, decode_view, parse
from services.view_backlog import Backlog, Change

NOTES = """
name: notes
tenant: acme
type: note
attributes: [title, body]
space: notes
embedder: hashing:64
"""


def context(type: str | None = "note", **attributes: Any) -> Context:
    return Context(
        entity_id="e", type=type, attributes=attributes, edges=[], spaces=[], version=1, watermark={"hub": 1}
    )


def with_template(template: str) -> View:
    return parse(f"{NOTES}template: {template!r}\n")


def test_a_text_is_a_line_for_each_attribute_in_the_order_of_the_view() -> None:
    view = parse(NOTES)
    assert view.text_of(context(body="two", title="one", other="x")) == "title: one\nbody: two"
    assert view.text_of(context(title="one")) == "title: one"
    assert view.text_of(context(title={"a": [1, "é"]}, body=True)) == 'title: {"a": [1, "é"]}\nbody: true'


def test_an_entity_without_the_attributes_or_of_another_type_has_no_text() -> None:
    view = parse(NOTES)
    assert view.text_of(context(other="x")) is None
    assert view.text_of(context("bus", title="one")) is None
    assert view.text_of(context(None, title="one")) is None
    assert with_template("{title} {body}").text_of(context(title="", body=" ")) is None


def test_a_template_is_filled_in_once() -> None:
    view = with_template("{{{title}}} of {body}!")
    assert view.text_of(context(title="{body}", body="b")) == "{{body}} of b!"
    assert view.text_of(context(title="one")) == "{one} of !"


def test_a_view_is_moved_by_what_may_change_its_text_or_its_vector() -> None:
    view = parse(NOTES)
    moving = [
        put(attributes={"title": None}),
        put(type="note"),
        forget(),
        put(vectors={"notes": [1.0]}),
        put(remove_vectors=["notes"]),
    ]
    assert all(view.is_moved_by(event) for event in moving)
    strange = [put(attributes=5), put(attributes={"kv": 1}, text="t"), put(vectors="notes"), put(edges=[])]
    assert not any(view.is_moved_by(event) for event in strange)


def test_a_view_returns_from_its_bucket_as_it_was() -> None:
    view = with_template("{title}{body}")
    assert decode_view(view.encode()) == view
    assert decode_view(view.encode()).definition == view.definition != parse(NOTES).definition


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a view is a map of name, tenant"),
        ("[1]", "a view is a map of"),
        ("a: [", "neither YAML nor JSON"),
        ("{name: a}", "missing required field"),
        (NOTES + "name: b\n", "says name twice"),
        (NOTES + "removed: true\n", "'removed', which is nothing of a view"),
        (NOTES.replace("[title, body]", "[]"), "length >= 1"),
        (NOTES.replace("[title, body]", "title"), "Expected `array`"),
        (NOTES.replace("[title, body]", "[title, title]"), "title is there twice"),
        (NOTES.replace("name: notes", "name: a.b"), "view 'a.b' must be"),
        (NOTES.replace("space: notes", "space: a b"), "space 'a b' must be"),
        (NOTES.replace("hashing:64", "openai:x"), "no embedder 'openai:x'; expected one of hashing:"),
        (NOTES.replace("hashing:64", "hashing:9"), "from 16 to 4096"),
        (NOTES.replace("hashing:64", "hashing:many"), "from 16 to 4096"),
        (NOTES + 'template: "{title} {body} {kv}"\n', "{kv} is none of the attributes"),
        (NOTES + 'template: "{title}"\n', "does not use 'body'"),
        (NOTES + 'template: "{title} {body"\n', "a brace that belongs to none"),
        (NOTES + 'template: "{title!r} {body}"\n', "{title!r} is none of the attributes"),
    ],
)
def test_a_file_that_is_no_view_is_told_why(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadRequest) as told:
        parse(text)
    assert says in told.value.message
    (tmp_path / "view.yaml").write_text(text)
    assert main(["view", "set", str(tmp_path / "view.yaml"), "--data", str(tmp_path)]) == 1
    assert says in capsys.readouterr().err


def test_a_file_that_is_too_long_is_not_read() -> None:
    with pytest.raises(TooLarge, match="at most 16384 characters"):
        parse("#" * (LARGEST + 1))


async def test_the_place_of_a_backlog_is_before_all_that_is_to_be_done() -> None:
    backlog = Backlog(5)
    assert (backlog.place, backlog.since_ms) == (5, None)
    for entity_id, sequence in (("a", 6), ("b", 7), ("a", 9)):
        backlog.add(entity_id, Change(sequence, sequence, sequence * 10))
    backlog.read(12)
    assert (backlog.place, backlog.since_ms) == (5, 60)
    assert await backlog.take(1) == {"a": Change(6, 9, 60)}
    assert (backlog.place, backlog.since_ms) == (5, 60)
    backlog.add("a", Change(13, 13, 130))
    backlog.done({"a": Change(6, 9, 60, contested=True)})
    assert await backlog.take(9) == {"b": Change(7, 7, 70), "a": Change(6, 13, 60, contested=True)}
    backlog.done({})
    assert (backlog.place, backlog.since_ms) == (12, None)
    backlog.add("c", Change(14, 14, 140))
    backlog.settle("c")
    assert backlog.place == 12
