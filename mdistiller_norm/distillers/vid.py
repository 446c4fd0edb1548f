"""VID: prediction of the teacher's maps with a learned variance for each channel.

Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer" (CVPR 2019): negative log likelihood
of a Gaussian with learned mean and variance, without its constant.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mdistiller_norm.distillers.base import Distiller, Need, Pair, loss_weights, register
from mdistiller_norm.distillers.common import match_stages, same_size
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs, at_least_float32


def vid_loss(mean: Tensor, f_t: Tensor, log_scale: Tensor, eps: float = 1e-5) -> Tensor:
    """``((mean - f_t)^2 / variance + log(variance)) / 2``, averaged over all elements; can be negative.

    Args:
        mean: predicted map of the teacher, ``[B, D, H, W]``.
        f_t: map of the teacher, of the same shape.
        log_scale: ``[D]``; the variance of a channel is ``softplus(log_scale) + eps``.
        eps: smallest variance.
    """
    variance = (nn.functional.softplus(at_least_float32(log_scale)) + eps).view(1, -1, 1, 1)
    error = at_least_float32(mean) - at_least_float32(f_t)
    return 0.5 * (error.square() / variance + variance.log()).mean()


def _regressor(channels: int, targets: int) -> nn.Sequential:
    convs = [nn.Conv2d(width, targets, 1, bias=False) for width in (channels, targets, targets)]
    return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])


@register("VID")
class VID(Distiller):
    """Variational information distillation of matched stages."""

    defaults = {
        "EPS": 1e-5,
        "INIT_PRED_VAR": 5.0,
        "INPUT_SIZE": [32, 32],
        "WARMUP": 0,
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0},
    }
    meanings = {"EPS": "smallest variance", "INIT_PRED_VAR": "initial variance of each channel"}
    need = Need.MAPS

    def __init__(
        self, channels: Sequence[tuple[int, int]], variance: float, eps: float, **weights: Any
    ) -> None:
        super().__init__(**weights)
        if not 0 < eps < variance:
            raise ConfigError(f"VID.EPS must be in (0, {variance}), VID.INIT_PRED_VAR, got {eps}")
        self.eps = eps
        # Inverse of softplus, without overflow and accurate for small variances.
        start = variance - eps
        start += math.log(-math.expm1(-start))
        self.regressors = nn.ModuleList(_regressor(s, t) for s, t in channels)
        self.log_scales = nn.ParameterList(torch.full((t,), start) for _, t in channels)

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> Self:
        stages = zip(*match_stages(pair.student.features, pair.teacher.features), strict=True)
        channels = [(s.shape[1], t.shape[1]) for s, t in stages]
        return cls(channels, node.INIT_PRED_VAR, node.EPS, **loss_weights(node))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        losses = []
        stages = match_stages(student.features, teacher.features)
        parts = zip(self.regressors, self.log_scales, *stages, strict=True)
        for regressor, log_scale, *maps in parts:
            s, t = same_size(*maps)
            losses.append(vid_loss(regressor(s), t, log_scale, self.eps))
        return torch.stack(losses).sum()
