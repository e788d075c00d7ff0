"""The ledger test, short enough for every run of the tests; `make ledger` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
from ledger import run


@pytest.mark.timeout(300)
async def test_every_acknowledged_write_is_there_once_whatever_was_killed_meanwhile(tmp_path: Path) -> None:
    report = await run(tmp_path, seconds=25, seed=1, writers=4)
    assert not report.findings, str(report)
    assert report.outcomes["acknowledged"] > 0
    assert report.deeds
