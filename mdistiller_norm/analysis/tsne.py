"""t-SNE of pooled features (Fig. 4 of the NormKD paper).

Source: van der Maaten and Hinton, "Visualizing Data using t-SNE" (2008).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from mdistiller_norm.analysis.collect import Collected, check_same_classes
from mdistiller_norm.analysis.figures import new_figure
from mdistiller_norm.errors import ConfigError


def draw(
    networks: Sequence[Collected], *, classes: int, samples: int, seed: int, perplexity: float
) -> tuple[Figure, dict[str, Any], list[str]]:
    """Draw the same test samples for each network, a colour for each class; return the figure, its data and a summary.

    The summary has the mean silhouette of the classes in the *features*: distances in a t-SNE embedding mean little.

    Args:
        classes: number of classes; 0 for all.
        samples: maximum number of samples N; the perplexity is at most ``(N - 1) / 3``.
        seed: of the choice of the samples and of the embedding.
    """
    check_same_classes(networks)
    if min(samples, classes, seed) < 0 or seed >= 2**32 or not 0 < perplexity < math.inf:
        raise ConfigError("--samples, --classes, --seed (< 2**32) and --perplexity must be positive")
    names = networks[0].classes[: classes or None]
    candidates = torch.nonzero(networks[0].targets < len(names)).squeeze(1)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    chosen = candidates[order[:samples]].sort().values
    targets = networks[0].targets[chosen].numpy()
    present = len(set(targets.tolist()))
    if len(chosen) < 8 or not 2 <= present < len(chosen):
        raise ConfigError(
            f"t-SNE needs more samples or classes than {len(chosen)} samples of {present} classes"
        )
    tsne = TSNE(perplexity=min(perplexity, (len(chosen) - 1) / 3), init="pca", random_state=seed)
    palette = mpl.colormaps["tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else "hsv"]
    figure, axes = new_figure(1, len(networks), 3.6, 3.8)
    entries, lines = [], []
    for axis, network in zip(axes, networks, strict=True):
        features = network.pooled[chosen].numpy()
        points = np.round(tsne.fit_transform(features), 3)
        silhouette = float(silhouette_score(features, targets))
        for number, label in enumerate(names):
            color = palette(number if len(names) <= 20 else number / len(names))
            x, y = points[targets == number].T
            axis.scatter(x, y, s=6, color=color, linewidths=0, label=label)
        line = f"{network.name}: top-1 {network.top1:.2f}, silhouette {silhouette:.3f}"
        axis.set(xticks=[], yticks=[], title=line.replace(": ", "\n"))
        axis.grid(False)
        axis.spines[:].set_visible(False)
        entries.append({"name": network.name, "silhouette": silhouette, "points": points.tolist()})
        lines.append(line)
    if len(names) <= 20:
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=2
        )
    data = {
        "classes": list(names),
        "samples": chosen.tolist(),
        "targets": targets.tolist(),
        "networks": entries,
    }
    return figure, data, lines
