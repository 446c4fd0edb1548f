"""Means, standard deviations and paired differences over seeds, and their text in reports."""

import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mdistiller_norm.errors import needs_extra

HOLDS, CONTRADICTED, UNDECIDED, UNTESTED = "holds", "does not hold", "not decided", "not tested"
MINUS = "\N{MINUS SIGN}"


def signed(value: float) -> str:
    """Return a difference with its sign and two decimals."""
    text = f"{value:+.2f}"
    return "±0.00" if text in ("+0.00", "-0.00") else text.replace("-", MINUS)


class MeanStd(NamedTuple):
    """Mean and sample standard deviation of ``n`` values; ``std`` is None for a single value."""

    n: int
    mean: float
    std: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.std is not None else "")


class PairedDifference(NamedTuple):
    """Mean difference over ``n`` common seeds with the 95% interval of the mean by Student's t.

    The interval is None with fewer than 3 seeds, and if all differences are equal, a coincidence on a small test set.
    """

    n: int
    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return UNDECIDED
        return HOLDS if self.low > 0 else CONTRADICTED

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            reason = (
                "no interval with fewer than 3 seeds" if self.n < 3 else "identical in all seeds"
            )
            return f"{signed(self.mean)} (n = {self.n}, {reason})"
        return f"{signed(self.mean)} [{signed(self.low)}, {signed(self.high)}] (n = {self.n})"


def mean_std(values: Iterable[float]) -> MeanStd | None:
    """Return mean and sample standard deviation, or None if there are no values."""
    if not (numbers := list(values)):
        return None
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return MeanStd(len(numbers), statistics.fmean(numbers), std)


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float]
) -> PairedDifference | None:
    """Return ``first - second`` over the common seeds, or None if there is no common seed."""
    if not (result := mean_std(first[seed] - second[seed] for seed in first if seed in second)):
        return None
    n, mean, std = result
    if n < 3 or std is None or std < 1e-6:  # rounding errors of percentages
        return PairedDifference(n, mean)
    with needs_extra("report", "a confidence interval"):
        from scipy import stats
    half = float(stats.t.ppf(0.975, n - 1)) * std / n**0.5
    return PairedDifference(n, mean, mean - half, mean + half)
