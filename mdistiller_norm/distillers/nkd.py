"""NKD: soft cross entropy of the target class, and of the other classes normalised without it.

Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
Loss and Customized Soft Labels" (ICCV 2023), and the authors' code (yzd-v/cls_KD, ``dis_losses/nkd.py``). Defaults: the
authors' CIFAR-100 file (ResNet34 -> ResNet18); their ImageNet files have gamma 1.5, temperature 1.
"""

from torch import Tensor

from mdistiller_norm.distillers.base import TargetDistiller, at_least_float32, register
from mdistiller_norm.distillers.dkd import split_target
from mdistiller_norm.distillers.temperature import soften


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    gamma: float = 3.5,
    temperature: float = 3.0,
) -> Tensor:
    """``-p_t[y] log p_s[y] - gamma * T^2 * sum over i != y of q_t[i] log q_s[i]``, averaged over the batch.

    Args:
        student_logits, teacher_logits: ``[B, C]``.
        targets: ``[B]``, int64 class indices y.
        temperature: T of q, the probabilities of the classes other than y among themselves; p has none.
    """
    softened = soften(student_logits, teacher_logits, temperature)
    _, others_s = split_target(softened.student, targets)
    _, others_t = split_target(softened.teacher, targets)
    chosen = targets[:, None]
    log_s = at_least_float32(student_logits).log_softmax(1).gather(1, chosen).squeeze(1)
    log_t = at_least_float32(teacher_logits).log_softmax(1).gather(1, chosen).squeeze(1)
    rest = softened.weight * (others_t.exp() * others_s).sum(1)
    return -(log_t.exp() * log_s + gamma * rest).mean()


@register("NKD")
class NKD(TargetDistiller):
    """Normalized knowledge distillation."""

    defaults = {
        "TEMPERATURE": 3.0,
        "GAMMA": 3.5,
        "WARMUP": 0,
        "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 1.0},
    }
    meanings = {"GAMMA": "weight of the non-target part"}
    loss = staticmethod(nkd_loss)
    arguments = {"gamma": "GAMMA", "temperature": "TEMPERATURE"}
