"""Accuracy and loss of a network on a test split."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mdistiller_norm.data import EvalLoader
from mdistiller_norm.distillers.base import Need
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.runtime import keep_freed_memory, progress
from mdistiller_norm.engine.teacher import folded
from mdistiller_norm.models.base import Network
from mdistiller_norm.types import at_least_float32


class Evaluation(NamedTuple):
    """Accuracies in percent and the mean cross entropy.

    ``per_class`` is the top-1 accuracy of each class ``[C]``, NaN for a class without samples.
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
    """Evaluate a network in eval mode. With several processes, each evaluates a share, and all return the whole.

    Args:
        autocast: dtype of the forward pass, None for float32.
        forward: captured form of ``network``. Defaults to ``network``, in float32 with folded batch norms.
    """
    network.eval()
    device = next(network.parameters()).device
    correct, seen = torch.zeros(2, network.num_classes, dtype=torch.int64, device=device)
    in_top5, loss = torch.zeros(2, dtype=torch.float64, device=device)
    start = time.perf_counter()
    if not forward:
        module = None if autocast else folded(network, Need.LOGITS)
        forward = (lambda images: module(images).logits) if module else network
    keep_freed_memory()
    batches = progress(loader, desc="evaluation", disable=not distributed.is_first())
    for images, targets in batches:
        # Without autocast's cache: a captured graph would keep the cached copies of old weights.
        with torch.autocast(device.type, autocast, enabled=bool(autocast), cache_enabled=False):
            logits = at_least_float32(forward(images))
        ranked = logits.topk(min(5, network.num_classes), dim=1).indices == targets[:, None]
        correct.index_add_(0, targets, ranked[:, 0].long())
        seen.index_add_(0, targets, torch.ones_like(targets))
        in_top5 += ranked.sum()
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double()
    correct, seen, in_top5, loss = map(distributed.all_reduce, (correct, seen, in_top5, loss))
    samples = int(seen.sum())
    top1, top5 = 100 * int(correct.sum()) / samples, 100 * int(in_top5) / samples
    rate = samples / (time.perf_counter() - start)
    per_class = (100 * correct.double() / seen).cpu()
    return Evaluation(top1, top5, float(loss) / samples, samples, rate, per_class)
