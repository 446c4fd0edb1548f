"""The words that the packages exchange: named tuples of tensors, nothing else."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """What a network says of a batch, in one pass.

    Attributes:
        logits: ``[B, C]``.
        features: maps ``[B, D_i, H_i, W_i]``: the stem, then the end of every stage, shallow to deep.
        preacts: the same maps before their last activation (each family says where it has none).
        pooled: ``[B, D]``, the input of the classifier.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    preacts: tuple[Tensor, ...]
    pooled: Tensor


class Batch(NamedTuple):
    """What a distiller may know of a batch besides the two networks' outputs.

    Attributes:
        images: ``[B, 3, H, W]``, normalised.
        targets: ``[B]``, int64 class numbers.
        indices: ``[B]``, int64 positions of the samples in the training set.
        views: ``[B]``, int64 names of the augmentation each image went through (-1 where the data set cannot name it).
        key: int64 scalar, a pure function of (seed, epoch, step): the only source of randomness inside a step.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    views: Tensor
    key: Tensor


class Softened(NamedTuple):
    """Two sides' logits after division by their temperatures, in at least float32.

    Attributes:
        student: ``[B, C]``.
        teacher: ``[B, C]``.
        weight: ``[B]`` or a scalar: what gives the loss its gradient scale back, ``tau_t ** 2`` (Hinton et al., 2015).
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor


class Losses(NamedTuple):
    """The losses of one step.

    Attributes:
        total: scalar, what is differentiated.
        parts: ``[1 + number of distillers]``: cross entropy, then each distillation loss, as they enter the total
            (weighted and ramped).
        logits: ``[B, C]`` of the student, detached.
    """

    total: Tensor
    parts: Tensor
    logits: Tensor
