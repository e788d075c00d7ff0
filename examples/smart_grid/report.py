"""What came of it: figures, the tables, the picture. Looks at `agents`, `deciding`, `forecast` and `profiles`.

Whether a forecast was good is judged here, with the values that came, which no agent was shown.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.smart_grid.agents import STEPS, Decision
from examples.smart_grid.deciding import Run
from examples.smart_grid.forecast import HORIZON, Values, errors, naive
from examples.smart_grid.profiles import Days

NAMES = {
    "memory": "similar days (the mesh)",
    "last_week": "same hours last week",
    "yesterday": "same hours yesterday",
    "persistence": "persistence (last value held)",
}


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What the mesh was loaded with, and the seconds for reading, ingesting, and every shard catching up."""

    entities: int
    edges: int
    by_type: dict[str, int]
    read_s: float
    ingest_s: float
    catch_up_s: float


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds."""

    p50: float
    p95: float
    p99: float
    max: float


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """Mean over decisions, in percent of the mean load of the day before."""

    mae: float
    rmse: float


class Accounted(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the events that the agents of one substation wrote to its device, which holds `held` entities.

    `cut_s` is for how long its link was cut. The hub had all that was written until then `after_heal_s` later, and all
    there is `after_end_s` after the last decision; `None`: it was not waited for any longer. `lost` events were
    acknowledged at the device and the hub does not have them, `doubled` ones it has more than once. Of `compared`
    entities, device and hub say the same of `equal`.
    """

    site: str
    agents: int
    held: int
    decisions: int
    failed: dict[str, int]
    loop: Latency | None
    coverage: float | None
    cut_s: float | None
    loop_while_cut: Latency | None
    written: int
    written_while_cut: int
    after_heal_s: float | None
    after_end_s: float | None
    lost: int
    doubled: int
    equal: int
    compared: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The figures that `--json` prints. `better_than` is the share of decisions whose MAE beat that forecast's.

    `coverage` is the share of federated replies that spoke for all partitions; `truncated` the share of
    walks that reached `reach` before the end. A figure that no decision backs is `None` or absent.
    """

    grid: str
    agents: int
    days: int
    mornings: tuple[str, str] | None
    loaded: Loaded
    decisions: int
    failed: dict[str, int]
    asked_rate: float
    rate: float
    late: Latency | None
    steps: dict[str, Latency]
    loop: Latency | None
    error: dict[str, Error]
    better_than: dict[str, float]
    coverage: float | None
    truncated: float | None
    below: float | None
    watched: int
    substations: list[Accounted]
    picture: str | None


def summarise(
    grid: str, days: Days, loaded: Loaded, run: Run, substations: list[Accounted], *, picture: Path | None
) -> Report:
    """All figures of a run; the agents of substations are in `substations` alone."""
    decided = run.decided
    scored = _scores(days, decided)
    coverage = [part.complete for decision in decided for part in decision.coverage]
    mornings = sorted(decision.day for decision in decided)
    return Report(
        grid=grid,
        agents=len(days.subnets),
        days=len(days.dates),
        mornings=(mornings[0].isoformat(), mornings[-1].isoformat()) if mornings else None,
        loaded=loaded,
        decisions=len(decided),
        failed=dict(Counter(f"{failure.step}: {failure.code}" for failure in run.failed)),
        asked_rate=run.asked_rate,
        rate=len(decided) / run.took_s,
        late=latency(run.late),
        steps={step: _measured([decision.took[step] for decision in decided]) for step in STEPS if decided},
        loop=latency([sum(decision.took.values()) for decision in decided]),
        error={
            name: Error(mae=100 * float(values[:, 0].mean()), rmse=100 * float(values[:, 1].mean()))
            for name, values in scored.items()
        },
        better_than={
            name: float((scored["memory"][:, 0] < values[:, 0]).mean())
            for name, values in scored.items()
            if name != "memory"
        },
        coverage=float(np.mean(coverage)) if coverage else None,
        truncated=float(np.mean([decision.truncated for decision in decided])) if decided else None,
        below=float(np.mean([sum(decision.below.values()) for decision in decided])) if decided else None,
        watched=sum(decision.watch for decision in decided),
        substations=substations,
        picture=str(picture) if picture is not None and decided else None,
    )


def show(report: Report, console: Console) -> None:
    """One table: decisions, time per step and per loop, forecast error, coverage. Another for the substations."""
    loaded = report.loaded
    table = Table(
        title=f"{report.agents:,} agents on {report.grid}",
        caption=f"{loaded.entities:,} entities, {loaded.edges:,} edges, {report.days} days a subnet: "
        f"read {loaded.read_s:.1f} s, ingested {loaded.ingest_s:.1f} s, caught up {loaded.catch_up_s:.1f} s",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("p50", "p95", "p99", "max"):
        table.add_column(heading, justify="right")
    for step, latency in (*report.steps.items(), ("whole loop", report.loop), ("started late by", report.late)):
        if latency is not None:
            end = step == list(report.steps)[-1] if report.steps else False
            cells = (latency.p50, latency.p95, latency.p99, latency.max)
            table.add_row(step, *(f"{cell:.1f} ms" for cell in cells), end_section=end)
    table.add_section()
    table.add_row("forecast error, % of mean load", "MAE", "RMSE", "beaten in", "")
    for name, title in NAMES.items():
        if name in report.error:
            error = report.error[name]
            beaten = f"{report.better_than[name]:.0%}" if name in report.better_than else ""
            table.add_row(f"  {title}", f"{error.mae:.2f}", f"{error.rmse:.2f}", beaten, "")
    table.add_section()
    table.add_row("decisions", f"{report.decisions:,}", f"{report.rate:.0f} / s", "", f"of {report.asked_rate:.0f} / s")
    table.add_row("  of them to watch", f"{report.watched:,}")
    table.add_row("failed", f"{sum(report.failed.values()):,}", *_first(report.failed, 3))
    if report.coverage is not None and report.below is not None and report.truncated is not None:
        table.add_row("replies that cover all partitions", f"{report.coverage:.2%}")
        table.add_row("below a transformer", f"{report.below:.0f}", "entities", f"{report.truncated:.0%}", "cut off")
    console.print(table)
    if report.substations:
        console.print(_of_substations(report.substations))
    if report.picture is not None:
        console.print(f"picture: {report.picture}")


def _of_substations(told: list[Accounted]) -> Table:
    """The account: a column a substation."""
    table = Table(title=f"{len(told)} substations with a memory of their own", title_justify="left")
    table.add_column("")
    for one in told:
        table.add_column(one.site, justify="right")

    def row(name: str, cells: Iterable[str], *, end_section: bool = False) -> None:
        table.add_row(name, *cells, end_section=end_section)

    row("agents", (f"{one.agents}" for one in told))
    row("entities held", (f"{one.held:,}" for one in told), end_section=True)
    row("decisions", (f"{one.decisions:,}" for one in told))
    row("failed", (f"{sum(one.failed.values()):,}" for one in told))
    row("whole loop, p50, p99", (_p50_p99(one.loop) for one in told))
    row("  while cut", (_p50_p99(one.loop_while_cut) for one in told))
    row("complete replies", ("" if one.coverage is None else f"{one.coverage:.2%}" for one in told))
    row("link cut for", ("" if one.cut_s is None else f"{one.cut_s:.1f} s" for one in told), end_section=True)
    row("events written", (f"{one.written:,}" for one in told))
    row("  while cut", ("" if one.cut_s is None else f"{one.written_while_cut:,}" for one in told))
    row("  at the hub, after the heal", ("" if one.cut_s is None else _within(one.after_heal_s) for one in told))
    row("all at the hub, after the end", (_within(one.after_end_s) for one in told))
    row("lost", (f"{one.lost:,}" for one in told))
    row("doubled", (f"{one.doubled:,}" for one in told))
    row("entities of equal hash", (f"{one.equal} of {one.compared}" for one in told))
    return table


def _p50_p99(of: Latency | None) -> str:
    return "" if of is None else f"{of.p50:.0f}, {of.p99:.0f} ms"


def _within(seconds: float | None) -> str:
    return "not in time" if seconds is None else f"{seconds:.2f} s"


def as_json(report: Report) -> str:
    """The same figures as one JSON object, floats to four digits."""
    return json.dumps(_rounded(msgspec.to_builtins(report)))


def bars(console: Console) -> Progress:
    """Progress bars; give it a console on stderr where stdout carries JSON."""
    return Progress(
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=4,  # drawing holds the interpreter for a millisecond, which decisions would wait for
    )


def draw(days: Days, run: Run, path: Path) -> None:
    """The median decision by error, so neither the best nor the worst: what it knew, said, and what came."""
    if not run.decided:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mae = _scores(days, run.decided)["memory"][:, 0]
    decision = run.decided[int(np.argsort(mae)[len(mae) // 2])]
    error = float(np.sort(mae)[len(mae) // 2])
    agent = days.subnets.index(decision.subnet)
    came = days.day(agent, decision.day)[:HORIZON]
    others = naive(decision.ended, days.day(agent, decision.day - timedelta(days=7)))
    ahead = np.arange(HORIZON) / 4
    evening = ahead - HORIZON / 4

    figure = Figure(figsize=(11, 5.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axvspan(0, 6, color="#2563eb", alpha=0.05, linewidth=0)
    axes.axvline(0, color="#6b7280", linewidth=1)
    measured = np.concatenate([decision.ended[-HORIZON:], came])
    axes.plot(np.concatenate([evening, ahead]), measured, color="#111827", linewidth=2.2, label="measured")
    axes.plot(ahead, others["persistence"], color="#9ca3af", linestyle=":", linewidth=2, label="last value held")
    axes.plot(ahead, others["last_week"], color="#d97706", linestyle="--", linewidth=1.6, label="same hours last week")
    axes.plot(ahead, decision.forecast, color="#2563eb", linewidth=2.6, label="forecast from similar days")
    axes.set_title(
        f"Subnet {decision.subnet}, {decision.day:%A %d %B %Y}: six hours ahead from midnight\n"
        f"the median of {len(run.decided):,} decisions by error: off by {error:.1%} of mean load on average",
        loc="left",
    )
    axes.set_ylabel("demand in MW")
    axes.set_xlabel("local time; the agent decided at 00:00 and knew nothing later")
    axes.set_ylim(bottom=0)
    axes.set_xlim(-6, 6)
    hours = np.arange(-6, 7)
    axes.set_xticks(hours, [f"{hour % 24:02d}:00" for hour in hours])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _scores(days: Days, decided: list[Decision]) -> dict[str, Values]:
    """Each forecast's (MAE, RMSE) as shares of mean load, of shape (decisions, 2), by method."""
    scores: dict[str, list[tuple[float, float]]] = {}
    at = {subnet: n for n, subnet in enumerate(days.subnets)}
    for decision in decided:
        agent = at[decision.subnet]
        came = days.day(agent, decision.day)[:HORIZON]
        week_ago = days.day(agent, decision.day - timedelta(days=7))
        usual = float(decision.ended.mean())
        for name, forecast in {"memory": decision.forecast, **naive(decision.ended, week_ago)}.items():
            scores.setdefault(name, []).append(errors(forecast, came, usual=usual))
    return {name: np.array(values) for name, values in scores.items()}


def _measured(seconds: list[float]) -> Latency:
    p50, p95, p99, top = 1000 * np.percentile(seconds, [50, 95, 99, 100])
    return Latency(p50=float(p50), p95=float(p95), p99=float(p99), max=float(top))


def latency(seconds: list[float]) -> Latency | None:
    return _measured(seconds) if seconds else None


def _first(failed: dict[str, int], most: int) -> list[str]:
    """The commonest failures, as cells."""
    return [f"{count} {what}" for what, count in Counter(failed).most_common(most)]


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
