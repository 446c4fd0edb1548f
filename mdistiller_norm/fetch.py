"""The command ``fetch``: download data sets and teachers to the folders where training searches for them."""

import argparse
from pathlib import Path

from mdistiller_norm import cli
from mdistiller_norm.data.cifar import FOLDERS
from mdistiller_norm.download import Source, obtain, read_sources
from mdistiller_norm.engine.teacher_file import MANIFEST, add_to_manifest
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.registry import Registry


def main(options: argparse.Namespace) -> int:
    """Download the sources, then evaluate the teachers among them; return 1 if one cannot be evaluated."""
    sources = Registry[list[Source]]("source")
    sources.update(read_sources() | (read_sources(options.sources) if options.sources else {}))
    selected = [source for name in options.names for source in sources[name]]
    teachers = [teacher for source in selected for teacher in fetch(source, options.root)]
    results = [_evaluate(*teacher, options.root) for teacher in teachers if not options.no_eval]
    return 0 if all(results) else 1


def fetch(source: Source, root: Path) -> list[tuple[Path, str, str]]:
    """Download a source; return file, model and data set of the teachers in it."""
    folder = root if source.to == "data" else Path(source.to)
    if source.model and folder != MANIFEST.parent:
        raise ConfigError(f"sources of weights must have to: {MANIFEST.parent}, got {source.to}")
    path = obtain(source, folder)
    print(path, flush=True)
    if source.model:
        facts = {"model": source.model, "dataset": source.dataset, "top1": source.top1}
        add_to_manifest(MANIFEST, path, **facts, source=source.urls[0])
        return [(path, source.model, source.dataset)]
    files = sorted(path.glob("*_vanilla/ckpt_epoch_240.pth"))  # of mdistiller's archive
    return [(file, file.parent.name.removesuffix("_vanilla"), "cifar100") for file in files]


def _evaluate(path: Path, model: str, dataset: str, root: Path) -> bool:
    if dataset in FOLDERS and not (root / FOLDERS[dataset]).is_dir():  # would be downloaded
        print(f"{model}: not evaluated, {root} contains no {FOLDERS[dataset]}: {path}")
        return True
    return (
        cli.main(["eval", "-m", model, "-d", dataset, "--root", str(root), "-c", str(path)]) == 0
    )
