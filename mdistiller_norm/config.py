"""Configuration: defaults, then YAML files with ``_BASE_`` inheritance, then ``KEY VALUE`` overrides.

A base that several files share is applied once, at its first place. Values are read as text and converted to their
default's type.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Literal

import yaml
from yacs.config import CfgNode

from mdistiller_norm.config_keys import KEYS, check_value, read_file
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.files import find_config
from mdistiller_norm.registry import import_plugin, suggest

# Sources of overrides: the commands, and `train` and `Distillation` of the library.
OVERRIDES = ("command line", "overrides", "arguments")


@dataclass(frozen=True)
class Config:
    """A frozen tree, and the source of each dotted key: ``default``, the path of a file or one of ``OVERRIDES``."""

    node: CfgNode
    sources: Mapping[str, str]

    @cached_property
    def yaml(self) -> str:
        """The tree as YAML, from which :func:`load_config` loads an equal tree."""
        return dump(self.node)


def default_config() -> CfgNode:
    """Return a new tree of all defaults: the common keys and a node for each registered distiller with defaults."""
    tree: dict[str, Any] = {}
    for key, about in KEYS.items():
        *sections, name = key.split(".")
        reduce(lambda section, part: section.setdefault(part, {}), sections, tree)[name] = (
            about.default
        )
    for name, method in DISTILLERS.items():
        if name in tree or name == "NONE" or not name.isidentifier():
            raise ConfigError(
                f"distiller name {name!r} must be an identifier, and no config section"
            )
        if method.defaults:
            tree[name] = CfgNode(method.defaults)
    return CfgNode(tree)


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    others: Sequence[str] = (),
    plugins: Literal["import", "refuse", "skip"] = "import",
    origin: str = OVERRIDES[0],
) -> Config:
    """Load the defaults, then a YAML file with its bases, then overrides.

    Args:
        path: a file for :func:`~mdistiller_norm.files.find_config`; None for the defaults.
        overrides: ``KEY VALUE`` (two items) or ``KEY=VALUE`` (one item).
        others: methods besides those of ``DISTILLER.TYPE`` whose keys the overrides may set.
        plugins: import those of the config, refuse a config with plugins, or skip them: the keys of their methods are
            then kept as text.
        origin: source of the overrides, one of ``OVERRIDES``.

    Raises:
        ConfigError: a file, key or value is invalid, or an override is for a method that is not used.
    """
    settings = {} if path is None else read_file(find_config(path), set())
    items = iter(overrides)
    for item in items:
        key, equals, value = item.partition("=")
        if (text := value if equals else next(items, None)) is None:
            raise ConfigError(f"{origin}: {key} has no value: overrides are KEY VALUE pairs")
        settings[key] = (text, origin)
    text, source = settings.get("EXPERIMENT.PLUGINS", ("", ""))
    names = check_value("EXPERIMENT.PLUGINS", text, {"EXPERIMENT.PLUGINS": ""}, source)
    names = [name for name in ([names] if isinstance(names, str) else names) if name]
    if names and plugins == "refuse":
        raise ConfigError(f"{source}: --no-plugins refuses EXPERIMENT.PLUGINS {', '.join(names)}")
    if plugins == "import":  # beside the config that names it, else in the working directory
        names = [import_plugin(name, Path(source).parent) for name in names]
    node = default_config()
    defaults = dict(leaves(node, sections=True))
    sources = {key: "default" for key, _ in leaves(node)}
    skipped = bool(names) and plugins == "skip"
    for key, (value, source) in settings.items():
        *sections, name = key.split(".")
        if not (skipped and sections and sections[0] not in defaults):
            value = check_value(key, value, defaults, source)
        reduce(lambda section, part: section.setdefault(part, CfgNode()), sections, node)[
            name
        ] = value
        sources[key] = source
    node.EXPERIMENT.PLUGINS = names or ""
    if "DATASET.RESIZE" not in settings:
        node.DATASET.RESIZE = round(node.DATASET.IMAGE_SIZE * 8 / 7)
    _check_together(node, sources, others, skipped)
    node.freeze()
    return Config(node, sources)


def show(config: Config) -> str:
    """Return the resolved config as YAML with the source of each value; nodes of unused methods are left out."""
    changed = [key.split(".")[0] for key, source in config.sources.items() if source != "default"]
    unused = {*DISTILLERS}.difference(method_names(config.node), changed)
    shown = {name: value for name, value in config.node.items() if name not in unused}
    return dump(shown, config.sources).rstrip("\n")


def dump(node: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> str:
    """Return a tree as YAML, from which :func:`load_config` loads an equal tree, with comments that name sources."""
    style: dict[str, Any] = {"default_flow_style": True, "width": math.inf}
    lines = []
    for key, value in leaves(node, sections=True):
        line = "  " * key.count(".") + key.rsplit(".", 1)[-1] + ":"
        if not isinstance(value, CfgNode):
            # Dumped as a list: YAML ends a document that is a scalar with a mark.
            text = yaml.safe_dump([value], **style, allow_unicode=True)
            if len(text.splitlines()) > 1:
                text = yaml.safe_dump([value], **style, default_style='"')
            line += f" {text[1:-2]}"
        elif not value:
            line += " {}"
        lines.append((line, (sources or {}).get(key, "")))
    width = max(len(line) for line, _ in lines)
    return "".join(
        f"{line:<{width}}  # {source}\n" if source else f"{line}\n" for line, source in lines
    )


def method_names(tree: Mapping[str, Any]) -> list[str]:
    """Return the distillers in ``DISTILLER.TYPE`` of a config or of a record's config."""
    types = tree["DISTILLER"]["TYPE"]
    return [name for name in ([types] if isinstance(types, str) else types) if name != "NONE"]


