"""The command ``eval``: evaluate weights on a test split."""

import argparse
import math
from pathlib import Path

from mdistiller_norm.build import (
    build_dataset,
    build_device,
    build_precision,
    placed,
    train_command,
)
from mdistiller_norm.config import load_config
from mdistiller_norm.data import Dataset
from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.teacher_file import TORCHVISION, find_teacher, published
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.student import find_weights, open_checkpoint


def main(options: argparse.Namespace) -> int:
    """Evaluate the checkpoints and print a line for each."""
    if options.cfg and (options.dataset or options.root):
        raise ConfigError("--cfg sets the data set: remove -d and --root")
    dataset = (
        build_dataset(load_config(options.cfg, plugins="skip").node) if options.cfg else None
    )
    device = build_device(options.device)
    autocast, warning = build_precision(options.precision, device)
    if warning:
        raise ConfigError(
            f"--precision {options.precision}: {warning} in training: remove the option"
        )
    for name in options.ckpt:
        path = _find_weights(name, options, dataset)
        network, used = open_checkpoint(
            path, options.model, options.dataset, options.root, dataset
        )
        test = used.eval_loader(options.batch_size, device)
        result = evaluate(placed(network, device), test, autocast)
        if not math.isfinite(result.loss):
            raise CheckpointError(
                f"{path} diverged or is damaged: it computes NaN or infinite logits"
            )
        print(
            f"{network.name:12} {used.name}  top-1 {result.top1:6.2f}  top-5 {result.top5:6.2f}  "
            f"loss {result.loss:7.4f}  {result.samples} images of {'x'.join(map(str, used.image_size))}, "
            f"{options.precision}, {result.images_per_second:.0f} images/s  {path}"
        )
        if options.per_class:
            for label, accuracy in zip(used.classes, result.per_class.tolist(), strict=True):
                print(f"  {label}: {accuracy:.2f}")
    return 0


def _find_weights(name: str, options: argparse.Namespace, dataset: Dataset | None) -> Path:
    if name.startswith(TORCHVISION):
        return published(name.removeprefix(TORCHVISION)).path
    if name != "pretrain" or Path(name).exists():
        return find_weights(Path(name))
    if not options.model:
        raise ConfigError(
            "-c pretrain requires the model name: add -m, for example -m resnet32x4"
        )
    kind = dataset.name if dataset else options.dataset or "cifar100"
    if kind == "imagenet":
        return published(f"{options.model}_Weights.IMAGENET1K_V1").path
    command = train_command(kind, options.model)
    return find_teacher(options.model, kind, "", Path("output"), command).path
