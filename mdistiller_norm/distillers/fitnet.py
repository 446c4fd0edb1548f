"""FitNet: regression of one map of the student onto one map of the teacher.

Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), Eq. 3.
"""

from typing import Any, Self

from torch import Tensor, nn

from mdistiller_norm.distillers.base import Distiller, Need, Pair, loss_weights, register
from mdistiller_norm.distillers.common import BatchNorm
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs, at_least_float32


def hint_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Mean squared difference of a regressed map of the student and a map of the teacher of equal shape."""
    return nn.functional.mse_loss(at_least_float32(f_s), at_least_float32(f_t))


def make_regressor(student: Tensor, teacher: Tensor) -> nn.Sequential:
    """Create convolution, batch norm and ReLU that map the student's map to the shape of the teacher's.

    The kernel is 1x1 for equal sizes, 3x3 with stride 2 if the student's map is twice as large, a transposed 4x4 with
    stride 2 if it is half as large, and covers the difference if it is larger by another factor.

    Args:
        student, teacher: ``[B, D, H, W]``, used for their shapes only.

    Raises:
        ConfigError: the student's map is smaller, and not by half.
    """
    (channels, *source), (hints, *target) = student.shape[1:], teacher.shape[1:]
    if source == [2 * side for side in target]:
        convolution: nn.Module = nn.Conv2d(channels, hints, 3, stride=2, padding=1)
    elif [2 * side for side in source] == target:
        convolution = nn.ConvTranspose2d(channels, hints, 4, stride=2, padding=1)
    elif source[0] >= target[0] and source[1] >= target[1]:
        size = source[0] - target[0] + 1, source[1] - target[1] + 1
        convolution = nn.Conv2d(channels, hints, size)
    else:
        raise ConfigError(f"HINT_LAYER: size {source} is too small for {target}: choose another")
    return nn.Sequential(convolution, BatchNorm(hints), nn.ReLU())


@register("FITNET")
class FitNet(Distiller):
    """Regression of one map of the student onto one map of the teacher."""

    defaults = {
        "HINT_LAYER": 2,
        "INPUT_SIZE": [32, 32],
        "WARMUP": 0,
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 100.0},
    }
    meanings = {"HINT_LAYER": "map of the teacher; 0 is the stem"}
    need = Need.MAPS

    def __init__(self, regressor: nn.Module, layer: int, **weights: Any) -> None:
        super().__init__(**weights)
        self.regressor, self.layer = regressor, layer  # negative: counted from the end

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> Self:
        students, teachers = pair.student.features, pair.teacher.features
        # HINT_LAYER counts the teacher's maps from the stem, 0; the student's map is as far from its end.
        first, last = max(len(teachers) - len(students), 0), len(teachers) - 1
        if not first <= node.HINT_LAYER <= last:
            raise ConfigError(f"HINT_LAYER must be in {first}..{last}, got {node.HINT_LAYER}")
        layer = node.HINT_LAYER - len(teachers)
        return cls(make_regressor(students[layer], teachers[layer]), layer, **loss_weights(node))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return hint_loss(
            self.regressor(student.features[self.layer]), teacher.features[self.layer]
        )
