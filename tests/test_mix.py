"""MixUp and CutMix in the training loader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from short_runs import assert_same_state, config, state_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2
from torchvision.tv_tensors import Image

from mdistiller_norm.data import MemoryTrainLoader, Share, digits
from mdistiller_norm.data.mix import MixedLoader, mix
from mdistiller_norm.data.plan import ALONE
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.run import build_run, train
from mdistiller_norm.types import Batch

CPU = torch.device("cpu")


def loader(mixup: float, cutmix: float, seed: int = 0, share: Share = ALONE) -> MixedLoader:
    return MixedLoader(MemoryTrainLoader(digits(), 240, seed, share), mixup, cutmix, 10, CPU)


def test_mixed_images_and_targets_equal_torchvisions() -> None:
    images, targets, rest = torch.randn(5, 3, 8, 10), torch.tensor([1, 0, 2, 2, 1]), torch.zeros(())
    batch = Batch(images, targets, rest, rest, rest)
    common = {"labels": targets, "batch_size": 5}
    for drawn, transform, parameters in (
        ([0, 0, 1, 1, 0.3], v2.MixUp(num_classes=3), {"lam": 0.3}),
        ([-0.1, 0.2, 0.5, 0.6, 0], v2.CutMix(num_classes=3), {"box": (2, 0, 6, 4), "lam_adjusted": 0.8}),
    ):
        mixed = mix(batch, torch.tensor(drawn), 3)
        for ours, whole in ((mixed.images, Image(images)), (mixed.targets, targets)):
            theirs = transform.transform(whole, common | parameters)
            torch.testing.assert_close(ours, theirs.as_subclass(torch.Tensor))


def test_mixing_does_not_synchronise() -> None:
    with FakeTensorMode():  # raises where a value is read
        images, targets = (
            torch.empty(4, 3, 8, 8, device="cuda"),
            torch.empty(4, dtype=torch.int64, device="cuda"),
        )
        mixed = mix(Batch(images, *[targets] * 4), torch.empty(5, device="cuda"), 3)
        assert mixed.targets.shape == (4, 3)


def test_draws_are_distributed_and_a_function_of_seed_epoch_step_and_rank() -> None:
    drawn = torch.cat([loader(0.4, 1.0, seed)._draw(1) for seed in range(300)])
    top, left, bottom, right, weight = drawn.T
    cut = weight == 0
    assert cut.float().mean() == pytest.approx(0.5, abs=0.05)
    area = (bottom - top) * (right - left)
    assert area[cut].mean() == pytest.approx(0.5, abs=0.05)  # a uniform distribution
    assert weight[~cut].var() == pytest.approx(0.25 / 1.8, abs=0.02)  # beta(0.4, 0.4)
    assert (area[~cut] == 1).all()
    assert (loader(0.4, 0)._draw(1)[:, 4] > 0).all()
    assert (loader(0, 0.4)._draw(1)[:, 4] == 0).all()
    first = loader(1, 1)
    whole = list(first.batches(2))
    for resumed, expected in zip(loader(1, 1).batches(2, 4), whole[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(resumed, expected, strict=True))
    assert not torch.equal(first._draw(1), first._draw(2))
    assert not torch.equal(first._draw(1), loader(1, 1, share=Share(1, 2))._draw(1))


@pytest.mark.parametrize("trainer", ["base", "dot"])
def test_run_with_mixed_images_resumes_bit_identically(tmp_path: Path, teacher: str, trainer: str) -> None:
    given = [
        "DISTILLER.TYPE=NormKD",
        "DATASET.MIXUP=0.2",
        "DATASET.CUTMIX=1",
        f"SOLVER.TRAINER={trainer}",
        teacher,
    ]
    train(config(tmp_path, "whole", *given))
    train(config(tmp_path, "parts", *given, epochs=1))
    train(config(tmp_path, "parts", *given), resume=True)
    assert_same_state(state_of(tmp_path, "parts"), state_of(tmp_path, "whole"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "DISTILLER.TYPE=DKD DATASET.MIXUP=0.2",
            r"DATASET\.MIXUP cannot be used with DKD: an image needs one class",
        ),
        ("DISTILLER.TYPE=[KD,CRD] CRD.NCE.K=16 DATASET.CUTMIX=1", r"DATASET\.CUTMIX cannot be used with CRD"),
        (
            "DISTILLER.TYPE=KD DISTILLER.TEACHER_CACHE=lazy DATASET.MIXUP=1",
            "MIXUP cannot be used with DISTILLER.TEACHER_C",
        ),
        ("DATASET.RANDAUGMENT=9", r"DATASET\.RANDAUGMENT requires image files, digits is in memory"),
    ],
)
def test_settings_that_exclude_each_other(tmp_path: Path, overrides: str, message: str, teacher: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_run(config(tmp_path, "refused", teacher, *overrides.split()))
    assert not list(tmp_path.iterdir())
