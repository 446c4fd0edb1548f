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


class Share(NamedTuple):
    """One of the processes that train together.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1


ALONE = Share()


class Part(NamedTuple):
    """What one process has of a batch.

    Attributes:
        rows: places in the epoch's order; never empty.
        weight: what the mean over these rows is multiplied by so that the mean over all processes is the mean over the
            batch: 1 where the batch divides evenly. 0 where there is no sample for this process: its one row is then
            another's, to have something to run on.
        smallest: the fewest rows that any process has.
    """

    rows: slice
    weight: float
    smallest: int


def share_out(first: int, count: int, share: Share) -> Part:
    """Split ``count`` places from ``first`` on over the processes, contiguously, sizes differing by at most one."""
    rank, world = share
    size, longer = divmod(count, world)
    start = first + rank * size + min(rank, longer)
    stop = start + size + (rank < longer)
    weight = (stop - start) * world / count
    rows = slice(start, stop) if stop > start else slice(first, first + 1)
    return Part(rows, weight, max(size, 1))


def eval_share(count: int, share: Share) -> range:
    """The test samples that this process evaluates; possibly none."""
    rank, world = share
    return range(rank * count // world, (rank + 1) * count // world)
