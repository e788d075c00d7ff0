"""What the commands that set something from a file have alike: their verbs, and how the file is read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from mnemesh.errors import BadRequest


def add_verbs(
    parser: argparse.ArgumentParser, data: Path, abouts: Mapping[str, str]
) -> Mapping[str, argparse.ArgumentParser]:
    """The verbs, each with the site's folder; `set` takes a file."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for verb, about in abouts.items():
        command = verbs.add_parser(verb, help=about)
        command.add_argument("--data", type=Path, default=data, help="folder of the site (default: %(default)s)")
    verbs.choices["set"].add_argument("file", type=Path, help="YAML or JSON")
    return verbs.choices


def text_in(file: Path, what: str) -> str:
    """The text of a file. Raises `BadRequest` that says what cannot be read."""
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"cannot read the {what} {file}: {getattr(error, 'strerror', None) or error}") from error
