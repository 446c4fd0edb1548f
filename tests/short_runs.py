"""Short runs on digits."""

import functools
from dataclasses import replace

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from mdistiller_norm.config import load_config
from mdistiller_norm.data import Split, digits
from mdistiller_norm.engine.checkpoint import load
from mdistiller_norm.run import build_run, train
from mdistiller_norm.student import open_checkpoint

# An epoch has 6 steps, the last one with a smaller batch.
SHORT = ["DATASET.TYPE=digits", "SOLVER.BATCH_SIZE=240"]
SHORT += ["SOLVER.NESTEROV=true", "SOLVER.WEIGHT_DECAY=5e-4"]
PAIR = [*SHORT, "DISTILLER.TEACHER=resnet14", "DISTILLER.STUDENT=resnet8"]
# All options of the optimizer and of the losses.
RECIPE = [
    "SOLVER.TYPE=AdamW", "SOLVER.LR=0.001", "SOLVER.SCHEDULE=cosine", "SOLVER.WARMUP_EPOCHS=1", "SOLVER.CLIP_GRAD=1.0",
    "SOLVER.LABEL_SMOOTHING=0.1", "SOLVER.EMA=0.9", "LOG.GRAD_NORMS=true",
]  # fmt: skip
# Overrides of defaults that are too large for digits.
SMALLER = {"CRD": ["CRD.NCE.K=8"]}


@functools.cache
def few_digits(train, test=40):
    """Return the first images of the digits."""
    whole = digits()
    splits = ((whole.train, train), (whole.test, test))
    parts = [Split(split.images[:count], split.targets[:count]) for split, count in splits]
    return replace(whole, train=parts[0], test=parts[1])


def config(folder, name, *overrides, epochs=2):
    """Return the config of a run in ``folder/distill/name``."""
    place = [f"LOG.PREFIX={folder}", f"EXPERIMENT.NAME={name}", f"SOLVER.EPOCHS={epochs}"]
    return load_config(None, [*PAIR, *place, *overrides])


def build_few(folder, name, *overrides, epochs=2, images=44, **more):
    """Build a run on 44 digits: an epoch has 5 steps of 8 and one of 4 images."""
    settings = config(folder, name, "SOLVER.BATCH_SIZE=8", *overrides, epochs=epochs)
    return build_run(settings, **{"dataset": few_digits(images)} | more)


def train_few(folder, name, *overrides, epochs=2, images=44, **more):
    """Train on 44 digits: an epoch has 5 steps of 8 and one of 4."""
    settings = config(folder, name, "SOLVER.BATCH_SIZE=8", *overrides, epochs=epochs)
    return train(settings, **{"dataset": few_digits(images)} | more)


def assert_same_state(a, b):
    """Check that nested states are bit-identical."""
    leaves, others = (tree_flatten_with_path(state)[0] for state in (a, b))
    assert [path for path, _ in leaves] == [path for path, _ in others]
    for (path, x), (_, y) in zip(leaves, others, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, keystr(path)


def state_of(folder, name):
    state = load(folder / "distill" / name / "latest.pt")
    del state["seconds"]
    return state


def build_step(folder, name, *overrides, dataset=None):
    """Build a run and return its training step."""
    run = build_run(config(folder, name, *overrides), dataset=dataset)
    run.trainer.log.close()
    run.trainer.step.trainable.train()
    return run.trainer.step


def outputs_of(weights):
    """Return logits, pooled features and targets of all test images, computed in one batch."""
    network, dataset = open_checkpoint(weights)
    ((images, targets),) = dataset.eval_loader(1000, torch.device("cpu"))
    with torch.no_grad():
        outputs = network.eval().outputs(images)
    return outputs.logits, outputs.pooled, targets
