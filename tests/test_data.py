"""Data sets in memory: CIFAR, the digits, augmentation, and the plan of an epoch."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from mdistiller_norm.config import load_config
from mdistiller_norm.data import ImageOptions, Share, cifar100, digits, open_dataset
from mdistiller_norm.data.augment import Normalise, PadCropFlip
from mdistiller_norm.data.memory import MemoryTrainLoader, TensorDataset
from mdistiller_norm.data.plan import epoch_plan, share_out, smallest_micro_batch
from mdistiller_norm.download import read_sources
from mdistiller_norm.errors import DataError
from mdistiller_norm.run_folder import run_folder


@pytest.fixture(scope="module")
def cifar(cifar_root: Path) -> TensorDataset:
    return cifar100(cifar_root)


def test_cifar_is_complete_and_constants_are_those_of_the_images(cifar: TensorDataset) -> None:
    assert (len(cifar.train), len(cifar.test)) == (50_000, 10_000)
    assert cifar.train.targets.bincount().tolist() == [500] * 100
    assert cifar.classes[:2] == ("apple", "aquarium_fish")
    for data in (cifar, digits()):
        pixels = data.train.images / 255
        assert pixels.mean((0, 1, 2)).tolist() == pytest.approx(data.mean, abs=1e-3)
    assert pixels.std((0, 1, 2)).tolist() == pytest.approx(data.std, abs=1e-3)


def test_every_view_equals_torchvision(cifar: TensorDataset) -> None:
    augment = PadCropFlip(cifar.padding, cifar.flip)
    assert augment.views == 162
    indices = torch.arange(162) * 31
    normalise = Normalise(cifar.mean, cifar.std, torch.device("cpu"))
    got = normalise(augment(cifar.train.images, indices, torch.arange(162)))
    assert got.is_contiguous(memory_format=torch.channels_last)
    for view, (index, image) in enumerate(zip(indices.tolist(), got, strict=True)):
        picture = TF.to_pil_image(cifar.train.images[index].permute(2, 0, 1))
        picture = TF.crop(TF.pad(picture, 4), view // 18, view // 2 % 9, 32, 32)
        picture = TF.hflip(picture) if view % 2 else picture
        assert torch.equal(image, TF.normalize(TF.to_tensor(picture), cifar.mean, cifar.std)), (
            view
        )
    images, targets = next(iter(cifar.eval_loader(16, torch.device("cpu"))))
    test = [TF.to_tensor(image.numpy()) for image in cifar.test.images[:16]]
    normalised = [TF.normalize(image, cifar.mean, cifar.std) for image in test]
    assert torch.equal(images, torch.stack(normalised))
    assert torch.equal(targets, cifar.test.targets[:16])


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    order, views, key = epoch_plan(3, 7, 1437, 162)
    assert sorted(order.tolist()) == list(range(1437))
    assert 0 <= views.min() <= views.max() < 162
    for seed, epoch, same in ((3, 7, True), (4, 7, False), (3, 8, False)):
        others = epoch_plan(seed, epoch, 1437, 162)
        equal = {torch.equal(others[0], order), torch.equal(others[1], views), others[2] == key}
        assert equal == {same}


def test_epoch_contains_every_sample_once_and_can_start_at_any_step() -> None:
    data = digits()
    loader = MemoryTrainLoader(data, batch_size=64, seed=0)
    raw = list(loader.batches(1))
    batches = [loader.prepare(*tensors) for tensors in raw]
    assert [len(batch.targets) for batch in batches] == [64] * 22 + [29]
    indices = torch.cat([batch.indices for batch in batches])
    assert sorted(indices.tolist()) == list(range(1437))
    assert torch.equal(
        torch.cat([batch.targets for batch in batches]), data.train.targets[indices]
    )
    assert len({int(batch.key) for batch in batches}) == loader.steps == 23
    for resumed, whole in zip(loader.batches(1, first_step=20), raw[20:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_weighted_parts_give_the_mean_of_the_batch(count: int) -> None:
    values, parts = (
        torch.arange(100.0),
        [share_out(40, count, Share(rank, 3)) for rank in range(3)],
    )
    mean = sum(part.weight * values[part.rows].mean() for part in parts) / 3
    torch.testing.assert_close(mean, values[40 : 40 + count].mean())
    real = [i for part in parts if part.weight for i in range(part.rows.start, part.rows.stop)]
    assert real == list(range(40, 40 + count))
    assert {part.smallest for part in parts} == {max(count // 3, 1)}


def test_smallest_micro_batch() -> None:
    for samples, batch, world, accumulate, expected in (
        (64, 32, 1, 1, 32), (33, 32, 1, 1, 1), (35, 32, 2, 1, 1), (66, 64, 2, 1, 1), (33, 11, 1, 11, 1),
        (20, 64, 2, 2, 5),
    ):  # fmt: skip
        assert smallest_micro_batch(samples, batch, Share(0, world), accumulate) == expected


# CIFAR's files


def write_cifar(root: Path, train: Mapping[str, object], names: object) -> None:
    """Write CIFAR-100 with 100 training images."""
    folder = root / "cifar-100-python"
    folder.mkdir(exist_ok=True)
    good = {"data": np.zeros((100, 3072), np.uint8), "fine_labels": list(range(100))}
    contents = {"train": good | dict(train), "test": good, "meta": {"fine_label_names": names}}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


class Call:
    def __init__(self, function: object) -> None:
        self.function = function

    def __reduce__(self):
        return (self.function, ("code from a data file",))


NAMES = [f"class {i}" for i in range(100)]


@pytest.mark.parametrize(
    ("train", "names", "message"),
    [
        ({"data": np.zeros((99, 3072), np.uint8)}, NAMES, r"int64 \[N\], got"),
        ({"data": np.zeros((100, 768), np.float32)}, NAMES, "data must be a uint8 array"),
        ({"data": [[0], [0, 0]]}, NAMES, "train cannot be read as a CIFAR file"),
        ({"data": Call(print)}, NAMES, r"print is not part of such a file"),
        ({}, Call(np.array), r"numpy\S*array is not part of such a file"),
        ({"fine_labels": [100] * 100}, NAMES, r"targets must be in 0\.\.99, got 100\.\.100"),
        ({}, 5, "meta cannot be read as a CIFAR file"),
        ({}, [0] * 100, "classes must be strings"),
    ],
)
def test_cifar_files_are_checked_by_content(tmp_path, train, names, message):
    write_cifar(tmp_path, train, names)
    with pytest.raises(DataError, match=message):
        open_dataset("cifar100", tmp_path, ImageOptions())


def test_damaged_and_missing_cifar_files_are_named(tmp_path: Path) -> None:
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


def test_cifar10_is_read_from_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    pixels = random.integers(256, size=(6, 20, 3072), dtype=np.uint8)
    labels = random.integers(10, size=(6, 20)).tolist()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, data, batch in zip(names, pixels, labels, strict=True):
        content = {
            "batch_label": name,
            "labels": batch,
            "data": data,
            "filenames": ["a.png"] * 20,
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    classes = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    meta = {"num_cases_per_batch": 20, "label_names": classes}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    data = open_dataset("cifar10", tmp_path, ImageOptions())
    assert data.summary() == "cifar10: 10 classes, 100 + 20 images"
    assert data.classes == tuple(classes)
    assert data.targets.tolist() == [label for batch in labels[:5] for label in batch]
    assert (
        data.train.images[25, 3, 4].tolist() == pixels[1, 5].reshape(3, 32, 32)[:, 3, 4].tolist()
    )


def test_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    sources = tmp_path / "sources.yaml"  # no server listens
    sources.write_text("cifar100: [{urls: ['http://127.0.0.1:9/archive.tar.gz'], to: data}]")
    monkeypatch.setattr("mdistiller_norm.data.cifar.read_sources", lambda: read_sources(sources))
    with pytest.raises(
        DataError, match=r"archive.tar.gz cannot be downloaded: .*: set DATASET.ROOT"
    ):
        cifar100(tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_held_out_part_is_stratified_fixed_and_disjoint() -> None:
    whole = digits()
    held = whole.hold_out(0.1)
    assert len(held.train) + len(held.test) == len(whole.train)
    counts = torch.bincount(whole.train.targets)
    assert torch.bincount(held.test.targets).tolist() == [
        round(0.1 * int(count)) for count in counts
    ]
    everything = torch.cat([held.train.images, held.test.images])
    sums = [
        images.flatten(1).long().sum(1).sort().values
        for images in (everything, whole.train.images)
    ]
    assert torch.equal(*sums)
    torch.manual_seed(5)
    assert torch.equal(whole.hold_out(0.1).test.images, held.test.images)


def test_subset_is_balanced_and_fixed() -> None:
    whole = digits()
    part = whole.subset(103)
    assert part.train.targets.bincount().tolist() == [11] * 3 + [10] * 7
    assert torch.equal(part.test.images, whole.test.images)
    assert torch.equal(whole.subset(103).train.images, part.train.images)
    for name in ("EXPERIMENT.NAME=quick", "EXPERIMENT.TAG=quick"):
        folder = run_folder(load_config(None, [name, "DATASET.SUBSET=20"]))
        assert folder.name.endswith("quick,DATASET.SUBSET=20")
