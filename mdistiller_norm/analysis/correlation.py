"""How a student's classes correlate, against its teacher's (Fig. 5 of the NormKD paper).

The correlation matrix of a network is that of its logits over the test set: entry (i, j) is Pearson's coefficient of
the logits of classes i and j. Normalised, each sample's logits are divided by their standard deviation first, as NormKD
does: what is left is the shape of the distributions, without the spread that a fixed temperature leaves in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mdistiller_norm.analysis.collect import Collected, check_same_classes
from mdistiller_norm.analysis.figures import new_figure
from mdistiller_norm.distillers.temperature import STATISTICS


def correlation_matrix(logits: Tensor, normalise: bool = False) -> Tensor:
    """Pearson's coefficients of the classes' logits over the samples, ``[C, C]`` in float64.

    Args:
        logits: ``[N, C]``.
        normalise: divide each sample by its unbiased standard deviation first; samples without spread become zero.

    A class whose logit never changes correlates with nothing: 0.
    """
    logits = logits.double()
    if normalise:
        spread = STATISTICS["std"](logits)
        logits = torch.where(spread > 0, logits / spread.clamp_min(torch.finfo(spread.dtype).tiny), 0.0)
    return torch.corrcoef(logits.T).nan_to_num(0.0)


def compute(teacher: Collected, students: Sequence[Collected]) -> dict[str, Any]:
    """The students' matrices minus the teacher's, raw and normalised, and their mean absolute values.

    Raises:
        ConfigError: networks of different data sets.
    """
    check_same_classes([teacher, *students])
    compared = []
    for student in students:
        entry: dict[str, Any] = {"name": student.name, "top1": student.top1}
        for kind, normalise in (("raw", False), ("normalised", True)):
            wanted, got = (correlation_matrix(network.logits, normalise) for network in (teacher, student))
            difference = got - wanted
            entry[kind] = {"mean_absolute": float(difference.abs().mean()), "difference": difference.tolist()}
        compared.append(entry)
    return {"teacher": teacher.name, "classes": list(teacher.classes), "students": compared}


def draw(data: dict[str, Any]) -> Figure:
    """A column for each student; raw above, normalised below; one colour scale for all."""
    students = data["students"]
    figure, axes = new_figure(2, len(students), 3.3 + 1.2 / len(students), 3.4)  # the colour scale needs an inch
    panels = [(kind, student) for kind in ("raw", "normalised") for student in students]
    largest = max(abs(value) for kind, student in panels for row in student[kind]["difference"] for value in row)
    image = None
    for (kind, student), axis in zip(panels, axes[0] + axes[1], strict=True):
        image = axis.imshow(student[kind]["difference"], cmap="RdBu_r", vmin=-largest or -1, vmax=largest or 1)
        axis.set(title=f"{student['name']}\n{kind}: mean |difference| {student[kind]['mean_absolute']:.4f}",
                 xlabel="class", ylabel="class")  # fmt: skip
        axis.grid(False)
    if image is not None:
        every = [axis for row in axes for axis in row]
        figure.colorbar(image, ax=every, shrink=0.6, label=f"correlation minus that of {data['teacher']}")
    return figure
