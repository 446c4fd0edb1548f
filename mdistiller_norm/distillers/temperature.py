"""The temperature that softens logits: a constant, or a statistic of each sample's own logits.

``tau(z) = scale * statistic(z)``, one number a sample. KD, NormKD, DKD and their combinations differ in the statistic
and in the divergence taken of the softened logits, nothing else.

Source: Chi et al., "NormKD: Normalized Logits for Knowledge Distillation" (2023), Eq. 1-7, Tables 1, 6, 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import at_least_float32
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.registry import Registry
from mdistiller_norm.types import Softened

# A statistic at or below this counts as zero: the sample has no scale to be normalised by.
FLOOR = 1e-6

Statistic = Callable[[Tensor], Tensor]
STATISTICS: Registry[Statistic] = Registry("temperature statistic")


@STATISTICS.register("constant")
def constant(logits: Tensor) -> Tensor:
    """1 for every sample: the fixed temperature of Hinton et al. (2015)."""
    return torch.ones_like(logits[:, :1])


@STATISTICS.register("std")
def std(logits: Tensor) -> Tensor:
    """Unbiased standard deviation of a sample's logits (NormKD, Eq. 6). Exactly 0 for a constant row."""
    # Subtracting the maximum first is exact for a constant row at any magnitude, and well conditioned for the others.
    shifted = logits - logits.amax(1, keepdim=True).detach()
    variance = shifted.var(1, keepdim=True)
    # The square root's slope is infinite at 0: it must not see a zero, not even where the result is dropped.
    return variance.clamp_min(FLOOR**2).sqrt() * (variance > FLOOR**2)


@STATISTICS.register("max")
def maximum(logits: Tensor) -> Tensor:
    """Largest logit of a sample, V_max (Table 8). Not shift invariant; 0 where no logit is positive."""
    return logits.amax(1, keepdim=True).clamp_min(0)


@STATISTICS.register("range")
def value_range(logits: Tensor) -> Tensor:
    """Largest minus smallest logit of a sample, V_max - V_min (Table 8)."""
    return logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)


@dataclass(frozen=True)
class Temperature:
    """``tau(z) = scale * statistic(z)`` for each sample, and the softening it stands for.

    A sample whose statistic is zero (constant logits) has no temperature: it becomes the uniform distribution, with no
    gradient through its logits, and as a teacher it gets weight 0.

    Attributes:
        scale: T, T_norm or T_v. Several scales mean the average of the softened *probabilities* over them (Eq. 3).
        statistic: a name in ``STATISTICS``.
        compensate: weight each sample by the teacher's ``tau ** 2`` (``max(scale) ** 2`` with a constant statistic,
            Eq. 4). Off, every sample weighs ``max(scale) ** 2`` whatever its statistic (logit standardisation).

    Raises:
        ConfigError: an unknown statistic, or a scale that is not positive and finite.
    """

    scale: float | Sequence[float] = 4.0
    statistic: str = "constant"
    compensate: bool = True

    def __post_init__(self) -> None:
        STATISTICS[self.statistic]
        if not self.scales or any(not math.isfinite(scale) or scale <= 0 for scale in self.scales):
            raise ConfigError(f"a temperature must be positive and finite, not {self.scale!r}")

    @property
    def scales(self) -> tuple[float, ...]:
        """The scale or scales, as a tuple."""
        if isinstance(self.scale, Sequence):
            return tuple(float(scale) for scale in self.scale)
        return (float(self.scale),)

    def measure(self, logits: Tensor) -> Tensor:
        """The statistic of each sample, ``[B, 1]``, without the scale."""
        return STATISTICS[self.statistic](logits)

    def soften(self, student_logits: Tensor, teacher_logits: Tensor) -> Softened:
        """Divide both sides by their own temperatures.

        Args:
            student_logits: ``[B, C]``, any floating type; gradient flows through the student's statistic too.
            teacher_logits: ``[B, C]``.

        Returns:
            Both sides in at least float32 and the weight of each sample, ``[B]``.

        Raises:
            ValueError: shapes that differ, are not ``[B, C]``, or have fewer than two classes.
        """
        student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits)
        if student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"student logits are {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)}: "
                "they must have the same shape"
            )
        if student_logits.ndim != 2 or student_logits.shape[1] < 2:
            shape = tuple(student_logits.shape)
            raise ValueError(f"logits must be [batch, classes] with at least 2 classes, not {shape}")
        # Both sides at once: on a GPU the time of such small tensors is the number of operations.
        divided, statistics = self._divide(torch.cat([student_logits, teacher_logits]))
        (student, teacher), statistic = divided.chunk(2), statistics.chunk(2)[1]
        if not teacher_logits.requires_grad:
            teacher, statistic = teacher.detach(), statistic.detach()
        weight = max(self.scales) * (statistic if self.compensate else torch.ones_like(statistic))
        return Softened(student, teacher, (weight**2).squeeze(1))

    def _divide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits over their temperature (for several: log of the mean probability), and the statistic ``[B, 1]``."""
        if self.statistic == "constant":
            statistic, unit = constant(logits), logits
        else:
            statistic = self.measure(logits)
            usable = statistic > FLOOR
            statistic = statistic.where(usable, torch.zeros_like(statistic))
            divisor = statistic.where(usable, torch.full_like(statistic, torch.inf))
            # z / inf is the uniform distribution, and its gradient is zero.
            unit = (logits - logits.amax(1, keepdim=True).detach()) / divisor
        if len(self.scales) == 1:
            return unit / self.scales[0], statistic
        log_probabilities = torch.stack([(unit / scale).log_softmax(1) for scale in self.scales])
        return log_probabilities.logsumexp(0) - math.log(len(self.scales)), statistic
