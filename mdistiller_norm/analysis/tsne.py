"""t-SNE of pooled features (Fig. 4 of the NormKD paper).

Source: van der Maaten and Hinton, "Visualizing Data using t-SNE" (2008).
"""

from __future__ import annotations

import importlib.util
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


def choose_samples(targets: torch.Tensor, classes: int, samples: int, seed: int) -> torch.Tensor:
    """Positions of a random part of the samples of the first ``classes`` classes, in order."""
    candidates = torch.nonzero(targets < classes).squeeze(1)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return candidates[order[:samples]].sort().values


def embed(features: np.ndarray[Any, Any], seed: int, perplexity: float, engine: str) -> np.ndarray[Any, Any]:
    """Two dimensions out of ``[N, D]``; the same for the same seed.

    Args:
        features: of N samples.
        seed: of the optimisation.
        perplexity: lowered to ``(N - 1) / 3`` where there are too few samples.
        engine: ``sklearn``, or ``opentsne``, which is faster for many samples.

    Raises:
        ConfigError: openTSNE is asked for and not installed.
    """
    perplexity = min(perplexity, (len(features) - 1) / 3)
    if engine == "sklearn":
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
        return np.asarray(tsne.fit_transform(features))
    if not importlib.util.find_spec("openTSNE"):
        raise ConfigError("--engine opentsne needs openTSNE: python -m pip install openTSNE")
    import openTSNE

    return np.asarray(openTSNE.TSNE(perplexity=perplexity, random_state=seed).fit(features))


def compute(
    networks: Sequence[Collected], *, classes: int = 0, samples: int = 2000, seed: int = 0, perplexity: float = 30.0,
    engine: str = "sklearn",
) -> dict[str, Any]:  # fmt: skip
    """Embed the same samples by each network's pooled features.

    Args:
        networks: of one data set.
        classes: only the first so many; 0 for all.
        samples: at most.
        seed: of the choice and the embedding.
        perplexity: of t-SNE.
        engine: see :func:`embed`.

    Returns:
        For each network the points, and the mean silhouette of the classes in the *features* (1: far apart, 0:
        touching), since distances in a t-SNE picture mean little.

    Raises:
        ConfigError: a number that is out of range, too few samples or classes, or networks of different data sets.
    """
    check_same_classes(networks)
    if min(samples, classes, seed) < 0 or seed >= 2**32 or not 0 < perplexity < math.inf:
        raise ConfigError(
            "--samples and --classes must be zero or positive, --seed too and below 2**32, --perplexity positive: "
            f"not {samples}, {classes}, {seed}, {perplexity:g}"
        )
    names = networks[0].classes[: classes or None]
    chosen = choose_samples(networks[0].targets, len(names), samples, seed)
    targets = networks[0].targets[chosen].numpy()
    present = len(set(targets.tolist()))
    if len(chosen) < 8 or not 2 <= present < len(chosen):
        raise ConfigError(f"t-SNE of {len(chosen)} samples of {present} classes shows nothing: take more --samples")
    drawn = []
    for network in networks:
        features = network.pooled[chosen].numpy()
        points = embed(features, seed, perplexity, engine)
        drawn.append({
            "name": network.name, "top1": network.top1, "silhouette": float(silhouette_score(features, targets)),
            "points": np.round(points, 3).tolist(),
        })  # fmt: skip
    return {
        "classes": list(names), "seed": seed, "engine": engine, "samples": chosen.tolist(),
        "targets": targets.tolist(), "networks": drawn,
    }  # fmt: skip


def draw(data: dict[str, Any]) -> Figure:
    """Side by side, a colour for each class."""
    networks, classes = data["networks"], data["classes"]
    figure, axes = new_figure(1, len(networks), 3.6, 3.8)
    targets = np.asarray(data["targets"])
    palette = mpl.colormaps["tab10" if len(classes) <= 10 else "tab20" if len(classes) <= 20 else "hsv"]
    colours = [palette(i if len(classes) <= 20 else i / len(classes)) for i in range(len(classes))]
    for axis, network in zip(axes[0], networks, strict=True):
        points = np.asarray(network["points"])
        for number, label in enumerate(classes):
            mine = points[targets == number]
            axis.scatter(mine[:, 0], mine[:, 1], s=6, color=colours[number], linewidths=0, label=label)
        axis.set(xticks=[], yticks=[], title=f"{network['name']}\ntop-1 {network['top1']:.2f}, silhouette "
                 f"{network['silhouette']:.3f}")  # fmt: skip
        axis.grid(False)
        axis.spines[:].set_visible(False)
    if len(classes) <= 20:
        handles, labels = axes[0][0].get_legend_handles_labels()
        room = 44 * len(networks) // (max(len(label) for label in labels) + 4)  # characters of the style's size
        figure.legend(handles, labels, loc="outside lower center", ncols=min(max(room, 2), 10), markerscale=2,
                      columnspacing=0.8, handletextpad=0.1)  # fmt: skip
    return figure
