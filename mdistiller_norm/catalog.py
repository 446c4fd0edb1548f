"""The command ``list``: networks, methods, data sets and packaged configs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fnmatch import fnmatch

import torch

from mdistiller_norm import data
from mdistiller_norm.distillers import DISTILLERS, Need
from mdistiller_norm.files import CONFIGS
from mdistiller_norm.models import VARIANTS, build_model, count_macs

_SIZES = {"cifar": (32, 100), "imagenet": (224, 1000)}  # image size and number of classes
_NEEDS = {
    Need.NOTHING: "nothing",
    Need.LOGITS: "logits",
    Need.POOLED: "pooled features",
    Need.MAPS: "feature maps",
}
Rows = list[tuple[str, ...]]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(f"{text:{width}}" for text, width in line).rstrip() for line in lines)


def matches(name: str, pattern: str) -> bool:
    """Whether a name contains a pattern, or equals a pattern with wildcards; ignores case."""
    return pattern.lower() in name.lower() or fnmatch(name.lower(), pattern.lower())


def _models(pattern: str) -> Rows:
    rows: Rows = [("name", "variant", "image", "parameters", "MACs")]
    for variant, registry in VARIANTS.items():
        size, classes = _SIZES[variant]
        for name in filter(lambda name: matches(name, pattern), sorted(registry)):
            with torch.device("meta"):
                network = build_model(name, classes, variant=variant)
            parameters = sum(parameter.numel() for parameter in network.parameters())
            macs = count_macs(network, (size, size))
            rows.append((name, variant, f"{size}x{size}", f"{parameters:,}", f"{macs:,}"))
    return rows


def _distillers(pattern: str) -> Rows:
    found = [(name, method) for name, method in DISTILLERS.items() if matches(name, pattern)]
    return [
        ("name", "reads", "method"),
        *((name, _NEEDS[method.need], _summary(method)) for name, method in found),
    ]


def _datasets(pattern: str) -> Rows:
    # The functions of the package have the names of their DATASET.TYPE.
    found = [
        (name, getattr(data, name, opener))
        for name, opener in data.DATASETS.items()
        if matches(name, pattern)
    ]
    return [("name", "content"), *((name, _summary(opener)) for name, opener in found)]


def _summary(documented: object) -> str:
    return (documented.__doc__ or "").partition("\n")[0]


def _configs(pattern: str) -> Rows:
    rows: Rows = [("name", "content")]
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = str(path.relative_to(CONFIGS).with_suffix(""))
        if "_base_" not in path.parts and matches(name, pattern):
            rows.append((name, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")))
    return rows


KINDS = {"models": _models, "distillers": _distillers, "datasets": _datasets, "configs": _configs}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``list``."""
    parser.epilog = f"example: {parser.prog} configs cifar100/normkd"
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument(
        "pattern", nargs="?", default="", help="part of the name, or a pattern with wildcards"
    )


def main(options: argparse.Namespace) -> int:
    """Print the entries of a kind."""
    print(columns(KINDS[options.kind](options.pattern)))
    return 0
