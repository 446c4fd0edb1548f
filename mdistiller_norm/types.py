"""Named tuples of tensors that the packages exchange, and their smallest precision."""

from typing import NamedTuple

import torch
from torch import Tensor


class Outputs(NamedTuple):
    """Outputs of a network for a batch."""

    logits: Tensor  # [B, C]
    features: tuple[Tensor, ...]  # maps [B, D_i, H_i, W_i] of stem and stages, shallow to deep
    preacts: tuple[Tensor, ...]  # the same maps before their last activation, if they have one
    pooled: Tensor  # [B, D], the input of the classifier


class Batch(NamedTuple):
    """A training batch."""

    images: Tensor  # [B, 3, H, W], normalised
    targets: Tensor  # [B], int64 class numbers, or [B, C], class probabilities
    indices: Tensor  # [B], int64 positions of the samples in the training set
    views: Tensor  # [B], int64 numbers of the images' augmentations (-1 if the data set cannot number them)
    key: Tensor  # int64 scalar, a function of (seed, epoch, step): the only source of randomness in a step


class Softened(NamedTuple):
    """Logits of student and teacher divided by their temperatures, in at least float32."""

    student: Tensor  # [B, C]
    teacher: Tensor  # [B, C]
    weight: Tensor  # [B] or a scalar, tau_t ** 2: restores the gradient's scale (Hinton, 2015)


class Losses(NamedTuple):
    """Losses of a step."""

    total: Tensor  # scalar to differentiate
    parts: Tensor  # [1 + number of distillers]: cross entropy, then each distillation loss, as weighted in the total
    logits: Tensor  # [B, C] of the student, detached


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; return float32 and float64 unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
