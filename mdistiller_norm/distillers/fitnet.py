"""FitNet: one of the student's maps is regressed onto one of the teacher's.

Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), Eq. 3. As in mdistiller the hint is part of the
loss during the whole training, not a first stage of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.distillers.base import Distiller, Need, Pair, at_least_float32, register
from mdistiller_norm.distillers.maps import shape, shapes
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs


def hint_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Mean squared difference of a regressed student map and a teacher map of equal shape; a scalar."""
    return F.mse_loss(at_least_float32(f_s), at_least_float32(f_t))


def make_regressor(student: Tensor, teacher: Tensor) -> nn.Sequential:
    """Convolution, batch norm and ReLU from maps shaped like ``student`` to maps shaped like ``teacher``.

    Equal sizes take a 1x1 kernel; a student of twice the teacher's size a 3x3 with stride 2; one of half its size a
    transposed 4x4 with stride 2; any other larger one a kernel that covers the difference.

    Args:
        student: ``[B, D, H, W]``, only its shape is read.
        teacher: likewise.

    Raises:
        ConfigError: the student's map is smaller, and not by half.
    """
    (channels, *source), (hints, *target) = student.shape[1:], teacher.shape[1:]
    convolution: nn.Module
    if source == [2 * side for side in target]:
        convolution = nn.Conv2d(channels, hints, 3, stride=2, padding=1)
    elif [2 * side for side in source] == target:
        convolution = nn.ConvTranspose2d(channels, hints, 4, stride=2, padding=1)
    elif source[0] >= target[0] and source[1] >= target[1]:
        convolution = nn.Conv2d(channels, hints, (source[0] - target[0] + 1, source[1] - target[1] + 1))
    else:
        raise ConfigError(
            f"FitNet has no regressor from the student's map {shape(student)} to the teacher's {shape(teacher)}: "
            "choose another FITNET.HINT_LAYER"
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(hints), nn.ReLU())


@register("FITNET")
class FitNet(Distiller):
    """Hint regression at one layer.

    Args:
        regressor: from the student's map to the teacher's.
        layer: which map of either network, counted from the end: -1 is the last.
    """

    defaults = {"HINT_LAYER": 2, "INPUT_SIZE": [32, 32], "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 100.0}}
    need = Need.MAPS

    def __init__(self, regressor: nn.Module, layer: int, **weights: Any) -> None:
        super().__init__(**weights)
        self.regressor = regressor
        self.layer = layer

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> FitNet:
        """See :class:`Distiller`.

        ``HINT_LAYER`` counts the teacher's maps from its stem, 0; the student's map is the one as far from its end.
        """
        students, teachers = pair.student.features, pair.teacher.features
        layer = node.HINT_LAYER - len(teachers)
        if not -min(len(students), len(teachers)) <= layer < 0:
            raise ConfigError(
                f"FITNET.HINT_LAYER is {node.HINT_LAYER}, but student maps are {shapes(students)} "
                f"and teacher maps {shapes(teachers)}: choose one that both have, counted from the deepest"
            )
        _check_input_size(list(node.INPUT_SIZE), pair)
        regressor = make_regressor(students[layer], teachers[layer])
        return cls(regressor, layer, ce_weight=node.LOSS.CE_WEIGHT, weight=node.LOSS.FEAT_WEIGHT)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        return hint_loss(self.regressor(student.features[self.layer]), teacher.features[self.layer])


def _check_input_size(size: list[int], pair: Pair) -> None:
    """Maps are probed, so the size of an image is not needed; one that cannot be theirs is a mistake all the same."""
    if size == FitNet.defaults["INPUT_SIZE"]:
        return
    for network, outputs in (("student", pair.student), ("teacher", pair.teacher)):
        first = outputs.features[0]
        if len(size) != 2 or any(side < 1 or side % out for side, out in zip(size, first.shape[-2:], strict=False)):
            raise ConfigError(
                f"FITNET.INPUT_SIZE is {size}, but the {network}'s first map is {shape(first)}: "
                "correct it or leave it out"
            )
