"""Where snapshots are: the site's Object Store, or a folder, S3 or GCS through `obstore`.

A target keeps contents under names that look like paths, and makes no promise about them: what comes back is compared
with a checksum by whoever asked. Looks at `settings` and `mnemesh`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from memory_shards.stores.urls import without_password
from mnemesh import objects, subjects
from mnemesh.errors import BadRequest, NotFound, Unavailable
from mnemesh.inbox import Inbox

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig

PATIENCE = timedelta(seconds=30)
"""How long a request to a bucket is tried again."""


class Target(Protocol):
    """Contents by name. Every call raises `Unavailable`, or another `MnemeshError`, where the target does not do it."""

    async def put(self, name: str, content: bytes) -> None:
        """Keep a content under a name, whole or not at all."""

    async def get(self, name: str) -> bytes:
        """The content under a name. Raises `NotFound`."""

    async def names(self, prefix: str) -> list[str]:
        """The names that begin with this, which ends in `/`, in order."""

    async def remove(self, names: Sequence[str]) -> None:
        """Forget contents; one that is not there is no error."""


def open_target(url: str, inbox: Inbox) -> Target:
    """The target that a URL of `settings` names. Raises `BadRequest` where it is no good."""
    if url == "nats:":
        return ObjectStoreTarget(inbox)
    try:
        from obstore import exceptions
        from obstore.store import LocalStore, from_url
    except ImportError as error:
        raise BadRequest(
            f"snapshots in {without_password(url)} need obstore: `pip install 'mnemesh-server[snapshots]'` brings it"
        ) from error
    try:
        if url.startswith("file:"):
            folder = Path(unquote(urlsplit(url).path))
            return BucketTarget(LocalStore(folder, mkdir=True, automatic_cleanup=True), url)
        retries: RetryConfig = {"max_retries": 5, "retry_timeout": PATIENCE}
        return BucketTarget(from_url(url, retry_config=retries), url)
    except (exceptions.BaseError, ValueError, OSError) as error:
        raise BadRequest(f"snapshots {without_password(url)}: {_first_line(error)}") from error


class ObjectStoreTarget:
    """The bucket of the site's own nats-server."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._bucket = subjects.SNAPSHOTS.name

    async def put(self, name: str, content: bytes) -> None:
        await objects.put(self._inbox, self._bucket, name, content)

    async def get(self, name: str) -> bytes:
        return await objects.get(self._inbox, self._bucket, name)

    async def names(self, prefix: str) -> list[str]:
        return [name for name in await objects.names(self._inbox, self._bucket) if name.startswith(prefix)]

    async def remove(self, names: Sequence[str]) -> None:
        for name in names:
            await objects.remove(self._inbox, self._bucket, name)


class BucketTarget:
    """What `obstore` has a store for."""

    def __init__(self, store: ObjectStore, url: str) -> None:
        self._store = store
        self._url = without_password(url)

    async def put(self, name: str, content: bytes) -> None:
        with self._converted():
            await self._store.put_async(name, content)

    async def get(self, name: str) -> bytes:
        with self._converted():
            result = await self._store.get_async(name)
            return bytes(await result.bytes_async())

    async def names(self, prefix: str) -> list[str]:
        with self._converted():
            return sorted([held["path"] async for page in self._store.list(prefix) for held in page])

    async def remove(self, names: Sequence[str]) -> None:
        for name in names:
            with contextlib.suppress(NotFound), self._converted():
                await self._store.delete_async(name)

    @contextlib.contextmanager
    def _converted(self) -> Iterator[None]:
        from obstore import exceptions

        try:
            yield
        except (FileNotFoundError, exceptions.NotFoundError) as error:
            raise NotFound(f"{self._url}: {_first_line(error)}") from error
        except (OSError, exceptions.BaseError) as error:
            raise Unavailable(f"{self._url}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
