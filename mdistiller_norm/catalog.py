"""The command ``list``: networks, methods, data sets and packaged configs."""

import argparse
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

import torch

from mdistiller_norm import data
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.files import CONFIGS
from mdistiller_norm.models import VARIANTS, build_model, count_macs

_SIZES = {"cifar": (32, 100), "imagenet": (224, 1000)}  # image size and number of classes
Rows = Iterator[tuple[str, ...]]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def matches(name: str, pattern: str) -> bool:
    """Whether a name contains a pattern, or equals a pattern with wildcards; ignores case."""
    return pattern.lower() in name.lower() or fnmatch(name.lower(), pattern.lower())


def _models(pattern: str) -> Rows:
    yield "name", "variant", "image", "parameters", "MACs"
    for variant, registry in VARIANTS.items():
        size, classes = _SIZES[variant]
        for name in filter(lambda name: matches(name, pattern), sorted(registry)):
            with torch.device("meta"):
                network = build_model(name, classes, variant=variant)
            parameters = sum(parameter.numel() for parameter in network.parameters())
            macs = count_macs(network, (size, size))
            yield name, variant, f"{size}x{size}", f"{parameters:,}", f"{macs:,}"


def _distillers(pattern: str) -> Rows:
    yield "name", "reads", "method"
    for name, method in DISTILLERS.items():
        if matches(name, pattern):
            reads = method.need.name.lower() + ", indices" * method.needs_indices
            yield name, reads, _summary(method)


def _datasets(pattern: str) -> Rows:
    yield "name", "content"
    for name, opener in data.DATASETS.items():
        if matches(name, pattern):  # the package's functions have the names of the types
            yield name, _summary(getattr(data, name, opener))


def _configs(pattern: str) -> Rows:
    yield "name", "content"
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = str(path.relative_to(CONFIGS).with_suffix(""))
        if "_base_" not in path.parts and matches(name, pattern):
            yield name, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _summary(documented: object) -> str:
    return (documented.__doc__ or "").partition("\n")[0].replace("``", "")


KINDS = {"models": _models, "distillers": _distillers, "datasets": _datasets, "configs": _configs}


def main(options: argparse.Namespace) -> int:
    """Print the entries of a kind."""
    print(columns(list(KINDS[options.kind](options.pattern))))
    return 0
