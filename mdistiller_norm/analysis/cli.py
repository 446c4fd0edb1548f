"""The command ``visualize``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mdistiller_norm.errors import ConfigError, needs_extra
from mdistiller_norm.student import add_student_arguments, find_root, find_weights, open_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``visualize``."""
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    tsne = figures.add_parser("tsne", help="t-SNE of pooled features (Fig. 4)")
    tsne.add_argument(
        "--samples", type=int, default=2000, help="maximum number of test images (default: 2000)"
    )
    tsne.add_argument("--classes", type=int, default=0, metavar="N", help="only the first N classes")
    tsne.add_argument("--perplexity", type=float, default=30.0)
    tsne.add_argument("--seed", type=int, default=0)
    correlation = figures.add_parser(
        "correlation", help="class correlations minus those of the teacher (Fig. 5)"
    )
    correlation.add_argument("-t", "--teacher", required=True, help="weights file of the teacher")
    correlation.add_argument("-tm", "--teacher-model", default="", help="model name of the teacher")
    logits = figures.add_parser("logits", help="softened logits of a teacher (Fig. 1 and 3)")
    logits.add_argument("--sample", type=int, default=0, help="index in the test set")
    logits.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    logits.add_argument(
        "--fixed", type=float, default=4.0, help="fixed temperature of the whole set (default: 4)"
    )
    logits.add_argument("--t-norm", type=float, default=2.0, help="T_norm of NormKD (default: 2)")
    logits.add_argument(
        "--tolerance", type=float, default=1.25, help="factor that counts as too much (default: 1.25)"
    )
    for sub in (tsne, correlation, logits):
        count = 1 if sub is logits else "+"
        sub.add_argument("-c", "--ckpt", nargs=count, required=True, metavar="FILE", help="weights files")
        sub.add_argument("--out", default="", metavar="STEM", help="default: output/figures/FIGURE")
        sub.add_argument("--data", action="store_true", help="also write the numbers as JSON")
        sub.add_argument("--names", nargs="+", default=[], help="one label for each file of -c")
        add_student_arguments(sub, batch_size=250)


def main(options: argparse.Namespace) -> int:
    """Compute and draw a figure, print its numbers and write its files."""
    if options.names and len(options.names) != len(options.ckpt):
        raise ConfigError(
            f"--names must have {len(options.ckpt)} names, one for each file, got {len(options.names)}"
        )
    stem = Path(options.out or Path("output", "figures", options.figure))

    with needs_extra("report", "visualize"):
        import matplotlib as mpl

        from mdistiller_norm.analysis import correlation, softening, tsne
        from mdistiller_norm.analysis.figures import STYLE, save
    from mdistiller_norm.analysis.collect import Collected, collect, short_names
    from mdistiller_norm.build import build_device

    device = build_device(options.device)

    def outputs(path: Path, name: str, model: str) -> Collected:
        network, dataset = open_checkpoint(path, model, options.dataset, find_root(path, options.root))
        return collect(network, dataset, name, options.batch_size, device)

    def picked(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names}

    paths = [find_weights(Path(path)) for path in options.ckpt]
    names = options.names or short_names(paths)
    networks = [outputs(path, name, options.model) for path, name in zip(paths, names, strict=True)]
    with mpl.rc_context(STYLE):
        if options.figure == "tsne":
            figure, data, lines = tsne.draw(networks, **picked("classes", "samples", "seed", "perplexity"))
        elif options.figure == "correlation":
            path = find_weights(Path(options.teacher))
            teacher = outputs(path, short_names([path])[0], options.teacher_model)
            figure, data, lines = correlation.draw(teacher, networks)
        else:
            chosen = picked("sample", "temperatures", "fixed", "t_norm", "tolerance")
            data = softening.compute(networks[0], **chosen)
            figure, lines = softening.draw(data)
        lines += [f"wrote {path}" for path in save(figure, data if options.data else None, stem)]
    print("\n".join(lines))
    return 0
