"""The command lines: parse, call the package, and turn a user's mistake into one line and exit code 2."""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mdistiller_norm.arguments import ArgumentParser
from mdistiller_norm.errors import CheckpointError, ConfigError, DataError, UserError, first_line
from mdistiller_norm.plugins import import_plugin

if TYPE_CHECKING:
    from mdistiller_norm.data import Dataset


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run a tool: exit code 0, 2 for a mistake in its input, 128 + the signal's number when stopped."""
    from mdistiller_norm.engine import distributed
    from mdistiller_norm.engine.trainer import Interrupted

    try:
        code = main(sys.argv[1:])
    except UserError as error:
        code = _refuse(_lost_worker(error) or str(error))
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        code = _refuse(f"{where}{error.strerror}: make room, or name another place")
    except RuntimeError as error:
        lost = _lost_worker(error)
        if not lost:
            raise
        code = _refuse(lost)
    except Interrupted as stop:
        print(f"{stop}; everything is saved: the same command with --resume goes on", file=sys.stderr)
        code = 128 + stop.signal_number
    except KeyboardInterrupt:
        code = 130
    distributed.exit_process(code)


# What a disk or a folder says, wherever it happens.
_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG,
}  # fmt: skip


def _lost_worker(error: BaseException | None) -> str:
    """What to say if a process that read images is behind the error, else nothing.

    PyTorch raises this from the signal's handler, wherever the process that trains is: what it was about to do there,
    such as writing a file, may have taken it for its own failure.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):  # not what it raised
            return (
                f"{first_line(error).rstrip('.')}: a process that reads images was lost. If memory, or shared memory, "
                "is short, lower DATASET.NUM_WORKERS; a run that has saved a state goes on with --resume"
            )
        error = error.__cause__ or error.__context__
    return ""


def _refuse(text: str) -> int:
    """Say what is wrong, once where several processes found the same; the exit code."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # the first process speaks, and torchrun ends the others; unless it is this one's trouble alone
    print(f"error: {' '.join(text.splitlines())}", file=sys.stderr)  # a name that was given may hold several lines
    return 2


def train_main(arguments: Sequence[str]) -> int:
    """``tools/train.py``."""
    parser = ArgumentParser(
        prog="tools/train.py", description="Train a student, with a teacher or without.",
        epilog="example: python tools/train.py --cfg configs/cifar100/normkd/res32x4_res8x4.yaml SEED 1",
    )  # fmt: skip
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config file")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's latest.pt")
    parser.add_argument("--show", action="store_true", help="print the resolved config and where each key is from")
    parser.add_argument("--check-data", action="store_true", help="read every image, list those that cannot be, stop")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys to change")
    options = parser.parse_intermixed_args(arguments)

    from mdistiller_norm import build, config
    from mdistiller_norm import run as run_module

    resolved = config.load_config(options.cfg, options.overrides)
    if options.show:
        print(config.show(resolved))
        return 0
    if options.check_data:
        return _check_data(build.build_dataset(resolved.node))
    command = [*_starter(), "tools/train.py", *arguments]
    run_module.train(resolved, options.resume, command)
    return 0


