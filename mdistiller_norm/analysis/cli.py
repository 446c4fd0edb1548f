"""The command line of ``tools/visualize.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.plugins import import_plugin


def _add_network_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", default="", help="name of the networks; a student_*.pt knows it")
    parser.add_argument("-d", "--dataset", default="", help="data set; a student_*.pt knows it; else cifar100")
    parser.add_argument("-bs", "--batch-size", type=int, default=250)
    parser.add_argument("--root", default="data", help="folder of the data set")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plugin", nargs="+", type=import_plugin, metavar="FILE", help="the runs' EXPERIMENT.PLUGINS")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``visualize``."""
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    tsne = figures.add_parser("tsne", help="t-SNE of pooled features (Fig. 4)")
    tsne.add_argument("-c", "--ckpt", nargs="+", required=True, help="weights files, side by side")
    tsne.add_argument("--samples", type=int, default=2000, help="of the test set, at most (default: 2000)")
    tsne.add_argument("--classes", type=int, default=0, metavar="N", help="only the first N classes")
    tsne.add_argument("--perplexity", type=float, default=30.0)
    tsne.add_argument("--seed", type=int, default=0)
    tsne.add_argument("--engine", choices=["sklearn", "opentsne"], default="sklearn")
    correlation = figures.add_parser("correlation", help="class correlations against the teacher's (Fig. 5)")
    correlation.add_argument("-t", "--teacher", required=True, help="its weights file")
    correlation.add_argument("-tm", "--teacher-model", default="", help="its name; a student_*.pt knows it")
    correlation.add_argument("-c", "--ckpt", nargs="+", required=True, help="weights files of students")
    logits = figures.add_parser("logits", help="softened logits of a teacher (Fig. 1 and 3)")
    logits.add_argument("-c", "--ckpt", required=True, help="weights file")
    logits.add_argument("--sample", type=int, default=0, help="position in the test set")
    logits.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    logits.add_argument("--fixed", type=float, default=4.0, help="T of the data set's picture (default: 4)")
    logits.add_argument("--t-norm", type=float, default=2.0)
    logits.add_argument("--tolerance", type=float, default=1.25, help="factor that counts as too much (default: 1.25)")
    curves = figures.add_parser("curves", help="learning curves of runs")
    curves.add_argument("runs", nargs="+", help="run folders, or records of the ledger")
    for sub in (tsne, correlation, logits, curves):
        sub.add_argument("--out", default="", metavar="STEM", help="default: output/figures/FIGURE")
        sub.add_argument("--data", action="store_true", help="write what is drawn as JSON too")
        sub.add_argument("--names", nargs="+", default=[], help="labels, one each")
    for sub in (tsne, correlation, logits):
        _add_network_options(sub)


def main(options: argparse.Namespace) -> int:
    """Run the command ``visualize``."""
    paths = [Path(path) for path in (options.runs if options.figure == "curves" else _as_list(options.ckpt))]
    if options.names and len(options.names) != len(paths):
        raise ConfigError(f"--names has {len(options.names)} names for {len(paths)} files")
    stem = Path(options.out or Path("output", "figures", options.figure))
    if not stem.name:
        raise ConfigError(f"--out {options.out} names no file: for example figures/{options.figure}")

    from mdistiller_norm.analysis import commands

    for path in commands.make_figure(options, paths, stem):
        print(f"wrote {path}")
    return 0


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
