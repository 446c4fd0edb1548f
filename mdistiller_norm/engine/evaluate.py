"""Accuracy and loss of a network over a test split."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller_norm.data import EvalLoader
from mdistiller_norm.distillers.base import Need, at_least_float32
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.runtime import keep_freed_memory
from mdistiller_norm.engine.teacher import folded
from mdistiller_norm.models.base import Network


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
        top1: percent of the samples whose largest logit is the target's.
        top5: percent whose target is among the five largest (all, with five classes or fewer).
        loss: mean cross entropy.
        samples: how many.
        images_per_second: over the whole evaluation.
        per_class: top-1 in percent of each class, ``[C]``; NaN for a class without samples.
    """

    top1: float
    top5: float
    loss: float
    samples: int
    images_per_second: float
    per_class: Tensor


@torch.inference_mode()
def evaluate(
    network: Network,
    loader: EvalLoader,
    autocast: torch.dtype | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Run a network over a split in eval mode (its mode is put back); waits for the device once, at the end.

    With several processes each runs over its share of the split, and all get the figures of the whole.

    Args:
        network: to evaluate.
        loader: batches of the split.
        autocast: the dtype of its passes, None for float32.
        forward: a faster form of ``network`` (a captured one). When not given, its batch norms are folded into its
            convolutions in float32, where it can be traced: equal up to rounding.
    """
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    classes = network.num_classes
    correct, seen = (torch.zeros(classes, dtype=torch.int64, device=device) for _ in range(2))
    in_top5 = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    start = time.perf_counter()
    run = forward or (_folded(network) if autocast is None else network)
    keep_freed_memory()
    for images, targets in loader:
        # No cache: a graph would be recorded with the copies of the weights that an earlier pass left there.
        with torch.autocast(device.type, autocast, enabled=autocast is not None, cache_enabled=False):
            logits = run(images)
        logits = at_least_float32(logits)
        ranked = logits.topk(min(5, classes), dim=1).indices == targets[:, None]
        correct.index_add_(0, targets, ranked[:, 0].long())
        seen.index_add_(0, targets, torch.ones_like(targets))
        in_top5 += ranked.sum()
        loss += F.cross_entropy(logits, targets, reduction="sum").double()
    correct, seen, in_top5, loss = (distributed.total(counted) for counted in (correct, seen, in_top5, loss))
    samples = int(seen.sum())
    top1, top5 = 100 * int(correct.sum()) / samples, 100 * int(in_top5) / samples
    rate = samples / (time.perf_counter() - start)
    network.train(was_training)
    per_class = (100 * correct.double() / seen.double()).cpu()
    return Evaluation(top1, top5, float(loss) / samples, samples, rate, per_class)


def _folded(network: Network) -> Callable[[Tensor], Tensor]:
    module = folded(network, Need.LOGITS)
    return lambda images: module(images).logits
