"""Correlation matrices of the classes' logits, students minus teacher (Fig. 5 of the NormKD paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mdistiller_norm.analysis.collect import Collected, check_same_classes
from mdistiller_norm.analysis.figures import new_figure


def correlation_matrix(logits: Tensor, normalise: bool = False) -> Tensor:
    """Return Pearson's coefficients of the classes' logits over the samples, ``[C, C]`` in float64.

    Args:
        logits: ``[N, C]``. A class with constant logits has the coefficients 0.
        normalise: divide each sample by its unbiased standard deviation first, as NormKD does.
    """
    logits = logits.double()
    if normalise:
        logits = logits / logits.std(1, keepdim=True).clamp_min(1e-6)
    return torch.corrcoef(logits.T).nan_to_num(0.0)


def draw(teacher: Collected, students: Sequence[Collected]) -> tuple[Figure, dict[str, Any], list[str]]:
    """Draw a column for each student, raw above normalised; return the figure, its data and a line for each panel."""
    check_same_classes([teacher, *students])
    panels, lines = [], []
    for kind in ("raw", "normalised"):
        expected = correlation_matrix(teacher.logits, kind == "normalised")
        for student in students:
            difference = correlation_matrix(student.logits, kind == "normalised") - expected
            mean = float(difference.abs().mean())
            panels.append(
                {"name": student.name, "kind": kind, "mean_absolute": mean, "difference": difference.tolist()}
            )
            lines.append(f"{student.name}, {kind}: mean |difference| {mean:.4f}")
    largest = float(torch.tensor([panel["difference"] for panel in panels]).abs().max()) or 1.0
    figure, axes = new_figure(
        2, len(students), 3.3 + 1.2 / len(students), 3.4
    )  # the colour scale needs an inch
    for axis, panel, line in zip(axes, panels, lines, strict=True):
        image = axis.imshow(panel["difference"], cmap="RdBu_r", vmin=-largest, vmax=largest)
        axis.set(title=line.replace(": ", "\n"), xlabel="class", ylabel="class")
        axis.grid(False)
    figure.colorbar(image, ax=axes, shrink=0.6, label=f"correlation minus that of {teacher.name}")
    return figure, {"teacher": teacher.name, "classes": list(teacher.classes), "panels": panels}, lines
