"""The command ``visualize``."""

import argparse
from pathlib import Path

from mdistiller_norm.errors import ConfigError, needs_extra
from mdistiller_norm.student import add_student_arguments, find_weights, open_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``visualize``."""
    commands = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    tsne = commands.add_parser("tsne", help="t-SNE of pooled features (Fig. 4)")
    correlation = commands.add_parser("correlation", help="correlations minus the teacher's (Fig. 5)")
    correlation.add_argument("-t", "--teacher", required=True, type=Path, help="its weights")
    correlation.add_argument("-tm", "--teacher-model", default="", help="model name of the teacher")
    logits = commands.add_parser("logits", help="softened logits of a teacher (Fig. 1 and 3)")
    logits.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    for sub, name, default, text in (
        (tsne, "--samples", 2000, "number of test images"),
        (tsne, "--classes", 0, "number of classes; 0 for all"),
        (tsne, "--seed", 0, "of the samples and the embedding"),
        (tsne, "--perplexity", 30.0, "of the t-SNE"),
        (logits, "--sample", 0, "index in the test set"),
        (logits, "--fixed", 4.0, "temperature of all samples"),
        (logits, "--t-norm", 2.0, "T_norm of NormKD"),
        (logits, "--tolerance", 1.25, "factor that counts as too much"),
    ):
        sub.add_argument(name, type=type(default), default=default, help=f"{text} ({default:g})")
    for sub in (tsne, correlation, logits):
        add, count = sub.add_argument, 1 if sub is logits else "+"
        add("-c", "--ckpt", nargs=count, required=True, type=Path, metavar="PATH", help="weights/runs")
        add("--out", type=Path, metavar="STEM", help="default: output/figures/FIGURE")
        add("--data", action="store_true", help="also write the numbers as JSON")
        add("--names", nargs="+", default=[], help="one label for each file of -c")
        add_student_arguments(sub, batch_size=250)


def main(options: argparse.Namespace) -> int:
    """Compute and draw a figure, print its numbers and write its files."""
    if options.names and len(options.names) != len(options.ckpt):
        raise ConfigError(f"--names must have a name for each of the {len(options.ckpt)} files")
    with needs_extra("report", "visualize"):
        import matplotlib as mpl

        from mdistiller_norm.analysis import figures
    from mdistiller_norm.analysis.collect import Collected, collect, short_names
    from mdistiller_norm.build import build_device

    def outputs(path: Path, name: str, model: str) -> Collected:
        student = open_checkpoint(path, model, options.dataset, options.root)
        return collect(*student, name, options.batch_size, build_device(options.device))

    paths = [find_weights(path) for path in options.ckpt]
    labels = zip(paths, options.names or short_names(paths), strict=True)
    networks = [outputs(path, name, options.model) for path, name in labels]
    with mpl.rc_context(figures.STYLE):
        if options.figure == "tsne":
            figure, data, lines = figures.draw_tsne(
                networks, classes=options.classes, samples=options.samples, seed=options.seed,
                perplexity=options.perplexity,
            )  # fmt: skip
        elif options.figure == "correlation":
            path = find_weights(options.teacher)
            teacher = outputs(path, short_names([path])[0], options.teacher_model)
            figure, data, lines = figures.draw_correlation(teacher, networks)
        else:
            figure, data, lines = figures.draw_softening(
                networks[0], sample=options.sample, temperatures=options.temperatures, fixed=options.fixed,
                t_norm=options.t_norm, tolerance=options.tolerance,
            )  # fmt: skip
        stem = options.out or Path("output", "figures", options.figure)
        figures.save(figure, data if options.data else {}, stem)
    print("\n".join([*lines, f"wrote {stem}.png and .svg{' and .json' if options.data else ''}"]))
    return 0
