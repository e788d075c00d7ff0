"""Up to where other sites' logs are in this one, by the marks and by what came without one."""

from __future__ import annotations

import asyncio

import pytest

from memory_shards.origins import Origins
from mnemesh.origin import Mark


async def test_what_came_of_an_earlier_log_does_not_count_for_the_one_of_now_when_the_log_is_read_again() -> None:
    origins = Origins(may_go_back=False)
    origins.note("sub7", 900, Mark(incarnation="new", sequence=10))
    origins.note("sub7", 400, Mark(incarnation="old", sequence=5000))
    assert await origins.local("sub7", 10) == 900
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await origins.local("sub7", 11)
    assert origins.at(899, ["sub7"]) == {}
