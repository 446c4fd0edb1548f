"""What ``tools/visualize.py`` does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mdistiller_norm.analysis import correlation, curves, softening, tsne
from mdistiller_norm.analysis.collect import Collected, collect, short_names
from mdistiller_norm.analysis.figures import save, styled
from mdistiller_norm.build import build_device
from mdistiller_norm.errors import ConfigError


def _collect(options: argparse.Namespace, path: Path, name: str, model: str) -> Collected:
    if options.batch_size < 1:
        raise ConfigError(f"-bs must be at least 1, not {options.batch_size}")
    return collect(
        path, name, model=model, kind=options.dataset, root=Path(options.root), batch_size=options.batch_size,
        device=build_device(options.device),
    )  # fmt: skip


def make_figure(options: argparse.Namespace, paths: Sequence[Path], stem: Path) -> list[Path]:
    """Compute, print the numbers, draw and save; returns the files.

    Raises:
        UserError: a file, a name or a number cannot be used.
    """
    names = list(options.names) or short_names(paths)
    with styled():
        figure, data, lines = _make(options, paths, names)
        for line in lines:
            print(line)
        return save(figure, data, stem, options.data)


def _make(
    options: argparse.Namespace, paths: Sequence[Path], names: Sequence[str]
) -> tuple[Figure, dict[str, Any], list[str]]:
    if options.figure == "curves":
        data = curves.compute(paths, names)
        lines = [f"{run['name']}: best {run['best']:.2f}, last {run['last']:.2f}" for run in data["runs"]]
        return curves.draw(data), data, lines
    networks = [_collect(options, path, name, options.model) for path, name in zip(paths, names, strict=True)]
    if options.figure == "tsne":
        data = tsne.compute(
            networks, classes=options.classes, samples=options.samples, seed=options.seed,
            perplexity=options.perplexity, engine=options.engine,
        )  # fmt: skip
        lines = [f"{n['name']}: top-1 {n['top1']:.2f}, silhouette {n['silhouette']:.4f}" for n in data["networks"]]
        return tsne.draw(data), data, lines
    if options.figure == "correlation":
        path = Path(options.teacher)
        teacher = _collect(options, path, short_names([path])[0], options.teacher_model)
        data = correlation.compute(teacher, networks)
        lines = [
            f"{s['name']}: mean absolute difference {s['raw']['mean_absolute']:.4f} raw, "
            f"{s['normalised']['mean_absolute']:.4f} normalised"
            for s in data["students"]
        ]
        return correlation.draw(data), data, lines
    data = softening.compute(
        networks[0], sample=options.sample, temperatures=options.temperatures, fixed=options.fixed,
        t_norm=options.t_norm, tolerance=options.tolerance,
    )  # fmt: skip
    spread = data["std"]
    lines = [
        f"std of a sample's logits: mean {spread['mean']:.3f}, {spread['min']:.3f} to {spread['max']:.3f}",
        f"T = {data['fixed']:g} over-softens {data['over_softened']} and under-softens {data['under_softened']} of "
        f"{data['samples']} samples",
    ]
    lines += [
        f"entropy at {name}: {entry['mean']:.3f} ± {entry['std']:.3f} nats"
        for name, entry in data["entropy"]["by_temperature"].items()
    ]
    return softening.draw(data), data, lines
