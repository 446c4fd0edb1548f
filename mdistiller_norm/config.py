"""Configuration: defaults, then YAML files with ``_BASE_`` inheritance, then ``KEY VALUE`` overrides.

The keys are a superset of those of mdistiller and of its NormKD fork, so their YAML files load unchanged.

``_BASE_: ../base.yaml`` (or a list) names files relative to the file. Later bases override earlier ones and the file
overrides its bases; a base that several files share is applied once, at its first place. Keys are nested
(``SOLVER: {LR: 0.1}``) or dotted (``SOLVER.LR: 0.1``). Values are read as text and converted to their default's type.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import yaml
from yacs.config import CfgNode

from mdistiller_norm.config_text import Settings, TextLoader, read_file
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.distillers.temperature import STATISTICS, WEIGHTINGS
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.files import find_config
from mdistiller_norm.plugins import import_plugin
from mdistiller_norm.program import command
from mdistiller_norm.registry import nearest, not_registered, suggest

Check = tuple[str, Callable[[Any], bool]]  # a requirement, and the function that tests it


def _one_of(*names: str) -> Check:
    return f"one of {', '.join(names)}", names.__contains__


_ANY: Check = ("anything", lambda x: True)
_POSITIVE: Check = ("> 0", lambda x: x > 0)
_AT_LEAST_0: Check = (">= 0", lambda x: x >= 0)
_AT_LEAST_1: Check = (">= 1", lambda x: x >= 1)
_SEED: Check = ("in [0, 2**63)", lambda x: 0 <= x < 2**63)
_FRACTION: Check = ("in [0, 1)", lambda x: 0 <= x < 1)
_RATE: Check = ("in (0, 1]", lambda x: 0 < x <= 1)
_TEMPERATURE: Check = ("> 0", lambda x: min(x if isinstance(x, list) else [x]) > 0)
_HALF: Check = ("in [0, 0.5]", lambda x: 0 <= x <= 0.5)
_UTF8: Check = ("valid UTF-8", lambda x: x.encode() is not None)  # raises a ValueError
_FOLDER: Check = ("the name of one folder, without /", lambda x: "/" not in x and x not in (".", ".."))
_PROJECT: Check = (
    "the name of one folder, without /",
    lambda x: b"/" not in x.encode() and x not in ("", ".", ".."),
)
_MEANS: Check = (
    "three numbers in [0, 1], or empty",
    lambda x: len(x) in (0, 3) and all(0 <= v <= 1 for v in x),
)
_DEVIATIONS: Check = (
    "three numbers in (0, 1], or empty",
    lambda x: len(x) in (0, 3) and all(0 < v <= 1 for v in x),
)
_CROP: Check = (
    "two areas with 0 < smallest <= largest <= 1",
    lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1,
)
_EPOCHS: Check = ("increasing epochs >= 1", lambda x: x == sorted(set(x)) and min(x, default=1) >= 1)
_METHODS: Check = (
    "NONE or different methods",
    lambda x: isinstance(x, str) or len({"NONE", *x}) == len(x) + 1,
)

# Key -> default, help and check. Every registered distiller adds a node under its name, see default_config.
KEYS: dict[str, tuple[Any, str, Check]] = {
    "EXPERIMENT.PROJECT": ("distill", "folder of the runs, under LOG.PREFIX", _PROJECT),
    "EXPERIMENT.NAME": ("", "name of the run; empty: TAG and the keys changed on the command line", _FOLDER),
    "EXPERIMENT.TAG": ("default", "comma-separated words that describe the run", _FOLDER),
    "EXPERIMENT.PLUGINS": ("", "Python file or files that register networks, data sets and methods", _ANY),
    "DATASET.TYPE": ("cifar100", "data set", _ANY),
    "DATASET.ROOT": ("data", "folder of the data sets; of image files or shards: their folder", _ANY),
    "DATASET.NUM_WORKERS": (
        2,
        "processes that load images in training, and as many in evaluation",
        _AT_LEAST_0,
    ),
    "DATASET.IMAGE_SIZE": (224, "image files: height and width of the networks' input", _AT_LEAST_1),
    "DATASET.RESIZE": (
        256,
        "image files: shorter side before the central crop of an evaluation",
        _AT_LEAST_1,
    ),
    "DATASET.CROP_SCALE": ([0.08, 1.0], "image files: smallest and largest area of a random crop", _CROP),
    "DATASET.MEAN": ([], "image files: channel means; empty: ImageNet's (image_folder: measured)", _MEANS),
    "DATASET.STD": ([], "image files: channel standard deviations; empty: as for MEAN", _DEVIATIONS),
    "DATASET.CLASSES": ([], "image files: class folders, in order; empty: all, sorted", _ANY),
    "DATASET.VARIANT": (
        "auto",
        "networks; auto: imagenet above 64 pixels",
        _one_of("auto", "cifar", "imagenet"),
    ),
    "DATASET.MAX_BROKEN": (10, "image files: unreadable images to replace before the run fails", _AT_LEAST_0),
    "DATASET.VAL_SPLIT": (0.0, "data in memory: part of the training set to evaluate on", _HALF),
    "DATASET.TEST.BATCH_SIZE": (64, "images per batch of an evaluation", _AT_LEAST_1),
    "DISTILLER.TYPE": (
        "NONE",
        "method or list of methods whose losses are added; NONE: no teacher",
        _METHODS,
    ),
    "DISTILLER.TEACHER": ("ResNet50", "model name of the teacher", _ANY),
    "DISTILLER.STUDENT": ("resnet32", "model name of the student", _ANY),
    "DISTILLER.TEACHER_WEIGHTS": ("", "file, torchvision:NAME, or pretrained; empty: search for it", _ANY),
    "DISTILLER.TEACHER_CACHE": ("off", "store the teacher's outputs on disk", _one_of("off", "lazy", "full")),
    "DISTILLER.TEACHER_CACHE_PRECISION": ("fp32", "precision of the teacher cache", _one_of("fp32", "fp16")),
    "SOLVER.TRAINER": (
        "base",
        "dot: DOT's two momenta; crd: as base",
        _one_of("base", "crd", "dot", "crd_dot"),
    ),
    "SOLVER.BATCH_SIZE": (64, "images per batch, over all processes", _AT_LEAST_1),
    "SOLVER.EPOCHS": (240, "passes over the training set", _AT_LEAST_1),
    "SOLVER.LR": (0.05, "initial learning rate", _POSITIVE),
    "SOLVER.LR_DECAY_STAGES": ([150, 180, 210], "epochs after which the learning rate decays", _EPOCHS),
    "SOLVER.LR_DECAY_RATE": (0.1, "factor of each decay", _RATE),
    "SOLVER.WEIGHT_DECAY": (1e-4, "weight decay of every parameter", _AT_LEAST_0),
    "SOLVER.MOMENTUM": (0.9, "momentum of SGD", _FRACTION),
    "SOLVER.NESTEROV": (False, "Nesterov momentum (on in the NormKD paper, off in mdistiller)", _ANY),
    "SOLVER.TYPE": ("SGD", "optimizer", _one_of("SGD")),
    "SOLVER.PRECISION": ("fp32", "precision of the networks", _one_of("fp32", "bf16", "fp16")),
    "SOLVER.ACCUMULATE": (1, "micro-batches per update and process", _AT_LEAST_1),
    "SOLVER.SYNC_BN": (False, "batch norm over the batch of all processes (CUDA only)", _ANY),
    "SOLVER.TIMEOUT": (600, "seconds that a process waits for the others before the run fails", _AT_LEAST_1),
    "SOLVER.DOT.DELTA": (0.075, "DOT: the momenta of the two losses are MOMENTUM -/+ DELTA", _ANY),
    "ENGINE.COMPILE": ("auto", "auto: the teacher of a long run", _one_of("auto", "none", "teacher", "all")),
    "ENGINE.CUDA_GRAPH": ("auto", "record a step as a CUDA graph", _one_of("auto", "on", "off")),
    "ENGINE.DETERMINISTIC": (
        False,
        "bit-identical results on CUDA, at a cost in speed (on the CPU always)",
        _ANY,
    ),
    "LOG.TENSORBOARD_FREQ": (500, "steps between two scalars of the training loss", _AT_LEAST_1),
    "LOG.CHECKPOINT_STEPS": (
        0,
        "steps between two saves of latest.pt in an epoch; 0: one per epoch",
        _AT_LEAST_0,
    ),
    "LOG.SAVE_CHECKPOINT_FREQ": (40, "epochs between two student_<epoch>.pt", _AT_LEAST_1),
    "LOG.PREFIX": ("./output", "folder of all projects", _UTF8),
    "LOG.WANDB": (False, "log to Weights & Biases too", _ANY),
    "SEED": (0, "seed of initialisation, order, augmentation and negatives", _SEED),
    "DEVICE": ("auto", "auto, cpu, cuda or cuda:N", _ANY),
}
# Last part of a key in the node of a method -> check.
_METHOD_KEYS: dict[str, Check] = {
    **dict.fromkeys(("T", "TEMPERATURE", "TEMPERATURE_NORM", "ALPHA_T", "T_START"), _TEMPERATURE),
    **dict.fromkeys(("CE_WEIGHT", "KD_WEIGHT", "FEAT_WEIGHT", "REVIEWKD_WEIGHT", "ALPHA", "BETA"), _AT_LEAST_0),
    **dict.fromkeys(("K", "DIM", "P"), _AT_LEAST_1),
    "MOMENTUM": _FRACTION, "STATISTIC": _one_of(*STATISTICS), "WEIGHTING": _one_of(*WEIGHTINGS),
}  # fmt: skip
# Removed key -> its old default, which stored configs may contain, and the replacement.
_SEEDS = f"run one command for each SEED, or {command('reproduce')} --trials N"
REMOVED: dict[str, tuple[Any, str]] = {
    "SOLVER.TRIALS": (1, _SEEDS),
    "SOLVER.TRIALS_MODE": ("processes", _SEEDS),
    "SOLVER.INIT_SEED": (-1, "set SEED"),
    "DATASET.DECODE": ("cpu", "raise DATASET.NUM_WORKERS"),
}
_ONE_OR_SEVERAL = (
    "DISTILLER.TYPE",
    "EXPERIMENT.PLUGINS",
    "KD.TEMPERATURE",
)  # keys of a value or a list of values
_PATHS = (
    "DATASET.ROOT",
    "DISTILLER.TEACHER_WEIGHTS",
    "EXPERIMENT.PLUGINS",
    "LOG.PREFIX",
)  # ~ is the home folder
_ITEMS: dict[str, Any] = {
    "DATASET.MEAN": 0.0,
    "DATASET.STD": 0.0,
    "DATASET.CLASSES": "",
}  # items of empty defaults
_TYPES = {bool: "true or false", int: "an integer", float: "a finite number", str: "valid text"}
_COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Config:
    """A frozen tree, and the source of each dotted key: ``default``, the path of a file or ``command line``."""

    node: CfgNode
    sources: Mapping[str, str]


def default_config() -> CfgNode:
    """Return a new tree of all defaults: the common keys and a node for each registered distiller with defaults."""
    tree: dict[str, Any] = {}
    for key, (default, _, _) in KEYS.items():
        *sections, name = key.split(".")
        reduce(lambda section, part: section.setdefault(part, {}), sections, tree)[name] = default
    for name, method in DISTILLERS.items():
        if name in tree or name == "NONE" or not name.isidentifier():
            raise ConfigError(f"distiller name {name!r} must be an identifier that is no key of the config")
        if method.defaults:
            tree[name] = CfgNode(method.defaults)
    return CfgNode(tree)


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    others: Sequence[str] = (),
    stored: bool = False,
    plugins: Literal["import", "refuse", "skip"] = "import",
) -> Config:
    """Load the defaults, then a YAML file with its bases, then overrides.

    Args:
        path: a file for :func:`~mdistiller_norm.files.find_config`; None for the defaults.
        overrides: ``KEY VALUE`` (two items) or ``KEY=VALUE`` (one item).
        others: methods besides those of ``DISTILLER.TYPE`` whose keys the overrides may set.
        stored: whether a run wrote the file, which may then contain removed keys at their old defaults.
        plugins: import those of the config, refuse a config with plugins, or skip them: the keys of their methods are
            then kept as text.

    Raises:
        ConfigError: a file, key or value is invalid, or an override is for a method that is not used.
    """
    settings = {} if path is None else read_file(find_config(path), set())
    settings |= _parse_overrides(overrides)
    names, source = settings.get("EXPERIMENT.PLUGINS", ("", ""))
    names = _checked("EXPERIMENT.PLUGINS", names, {"EXPERIMENT.PLUGINS": ""}, source)
    names = [name for name in ([names] if isinstance(names, str) else names) if name]
    if names and plugins == "refuse":
        raise ConfigError(
            f"{source}: EXPERIMENT.PLUGINS would import {', '.join(names)}, refused by --no-plugins"
        )
    if plugins == "import":  # searched beside the config that names it, then in the working directory
        names = [import_plugin(name, Path(source).parent) for name in names]
    node = default_config()
    defaults = dict(leaves(node, sections=True))
    sources = {key: "default" for key, _ in leaves(node)}
    skipped = bool(names) and plugins == "skip"
    for key, (value, source) in settings.items():
        if stored and key in REMOVED and value == str(REMOVED[key][0]):
            continue
        *sections, name = key.split(".")
        if not (skipped and sections and sections[0] not in defaults):
            value = _checked(key, value, defaults, source)
        reduce(lambda section, part: section.setdefault(part, CfgNode()), sections, node)[name] = value
        sources[key] = source
    node.EXPERIMENT.PLUGINS = names or ""
    _check_together(node, sources, others, skipped)
    node.freeze()
    return Config(node, sources)


def show(config: Config) -> str:
    """Return the resolved config as YAML with the source of each value; nodes of unused methods are left out."""
    used = set(method_names(config.node))
    used |= {key.split(".")[0] for key, source in config.sources.items() if source != "default"}
    shown = {name: value for name, value in config.node.items() if name not in DISTILLERS or name in used}
    return dump(shown, config.sources).rstrip("\n")


def dump(node: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> str:
    """Return a tree as YAML, from which :func:`load_config` loads an equal tree, with comments that name sources."""
    lines = []
    for key, value in leaves(node, sections=True):
        line = "  " * key.count(".") + key.rsplit(".", 1)[-1] + ":"
        if not isinstance(value, CfgNode):
            # Dumped as a list: YAML ends a document that is a scalar with a mark.
            text = yaml.safe_dump([value], default_flow_style=True, width=math.inf, allow_unicode=True)
            if len(text.splitlines()) > 1:
                text = yaml.safe_dump([value], default_flow_style=True, width=math.inf, default_style='"')
            line += f" {text[1:-2]}"
        elif not value:
            line += " {}"
        lines.append((line, (sources or {}).get(key, "")))
    width = max(len(line) for line, _ in lines)
    return "".join((f"{line:<{width}}  # {source}" if source else line) + "\n" for line, source in lines)


def method_names(tree: Mapping[str, Any]) -> list[str]:
    """Return the distillers in ``DISTILLER.TYPE`` of a config or of a record's config."""
    types = tree["DISTILLER"]["TYPE"]
    return [name for name in ([types] if isinstance(types, str) else types) if name != "NONE"]


