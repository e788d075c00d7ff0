"""`mnemesh bench`: runs a suite of `bench/`."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", default="core")
    parser.add_argument("--json", action="store_true")


def run(flags: argparse.Namespace) -> int:
    return 0
