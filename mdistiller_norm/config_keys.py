"""Config keys: their defaults, meanings and checks, and the conversion of text to the type of the default."""

import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml
from yacs.config import CfgNode

from mdistiller_norm.config_text import TextLoader
from mdistiller_norm.distillers.temperature import STATISTICS, WEIGHTINGS
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.program import command
from mdistiller_norm.registry import nearest, not_registered

_FOLDER = "the name of one folder, without /"
_PROJECT = f"{_FOLDER}, and not empty"
_MEAN, _STD = "[] or three numbers in [0, 1]", "[] or three numbers in (0, 1]"
_CROP, _METHODS = "two areas with 0 < first <= second <= 1", "NONE or different methods"
# Requirement -> function that tests it. "one of a, b, ..." has none.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "": lambda x: True,
    "> 0": lambda x: min(x if isinstance(x, list) else [x]) > 0,
    ">= 0": lambda x: x >= 0,
    ">= 1": lambda x: x >= 1,
    "in [0, 2**63)": lambda x: 0 <= x < 2**63,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "in [0, 0.5]": lambda x: 0 <= x <= 0.5,
    "in [0, 30]": lambda x: 0 <= x <= 30,
    "valid UTF-8": lambda x: x.encode() is not None,  # raises a ValueError
    _FOLDER: lambda x: "/" not in x and x not in (".", ".."),
    _PROJECT: lambda x: x.encode() != b"" and _CHECKS[_FOLDER](x),
    _MEAN: lambda x: len(x) in (0, 3) and all(0 <= v <= 1 for v in x),
    _STD: lambda x: len(x) in (0, 3) and all(0 < v <= 1 for v in x),
    _CROP: lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1,
    "increasing epochs >= 1": lambda x: x == sorted(set(x)) and min(x, default=1) >= 1,
    "different names": lambda x: len(set(x)) == len(x),
    _METHODS: lambda x: isinstance(x, str) or len({"NONE", *x}) == len(x) + 1,
}

