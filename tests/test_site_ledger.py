"""The sites ledger, short enough for every run of the tests; `make site-ledger` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.site_ledger import run


@pytest.mark.timeout(600)
async def test_every_acknowledged_write_of_five_sites_is_on_all_of_them_once_and_they_hash_alike(
    tmp_path: Path,
) -> None:
    report = await run(tmp_path, writes=50_000, seed=1)
    assert not report.findings, str(report)
    assert report.writes >= 50_000
    assert {name.split()[0] for name in report.deeds} == {"cut", "kill"}
