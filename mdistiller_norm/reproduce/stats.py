"""Means, spreads and paired comparisons over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from scipy import stats

ALIKE = 1e-6  # accuracies, in percent, that differ by rounding only
HOLDS, CONTRADICTED, UNDECIDED, UNTESTED = "holds", "does not hold", "not decided", "not tested yet"


class Spread(NamedTuple):
    """Some numbers in short.

    Attributes:
        n: how many.
        mean: of them.
        std: their sample standard deviation (n - 1); None for a single one.
    """

    n: int
    mean: float
    std: float | None


class Paired(NamedTuple):
    """A difference of two methods over the seeds that both have.

    Attributes:
        n: seeds.
        mean: difference.
        low: of the 95% interval of the mean by Student's t; None with fewer than 3 seeds, and where all differences are
            alike: a few test images make that a coincidence of their steps, and the interval would have no width.
        high: likewise.
    """

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """Whether the difference is above zero: it holds where the whole interval is, and is undecided without one."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return UNDECIDED
        return HOLDS if self.low > 0 else CONTRADICTED


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and standard deviation; None of nothing."""
    numbers = list(values)
    if not numbers:
        return None
    return Spread(len(numbers), statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Paired | None:
    """``first - second`` over common seeds; None where there is none."""
    differences = spread(first[seed] - second[seed] for seed in sorted(first.keys() & second.keys()))
    if not differences:
        return None
    if differences.n < 3 or differences.std is None or differences.std < ALIKE:
        return Paired(differences.n, differences.mean, None, None)
    half = float(stats.t.ppf(0.975, differences.n - 1)) * differences.std / differences.n**0.5
    return Paired(differences.n, differences.mean, differences.mean - half, differences.mean + half)


def plus_minus(numbers: Spread | None) -> str:
    """Mean ± std, to two decimals."""
    if numbers is None:
        return ""
    return f"{numbers.mean:.2f}" + (f" ± {numbers.std:.2f}" if numbers.std is not None else "")