def leaves(
    tree: Mapping[str, Any], sections: bool = False, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of a config or of a record's config with its value, with or without the sections."""
    for name, value in tree.items():
        is_section = isinstance(value, Mapping)
        if sections or not is_section:
            yield prefix + name, value
        if is_section:
            yield from leaves(value, sections, f"{prefix}{name}.")


def _check_together(
    node: CfgNode, sources: Mapping[str, str], others: Sequence[str], skipped: bool
) -> None:
    used = method_names(node)
    types = f"DISTILLER.TYPE ({sources['DISTILLER.TYPE']})"
    name = next((name for name in used if name not in DISTILLERS), "")
    if name and not skipped:
        raise ConfigError(
            f"{types}: unknown distiller {name!r}: {suggest(name, ['NONE', *DISTILLERS])}"
        )
    for key, source in sources.items():
        section = key.split(".")[0]
        if source in OVERRIDES and section in DISTILLERS and section not in (*used, *others):
            raise ConfigError(
                f"{source}: {key} has no effect: {types} is {', '.join(used) or 'NONE'}"
            )
    if not (node.EXPERIMENT.NAME or node.EXPERIMENT.TAG):
        raise ConfigError(
            f"EXPERIMENT.NAME or TAG ({sources['EXPERIMENT.TAG']}) must not be empty"
        )
    solver, got = node.SOLVER, f"got {node.SOLVER.MOMENTUM:g} ({sources['SOLVER.MOMENTUM']})"
    if solver.NESTEROV and solver.MOMENTUM == 0:
        raise ConfigError(f"SOLVER.MOMENTUM must be > 0 with NESTEROV, {got}")
    delta = solver.DOT.DELTA
    if solver.TRAINER.endswith("dot") and not 0 <= delta < min(
        solver.MOMENTUM, 1 - solver.MOMENTUM
    ):
        got += f" and {delta:g} ({sources['SOLVER.DOT.DELTA']})"
        raise ConfigError(f"SOLVER.MOMENTUM -/+ SOLVER.DOT.DELTA must be in (0, 1), {got}")
