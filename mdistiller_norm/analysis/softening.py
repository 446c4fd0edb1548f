"""What a temperature does to a teacher's logits (Fig. 1 and 3 of the NormKD paper): its argument, measured.

One fixed T softens samples of small logits too much and those of large logits too little. NormKD's temperature is
``T_norm * std`` of the sample. A sample counts as over-softened where the fixed T is above ``tolerance`` times its own
temperature, and as under-softened where it is below it divided by ``tolerance``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mdistiller_norm.analysis.collect import Collected
from mdistiller_norm.analysis.figures import new_figure
from mdistiller_norm.distillers.temperature import Temperature
from mdistiller_norm.errors import ConfigError

_BINS = 40


def entropy(softened: Tensor) -> Tensor:
    """Entropy in nats of each row's softmax, ``[N]``."""
    log_probabilities = softened.log_softmax(1)
    return -(log_probabilities.exp() * log_probabilities).sum(1)


def _histogram(values: Tensor, edges: np.ndarray[Any, Any]) -> list[int]:
    counts: list[int] = np.histogram(values.numpy(), edges)[0].tolist()
    return counts


def _edges(*values: Tensor) -> np.ndarray[Any, Any]:
    every = torch.cat([value.flatten() for value in values])
    return np.linspace(float(every.min()), float(every.max()) + 1e-6, _BINS + 1)


def compute(
    network: Collected, *, sample: int = 0, temperatures: Sequence[float] = (1.0, 2.0, 4.0, 8.0), fixed: float = 4.0,
    t_norm: float = 2.0, tolerance: float = 1.25,
) -> dict[str, Any]:  # fmt: skip
    """Distributions of one sample's logits, and of the whole set's spread and entropy.

    Args:
        network: a teacher.
        sample: position in the test set of the sample that is shown.
        temperatures: that its logits are divided by.
        fixed: the T that the data set is softened by.
        t_norm: NormKD's factor.
        tolerance: a factor above 1, see the module.

    Raises:
        ConfigError: no such sample, or a number that is out of range.
    """
    samples, classes = network.logits.shape
    if not 0 <= sample < samples:
        raise ConfigError(f"--sample {sample}: the test set has the samples 0 to {samples - 1}")
    if not 1 < tolerance < math.inf:
        raise ConfigError(f"--tolerance must be above 1, not {tolerance:g}")
    logits = network.logits.double()
    constant, norm = Temperature(fixed), Temperature(t_norm, "std")
    spread = norm.measure(logits).squeeze(1)
    own = t_norm * spread
    shown = {f"T = {t:g}": logits[sample] / Temperature(t).scales[0] for t in temperatures}
    shown[f"NormKD, T = {t_norm:g} * {spread[sample]:.2f}"] = logits[sample] / own[sample].clamp_min(1e-6)
    entropies = {
        f"T = {fixed:g}": entropy(constant.soften(logits, logits).teacher),
        f"NormKD, T_norm = {t_norm:g}": entropy(norm.soften(logits, logits).teacher),
    }
    over, under = int((fixed > tolerance * own).sum()), int((fixed < own / tolerance).sum())
    spread_edges, entropy_edges = _edges(spread), _edges(*entropies.values())
    return {
        "network": network.name, "top1": network.top1, "samples": samples, "classes": classes, "fixed": fixed,
        "t_norm": t_norm, "tolerance": tolerance,
        "sample": {
            "index": sample, "target": network.classes[int(network.targets[sample])], "std": float(spread[sample]),
            "softened": {
                name: {"values": values.tolist(), "top_probability": float(values.softmax(0).max())}
                for name, values in shown.items()
            },
        },
        "std": {
            "mean": float(spread.mean()), "min": float(spread.min()), "max": float(spread.max()),
            "edges": spread_edges.tolist(), "counts": _histogram(spread, spread_edges),
        },
        "entropy": {
            "edges": entropy_edges.tolist(), "largest": float(np.log(classes)),
            "by_temperature": {
                name: {"mean": float(values.mean()), "std": float(values.std()),
                       "counts": _histogram(values, entropy_edges)}
                for name, values in entropies.items()
            },
        },
        "over_softened": over, "under_softened": under,
    }  # fmt: skip


def draw(data: dict[str, Any]) -> Figure:
    """Three panels: one sample, the spread of all, the entropy of all."""
    figure, axes = new_figure(1, 3, 4.2, 3.4)
    first, second, third = axes[0]
    sample = data["sample"]
    edges = _edges(*(torch.tensor(entry["values"]) for entry in sample["softened"].values()))
    heights = [np.histogram(entry["values"], edges)[0] for entry in sample["softened"].values()]
    tallest = 1.2 * max(int(height.max()) for height in heights)
    for number, height in enumerate(heights):  # one above the other, the last at the top
        first.stairs(number + height / tallest, edges, baseline=number, fill=True, alpha=0.7)
    labels = [f"{name}\nlargest p {entry['top_probability']:.2f}" for name, entry in sample["softened"].items()]
    first.set_yticks(range(len(labels)), labels, fontsize=7)
    first.set(title=f"Softened logits of test sample {sample['index']} (class {sample['target']})",
              xlabel="logit / temperature (bars: number of classes)")  # fmt: skip

    second.stairs(data["std"]["counts"], data["std"]["edges"], fill=True, alpha=0.7)
    own = data["fixed"] / data["t_norm"]
    for position, style in ((own / data["tolerance"], ":"), (own, "-"), (own * data["tolerance"], ":")):
        second.axvline(position, color="black", ls=style, lw=1)
    second.set(title=f"T = {data['fixed']:g} over-softens {data['over_softened']} and under-softens "
               f"{data['under_softened']}\nof {data['samples']} samples (by more than {data['tolerance']:g} times)",
               xlabel=f"std of a sample's logits (line: T / T_norm = {own:g})", ylabel="samples")  # fmt: skip

    for name, entry in data["entropy"]["by_temperature"].items():
        third.stairs(entry["counts"], data["entropy"]["edges"], fill=True, alpha=0.5,
                     label=f"{name}: {entry['mean']:.2f} ± {entry['std']:.2f}")  # fmt: skip
    third.axvline(data["entropy"]["largest"], color="black", lw=1, ls="--")
    third.set(title="Entropy of the softened prediction", xlabel="nats (dashed: uniform)", ylabel="samples")
    third.legend(fontsize=7)
    figure.suptitle(f"{data['network']}, top-1 {data['top1']:.2f}", fontsize=10)
    return figure
