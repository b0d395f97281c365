"""Whether one method segments better than another: differences over the cases that both have segmented.

A mean over cases says little without its spread: two trainings of the same configuration differ by a Dice point. Cases are
paired, so that hard cases do not drown a difference; the interval is a bootstrap over cases, and the p value is that of Wilcoxon's
signed-rank test, adjusted by Holm's rule where several methods are compared with one baseline (Demsar 2006, JMLR 7:1-30).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import wilcoxon

RESAMPLES, AT_ONCE = 10_000, 500
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over cases and the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """Other minus baseline over the cases of both: number of cases, mean with its interval, how many cases are better and worse,
    and the two-sided p value (1 where no case differs)."""

    cases: int
    difference: Interval
    better: int
    worse: int
    p_value: float


def mean_interval(values: Float[np.ndarray, " n"], seed: int = 0) -> Interval:
    """Mean over cases and its percentile bootstrap interval; the same numbers for the same values."""
    values = np.asarray(values, float)
    if len(values) == 0:
        return Interval(*(float("nan"),) * 3)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=(AT_ONCE, len(values)))].mean(axis=1) for _ in range(RESAMPLES // AT_ONCE)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(baseline: Mapping[str, float], other: Mapping[str, float]) -> PairedDifference:
    """Compare two methods by a number per case, over the cases that both have a number (not NaN) for."""
    shared = [case for case in baseline if case in other and not np.isnan(baseline[case] + other[case])]
    differences = np.array([other[case] - baseline[case] for case in shared], float)
    differs = bool(np.any(differences != 0))
    return PairedDifference(
        len(shared), mean_interval(differences), int((differences > 0).sum()), int((differences < 0).sum()),
        float(wilcoxon(differences).pvalue) if differs else 1.0,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, so that the chance of any false finding among them stays below the level (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, float)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()