def _starter() -> list[str]:
    """What started this process, for the record of the run: torchrun leaves traces in the environment."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["python"]
    nodes, processes = os.environ["GROUP_WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]
    return ["torchrun", *(["--nnodes", nodes] if nodes != "1" else ["--standalone"]), "--nproc-per-node", processes]


def _check_data(dataset: Dataset) -> int:
    """Check every file of the data set; exit code 2 if one cannot be read."""
    broken = _list_unreadable(dataset)
    print(f"{len(broken)} of its images cannot be read")
    return 2 if broken else 0


def _list_unreadable(dataset: Dataset) -> list[str]:
    """Print what the data set holds and every file of it that cannot be read; returns these."""
    print(dataset.summary())
    broken = dataset.unreadable()
    for name in broken:
        print(name)
    return broken


def shards_main(arguments: Sequence[str]) -> int:
    """``tools/make_shards.py``."""
    parser = ArgumentParser(
        prog="tools/make_shards.py", description="Pack train/<class>/* and val/<class>/* into tar files.",
        epilog="example: python tools/make_shards.py --root data/imagenet --out data/imagenet_shards",
    )  # fmt: skip
    parser.add_argument("--root", required=True, help="folder with train and val")
    parser.add_argument("--out", required=True, help="folder of the shards; made")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="images in a tar file")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that check the images first")
    options = parser.parse_args(arguments)
    if options.per_shard < 1:
        raise ConfigError(f"--per-shard must be at least 1, not {options.per_shard}")
    if options.workers < 0:
        raise ConfigError(f"--workers must be zero or positive, not {options.workers}")

    from mdistiller_norm.data import ImageOptions, image_folder
    from mdistiller_norm.data.image_folder import MEAN, STD
    from mdistiller_norm.data.webdataset import pack

    dataset = image_folder(Path(options.root), ImageOptions(mean=MEAN, std=STD, workers=options.workers))
    if broken := _list_unreadable(dataset):
        raise DataError(f"{options.root}: {len(broken)} images cannot be read (listed above): replace or remove them")
    for name, count in pack(dataset, Path(options.out), options.per_shard).items():
        print(f"{count} shards in {Path(options.out, name)}")
    return 0


def eval_main(arguments: Sequence[str]) -> int:
    """``tools/eval.py``."""
    parser = ArgumentParser(
        prog="tools/eval.py", description="Evaluate the weights of networks on a test split, a line each.",
        epilog="example: python tools/eval.py -c output/digits/student_normkd/student_last.pt",
    )  # fmt: skip
    parser.add_argument("-m", "--model", default="", help="its name; a student_*.pt knows it")
    parser.add_argument(
        "-c", "--ckpt", required=True, nargs="+",
        help="checkpoint files; pretrain: the weights that would teach as -m on -d; torchvision:NAME: its weights",
    )  # fmt: skip
    parser.add_argument("-d", "--dataset", default="", help="data set; a student_*.pt knows it; else cifar100")
    parser.add_argument(
        "--cfg", metavar="FILE",
        help="a config whose data set it is, DATASET.*, in place of -d and --root: for weights that know none",
    )  # fmt: skip
    parser.add_argument("-bs", "--batch-size", type=int, default=64)
    parser.add_argument("--root", default="", help="folder of the data set; data, when not given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plugin", nargs="+", type=import_plugin, metavar="FILE", help="the run's EXPERIMENT.PLUGINS")
    parser.add_argument(
        "--precision", default="fp32", choices=("fp32", "bf16", "fp16"),
        help="of the passes; with a run's SOLVER.PRECISION its student's figures are those that it recorded",
    )  # fmt: skip
    parser.add_argument("--per-class", action="store_true", help="print the accuracy of every class")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise ConfigError(f"-bs must be at least 1, not {options.batch_size}")

    if options.cfg and (options.dataset or options.root):
        raise ConfigError("--cfg names the data set: leave -d and --root out")

    from mdistiller_norm.build import build_dataset, build_device, build_precision
    from mdistiller_norm.config import default_config, load_config

    told = build_dataset(load_config(options.cfg).node) if options.cfg else None
    cfg = default_config()
    cfg.DEVICE, cfg.SOLVER.PRECISION = options.device, options.precision
    device = build_device(cfg)
    autocast, slow = build_precision(cfg, device)
    if slow:
        raise ConfigError(f"--precision {options.precision}: {slow}, also by runs: leave the option out")
    for path in options.ckpt:
        _evaluate_file(path, options, told, device, autocast)
    return 0


def _weights_file(name: str, options: argparse.Namespace, told: Dataset | None) -> str:
    """The file of a checkpoint's name; mdistiller calls a teacher's published weights ``pretrain``."""
    from mdistiller_norm.build import train_command
    from mdistiller_norm.engine.teacher_file import TORCHVISION, find_teacher, published

    if name.startswith(TORCHVISION):
        return str(published(name.removeprefix(TORCHVISION)).path)
    if name != "pretrain" or Path(name).exists():
        return name
    if not options.model:
        raise ConfigError("-c pretrain does not say what network it is: add -m, for example -m resnet32x4")
    dataset = told.name if told is not None else options.dataset or "cifar100"
    if dataset == "imagenet":
        return str(published(f"{options.model}_Weights.IMAGENET1K_V1").path)
    command = train_command(dataset, options.model)
    return str(find_teacher(options.model, dataset, "", Path("output"), command).path)


def _evaluate_file(
    path: str, options: argparse.Namespace, told: Dataset | None, device: torch.device, autocast: torch.dtype | None
) -> None:
    """Evaluate one checkpoint, on the data set that was told or its own, and print what was found."""
    from mdistiller_norm.build import open_checkpoint, placed
    from mdistiller_norm.engine.evaluate import evaluate

    path = _weights_file(path, options, told)
    network, dataset = open_checkpoint(path, options.model, options.dataset, Path(options.root or "data"), told)
    measured = evaluate(placed(network, device), dataset.eval_loader(options.batch_size, device), autocast)
    if not math.isfinite(measured.loss):
        raise CheckpointError(
            f"{path} gives NaN or infinite logits on {dataset.name}, so that it has no accuracy: it diverged in its "
            "training, or is damaged"
        )
    size = "x".join(map(str, dataset.image_size))
    print(
        f"{network.name:12} {dataset.name}  top-1 {measured.top1:6.2f}  top-5 {measured.top5:6.2f}  "
        f"loss {measured.loss:7.4f}  {measured.samples} images of {size}, {options.precision}, "
        f"{measured.images_per_second:.0f} images/s  {path}"
    )
    if options.per_class:
        for label, accuracy in zip(dataset.classes, measured.per_class.tolist(), strict=True):
            print(f"  {label}: {accuracy:.2f}")
