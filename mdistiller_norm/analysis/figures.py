"""The figures of the NormKD paper. Each function returns a figure, the plotted numbers and lines that summarise it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import Tensor
from torch.special import entr

from mdistiller_norm.analysis.collect import Collected, check_same_classes
from mdistiller_norm.errors import ConfigError

STYLE = Path(__file__).with_suffix(".mplstyle")
_BINS = 40
Drawing = tuple[Figure, dict[str, Any], list[str]]


def save(figure: Figure, data: dict[str, Any], stem: Path) -> None:
    """Write ``stem.png``, ``stem.svg`` and, with data, ``stem.json``."""
    png, svg, numbers = (
        stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg", "json")
    )
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=160)
    figure.savefig(svg, metadata={"Date": None})
    if data:
        numbers.write_text(json.dumps(data) + "\n", encoding="utf-8")


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


def draw_correlation(teacher: Collected, students: Sequence[Collected]) -> Drawing:
    """Draw the classes' correlations, students minus teacher: raw logits above normalised ones (Fig. 5)."""
    check_same_classes([teacher, *students])
    lines: list[str] = []
    panels: list[dict[str, Any]] = []
    for kind in ("raw", "normalised"):
        expected = correlation_matrix(teacher.logits, kind == "normalised")
        for student in students:
            difference = correlation_matrix(student.logits, kind == "normalised") - expected
            mean = float(difference.abs().mean())
            panel = {"name": student.name, "kind": kind, "mean_absolute": mean}
            panels.append(panel | {"difference": difference.tolist()})
            lines.append(f"{student.name}, {kind}: mean |difference| {mean:.4f}")
    largest = float(torch.tensor([panel["difference"] for panel in panels]).abs().max()) or 1.0
    figure = Figure(figsize=(3.3 * len(students) + 1.2, 6.8))
    axes = figure.subplots(2, len(students), squeeze=False).ravel()
    for axis, panel, line in zip(axes, panels, lines, strict=True):
        image = axis.imshow(panel["difference"], cmap="RdBu_r", vmin=-largest, vmax=largest)
        axis.set(title=line.replace(": ", "\n"), xlabel="class", ylabel="class")
        axis.grid(False)
    figure.colorbar(image, ax=axes, shrink=0.6, label=f"correlation minus that of {teacher.name}")
    return (
        figure,
        {"teacher": teacher.name, "classes": list(teacher.classes), "panels": panels},
        lines,
    )


def _draw_histograms(axis: Axes, rows: dict[str, list[float]]) -> None:
    edges = np.histogram_bin_edges(list(rows.values()), _BINS)
    heights = [np.histogram(values, edges)[0] for values in rows.values()]
    tallest = 1.2 * max(height.max() for height in heights)
    for row, height in enumerate(heights):
        axis.stairs(row + height / tallest, edges, baseline=row, fill=True, alpha=0.7)
    axis.set_yticks(range(len(heights)), list(rows), fontsize=7)


