"""Named tuples of tensors that the packages exchange."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """Outputs of a network for a batch.

    Attributes:
        logits: ``[B, C]``.
        features: maps ``[B, D_i, H_i, W_i]`` after the stem and after every stage, shallow to deep.
        preacts: the same maps before their last activation (see the network for maps without one).
        pooled: ``[B, D]``, the input of the classifier.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    preacts: tuple[Tensor, ...]
    pooled: Tensor


class Batch(NamedTuple):
    """A training batch.

    Attributes:
        images: ``[B, 3, H, W]``, normalised.
        targets: ``[B]``, int64 class numbers.
        indices: ``[B]``, int64 positions of the samples in the training set.
        views: ``[B]``, int64 numbers of the augmentations of the images (-1 if the data set cannot number them).
        key: int64 scalar, a function of (seed, epoch, step): the only source of randomness in a step.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    views: Tensor
    key: Tensor


class Softened(NamedTuple):
    """Logits of student and teacher divided by their temperatures, in at least float32.

    Attributes:
        student: ``[B, C]``.
        teacher: ``[B, C]``.
        weight: ``[B]`` or a scalar, ``tau_t ** 2``, which restores the gradient scale (Hinton et al., 2015).
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor


class Losses(NamedTuple):
    """Losses of a step.

    Attributes:
        total: scalar to differentiate.
        parts: ``[1 + number of distillers]``: cross entropy, then each distillation loss, as weighted in the total.
        logits: ``[B, C]`` of the student, detached.
    """

    total: Tensor
    parts: Tensor
    logits: Tensor
