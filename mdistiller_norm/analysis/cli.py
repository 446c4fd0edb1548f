"""The command ``visualize``."""

import argparse
from pathlib import Path

from mdistiller_norm.analysis.collect import Collected, collect, short_names
from mdistiller_norm.build import build_device
from mdistiller_norm.errors import ConfigError, needs_extra
from mdistiller_norm.student import find_weights, open_checkpoint


def main(options: argparse.Namespace) -> int:
    """Compute and draw a figure, print its numbers and write its files."""
    if options.names and len(options.names) != len(options.ckpt):
        raise ConfigError(f"--names must have a name for each of the {len(options.ckpt)} files")
    with needs_extra("report", "visualize"):
        import matplotlib as mpl

        from mdistiller_norm.analysis import figures

    def outputs(path: Path, name: str, model: str) -> Collected:
        student = open_checkpoint(path, model, options.dataset, options.root)
        return collect(*student, name, options.batch_size, build_device(options.device))

    paths = [find_weights(path) for path in options.ckpt]
    labels = zip(paths, options.names or short_names(paths), strict=True)
    networks = [outputs(path, name, options.model) for path, name in labels]
    with mpl.rc_context(fname=figures.STYLE):
        if options.figure == "tsne":
            figure, data, lines = figures.draw_tsne(
                networks,
                classes=options.classes,
                samples=options.samples,
                seed=options.seed,
                perplexity=options.perplexity,
            )
        elif options.figure == "correlation":
            path = find_weights(options.teacher)
            teacher = outputs(path, short_names([path])[0], options.teacher_model)
            figure, data, lines = figures.draw_correlation(teacher, networks)
        else:
            figure, data, lines = figures.draw_softening(
                networks[0],
                sample=options.sample,
                temperatures=options.temperatures,
                fixed=options.fixed,
                t_norm=options.t_norm,
                tolerance=options.tolerance,
            )
        stem = options.out or Path("output", "figures", options.figure)
        figures.save(figure, data if options.data else {}, stem)
    print("\n".join([*lines, f"wrote {stem}.png and .svg{' and .json' if options.data else ''}"]))
    return 0