def draw_softening(
    network: Collected, *, sample: int, temperatures: Sequence[float], fixed: float, t_norm: float, tolerance: float
) -> Drawing:  # fmt: skip
    """Draw the effect of the temperature on a teacher's logits (Fig. 1 and 3).

    NormKD's temperature of a sample is ``t_norm * std`` of its logits. A fixed temperature over-softens a sample if it
    is more than ``tolerance`` times that, and under-softens it if it is less than that divided by ``tolerance``.
    ``temperatures`` are for the single sample, ``fixed`` is for all samples.
    """
    if not 0 <= sample < len(network.logits):
        raise ConfigError(f"--sample must be in 0..{len(network.logits) - 1}, got {sample}")
    if not all(0 < value < math.inf for value in (*temperatures, fixed, t_norm, tolerance - 1)):
        raise ConfigError("--temperatures, --fixed and --t-norm must be > 0, and --tolerance > 1")
    logits, std = network.logits.double(), network.logits.double().std(1)
    by_sample = t_norm * std.clamp_min(1e-6)
    over = int((fixed > tolerance * by_sample).sum())
    under = int((fixed < by_sample / tolerance).sum())
    counted = f"T = {fixed:g} over-softens {over} and under-softens {under}"
    lines = [
        f"std of a sample's logits: mean {std.mean():.3f}, {std.min():.3f} to {std.max():.3f}"
    ]
    lines.append(f"{counted} of {len(std)} samples")
    figure = Figure(figsize=(12.6, 3.4))
    first, second, third = figure.subplots(1, 3)
    figure.suptitle(f"{network.name}, top-1 {network.top1:.2f}", fontsize=10)
    used = {f"T = {value:g}": value for value in temperatures}
    used[f"NormKD, T = {t_norm:g} * {std[sample]:.2f}"] = float(by_sample[sample])
    softened = {name: (logits[sample] / value).tolist() for name, value in used.items()}
    target = network.classes[int(network.targets[sample])]
    _draw_histograms(first, softened)
    title = f"Softened logits of test sample {sample} (class {target})"
    first.set(title=title, xlabel="logit / temperature (bars: number of classes)")
    second.hist(std.numpy(), _BINS, alpha=0.7)
    equal = fixed / t_norm  # the std with which NormKD's temperature is the fixed one
    for position, style in ((equal / tolerance, ":"), (equal, "-"), (equal * tolerance, ":")):
        second.axvline(position, color="black", ls=style, lw=1)
    second.set(
        title=f"{counted}\nof {len(std)} samples (by more than {tolerance:g} times)",
        xlabel=f"std of a sample's logits (line: T / T_norm = {equal:g})",
        ylabel="samples",
    )
    entropies = {
        f"T = {fixed:g}": entr((logits / fixed).softmax(1)).sum(1).tolist(),
        f"NormKD, T_norm = {t_norm:g}": entr((logits / by_sample[:, None]).softmax(1))
        .sum(1)
        .tolist(),
    }
    for name, values in entropies.items():
        mean, deviation = np.mean(values), np.std(values, ddof=1)
        lines.append(f"entropy at {name}: {mean:.3f} ± {deviation:.3f} nats")
        third.hist(values, _BINS, alpha=0.5, label=f"{name}: {mean:.2f} ± {deviation:.2f}")
    third.axvline(math.log(len(network.classes)), color="black", lw=1, ls="--")
    third.set(
        title="Entropy of soft predictions", xlabel="nats (dashed: uniform)", ylabel="samples"
    )
    third.legend(fontsize=7)
    return figure, {
        "network": network.name, "top1": network.top1, "sample": sample, "target": target, "softened": softened,
        "std": std.tolist(), "entropy": entropies, "over_softened": over, "under_softened": under,
    }, lines  # fmt: skip


def draw_tsne(
    networks: Sequence[Collected], *, classes: int, samples: int, seed: int, perplexity: float
) -> Drawing:
    """Draw a t-SNE of the pooled features of the same test samples for each network (Fig. 4).

    The summary has the mean silhouette of the classes in the *features*: distances in a t-SNE embedding mean little.
    Source: van der Maaten and Hinton, "Visualizing Data using t-SNE" (2008).

    Args:
        classes: number of classes; 0 for all.
        samples: maximum number of samples N.
        perplexity: of the t-SNE, at most ``(N - 1) / 3``.
    """
    check_same_classes(networks)
    if min(samples, classes, seed) < 0 or seed >= 2**32 or not 0 < perplexity < math.inf:
        raise ConfigError(
            "--samples, --classes, --seed (< 2**32) and --perplexity must be positive"
        )
    names = networks[0].classes[: classes or None]
    candidates = torch.nonzero(networks[0].targets < len(names)).squeeze(1)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    chosen = candidates[order[:samples]].sort().values
    targets = networks[0].targets[chosen].numpy()
    present = len(set(targets.tolist()))
    if len(chosen) < 8 or not 2 <= present < len(chosen):
        raise ConfigError(f"t-SNE needs 8 samples and 2 classes, got {len(chosen)} and {present}")
    tsne = TSNE(perplexity=min(perplexity, (len(chosen) - 1) / 3), init="pca", random_state=seed)
    palette = mpl.colormaps[
        "tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else "hsv"
    ]
    figure = Figure(figsize=(3.6 * len(networks), 3.8))
    axes = figure.subplots(1, len(networks), squeeze=False).ravel()
    entries, lines = [], []
    for axis, network in zip(axes, networks, strict=True):
        features = network.pooled[chosen].numpy()
        points = np.round(tsne.fit_transform(features), 3)
        silhouette = float(silhouette_score(features, targets))
        for number, label in enumerate(names):
            color = palette(number if len(names) <= 20 else number / len(names))
            x, y = points[targets == number].T
            axis.scatter(x, y, s=6, color=color, linewidths=0, label=label)
        lines.append(f"{network.name}: top-1 {network.top1:.2f}, silhouette {silhouette:.3f}")
        axis.set(xticks=[], yticks=[], title=lines[-1].replace(": ", "\n"))
        axis.grid(False)
        axis.spines[:].set_visible(False)
        entries.append(
            {"name": network.name, "silhouette": silhouette, "points": points.tolist()}
        )
    if len(names) <= 20:
        labels = axis.get_legend_handles_labels()
        figure.legend(*labels, loc="outside lower center", ncols=5, markerscale=2)
    numbers = {"samples": chosen.tolist(), "targets": targets.tolist()}
    return figure, {"classes": list(names), **numbers, "networks": entries}, lines
