"""The flags that say where shards keep what, of whoever starts some: `mnemesh up` and `mnemesh run shard`."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields

from memory_shards.snapshots.settings import KNOWN as KNOWN_TARGETS
from memory_shards.snapshots.settings import SnapshotSettings, seconds_of
from memory_shards.stores.urls import KNOWN, StoreUrls, environment


def add_flags(parser: argparse.ArgumentParser) -> None:
    _add_store_flags(parser)
    _add_snapshot_flags(parser)


def _add_store_flags(parser: argparse.ArgumentParser) -> None:
    """Where the shards keep what."""
    for field in fields(StoreUrls):
        parser.add_argument(
            f"--{field.name}",
            metavar="URL",
            default=os.environ.get(environment(field.name), field.default),
            help=f"store of the {field.name}: {' '.join(KNOWN[field.name])} (default: ${environment(field.name)}, "
            f"else {field.default})",
        )


def _add_snapshot_flags(parser: argparse.ArgumentParser) -> None:
    """Where the shards' snapshots go, and how often."""
    target, every = environment("snapshots"), environment("snapshot_every")
    parser.add_argument(
        "--snapshots",
        metavar="URL",
        default=os.environ.get(target, ""),
        help=f"where snapshots of the shards go: {' '.join(KNOWN_TARGETS)} (default: ${target}, else nowhere)",
    )
    parser.add_argument(
        "--snapshot-every",
        metavar="TIME",
        default=os.environ.get(every, "1h"),
        help=f"how often each shard takes one, such as 30m or 1h (default: ${every}, else 1h)",
    )


def snapshots(flags: argparse.Namespace) -> SnapshotSettings:
    """What the flags say of snapshots. Raises `BadRequest`."""
    return SnapshotSettings(url=flags.snapshots, every_s=seconds_of(flags.snapshot_every))


def stores(flags: argparse.Namespace) -> StoreUrls:
    """The stores that the flags name. Raises `BadRequest`."""
    return StoreUrls(**{field.name: getattr(flags, field.name) for field in fields(StoreUrls)})
