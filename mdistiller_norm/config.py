"""Configuration: a YACS tree of defaults, YAML files with ``_BASE_`` inheritance on top, ``KEY VALUE`` overrides last.

The keys are a superset of mdistiller's and of its NormKD fork's, so their YAML files load unchanged. What is
in ``engine``, ``data`` and ``models`` does not see the tree and takes explicit arguments.

A YAML file may name its bases: ``_BASE_: ../base.yaml`` or a list, relative to the file. Later bases override earlier
ones, the file overrides its bases; a base reached on two ways counts once, where it is reached first. Keys are nested
(``SOLVER: {LR: 0.1}``) or dotted (``SOLVER.LR: 0.1``).
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from mdistiller_norm.config_text import Setting, read_settings
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.plugins import import_plugin
from mdistiller_norm.registry import nearest

# Key -> default and what it means. Every registered distiller adds a node under its own name: see default_config.
_KEYS: dict[str, tuple[Any, str]] = {
    "EXPERIMENT.PROJECT": ("distill", "folder of the runs, under LOG.PREFIX"),
    "EXPERIMENT.NAME": ("", "name of the run; empty for its TAG and what the command line changed"),
    "EXPERIMENT.TAG": ("default", "comma-separated words that describe the run"),
    "EXPERIMENT.PLUGINS": ("", "Python file or files that register networks, data sets and methods of one's own"),
    "DATASET.TYPE": ("cifar100", "data set"),
    "DATASET.ROOT": ("data", "folder that holds the data sets; of image files, or shards, their own"),
    "DATASET.NUM_WORKERS": (
        2,
        "processes that read images in training, and as many in evaluation (data in memory: none)",
    ),
    "DATASET.IMAGE_SIZE": (224, "image files: height and width of what the networks see"),
    "DATASET.RESIZE": (256, "image files: length of the shorter side before an evaluation's central crop"),
    "DATASET.CROP_SCALE": ([0.08, 1.0], "image files: least and largest share of the area in a random crop"),
    "DATASET.MEAN": ([], "image files: mean of the channels; empty for ImageNet's (image_folder: measured)"),
    "DATASET.STD": ([], "image files: standard deviation of the channels; empty as for MEAN"),
    "DATASET.CLASSES": ([], "image files: names of the class folders, in order; empty for all of them, sorted"),
    "DATASET.VARIANT": ("auto", "image files: family of networks; auto: imagenet above 64 pixels, else cifar"),
    "DATASET.DECODE": ("cpu", "image files: who decodes for training: cpu (workers), cuda or device (whole batches)"),
    "DATASET.MAX_BROKEN": (10, "image files: unreadable ones that are replaced by others before the run fails"),
    "DATASET.VAL_SPLIT": (0.0, "data in memory: part of the training set that is held out and evaluated on; 0: none"),
    "DATASET.TEST.BATCH_SIZE": (64, "images in a batch of the evaluation"),
    "DISTILLER.TYPE": ("NONE", "method, or a list of methods whose losses add up; NONE trains the student alone"),
    "DISTILLER.TEACHER": ("ResNet50", "teacher's model name"),
    "DISTILLER.STUDENT": ("resnet32", "student's model name"),
    "DISTILLER.TEACHER_WEIGHTS": ("", "teacher's checkpoint or torchvision:NAME; empty to look it up"),
    "DISTILLER.TEACHER_CACHE": ("off", "keep the teacher's answers: off, lazy (as met) or full (ahead of step 1)"),
    "DISTILLER.TEACHER_CACHE_PRECISION": ("fp32", "numbers of the teacher cache: fp32, or fp16 in half the space"),
    "SOLVER.TRAINER": ("base", "base, or dot for DOT's two momenta; crd and crd_dot mean the same here"),
    "SOLVER.BATCH_SIZE": (64, "images in a batch, over all processes"),
    "SOLVER.EPOCHS": (240, "passes over the training set"),
    "SOLVER.LR": (0.05, "initial learning rate"),
    "SOLVER.LR_DECAY_STAGES": ([150, 180, 210], "epochs, counted from 1, after which the learning rate decays"),
    "SOLVER.LR_DECAY_RATE": (0.1, "factor of each decay"),
    "SOLVER.WEIGHT_DECAY": (1e-4, "weight decay on every parameter"),
    "SOLVER.MOMENTUM": (0.9, "momentum of SGD"),
    "SOLVER.NESTEROV": (False, "Nesterov momentum: the NormKD paper says yes, its code and mdistiller's say no"),
    "SOLVER.TYPE": ("SGD", "optimizer"),
    "SOLVER.TRIALS": (1, "runs with the seeds SEED, SEED + 1, ... side by side"),
    "SOLVER.TRIALS_MODE": (
        "processes",
        "processes: each with its order of the data; lockstep: one process, one order",
    ),
    "SOLVER.INIT_SEED": (-1, "seed of the initial weights; -1: SEED"),
    "SOLVER.PRECISION": ("fp32", "arithmetic of the networks; losses are float32 in any case"),
    "SOLVER.ACCUMULATE": (1, "parts of a batch that a process trains on one after the other, for one update"),
    "SOLVER.SYNC_BN": (False, "batch norm over the batch of all processes (CUDA only)"),
    "SOLVER.TIMEOUT": (600, "seconds that a process waits for the others before the run fails"),
    "SOLVER.DOT.DELTA": (0.075, "DOT: the momenta of both losses are MOMENTUM -/+ DELTA"),
    "ENGINE.COMPILE": ("auto", "what to compile: none, teacher, all, or auto (the teacher of a long run)"),
    "ENGINE.CUDA_GRAPH": ("auto", "record a training step as one CUDA graph: auto (on CUDA), on or off"),
    "ENGINE.DETERMINISTIC": (False, "on CUDA, the same bits in every run, at a cost in speed (on the CPU always)"),
    "LOG.TENSORBOARD_FREQ": (500, "steps between two scalars of the training loss"),
    "LOG.CHECKPOINT_STEPS": (0, "steps between two states of latest.pt within an epoch; 0 for one an epoch"),
    "LOG.SAVE_CHECKPOINT_FREQ": (40, "epochs between two student_<epoch>.pt"),
    "LOG.PREFIX": ("./output", "folder of all projects"),
    "LOG.WANDB": (False, "log to Weights & Biases too"),
    "SEED": (0, "seed of all that is random: initialisation, order, augmentation, negatives"),
    "DEVICE": ("auto", "auto, cpu, cuda or cuda:N"),
}
HELP: dict[str, str] = {key: text for key, (_, text) in _KEYS.items()}

# These take one value of their default's type, or a list of such values.
_ONE_OR_SEVERAL = {"DISTILLER.TYPE", "EXPERIMENT.PLUGINS", "KD.TEMPERATURE"}


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    text: str


def _one_of(*names: str) -> _Rule:
    return _Rule(lambda value: value in names, f"one of {', '.join(names)}")


_AT_LEAST_1 = _Rule(lambda value: value >= 1, "at least 1")
_POSITIVE = _Rule(lambda value: value > 0, "positive")
MOST_TRIALS = 1000  # more is a slip of the keyboard
# A path of more than one part would leave LOG.PREFIX, or hide a run from those who look for it two folders down.
_FOLDER = _Rule(
    lambda name: not set(name) & {"/", "\0"} and name not in (".", ".."), "the name of one folder, without /"
)
_NOT_NEGATIVE = _Rule(lambda value: value >= 0, "zero or positive")
_CHANNELS = _Rule(
    lambda values: not values or (len(values) == 3 and all(type(x) in (int, float) and 0 < x < 1 for x in values)),
    "three numbers in (0, 1), or empty",
)
_RULES: dict[str, _Rule] = {
    "EXPERIMENT.PROJECT": _Rule(lambda name: name != "" and _FOLDER.holds(name), f"{_FOLDER.text} and not empty"),
    "EXPERIMENT.NAME": _FOLDER,
    "EXPERIMENT.TAG": _FOLDER,
    "DATASET.NUM_WORKERS": _NOT_NEGATIVE,
    "DATASET.IMAGE_SIZE": _AT_LEAST_1,
    "DATASET.RESIZE": _AT_LEAST_1,
    "DATASET.CROP_SCALE": _Rule(lambda s: len(s) == 2 and 0 < s[0] <= s[1] <= 1, "two shares, 0 < least <= most <= 1"),
    "DATASET.MEAN": _CHANNELS,
    "DATASET.STD": _CHANNELS,
    "DATASET.CLASSES": _Rule(lambda names: all(isinstance(name, str) for name in names), "names of folders"),
    "DATASET.VARIANT": _one_of("auto", "cifar", "imagenet"),
    "DATASET.DECODE": _one_of("cpu", "cuda", "device"),
    "DATASET.MAX_BROKEN": _NOT_NEGATIVE,
    "DATASET.VAL_SPLIT": _Rule(lambda value: 0 <= value <= 0.5, "in [0, 0.5]"),
    "DATASET.TEST.BATCH_SIZE": _AT_LEAST_1,
    "SOLVER.TRAINER": _one_of("base", "crd", "dot", "crd_dot"),
    "SOLVER.BATCH_SIZE": _AT_LEAST_1,
    "SOLVER.EPOCHS": _AT_LEAST_1,
    "SOLVER.LR": _POSITIVE,
    "SOLVER.LR_DECAY_STAGES": _Rule(
        lambda stages: stages == sorted(set(stages)) and min(stages, default=1) >= 1,
        "strictly increasing epochs, counted from 1",
    ),
    "SOLVER.LR_DECAY_RATE": _POSITIVE,
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.MOMENTUM": _Rule(lambda value: 0 <= value < 1, "in [0, 1)"),
    "SOLVER.TYPE": _one_of("SGD"),
    "SOLVER.ACCUMULATE": _AT_LEAST_1,
    "SOLVER.TIMEOUT": _AT_LEAST_1,
    "SOLVER.TRIALS": _Rule(lambda value: 1 <= value <= MOST_TRIALS, f"in 1 .. {MOST_TRIALS}"),
    "SOLVER.TRIALS_MODE": _one_of("processes", "lockstep"),
    "SOLVER.INIT_SEED": _Rule(lambda value: -1 <= value < 2**63, "a seed below 2**63, or -1"),
    "SOLVER.PRECISION": _one_of("fp32", "bf16", "fp16"),
    "DISTILLER.TEACHER_CACHE": _one_of("off", "lazy", "full"),
    "DISTILLER.TEACHER_CACHE_PRECISION": _one_of("fp32", "fp16"),
    "ENGINE.COMPILE": _one_of("auto", "none", "teacher", "all"),
    "ENGINE.CUDA_GRAPH": _one_of("auto", "on", "off"),
    "LOG.TENSORBOARD_FREQ": _AT_LEAST_1,
    "LOG.CHECKPOINT_STEPS": _NOT_NEGATIVE,
    "LOG.SAVE_CHECKPOINT_FREQ": _AT_LEAST_1,
    "SEED": _Rule(lambda value: 0 <= value < 2**63, "zero or positive, and below 2**63"),
}


@dataclass(frozen=True)
class Config:
    """A resolved configuration.

    Attributes:
        node: the tree, frozen.
        sources: dotted key -> where its value comes from: ``default``, a file's path, or ``command line``.
    """

    node: CfgNode
    sources: Mapping[str, str]


def default_config() -> CfgNode:
    """A fresh tree of all defaults: the common keys, and one node for each registered distiller that has any.

    Raises:
        ConfigError: a distiller's name or defaults cannot be those of a node.
    """
    tree: dict[str, Any] = {}
    for key, (default, _) in _KEYS.items():
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = default
    for name, cls in DISTILLERS.items():
        if name in tree or name == "NONE" or not name.isidentifier():
            raise ConfigError(f"distiller {name!r} cannot be called so: use letters, digits and _, and no key's name")
        if cls.defaults:
            try:
                tree[name] = CfgNode(cls.defaults)
            except AssertionError as error:
                raise ConfigError(f"distiller {name!r} has defaults that a config cannot hold: {error}") from error
    return CfgNode(tree)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), others: Sequence[str] = ()) -> Config:
    """The defaults, then a YAML file with its bases, then overrides.

    Args:
        path: the file; None for the defaults.
        overrides: from the command line, each ``KEY VALUE`` (two items) or ``KEY=VALUE`` (one); values are YAML.
        others: methods beside those of ``DISTILLER.TYPE`` that the overrides may be meant for, of a command that runs
            several configs.

    Raises:
        ConfigError: names the file and line, the key, what was expected, what was got and the nearest valid key; an
            override is of a method that is not used.
    """
    plugins = _import_plugins(path, overrides)
    node = default_config()
    tree = dict(_walk(node))
    sources = {key: "default" for key, _ in leaves(node)}
    for source, settings in read_settings(path, overrides, tree):
        for setting in settings:
            *sections, name = setting.key.split(".")
            section = node
            for part in sections:
                section = section[part]
            section[name] = _check(setting, tree[setting.key])
            sources[setting.key] = source
    node.EXPERIMENT.PLUGINS = plugins
    _check_momenta(node.SOLVER, sources)
    if not (node.EXPERIMENT.NAME or node.EXPERIMENT.TAG):
        raise ConfigError(f"EXPERIMENT.NAME and TAG ({sources['EXPERIMENT.TAG']}) are empty: the run folder needs one")
    _check_used(node.DISTILLER.TYPE, sources, others)
    node.freeze()
    return Config(node, sources)


def show(config: Config) -> str:
    """The resolved config as YAML, with the source of each value in a comment.

    Of the methods' nodes only those that are used or set somewhere are shown.
    """
    used = set(method_names(config.node))
    used |= {key.split(".")[0] for key, source in config.sources.items() if source != "default"}
    shown = {name: value for name, value in config.node.items() if name not in DISTILLERS or name in used}
    return _render(shown, config.sources).rstrip("\n")


def dump(node: CfgNode) -> str:
    """The whole tree as YAML; :func:`load_config` of it gives an equal tree."""
    return _render(node, {})


def differences(a: CfgNode, b: CfgNode) -> list[str]:
    """Dotted keys whose values differ, or that one of the two trees lacks."""
    leaves_a, leaves_b = dict(leaves(a)), dict(leaves(b))
    missing = object()
    return [key for key in {**leaves_a, **leaves_b} if leaves_a.get(key, missing) != leaves_b.get(key, missing)]


def method_names(tree: Mapping[str, Any]) -> list[str]:
    """The distillers that ``DISTILLER.TYPE`` of a config, or of a record's, names; none for plain training."""
    types = tree["DISTILLER"]["TYPE"]
    return [name for name in ([types] if isinstance(types, str) else types) if name != "NONE"]


def leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every dotted key of a config, or of a record's, with its value; without the sections."""
    return ((key, value) for key, value in _walk(tree) if not isinstance(value, Mapping))


def _walk(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, each section before what it holds."""
    for name, value in node.items():
        yield prefix + name, value
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{name}.")


def _render(node: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    lines = []
    for key, value in _walk(node):
        line = "  " * key.count(".") + key.rsplit(".", 1)[-1] + ":"
        if not isinstance(value, CfgNode):
            # As the one item of a list: a bare scalar would be followed by YAML's end-of-document mark.
            line += " " + yaml.safe_dump([value], default_flow_style=True, width=math.inf, allow_unicode=True)[1:-2]
        elif not value:
            line += " {}"
        lines.append((line, comments.get(key, "")))
    width = max(len(line) for line, _ in lines)
    return "".join((f"{line:<{width}}  # {comment}" if comment else line) + "\n" for line, comment in lines)


def _import_plugins(path: str | Path | None, overrides: Sequence[str]) -> str | list[str]:
    """Import what ``EXPERIMENT.PLUGINS`` names, before the keys are checked that it brings; returns its value.

    A file is looked for beside the config file that names it, then in the working directory.
    """
    read = read_settings(path, overrides, dict(_walk(default_config())), strict=False)
    named = [(source, one) for source, settings in read for one in settings if one.key == "EXPERIMENT.PLUGINS"]
    if not named:
        return ""
    source, setting = named[-1]
    value = _check(setting, "")
    beside = None if source == "command line" else Path(source).parent
    try:
        return [import_plugin(name, beside) for name in ([value] if isinstance(value, str) else value) if name] or ""
    except ConfigError as error:
        raise ConfigError(f"{setting.where}: EXPERIMENT.PLUGINS: {error}") from error


def _check(setting: Setting, default: Any) -> Any:
    """The value in its default's type.

    Raises:
        ConfigError: it is of another type, or breaks the key's rule.
    """
    key, value, where = setting
    several = key in _ONE_OR_SEVERAL
    meaning = f" ({HELP[key]})" if key in HELP else ""
    try:
        result = _convert(value, default, several)
    except (TypeError, OverflowError):
        expected = _describe(default) + (f", or a list of them (each {_describe(default)})" if several else "")
        got = "null" if value is None else f"{value!r} ({type(value).__name__})"
        raise ConfigError(f"{where}: {key}{meaning} must be {expected}, not {got}") from None
    if key == "DISTILLER.TYPE":
        _check_types(result, where)
    rule = _RULES.get(key)
    wanted = rule.text if rule is not None and not rule.holds(result) else ""
    if type(result) is int and abs(result) >= 2**63:
        wanted = wanted or "between -2**63 and 2**63, as a tensor's integers are"
    if wanted:
        raise ConfigError(f"{where}: {key}{meaning} must be {wanted}, not {value!r}")
    return result


def _convert(value: Any, default: Any, several: bool = False) -> Any:
    """``value`` in the type of ``default``, or TypeError. Text that spells a number or a list counts as one."""
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = ast.literal_eval(value)  # YAML reads 5e-4 and (1, 2) as text.
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise TypeError from None
    if several and isinstance(value, list | tuple) and value:
        return [_convert(item, default) for item in value]
    if isinstance(default, list | tuple) and isinstance(value, list | tuple):
        return type(default)(_convert(item, default[0]) if default else item for item in value)
    if isinstance(default, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif default is None or type(value) is type(default):
        return value
    raise TypeError


def _describe(default: Any) -> str:
    if isinstance(default, list | tuple):
        return f"a list (each item {_describe(default[0])})" if default else "a list"
    names = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}
    return names.get(type(default), type(default).__name__)


def _check_momenta(solver: CfgNode, sources: Mapping[str, str]) -> None:
    """Refuse momenta that SGD, or DOT's two, cannot have."""
    momentum, delta = solver.MOMENTUM, solver.DOT.DELTA
    if solver.NESTEROV and momentum == 0:
        raise ConfigError(
            f"SOLVER.NESTEROV ({sources['SOLVER.NESTEROV']}) needs a SOLVER.MOMENTUM above 0 "
            f"({sources['SOLVER.MOMENTUM']}): change one of them"
        )
    if solver.TRAINER.endswith("dot") and not (0 <= delta < momentum and momentum + delta < 1):
        raise ConfigError(
            f"SOLVER.TRAINER {solver.TRAINER} trains with the momenta MOMENTUM -/+ DOT.DELTA, which must be above 0 "
            f"and below 1: SOLVER.MOMENTUM is {momentum:g} ({sources['SOLVER.MOMENTUM']}) and SOLVER.DOT.DELTA "
            f"{delta:g} ({sources['SOLVER.DOT.DELTA']})"
        )


def _check_used(types: str | list[str], sources: Mapping[str, str], others: Sequence[str]) -> None:
    """Refuse what the command line sets for a method that is not used; a file may hold the nodes of many."""
    used = [types] if isinstance(types, str) else types
    for key, source in sources.items():
        section = key.split(".")[0]
        if source == "command line" and section in DISTILLERS and section not in (*used, *others):
            raise ConfigError(
                f"command line: {key} would change nothing: {section} is not in DISTILLER.TYPE, which is "
                f"{', '.join(used)} ({sources['DISTILLER.TYPE']})"
            )


def _check_types(types: str | list[str], where: str) -> None:
    """Refuse method names that are unknown, repeated, or NONE beside others."""
    names = [types] if isinstance(types, str) else types
    for name in names:
        if name != "NONE" and name not in DISTILLERS:
            near = nearest(name, ["NONE", *DISTILLERS])
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are: NONE, {', '.join(sorted(DISTILLERS))}"
            raise ConfigError(f"{where}: DISTILLER.TYPE: unknown distiller {name!r}: {hint}")
    if len(set(names)) < len(names) or ("NONE" in names and len(names) > 1):
        raise ConfigError(f"{where}: DISTILLER.TYPE must list different methods and not NONE among them, not {types!r}")
