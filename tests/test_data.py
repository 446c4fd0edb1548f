"""Data sets in memory: CIFAR, the digits, augmentation, and the plan of an epoch."""

import pickle

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from mdistiller_norm.data import ImageOptions, Share, cifar100, digits, open_dataset
from mdistiller_norm.data.augment import Normalise, PadCropFlip
from mdistiller_norm.data.memory import MemoryTrainLoader
from mdistiller_norm.data.plan import epoch_plan, share_out, smallest_micro_batch
from mdistiller_norm.errors import DataError


@pytest.fixture(scope="module")
def cifar(cifar_root):
    return cifar100(cifar_root)


def test_cifar_is_complete_and_constants_are_those_of_the_images(cifar):
    assert (len(cifar.train), len(cifar.test)) == (50_000, 10_000)
    assert cifar.train.targets.bincount().tolist() == [500] * 100
    assert cifar.classes[:2] == ("apple", "aquarium_fish")
    for data in (cifar, digits()):
        pixels = data.train.images / 255
        assert pixels.mean((0, 1, 2)).tolist() == pytest.approx(data.mean, abs=1e-3)
    assert pixels.std((0, 1, 2)).tolist() == pytest.approx(data.std, abs=1e-3)


def test_every_view_equals_torchvision(cifar):
    augment = PadCropFlip(cifar.padding, cifar.flip)
    assert augment.views == 162
    indices = torch.arange(162) * 31
    normalise = Normalise(cifar.mean, cifar.std, torch.device("cpu"))
    got = normalise(augment(cifar.train.images, indices, torch.arange(162)))
    assert got.is_contiguous(memory_format=torch.channels_last)
    for view, (index, image) in enumerate(zip(indices.tolist(), got, strict=True)):
        picture = TF.to_pil_image(cifar.train.images[index].permute(2, 0, 1))
        picture = TF.crop(TF.pad(picture, 4), view // 18, view // 2 % 9, 32, 32)
        picture = TF.to_tensor(TF.hflip(picture) if view % 2 else picture)
        assert torch.equal(image, TF.normalize(picture, cifar.mean, cifar.std)), view
    images, targets = next(iter(cifar.eval_loader(16, torch.device("cpu"))))
    test = torch.stack([TF.to_tensor(image.numpy()) for image in cifar.test.images[:16]])
    assert torch.equal(images, TF.normalize(test, cifar.mean, cifar.std))
    assert torch.equal(targets, cifar.test.targets[:16])


def test_plan_is_a_function_of_seed_and_epoch():
    order, views, key = epoch_plan(3, 7, 1437, 162)
    assert sorted(order.tolist()) == list(range(1437))
    assert 0 <= views.min() <= views.max() < 162
    for seed, epoch, same in ((3, 7, True), (4, 7, False), (3, 8, False)):
        others = epoch_plan(seed, epoch, 1437, 162)
        equal = {torch.equal(others[0], order), torch.equal(others[1], views), others[2] == key}
        assert equal == {same}


def test_epoch_contains_every_sample_once_and_can_start_at_any_step():
    data = digits()
    loader = MemoryTrainLoader(data, batch_size=64, seed=0)
    raw = list(loader.batches(1))
    batches = [loader.prepare(*tensors) for tensors in raw]
    assert [len(batch.targets) for batch in batches] == [64] * 22 + [29]
    indices = torch.cat([batch.indices for batch in batches])
    assert sorted(indices.tolist()) == list(range(1437))
    targets = torch.cat([batch.targets for batch in batches])
    assert torch.equal(targets, data.train.targets[indices])
    assert len({int(batch.key) for batch in batches}) == loader.steps == 23
    for resumed, whole in zip(loader.batches(1, first_step=20), raw[20:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_weighted_parts_give_the_mean_of_the_batch(count):
    values = torch.arange(100.0)
    parts = [share_out(40, count, Share(rank, 3)) for rank in range(3)]
    mean = sum(part.weight * values[part.rows].mean() for part in parts) / 3
    torch.testing.assert_close(mean, values[40 : 40 + count].mean())
    real = [i for part in parts if part.weight for i in range(part.rows.start, part.rows.stop)]
    assert real == list(range(40, 40 + count))
    assert {part.smallest for part in parts} == {max(count // 3, 1)}


def test_smallest_micro_batch():
    for samples, batch, world, accumulate, expected in (
        (64, 32, 1, 1, 32), (33, 32, 1, 1, 1), (35, 32, 2, 1, 1), (33, 11, 1, 11, 1), (20, 64, 2, 2, 5),
    ):  # fmt: skip
        assert smallest_micro_batch(samples, batch, Share(0, world), accumulate) == expected


def write_cifar(root, train, names):
    folder = root / "cifar-100-python"
    folder.mkdir(exist_ok=True)
    good = {"data": np.zeros((100, 3072), np.uint8), "fine_labels": list(range(100))}
    contents = {"train": good | dict(train), "test": good, "meta": {"fine_label_names": names}}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


class Call:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return (self.function, ("code from a data file",))


NAMES = [f"class {i}" for i in range(100)]


@pytest.mark.parametrize(
    ("train", "names", "message"),
    [
        ({"data": np.zeros((99, 3072), np.uint8)}, NAMES, r"int64 \[N\], got"),
        ({"data": [[0], [0, 0]]}, NAMES, "train cannot be read as a CIFAR file"),
        ({"data": Call(print)}, NAMES, r"print is not part of such a file"),
        ({}, Call(np.array), r"numpy\S*array is not part of such a file"),
        ({"fine_labels": [100] * 100}, NAMES, r"targets must be in 0\.\.99, got 100\.\.100"),
        ({}, 5, "meta cannot be read as a CIFAR file"),
    ],
)
def test_cifar_files_are_checked_by_content(tmp_path, train, names, message):
    write_cifar(tmp_path, train, names)
    with pytest.raises(DataError, match=message):
        open_dataset("cifar100", tmp_path, ImageOptions())


def test_damaged_and_missing_cifar_files_are_named(tmp_path):
    write_cifar(tmp_path, {}, NAMES)
    file = tmp_path / "cifar-100-python" / "train"
    assert len(cifar100(tmp_path).train) == 100
    for content in (file.read_bytes()[:1000], b"\x80\x04K\x05K\x06s.", b"\x80\x04].", b""):
        file.write_bytes(content)
        with pytest.raises(DataError, match="train cannot be read as a CIFAR file"):
            cifar100(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"train cannot be read as a CIFAR file .*No such file"):
        cifar100(tmp_path)


def test_cifar10_is_read_from_its_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random, classes = np.random.default_rng(0), list("abcdefghij")
    pixels = random.integers(256, size=(6, 20, 3072), dtype=np.uint8)
    labels = random.integers(10, size=(6, 20)).tolist()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, data, batch in zip(names, pixels, labels, strict=True):
        content = {"batch_label": name, "labels": batch, "data": data}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    data = open_dataset("cifar10", tmp_path, ImageOptions())
    assert data.summary() == "cifar10: 10 classes, 100 + 20 images"
    assert data.classes == tuple(classes)
    assert data.targets.tolist() == [label for batch in labels[:5] for label in batch]
    assert np.array_equal(data.train.images[25].permute(2, 0, 1).flatten(), pixels[1, 5])


def test_held_out_part_is_stratified_fixed_and_disjoint():
    whole = digits()
    held = whole.hold_out(0.1)
    counts = whole.train.targets.bincount()
    assert held.test.targets.bincount().tolist() == [round(0.1 * int(count)) for count in counts]
    everything = torch.cat([held.train.images, held.test.images])
    sums = [images.flatten(1).long().sum(1) for images in (everything, whole.train.images)]
    assert torch.equal(*(each.sort().values for each in sums))
    torch.manual_seed(5)
    assert torch.equal(whole.hold_out(0.1).test.images, held.test.images)


def test_subset_is_balanced_and_fixed():
    whole = digits()
    part = whole.subset(103)
    assert part.train.targets.bincount().tolist() == [11] * 3 + [10] * 7
    assert torch.equal(part.test.images, whole.test.images)
    assert torch.equal(whole.subset(103).train.images, part.train.images)
