"""A morning from the mornings that followed similar days, and how wrong a forecast was. Pure NumPy.

A day is compared by shape: its 96 values less their mean, over their deviation, so that cosine is correlation. What
followed a day is kept in that day's own scale and read back in the scale of the day that just ended: a
January morning can stand for a colder one. The forecast starts where the load is: the gap between the last value
measured and the similar days' own last values is closed over an hour.

Chosen offline on 1,120 subnets x 40 dates of 2016, by mean absolute error in % of mean load. Last week
and yesterday at the same hours are both off by 6.8, the last value held by 28:

    as it is (k 8, 12 weeks, same weekday)  5.5      k 5                          5.6
    levels in MW, not own scale             6.3      8 weeks, 16 weeks            5.6, 5.4
    any weekday                             5.6      gap never closed, half, two hours  5.8, 5.6, 5.8
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]

HORIZON = 24
"""Quarter-hours that an agent forecasts: six hours, from midnight."""

SETTLE = 4.0
"""Quarter-hours in which the gap to the last measured value falls to 1/e."""


def shape(days: Values) -> Values:
    """Days of shape (..., 96) centred and scaled to length 1. A flat day has no shape: it is all zeros."""
    centred = days - days.mean(axis=-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    unit: Values = (centred / np.where(length == 0, 1, length)).astype(np.float32)
    return unit


def in_own_scale(values: Values, days: Values) -> Values:
    """`values` (..., n) as deviations of `days` (..., 96): 0 is the day's mean, 1 its standard deviation."""
    scale = days.std(axis=-1, keepdims=True)
    own: Values = (values - days.mean(axis=-1, keepdims=True)) / np.where(scale == 0, 1, scale)
    return own


def from_similar(ended: Values, similar: Sequence[tuple[float, Mapping[str, Any]]]) -> Values:
    """The morning after `ended`, in MW, from (similarity, `last` and `next_morning` in own scale) of similar days.

    With no similar day at all it holds the last value.
    """
    if not similar:
        return np.full(HORIZON, ended[-1])
    weights = np.clip([score for score, _ in similar], 1e-6, None)
    weights /= weights.sum()
    mornings = np.array([day["next_morning"] for _, day in similar])
    lasts = np.array([day["last"] for _, day in similar])
    scale = float(ended.std()) or 1.0
    morning = weights @ mornings * scale + float(ended.mean())
    gap = float(ended[-1]) - (float(weights @ lasts) * scale + float(ended.mean()))
    ahead = np.arange(1, morning.size + 1)
    settled = morning + gap * np.exp(-ahead / SETTLE)
    return np.asarray(np.maximum(settled, 0.0), np.float32)


def naive(ended: Values, week_ago: Values) -> dict[str, Values]:
    """The forecasts to beat: the last value held, the same hours yesterday, the same hours a week ago."""
    return {
        "persistence": np.full(HORIZON, ended[-1]),
        "yesterday": ended[:HORIZON],
        "last_week": week_ago[:HORIZON],
    }


def errors(forecast: Values, came: Values, *, usual: float) -> tuple[float, float]:
    """Mean absolute and root mean square error, as shares of the `usual` load (the mean of the day before).

    Not MAPE, which divides by each value and explodes where a load is near zero.
    """
    off = forecast - came
    return float(np.abs(off).mean()) / usual, float(np.sqrt((off * off).mean())) / usual
