"""What a shard measures of itself, for Prometheus. Looks at `stores`, `intake`, `snapshots` and `mnemesh`."""

from __future__ import annotations

from memory_shards.intake import Intake
from memory_shards.snapshots.keeper import Snapshots
from memory_shards.stores.by_url import Stores
from mnemesh.stats import Gauge


def gauges_of(stores: Stores, intake: Intake, snapshots: Snapshots | None) -> list[Gauge]:
    """Those of a shard that is prepared."""
    gauges = [Gauge("undecodable_events", "Events of the log that could not be read", lambda: intake.undecodable)]
    gauges += [
        Gauge(
            "quarantined_events",
            "Events that are stamped too far ahead and have no effect",
            lambda count=count: count,  # type: ignore[misc]
            {"site": site},
        )
        for site, count in stores.documents.quarantined.items()
    ]
    for projection in stores.projections:
        gauges.append(
            Gauge(
                f"{projection.name}_watermark",
                f"Last log sequence applied to the {projection.name}",
                lambda projection=projection: projection.watermark.value,  # type: ignore[misc]
            )
        )
        gauges.append(
            Gauge(
                f"{projection.name}_applied",
                f"Events applied to the {projection.name} since the start",
                lambda projection=projection: projection.applied,  # type: ignore[misc]
            )
        )
    if snapshots is not None:
        gauges += snapshots.gauges()
    gauges += [
        Gauge(
            f"{outside.name}_breaker_open",
            f"1 while the store of the {outside.name} does not answer",
            lambda outside=outside: int(outside.breaker.is_open),  # type: ignore[misc]
        )
        for outside in stores.outside
    ]
    return gauges
