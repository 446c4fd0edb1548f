"""MixUp and CutMix as one operation: inside a box, images are blended with the next images of the batch.

Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018); Yun et al., "CutMix: Regularization Strategy
to Train Strong Classifiers with Localizable Features" (2019).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mdistiller_norm.data.base import Tensors, TrainLoader
from mdistiller_norm.types import Batch


class MixedLoader(TrainLoader):
    """Mixed batches of another loader, with class probabilities ``[B, C]`` as targets.

    Box and weight of a batch are a function of (seed, epoch, step, rank).

    Args:
        mixup: parameter of the symmetric beta distribution of MixUp's weights; 0 for no MixUp.
        cutmix: the same for CutMix. With both, each batch uses one of them with equal probability.
    """

    def __init__(
        self, loader: TrainLoader, mixup: float, cutmix: float, classes: int, device: torch.device
    ) -> None:
        super().__init__(loader.samples, loader.global_batch_size, loader.seed, loader.share)
        self.on_device = loader.on_device
        self._loader, self._alphas = loader, (mixup, cutmix)
        self._classes, self._device = classes, device

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Tensors]:
        drawn = self._draw(epoch).to(self._device)
        for step, raw in enumerate(self._loader.batches(epoch, first_step), first_step):
            yield *raw, drawn[step]

    def prepare(self, *raw: Tensor) -> Batch:
        return mix(self._loader.prepare(*raw[:-1]), raw[-1], self._classes)

    def _draw(self, epoch: int) -> Tensor:
        random = np.random.default_rng([self.seed, epoch, self.share.rank, 1])
        mixup, cutmix = self._alphas
        cut = random.random(self.steps) < (cutmix > 0) / ((mixup > 0) + (cutmix > 0))
        alpha = np.where(cut, cutmix, mixup)
        kept = random.beta(alpha, alpha)
        centre, half = random.random((2, self.steps)), np.sqrt(1 - kept) / 2
        low, high = np.where(cut, centre - half, 0), np.where(cut, centre + half, 1)
        return torch.from_numpy(np.stack([*low, *high, np.where(cut, 0, kept)], 1)).float()


def mix(batch: Batch, drawn: Tensor, classes: int) -> Batch:
    """Blend each image ``[3, H, W]`` with the next one of the batch, and their targets ``[B, C]`` in proportion.

    ``drawn`` are top, left, bottom and right of a box as fractions of the image, and the weight of an image in the box.
    """
    height, width = batch.images.shape[2:]
    top, left, bottom, right, weight = drawn
    y = torch.arange(height, device=drawn.device)[:, None]
    x = torch.arange(width, device=drawn.device)
    inside = (
        (y >= top * height) & (y < bottom * height) & (x >= left * width) & (x < right * width)
    )
    weights = torch.where(inside, weight, 1.0)
    targets = torch.nn.functional.one_hot(batch.targets, classes).to(weights)
    images = batch.images.roll(1, 0).lerp(batch.images, weights.to(batch.images))
    return batch._replace(images=images, targets=targets.roll(1, 0).lerp(targets, weights.mean()))
