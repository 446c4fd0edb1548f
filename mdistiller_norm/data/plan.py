"""The plan of an epoch: which sample stands where, and through which augmentation it goes.

Everything is a pure function of (seed, epoch), so a checkpoint needs no state of a random generator, and a run that
resumes, in mid-epoch too, sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class EpochPlan(NamedTuple):
    """One epoch of a data set of N samples.

    Attributes:
        order: ``[N]`` int64, a permutation of the samples.
        views: ``[N]`` int64, the augmentation of the sample at the same place of ``order``.
        key: 62-bit integer; step s of the epoch may draw randomness from ``key + s``.
    """

    order: Tensor
    views: Tensor
    key: int


def epoch_plan(seed: int, epoch: int, samples: int, views: int) -> EpochPlan:
    """The plan of that epoch (counted from 1); the same on every machine and device."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    order = torch.randperm(samples, generator=generator)
    names = torch.randint(views, (samples,), generator=generator)
    return EpochPlan(order, names, int(state[1] >> np.uint64(2)))
