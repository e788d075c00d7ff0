"""The file that says what a device wants to hold: YAML or JSON, and whatever is wrong in it is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.interest import read_interest
from cli.main import main
from mnemesh.errors import BadRequest
from mnemesh.messages import Interest, Want

GOOD = [
    ("", Interest()),
    (
        "wants:\n  - {tenant: grid, types: [weather]}\nmost_entities: 5\n",
        Interest(wants=[Want(tenant="grid", types=["weather"])], most_entities=5),
    ),
    (
        '{"wants": [{"tenant": "grid", "entities": ["sub:7"], "hops": 2}]}',
        Interest(wants=[Want(tenant="grid", entities=["sub:7"], hops=2)]),
    ),
]

WRONG = [
    ("wants: [", "is no interest"),
    ("- tenant: grid", "Expected `object`, got `array`"),
    ("wants: [{types: [weather]}]", "missing required field `tenant`"),
    ("wants: [{tenant: grid, kinds: [weather]}]", "unknown field `kinds`"),
    ("wants: [{tenant: a.b}]", "tenant 'a.b' must be"),
    ("wants: [{tenant: grid, hops: 1}]", "want 1 has hops, but no entities"),
    ("most_bytes: -1", "Expected `int` >= 0"),
]


@pytest.mark.parametrize(("text", "interest"), GOOD)
def test_a_device_wants_what_its_file_says(tmp_path: Path, text: str, interest: Interest) -> None:
    file = tmp_path / "interest.yaml"
    file.write_text(text)
    assert read_interest(file) == interest


@pytest.mark.parametrize(("text", "says"), WRONG)
def test_what_is_wrong_in_an_interest_is_named(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "interest.yaml"
    file.write_text(text)
    with pytest.raises(BadRequest) as raised:
        read_interest(file)
    assert says in str(raised.value)
    assert str(file) in str(raised.value)


def test_a_device_does_not_start_with_an_interest_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--site", "a", "--hub", "nats://x", "--data", str(tmp_path), "--interest", str(tmp_path / "none.yaml")]
    assert main(["edge", "up", *flags]) == 1
    assert "cannot read the interest file" in capsys.readouterr().err
