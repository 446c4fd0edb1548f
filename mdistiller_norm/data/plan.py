"""Order, augmentation and random key of an epoch, and each process's share of it.

All of it is a pure function of (seed, epoch, rank): checkpoints need no generator state.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def epoch_plan(seed: int, epoch: int, samples: int, views: int) -> tuple[Tensor, Tensor, int]:
    """Draw the random choices of an epoch (counted from 1). They are the same on every machine and device.

    Returns:
        The order of the samples, a permutation ``[N]`` int64; the view of the sample at the same position of the order,
        ``[N]`` int64; and a 62-bit key: step s of the epoch may draw randomness from ``key + s``.
    """
    state = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    order = torch.randperm(samples, generator=generator)
    drawn = torch.randint(views, (samples,), generator=generator)
    return order, drawn, int(state[1] >> np.uint64(2))


class Share(NamedTuple):
    """Rank of this process and the number of processes that train together."""

    rank: int = 0
    world: int = 1


ALONE = Share()


class Part(NamedTuple):
    """One process's part of a batch.

    Attributes:
        rows: positions in the epoch's order; never empty.
        weight: factor of the mean over these rows, such that the mean over all processes is the mean over the batch:
            1 if the batch divides evenly. It is 0 for a process without a sample, which gets a row of another one
            because every process must run the step.
        smallest: the smallest number of rows over all processes.
    """

    rows: slice
    weight: float
    smallest: int


def share_out(first: int, count: int, share: Share) -> Part:
    """Split ``count`` positions from ``first`` contiguously over the processes; sizes differ by at most one."""
    rank, world = share
    size, longer = divmod(count, world)
    start = first + rank * size + min(rank, longer)
    stop = start + size + (rank < longer)
    rows = slice(start, stop) if stop > start else slice(first, first + 1)
    return Part(rows, (stop - start) * world / count, max(size, 1))


def smallest_micro_batch(samples: int, batch_size: int, share: Share, accumulate: int) -> int:
    """Return the fewest samples of a micro-batch, over all steps and processes of an epoch."""
    full, last = min(samples, batch_size), samples % batch_size or batch_size
    parts = [share_out(0, count, share).smallest for count in (full, last)]
    return min(part // min(accumulate, part) for part in parts)


def eval_share(count: int, share: Share) -> range:
    """Return the test samples that this process evaluates, possibly none."""
    rank, world = share
    return range(rank * count // world, (rank + 1) * count // world)