def leaves(tree: Mapping[str, Any], sections: bool = False, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of a config or of a record's config with its value, with or without the sections."""
    for name, value in tree.items():
        is_section = isinstance(value, Mapping)
        if sections or not is_section:
            yield prefix + name, value
        if is_section:
            yield from leaves(value, sections, f"{prefix}{name}.")


def _parse_overrides(overrides: Sequence[str]) -> Settings:
    settings: Settings = {}
    items = iter(overrides)
    for item in items:
        key, equals, value = item.partition("=")
        text = value if equals else next(items, None)
        if text is None:
            raise ConfigError(f"{_COMMAND_LINE}: {key} has no value: overrides are KEY VALUE pairs")
        settings[key] = (text, _COMMAND_LINE)
    return settings


def _checked(key: str, value: Any, defaults: Mapping[str, Any], source: str) -> Any:
    """Return a setting's value in the type of its default, or raise ConfigError."""
    if key not in defaults:
        same_name = [
            known for known in defaults if known.lower().endswith(f".{key.rpartition('.')[2].lower()}")
        ]
        near = (nearest(key, same_name) or same_name or nearest(key, defaults))[:3]
        hint = not_registered(key.split(".")[0]) or (f"did you mean {' or '.join(near)}?" if near else "")
        hint = f"it was removed, {REMOVED[key][1]}" if key in REMOVED else hint
        raise ConfigError(f"{source}: unknown key {key}{': ' * bool(hint)}{hint}")
    default = defaults[key]
    if isinstance(default, CfgNode):
        raise ConfigError(
            f"{source}: {key} is a section: set one of its keys, such as {key}.{next(iter(default), '')}"
        )
    requirement, holds = KEYS[key][2] if key in KEYS else _METHOD_KEYS.get(key.rpartition(".")[2], _ANY)
    is_list = isinstance(default, list | tuple)
    item = default if not is_list else default[0] if default else _ITEMS.get(key)
    several = is_list or key in _ONE_OR_SEVERAL
    result: Any
    try:
        if several and isinstance(value, str) and re.fullmatch(r"\s*(\[.*\]|\(.*\))\s*", value, re.DOTALL):
            value = yaml.load(f"[{value.strip()[1:-1]}]", TextLoader)
        if isinstance(value, list) and (is_list or (several and value)):
            result = (tuple if isinstance(default, tuple) else list)(_convert(each, item) for each in value)
        else:
            result = _convert(value, default)
        valid = holds(result)
    except (TypeError, ValueError, KeyError, RecursionError, yaml.YAMLError):
        kind = _TYPES.get(type(item), "a value")
        valid, requirement = False, f"a list (each item {kind})" if is_list else kind
    if not valid:
        items = (
            value if isinstance(value, list) else [value or "''"]
        )  # of nested lists, aliases can make large ones
        got = ", ".join(item if isinstance(item, str) else "[...]" for item in items)
        raise ConfigError(
            f"{source}: {key} must be {requirement}, got {f'[{got}]' if value is items else got}"
        )
    if key in _PATHS:
        result = (
            os.path.expanduser(result) if isinstance(result, str) else [os.path.expanduser(x) for x in result]
        )
    return result


def _convert(text: Any, default: Any) -> Any:
    """Return text in the type of a default, or raise TypeError, ValueError or KeyError."""
    if not isinstance(text, str) or isinstance(default, list | tuple) or "\0" in text:
        raise TypeError
    os.fsencode(text)  # raises a ValueError for lone surrogates
    if default is None:
        return yaml.safe_load(text)
    if isinstance(default, bool):
        return yaml.SafeLoader.bool_values[text.lower()]
    result = type(default)(text)
    if not isinstance(result, str) and not -math.inf < result < math.inf:
        raise ValueError
    return result


def _check_together(node: CfgNode, sources: Mapping[str, str], others: Sequence[str], skipped: bool) -> None:
    """Check values that depend on each other or on the registered methods."""
    used = method_names(node)
    types = f"DISTILLER.TYPE ({sources['DISTILLER.TYPE']})"
    for name in used:
        if name not in DISTILLERS and not skipped:
            raise ConfigError(f"{types}: unknown distiller {name!r}: {suggest(name, ['NONE', *DISTILLERS])}")
    for key, source in sources.items():
        section = key.split(".")[0]
        if source == _COMMAND_LINE and section in DISTILLERS and section not in (*used, *others):
            raise ConfigError(f"{source}: {key} has no effect: {types} is {', '.join(used) or 'NONE'}")
    if not (node.EXPERIMENT.NAME or node.EXPERIMENT.TAG):
        raise ConfigError(f"EXPERIMENT.NAME or TAG ({sources['EXPERIMENT.TAG']}) must not be empty")
    solver, got = node.SOLVER, f"got {node.SOLVER.MOMENTUM:g} ({sources['SOLVER.MOMENTUM']})"
    if solver.NESTEROV and solver.MOMENTUM == 0:
        raise ConfigError(f"SOLVER.MOMENTUM must be > 0 with NESTEROV ({sources['SOLVER.NESTEROV']}), {got}")
    delta = solver.DOT.DELTA
    if solver.TRAINER.endswith("dot") and not 0 <= delta < min(solver.MOMENTUM, 1 - solver.MOMENTUM):
        where = sources["SOLVER.DOT.DELTA"]
        raise ConfigError(
            f"SOLVER.MOMENTUM -/+ SOLVER.DOT.DELTA must be in (0, 1), {got} and {delta:g} ({where})"
        )
