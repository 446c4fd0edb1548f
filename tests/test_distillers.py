"""The distiller classes: config keys, pairs of networks, needs, steps without values, and errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from mdistiller_norm.distillers import DISTILLERS, Distiller, Pair
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Outputs

TARGETS = torch.tensor([0] * 3 + [1] * 9 + [2] * 20 + [4])[
    torch.randperm(33, generator=torch.Generator().manual_seed(5))
]
STUDENT, TEACHER = [(4, 16), (6, 16), (8, 8), (10, 4)], [(8, 16), (5, 16), (7, 8), (9, 8)]  # channels, size of each map
Maps = list[tuple[int, int]]


class TeacherNorms(nn.Module):
    """A teacher's batch norms of given widths, None for the stem."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)

    def norms_before_relu(self) -> tuple[nn.Module | None, ...]:
        return (None, *self.norms)


def outputs(maps: Maps, count: int = 2, device: str = "meta", seed: int = 0) -> Outputs:
    """Random outputs with maps of these channels and sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(device)

    features = tuple(draw(count, channels, size, size) for channels, size in maps)
    pooled = draw(count, maps[-1][0])
    # Values of the pre-activations differ, so that a method that mistakes one for the other is found.
    return Outputs(4 * draw(count, 10) - 1, features, tuple(each - 0.3 for each in features), pooled)


def make_pair(student: Maps = STUDENT, teacher: Maps = TEACHER) -> Pair:
    norms = TeacherNorms([channels for channels, _ in teacher[1:]])
    return Pair(outputs(student), outputs(teacher), norms, TARGETS, 5)


def build(name: str, pair: Pair | None = None, changes: dict[str, Any] | None = None) -> Distiller:
    """Build a method from its defaults, with changes by dotted key."""
    node = CfgNode(copy.deepcopy(DISTILLERS[name].defaults))
    settings = ({"NCE.K": 7} if name == "CRD" else {}) | (changes or {})
    for key, value in settings.items():
        *sections, last = key.split(".")
        section = node
        for part in sections:
            section = section[part]
        section[last] = value
    return DISTILLERS[name].from_config(node, pair or make_pair())


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("KD", "TEMPERATURE", 0.0, "positive"),
        ("KD", "TEMPERATURE", [4.0, math.nan], "positive"),
        ("NormKD", "TEMPERATURE_NORM", math.inf, "positive"),
        ("NormKD", "STATISTIC", "rang", "range"),
        ("DKD", "T", -1.0, "positive"),
        ("NKD", "TEMPERATURE", 0.0, "positive"),
        ("DTKD", "T", 0.0, "positive"),
        ("RLD", "ALPHA_T", 0.0, "positive"),
        ("TTM", "GAMMA", 0.0, "TTM.GAMMA"),
        ("WTTM", "GAMMA", math.inf, "WTTM.GAMMA"),
        ("CTKD", "T_START", 0.0, "CTKD.T_START"),
        ("CTKD", "EPOCHS", 0, "CTKD.EPOCHS"),
        ("NormKD", "LOSS.KD_WEIGHT", -1.0, "KD_WEIGHT must be >= 0"),
        ("AT", "LOSS.CE_WEIGHT", -1.0, "CE_WEIGHT must be >= 0"),
        ("REVIEWKD", "WARMUP_EPOCHS", -1, "WARMUP_EPOCHS must be >= 0"),
        ("DKD", "BETA", -1.0, "BETA must be >= 0"),
        ("RKD", "ANGLE_WEIGHT", -1.0, "ANGLE_WEIGHT must be >= 0"),
        ("AT", "P", 0, "AT.P"),
        ("VID", "INIT_PRED_VAR", 0.0, "VID.INIT_PRED_VAR"),
        ("VID", "EPS", 0.0, "VID.EPS"),
        ("KDSVD", "K", 0, "KDSVD.K"),
        ("KDSVD", "K", 5, "maps 6x16x16, 8x8x8, 10x4x4 and teacher maps 5x16x16, 7x8x8, 9x8x8"),
        ("OFD", "CONNECTOR.KERNEL_SIZE", 2, "OFD.CONNECTOR.KERNEL_SIZE must be odd"),
        ("FITNET", "HINT_LAYER", 4, "got 4 for student maps 4x16x16.* teacher maps 8x16x16"),
        ("FITNET", "HINT_LAYER", -1, "FITNET.HINT_LAYER"),
        ("REVIEWKD", "IN_CHANNELS", [6, 8, 10, 11], r"IN_CHANNELS must be \[6, 8, 10, 10\]"),
        ("REVIEWKD", "SHAPES", [1, 4, 8], r"REVIEWKD.SHAPES must be \[1, 4, 8, 16\]"),
        ("REVIEWKD", "OUT_CHANNELS", [1, 2, 3, 4], r"OUT_CHANNELS must be \[5, 7, 9, 9\]"),
        ("REVIEWKD", "OUT_SHAPES", [1, 8, 8, 32], r"OUT_SHAPES must be \[1, 8, 8, 16\]"),
        ("CRD", "FEAT.STUDENT_DIM", 64, "STUDENT_DIM must be 10"),
        ("CRD", "FEAT.TEACHER_DIM", 64, "TEACHER_DIM must be 9"),
        ("CRD", "FEAT.DIM", 10**10, r"2458\.\d+ GiB"),
        ("CRD", "NCE.K", 14, "CRD.NCE.K must be <= 13"),
        ("CRD", "NCE.TEMPERATURE", 0.0, "TEMPERATURE > 0"),
        ("CRD", "MODE", "loose", "CRD.MODE must be exact or relax"),
    ],
)
def test_bad_values(name: str, key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build(name, changes={key: value})
    assert "\n" not in str(caught.value)


def test_typed_shapes_that_match_are_accepted() -> None:
    build("REVIEWKD", changes={"IN_CHANNELS": [6, 8, 10, 10], "SHAPES": [1, 4, 8, 16], "OUT_SHAPES": (1, 8, 8, 16)})
    build("CRD", changes={"FEAT.STUDENT_DIM": 10, "FEAT.TEACHER_DIM": 9})


def pair_without_norms(*norms: nn.Module | None) -> Pair:
    pair = make_pair()
    pair.teacher_network.norms_before_relu = lambda: norms  # type: ignore[method-assign]
    return pair


@pytest.mark.parametrize(
    ("name", "pair", "words"),
    [
        ("FITNET", make_pair([(4, 16), (6, 8), (8, 3)], [(8, 16), (5, 16), (7, 8)]), "8x3x3.*7x8x8"),
        *(
            (name, make_pair(STUDENT[:1], TEACHER[:1]), "4x16x16.*8x16x16")
            for name in ("AT", "NST", "VID", "KDSVD", "OFD")
        ),
        ("REVIEWKD", make_pair(STUDENT, TEACHER[:1]), "teacher stages none"),
        ("OFD", pair_without_norms(None, nn.BatchNorm2d(5), nn.BatchNorm2d(7), nn.BatchNorm2d(3)), "map 9x8x8"),
        ("OFD", pair_without_norms(), "map 5x16x16"),  # as of a wrapped network
    ],
)
def test_pairs_that_do_not_work(name: str, pair: Pair, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build(name, pair)
    assert "\n" not in str(caught.value)
