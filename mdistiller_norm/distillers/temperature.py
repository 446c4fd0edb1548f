"""Temperatures that soften logits: a constant, or a statistic of each sample's logits.

``tau(z) = scale * statistic(z)`` is one number per sample. KD, NormKD, DKD and their combinations differ only in the
statistic and in the divergence of the softened logits.

Source: Chi et al., "NormKD: Normalized Logits for Knowledge Distillation" (2023), Eq. 1-7, Tables 1, 6, 8.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.registry import Registry
from mdistiller_norm.types import Softened, at_least_float32

FLOOR = 1e-6  # smaller statistics count as zero: the sample has no temperature

Statistic = Callable[[Tensor], Tensor]
STATISTICS: Registry[Statistic] = Registry("temperature statistic")
WEIGHTINGS = ("teacher", "student_teacher", "none")


@STATISTICS.register("constant")
def constant(logits: Tensor) -> Tensor:
    """Return 1 for every sample (fixed temperature, Hinton et al., 2015)."""
    return torch.ones_like(logits[:, :1])


@STATISTICS.register("std")
def std(logits: Tensor) -> Tensor:
    """Return the unbiased standard deviation of each sample (NormKD, Eq. 6); exactly 0 for a constant row."""
    # The shift by the maximum is exact for a constant row of any magnitude.
    variance = (logits - logits.amax(1, keepdim=True).detach()).var(1, keepdim=True)
    # The gradient of sqrt is infinite at 0, even in a branch that is masked out.
    return variance.clamp_min(FLOOR**2).sqrt() * (variance > FLOOR**2)


@STATISTICS.register("max")
def maximum(logits: Tensor) -> Tensor:
    """Return the largest logit of each sample, V_max (Table 8); 0 if no logit is positive."""
    return logits.amax(1, keepdim=True).clamp_min(0)


@STATISTICS.register("range")
def value_range(logits: Tensor) -> Tensor:
    """Return the largest minus the smallest logit of each sample, V_max - V_min (Table 8)."""
    return logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)


def soften(
    student_logits: Tensor,
    teacher_logits: Tensor,
    scale: float | Sequence[float] = 4.0,
    statistic: str = "constant",
    weighting: str = "teacher",
) -> Softened:
    """Divide the logits of each network by ``tau(z) = scale * statistic(z)`` of each sample.

    A sample whose statistic is zero (constant logits) has no temperature: it becomes the uniform distribution without a
    gradient, and as a teacher it gets weight 0.

    Args:
        student_logits, teacher_logits: ``[B, C]``, any floating type. Gradients include the student's statistic.
        scale: T, T_norm or T_v. For several, the softened *probabilities* are averaged over them (Eq. 3).
        statistic: name of a statistic in ``STATISTICS``.
        weighting: weight of a sample. ``teacher``: the teacher's ``tau ** 2`` (for a constant ``max(scale) ** 2``, Eq.
            4); ``student_teacher``: the product of both ``tau``, without a gradient; ``none``: ``max(scale) ** 2`` for
            every sample (logit standardization).

    Returns:
        Softened logits in at least float32 and the weight of each sample, ``[B]``.

    Raises:
        ConfigError: the statistic or the weighting is unknown, or a scale is not positive and finite.
        ValueError: the shapes differ or are not ``[B, C]`` with at least 2 classes.
    """
    scales = tuple(scale) if isinstance(scale, Sequence) else (scale,)
    if weighting not in WEIGHTINGS:
        raise ConfigError(f"WEIGHTING must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if not scales or not all(0 < each < math.inf for each in scales):
        raise ConfigError(f"the temperature must be positive and finite, got {scale!r}")
    shapes = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] < 2:
        raise ValueError(f"logits must be of the same shape [B, C] with C >= 2, got {shapes}")
    # One pass over both: on a GPU, the cost of tensors this small is the number of operations.
    both = at_least_float32(student_logits), at_least_float32(teacher_logits)
    divided, statistics = _divide(torch.cat(both), scales, statistic)
    (student, teacher), (measured_s, measured_t) = divided.chunk(2), statistics.chunk(2)
    if not teacher_logits.requires_grad:
        teacher, measured_t = teacher.detach(), measured_t.detach()
    if weighting == "none":
        measured_t = torch.ones_like(measured_t)
    elif weighting == "student_teacher":
        measured_t = (measured_s * measured_t).detach().sqrt()
    return Softened(student, teacher, ((max(scales) * measured_t) ** 2).squeeze(1))


def _divide(logits: Tensor, scales: Sequence[float], statistic: str) -> tuple[Tensor, Tensor]:
    """Return the softened logits (for several scales, the log of the mean probability) and the statistic."""
    measured, unit = STATISTICS[statistic](logits), logits
    if statistic != "constant":
        usable = measured > FLOOR
        measured = measured.where(usable, torch.zeros_like(measured))
        # Logits divided by infinity are the uniform distribution, and their gradient is zero.
        divisor = measured.where(usable, torch.full_like(measured, torch.inf))
        unit = (logits - logits.amax(1, keepdim=True).detach()) / divisor
    if len(scales) == 1:
        return unit / scales[0], measured
    log_probabilities = torch.stack([(unit / scale).log_softmax(1) for scale in scales])
    return log_probabilities.logsumexp(0) - math.log(len(scales)), measured