# Key -> default, help and requirement. Every registered distiller adds a node under its name, see default_config.
KEYS: dict[str, tuple[Any, str, str]] = {
    "EXPERIMENT.PROJECT": ("distill", "folder of the runs in LOG.PREFIX", _PROJECT),
    "EXPERIMENT.NAME": ("", "name of the run; empty: TAG and the keys of the command line", _FOLDER),
    "EXPERIMENT.TAG": ("default", "words that describe the run", _FOLDER),
    "EXPERIMENT.PLUGINS": ("", "Python files that register networks, data sets and methods", ""),
    "DATASET.TYPE": ("cifar100", "data set", ""),
    "DATASET.ROOT": ("data", "folder of the data sets, or of the images or shards", ""),
    "DATASET.NUM_WORKERS": (2, "processes that load images; as many again in evaluation", ">= 0"),
    "DATASET.IMAGE_SIZE": (224, "image files: height and width of the input", ">= 1"),
    "DATASET.RESIZE": (256, "image files: shorter side before the crop of evaluation", ">= 1"),
    "DATASET.CROP_SCALE": ([0.08, 1.0], "image files: range of the area of a random crop", _CROP),
    "DATASET.MEAN": ([], "image files: means; empty: ImageNet's (image_folder: measured)", _MEAN),
    "DATASET.STD": ([], "image files: standard deviations; empty: as for MEAN", _STD),
    "DATASET.CLASSES": ([], "image files: class folders; empty: all, sorted", "different names"),
    "DATASET.VARIANT": ("auto", "auto: imagenet above 64 pixels", "one of auto, cifar, imagenet"),
    "DATASET.MAX_BROKEN": (10, "image files: unreadable ones before failing", ">= 0"),
    "DATASET.VAL_SPLIT": (0.0, "part of each training class to evaluate on", "in [0, 0.5]"),
    "DATASET.SUBSET": (0, "training images, equally many per class; 0: all", ">= 0"),
    "DATASET.MIXUP": (0.0, "alpha of MixUp; 0: none", ">= 0"),
    "DATASET.CUTMIX": (0.0, "alpha of CutMix; 0: none", ">= 0"),
    "DATASET.RANDAUGMENT": (0, "image files: magnitude of RandAugment; 0: none", "in [0, 30]"),
    "DATASET.TEST.BATCH_SIZE": (64, "images per batch of evaluation", ">= 1"),
    "DISTILLER.TYPE": ("NONE", "methods whose losses are added; NONE: no teacher", _METHODS),
    "DISTILLER.TEACHER": ("ResNet50", "model name of the teacher", ""),
    "DISTILLER.STUDENT": ("resnet32", "model name of the student", ""),
    "DISTILLER.TEACHER_WEIGHTS": ("", "file, torchvision:NAME or pretrained; empty: search", ""),
    "DISTILLER.TEACHER_CACHE": ("off", "store the teacher's outputs", "one of off, lazy, full"),
    "DISTILLER.TEACHER_CACHE_PRECISION": ("fp32", "precision of the cache", "one of fp32, fp16"),
    "SOLVER.TRAINER": ("base", "dot: DOT; crd: as base", "one of base, crd, dot, crd_dot"),
    "SOLVER.BATCH_SIZE": (64, "images per batch, over all processes", ">= 1"),
    "SOLVER.EPOCHS": (240, "passes over the training set", ">= 1"),
    "SOLVER.LR": (0.05, "initial learning rate", "> 0"),
    "SOLVER.LR_DECAY_STAGES": ([150, 180, 210], "LR decays after them", "increasing epochs >= 1"),
    "SOLVER.LR_DECAY_RATE": (0.1, "factor of each decay", "in (0, 1]"),
    "SOLVER.WEIGHT_DECAY": (1e-4, "weight decay of every parameter", ">= 0"),
    "SOLVER.MOMENTUM": (0.9, "momentum of SGD", "in [0, 1)"),
    "SOLVER.NESTEROV": (False, "Nesterov momentum (on in the paper, off in mdistiller)", ""),
    "SOLVER.TYPE": ("SGD", "optimizer", "one of SGD, AdamW"),
    "SOLVER.SCHEDULE": ("step", "step: decays at the STAGES; cosine: to 0", "one of step, cosine"),
    "SOLVER.WARMUP_EPOCHS": (0, "epochs of a linear rise to LR", ">= 0"),
    "SOLVER.CLIP_GRAD": (0.0, "largest norm of the gradient; 0: not clipped", ">= 0"),
    "SOLVER.LABEL_SMOOTHING": (0.0, "label smoothing of the cross entropy", "in [0, 1)"),
    "SOLVER.EMA": (0.0, "decay of averaged weights to evaluate and save; 0: none", "in [0, 1)"),
    "SOLVER.PRECISION": ("fp32", "precision of the networks", "one of fp32, bf16, fp16"),
    "SOLVER.ACCUMULATE": (1, "micro-batches per update and process", ">= 1"),
    "SOLVER.SYNC_BN": (False, "batch norm over all processes (CUDA only)", ""),
    "SOLVER.TIMEOUT": (600, "seconds that a process waits for the others", ">= 1"),
    "SOLVER.DOT.DELTA": (0.075, "DOT: the losses have momenta MOMENTUM -/+ DELTA", ""),
    "ENGINE.COMPILE": ("auto", "auto: the teacher of a long run", "one of auto, none, teacher, all"),
    "ENGINE.CUDA_GRAPH": ("auto", "record a step as a CUDA graph", "one of auto, on, off"),
    "ENGINE.DETERMINISTIC": (False, "bit-identical results on CUDA, slower (CPU: always)", ""),
    "LOG.TENSORBOARD_FREQ": (500, "steps between scalars of the training loss", ">= 1"),
    "LOG.CHECKPOINT_STEPS": (0, "steps between saves; 0: one save per epoch", ">= 0"),
    "LOG.SAVE_CHECKPOINT_FREQ": (40, "epochs between two student_<epoch>.pt", ">= 1"),
    "LOG.GRAD_NORMS": (False, "log gradient norms of the losses every epoch", ""),
    "LOG.PREFIX": ("./output", "folder of all projects", "valid UTF-8"),
    "LOG.WANDB": (False, "log to Weights & Biases too", ""),
    "SEED": (0, "seed of all random choices", "in [0, 2**63)"),
    "DEVICE": ("auto", "auto, cpu, cuda or cuda:N", ""),
}
# Last part of a key in the node of a method -> requirement.
_METHOD_KEYS: dict[str, str] = {
    **dict.fromkeys(("T", "TEMPERATURE", "TEMPERATURE_NORM", "ALPHA_T", "T_START"), "> 0"),
    **dict.fromkeys(("CE_WEIGHT", "KD_WEIGHT", "FEAT_WEIGHT", "REVIEWKD_WEIGHT"), ">= 0"),
    **dict.fromkeys(("ALPHA", "BETA"), ">= 0"),
    **dict.fromkeys(("K", "DIM", "P"), ">= 1"),
    "MOMENTUM": "in [0, 1)",
    "STATISTIC": f"one of {', '.join(STATISTICS)}",
    "WEIGHTING": f"one of {', '.join(WEIGHTINGS)}",
}
# Removed key -> its old default, which stored configs may contain, and the replacement.
_SEEDS = f"run one command for each SEED, or {command('reproduce')} --trials N"
REMOVED: dict[str, tuple[Any, str]] = {
    "SOLVER.TRIALS": (1, _SEEDS),
    "SOLVER.TRIALS_MODE": ("processes", _SEEDS),
    "SOLVER.INIT_SEED": (-1, "set SEED"),
    "DATASET.DECODE": ("cpu", "raise DATASET.NUM_WORKERS"),
}
# A value or a list of values.
_ONE_OR_SEVERAL = ("DISTILLER.TYPE", "EXPERIMENT.PLUGINS", "KD.TEMPERATURE")
# Paths, in which ~ is the home folder.
_PATHS = ("DATASET.ROOT", "DISTILLER.TEACHER_WEIGHTS", "EXPERIMENT.PLUGINS", "LOG.PREFIX")
# Items of the lists that are empty.
_ITEMS = {"DATASET.MEAN": 0.0, "DATASET.STD": 0.0, "DATASET.CLASSES": ""}
_TYPES = {bool: "true or false", int: "an integer", float: "a finite number", str: "valid text"}
_BRACKETS = re.compile(r"\s*(\[.*\]|\(.*\))\s*", re.DOTALL)


