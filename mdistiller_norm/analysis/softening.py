"""The effect of the temperature on a teacher's logits (Fig. 1 and 3 of the NormKD paper).

NormKD's temperature of a sample is ``T_norm * std`` of its logits. A fixed temperature over-softens a sample if it is
more than ``tolerance`` times that, and under-softens it if it is less than that divided by ``tolerance``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from mdistiller_norm.analysis.collect import Collected
from mdistiller_norm.analysis.figures import new_figure
from mdistiller_norm.errors import ConfigError

_BINS = 40


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of each row's softmax, ``[N]``."""
    log_probabilities = logits.log_softmax(1)
    return -(log_probabilities.exp() * log_probabilities).sum(1)


def compute(
    network: Collected,
    *,
    sample: int,
    temperatures: Sequence[float],
    fixed: float,
    t_norm: float,
    tolerance: float,
) -> dict[str, Any]:
    """Return the softened logits of one sample, and the standard deviation and entropy of all samples.

    The sample is softened by each of ``temperatures`` and by NormKD's; all samples by ``fixed`` and by NormKD's.
    """
    if not 0 <= sample < len(network.logits):
        raise ConfigError(f"--sample must be in 0..{len(network.logits) - 1}, got {sample}")
    if not all(0 < value < math.inf for value in (*temperatures, fixed, t_norm, tolerance - 1)):
        raise ConfigError("--temperatures, --fixed and --t-norm must be > 0, and --tolerance > 1")
    logits = network.logits.double()
    std = logits.std(1)
    own = t_norm * std.clamp_min(1e-6)
    softened = {f"T = {value:g}": logits[sample] / value for value in temperatures}
    softened[f"NormKD, T = {t_norm:g} * {std[sample]:.2f}"] = logits[sample] / own[sample]
    by_fixed, by_own = entropy(logits / fixed), entropy(logits / own[:, None])
    return {
        "network": network.name, "top1": network.top1, "fixed": fixed, "t_norm": t_norm, "tolerance": tolerance,
        "sample": sample, "target": network.classes[int(network.targets[sample])],
        "softened": {name: values.tolist() for name, values in softened.items()},
        "std": std.tolist(), "largest_entropy": math.log(len(network.classes)),
        "entropy": {f"T = {fixed:g}": by_fixed.tolist(), f"NormKD, T_norm = {t_norm:g}": by_own.tolist()},
        "over_softened": int((fixed > tolerance * own).sum()),
        "under_softened": int((fixed < own / tolerance).sum()),
    }  # fmt: skip


def draw(data: dict[str, Any]) -> tuple[Figure, list[str]]:
    """Draw one sample's logits, and the standard deviation and entropy of all; return the figure and its numbers."""
    figure, (first, second, third) = new_figure(1, 3, 4.2, 3.4)
    figure.suptitle(f"{data['network']}, top-1 {data['top1']:.2f}", fontsize=10)
    edges = np.histogram_bin_edges(list(data["softened"].values()), _BINS)
    heights = [np.histogram(values, edges)[0] for values in data["softened"].values()]
    tallest = 1.2 * max(height.max() for height in heights)
    for row, height in enumerate(heights):
        first.stairs(row + height / tallest, edges, baseline=row, fill=True, alpha=0.7)
    first.set_yticks(range(len(heights)), list(data["softened"]), fontsize=7)
    first.set_title(f"Softened logits of test sample {data['sample']} (class {data['target']})")
    first.set_xlabel("logit / temperature (bars: number of classes)")

    std, tolerance = np.array(data["std"]), data["tolerance"]
    second.hist(std, _BINS, alpha=0.7)
    equal = data["fixed"] / data["t_norm"]  # the std with which NormKD's temperature is the fixed one
    for position, style in ((equal / tolerance, ":"), (equal, "-"), (equal * tolerance, ":")):
        second.axvline(position, color="black", ls=style, lw=1)
    counted = f"T = {data['fixed']:g} over-softens {data['over_softened']} and under-softens {data['under_softened']}"
    second.set_title(f"{counted}\nof {len(std)} samples (by more than {tolerance:g} times)")
    second.set(xlabel=f"std of a sample's logits (line: T / T_norm = {equal:g})", ylabel="samples")

    spread = f"std of a sample's logits: mean {std.mean():.3f}, {std.min():.3f} to {std.max():.3f}"
    lines = [spread, f"{counted} of {len(std)} samples"]
    for name, values in data["entropy"].items():
        mean, deviation = np.mean(values), np.std(values, ddof=1)
        lines.append(f"entropy at {name}: {mean:.3f} ± {deviation:.3f} nats")
        third.hist(values, _BINS, alpha=0.5, label=f"{name}: {mean:.2f} ± {deviation:.2f}")
    third.axvline(data["largest_entropy"], color="black", lw=1, ls="--")
    third.set(title="Entropy of the softened prediction", xlabel="nats (dashed: uniform)", ylabel="samples")
    third.legend(fontsize=7)
    return figure, lines
