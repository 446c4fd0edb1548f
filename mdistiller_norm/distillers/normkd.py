"""NormKD and DKD+NormKD: KD and DKD with a temperature for each sample, the standard deviation of its logits.

Source: Chi et al., "NormKD: Normalized Logits for Knowledge Distillation" (2023), Eq. 5-7, Algorithm 1 and, for the
other statistics, Table 8. DKD+NormKD: section 4 and the published code.
"""

from torch import Tensor

from mdistiller_norm.distillers.base import LogitDistiller, TargetDistiller, register
from mdistiller_norm.distillers.dkd import DKD, decoupled_divergence
from mdistiller_norm.distillers.kd import kl_divergence
from mdistiller_norm.distillers.temperature import soften


def normkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    t_norm: float = 2.0,
    *,
    statistic: str = "std",
    weighting: str = "teacher",
) -> Tensor:
    """``(T_norm * sigma_t)^2 * KL(p_t || p_s)`` of logits divided by ``T_norm * sigma``, averaged over the batch.

    A sample with constant logits is uniform in the student and has weight 0 in the teacher.

    Args:
        student_logits, teacher_logits: ``[B, C]``. Gradients include the student's standard deviation.
        t_norm: T_norm (Eq. 6); the paper uses 2.0 for CIFAR-100 and 1.0 for ImageNet.
        statistic: ``std`` (unbiased), or ``max`` or ``range`` of Table 8.
        weighting: ``teacher`` as in the paper, or ``student_teacher`` for the weight ``T_norm^2 * sigma_s * sigma_t``
            (without a gradient), which keeps the gradient small while the student's logits are.
    """
    return kl_divergence(soften(student_logits, teacher_logits, t_norm, statistic, weighting))


def norm_dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    alpha: float,
    beta: float,
    t_norm: float = 2.0,
) -> Tensor:
    """``(T_norm * sigma_t)^2 * (alpha * TCKD + beta * NCKD)`` of logits divided by ``T_norm * sigma``, batch mean.

    Args:
        student_logits, teacher_logits: ``[B, C]``.
        targets: ``[B]``, int64 class indices.
    """
    softened = soften(student_logits, teacher_logits, t_norm, "std")
    return decoupled_divergence(softened, targets, alpha, beta)


@register("NormKD")
class NormKD(LogitDistiller):
    """KD with the temperature ``TEMPERATURE_NORM * STATISTIC(logits)`` for each sample and network."""

    defaults = {
        "TEMPERATURE_NORM": 2.0,
        "STATISTIC": "std",
        "WEIGHTING": "teacher",
        "WARMUP": 0,
        "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9},
    }
    meanings = {
        "TEMPERATURE_NORM": "T_norm; a temperature is T_norm times the statistic",
        "STATISTIC": "of the logits: std, max or range",
        "WEIGHTING": "teacher, or student_teacher: T_norm^2 times both statistics",
    }
    loss = staticmethod(normkd_loss)
    arguments = {"t_norm": "TEMPERATURE_NORM", "statistic": "STATISTIC", "weighting": "WEIGHTING"}


@register("NormKD_W_DKD")
class NormKDWithDKD(TargetDistiller):
    """DKD with NormKD's temperature."""

    # Configs of mdistiller's fork may contain LOSS, which is unused.
    defaults = {
        "TEMPERATURE_NORM": 2.0,
        "LOSS": {},
        "CE_WEIGHT": 1.0,
        "ALPHA": 1.0,
        "BETA": 8.0,
        "WARMUP": 20,
    }
    meanings = DKD.meanings | {"TEMPERATURE_NORM": "T_norm; a temperature is T_norm times std"}
    loss = staticmethod(norm_dkd_loss)
    arguments = {"alpha": "ALPHA", "beta": "BETA", "t_norm": "TEMPERATURE_NORM"}