def check_value(key: str, value: Any, defaults: Mapping[str, Any], source: str) -> Any:
    """Return the value of a dotted key, a text or a list of texts, in the type of its default.

    ``defaults`` are those of every key and section; ``source`` is of the value, for the message.
    """
    if key not in defaults:
        raise ConfigError(f"{source}: unknown key {key}{_hint(key, defaults)}")
    default = defaults[key]
    if isinstance(default, CfgNode):
        hint = f"set one of its keys, such as {key}.{next(iter(default), '')}"
        raise ConfigError(f"{source}: {key} is a section: {hint}")
    requirement = KEYS[key][2] if key in KEYS else _METHOD_KEYS.get(key.rpartition(".")[2], "")
    is_list = isinstance(default, list)
    several = is_list or key in _ONE_OR_SEVERAL
    item = [*default, _ITEMS.get(key)][0] if is_list else default
    try:
        if several and isinstance(value, str) and _BRACKETS.fullmatch(value):
            value = yaml.load(f"[{value.strip()[1:-1]}]", TextLoader)
        if is_list and isinstance(value, str):
            raise TypeError
        if is_list or (several and value and isinstance(value, list)):
            result: Any = [_convert(key, each, item) for each in value]
        else:
            result = _convert(key, value, default)
        names = requirement.removeprefix("one of ")
        valid = result in names.split(", ") if names != requirement else _CHECKS[requirement](result)
    except (TypeError, ValueError, KeyError, RecursionError, yaml.YAMLError):
        kind = _TYPES.get(type(item), "a value")
        valid, requirement = False, f"a list (each item {kind})" if is_list else kind
    if not valid:
        got = value if isinstance(value, str) and value else reprlib.repr(value)
        raise ConfigError(f"{source}: {key} must be {requirement}, got {got}")
    return result


def _hint(key: str, known: Iterable[str]) -> str:
    last = f".{key.rpartition('.')[2]}".lower()
    same_name = [name for name in known if name.lower().endswith(last)]
    section = [name for name in known if name.startswith(f"{key.partition('.')[0]}.")]
    near = (nearest(key, same_name) or same_name or nearest(key, section) or nearest(key, known))[:3]
    if key in REMOVED:
        return f": it was removed, {REMOVED[key][1]}"
    hint = not_registered(key.split(".")[0]) or (f"did you mean {' or '.join(near)}?" if near else "")
    return f": {hint}" if hint else ""


def _convert(key: str, text: Any, default: Any) -> Any:
    if not isinstance(text, str) or "\0" in text:
        raise TypeError
    os.fsencode(text)  # raises a ValueError for lone surrogates
    if isinstance(default, bool):
        return yaml.SafeLoader.bool_values[text.lower()]
    result = type(default)(text)
    if isinstance(result, str):
        return os.path.expanduser(result) if key in _PATHS else result
    if not math.isfinite(result):
        raise ValueError
    return result
