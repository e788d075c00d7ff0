"""The embedder without a model: the same text is the same vector everywhere, and alike texts are near each other."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemesh.embedding import embedder
from mnemesh.errors import BadRequest

HASHING = embedder("hashing:384")


def likeness(one: str, other: str) -> float:
    first, second = HASHING.embed([one, other])
    return float(first @ second)


@given(st.lists(st.text(max_size=60), max_size=5))
@settings(max_examples=60)
def test_any_text_becomes_a_vector_of_length_one_whatever_the_batch(texts: list[str]) -> None:
    vectors = HASHING.embed(texts)
    assert vectors.shape == (len(texts), HASHING.dimension)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for text, vector in zip(texts, vectors, strict=True):
        assert (HASHING.embed([text])[0] == vector).all()


def test_another_process_makes_the_same_vector() -> None:
    text = "Zürich 東京駅 🦆"
    program = f"from mnemesh.embedding import embedder as e; print(e('hashing:384').embed([{text!r}]).tobytes().hex())"
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True, env={"PYTHONHASHSEED": "7"}
    )
    assert bytes.fromhex(told.stdout) == HASHING.embed([text]).tobytes()


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("the transformer at bus seven is overheating", "overheated transformers, bus seven", "lunch is at noon today"),
        ("Die Straße ist gesperrt", "gesperrte STRASSE", "Wetter morgen sonnig"),
        ("東京駅は混雑しています", "混雑している東京駅", "今日は良い天気です"),
        ("Перегрев трансформатора", "трансформатор перегревается", "обед в полдень"),
    ],
)
def test_similar_texts_are_nearer_than_unrelated_ones(text: str, near: str, far: str) -> None:
    assert likeness(text, near) > likeness(text, far) + 0.1


def test_case_and_unicode_form_do_not_matter_and_order_hardly() -> None:
    assert likeness("CAFÉ", "cafe\u0301") == pytest.approx(1, abs=1e-5)
    assert likeness("one two", "two one") == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "name", ["hashing", "hashing:", "hashing:15", "hashing:4097", "hashing:-64", "hashing:6.4", "x:"]
)
def test_an_embedder_that_is_none_is_told_what_there_is(name: str) -> None:
    with pytest.raises(BadRequest, match="expected"):
        embedder(name)
