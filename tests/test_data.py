from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

from mdistiller_norm.config import load_config
from mdistiller_norm.data import (
    DATASETS,
    MemoryEvalLoader,
    MemoryTrainLoader,
    Share,
    TensorDataset,
    cifar100,
    digits,
)
from mdistiller_norm.data.augment import PadCropFlip, normalise
from mdistiller_norm.data.cifar import _download
from mdistiller_norm.data.plan import epoch_plan, share_out
from mdistiller_norm.errors import ConfigError, DataError
from mdistiller_norm.run import build_run


@pytest.fixture(scope="module")
def cifar(cifar_root: Path) -> TensorDataset:
    return cifar100(cifar_root)


def test_digits_are_the_real_ones_split_evenly() -> None:
    data = digits()
    assert data.train.images.shape == (1437, 32, 32, 3)
    assert data.test.images.shape == (360, 32, 32, 3)
    assert data.train.images.dtype == torch.uint8
    assert len(data.train) + len(data.test) == 1797
    assert data.test.targets.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert torch.equal(digits().train.images, data.train.images)
    pixels = data.train.images / 255
    assert pixels.mean((0, 1, 2)).tolist() == pytest.approx(data.mean, abs=1e-3)
    assert pixels.std((0, 1, 2)).tolist() == pytest.approx(data.std, abs=1e-3)


def test_cifar_is_complete(cifar: TensorDataset) -> None:
    assert len(cifar.train) == 50_000
    assert len(cifar.test) == 10_000
    assert cifar.train.targets.bincount().tolist() == [500] * 100
    assert cifar.classes[:2] == ("apple", "aquarium_fish")
    assert (cifar.train.images / 255).mean((0, 1, 2)).tolist() == pytest.approx(cifar.mean, abs=1e-3)


def torchvision_view(image: torch.Tensor, augment: PadCropFlip, y: int, x: int, flip: int, data: TensorDataset):
    """The usual pipeline on a PIL image, with the offsets given instead of drawn."""
    picture = TF.to_pil_image(image.permute(2, 0, 1))
    picture = TF.crop(TF.pad(picture, augment.padding), y, x, *data.image_size)
    picture = TF.hflip(picture) if flip else picture
    return TF.normalize(TF.to_tensor(picture), data.mean, data.std)


def test_augmentation_is_torchvisions_to_the_bit(cifar: TensorDataset) -> None:
    augment = PadCropFlip(cifar.padding, cifar.flip)
    assert augment.views == 162
    wanted, indices, views = [], [], []
    for i, (y, x, flip) in enumerate([(0, 0, 0), (8, 8, 1), (4, 4, 0), (4, 4, 1), (0, 8, 1), (3, 5, 0), (7, 1, 1)]):
        indices.append(i * 31)
        views.append(augment.name(y, x, flip))
        wanted.append(torchvision_view(cifar.train.images[i * 31], augment, y, x, flip, cifar))
    images = cifar.train.images
    crops = augment(images, torch.tensor(indices), torch.tensor(views))
    got = normalise(crops, torch.tensor(cifar.mean), torch.tensor(cifar.std))
    assert torch.equal(got, torch.stack(wanted))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(images, torch.tensor([5]), torch.tensor([augment.identity]))[0], images[5])


def test_every_view_has_its_own_name() -> None:
    for flip in (False, True):
        augment = PadCropFlip(4, flip)
        names = {augment.name(y, x, f) for y in range(9) for x in range(9) for f in range(1 + flip)}
        assert names == set(range(augment.views))


def test_evaluation_images_are_torchvisions_to_the_bit(cifar: TensorDataset) -> None:
    images, targets = next(iter(MemoryEvalLoader(cifar, 16)))
    usual = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(cifar.mean, cifar.std)])
    wanted = torch.stack([usual(TF.to_pil_image(image.permute(2, 0, 1))) for image in cifar.test.images[:16]])
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-6)
    classic = torch.stack(
        [TF.normalize(TF.to_tensor(image.numpy()), cifar.mean, cifar.std) for image in cifar.test.images[:16]]
    )
    assert torch.equal(images, classic)
    assert torch.equal(targets, cifar.test.targets[:16])


def test_plan_is_a_pure_function_of_seed_and_epoch() -> None:
    first, again = epoch_plan(3, 7, 1437, 162), epoch_plan(3, 7, 1437, 162)
    assert torch.equal(first.order, again.order)
    assert torch.equal(first.views, again.views)
    assert first.key == again.key
    assert sorted(first.order.tolist()) == list(range(1437))
    assert first.views.min() >= 0
    assert first.views.max() < 162
    for other in (epoch_plan(4, 7, 1437, 162), epoch_plan(3, 8, 1437, 162)):
        assert not torch.equal(first.order, other.order)
        assert not torch.equal(first.views, other.views)
        assert first.key != other.key


def test_an_epoch_holds_every_sample_once_and_the_last_batch_is_kept() -> None:
    data = digits()
    loader = MemoryTrainLoader(data, batch_size=64, seed=0)
    batches = [loader.prepare(*raw) for raw in loader.batches(1)]
    assert len(batches) == loader.steps == 23
    assert [len(batch.targets) for batch in batches] == [64] * 22 + [29]
    indices = torch.cat([batch.indices for batch in batches])
    assert sorted(indices.tolist()) == list(range(1437))
    assert torch.equal(torch.cat([batch.targets for batch in batches]), data.train.targets[indices])
    assert len({int(batch.key) for batch in batches}) == 23


def test_a_resumed_epoch_goes_on_where_it_stopped() -> None:
    loader = MemoryTrainLoader(digits(), batch_size=64, seed=0)
    whole = list(loader.batches(2))
    for raw, same in zip(loader.batches(2, first_step=20), whole[20:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(raw, same, strict=True))


def test_processes_share_out_the_same_plan() -> None:
    data = digits()
    whole = [raw[0] for raw in MemoryTrainLoader(data, 479, seed=5).batches(3)]
    for world, batch in ((3, 480), (2, 64), (4, 360)):  # 1437 samples: last batches of 477, 29 and 357
        parts = [
            [raw[0] for raw in MemoryTrainLoader(data, batch, 5, Share(r, world)).batches(3)] for r in range(world)
        ]
        assert torch.equal(torch.cat([part for step in zip(*parts, strict=True) for part in step]), torch.cat(whole))
    with pytest.raises(ConfigError, match=r"SOLVER\.BATCH_SIZE 64 cannot be split evenly over 3"):
        MemoryTrainLoader(data, 64, seed=0, share=Share(0, 3))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_the_parts_of_a_batch_weigh_as_much_as_their_samples(count: int) -> None:
    values = torch.arange(100.0)
    parts = [share_out(40, count, Share(rank, 3)) for rank in range(3)]
    mean = sum(part.weight * values[part.rows].mean() for part in parts) / 3
    torch.testing.assert_close(mean, values[40 : 40 + count].mean())
    real = [i for part in parts if part.weight for i in range(part.rows.start, part.rows.stop)]
    assert real == list(range(40, 40 + count))
    assert {part.smallest for part in parts} == {max(count // 3, 1)}


def test_unknown_data_set_names_the_near_ones() -> None:
    with pytest.raises(ConfigError, match="unknown data set 'cifar10': did you mean cifar100"):
        DATASETS["cifar10"]


def write_cifar(folder: Path, train: object) -> None:
    folder.mkdir()
    labels = list(range(100)) * 100
    test = {"data": np.zeros((10_000, 3072), np.uint8), "fine_labels": labels}
    meta = {"fine_label_names": [f"class {i}" for i in range(100)]}
    for name, content in (("train", train), ("test", test), ("meta", meta)):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def good_train() -> dict[str, object]:
    return {"data": np.zeros((50_000, 3072), np.uint8), "fine_labels": list(range(100)) * 500}


class Evil:
    def __reduce__(self):
        return (print, ("code from a data file ran",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((49_999, 3072), np.uint8)}, "holds uint8 data of shape"),
        ({"data": np.zeros((50_000, 3072), np.float32)}, "holds float32 data"),
        ({"fine_labels": [100] * 50_000}, "50000 fine labels in 0..99"),
        ({"fine_labels": None}, "fine labels"),
        ({"fine_labels": ["0"] * 50_000}, "50000 fine labels in 0..99"),
        ({"fine_labels": [0.5] * 50_000}, "50000 fine labels in 0..99"),
        ({"data": [[0], [0, 0]]}, "no array of images"),
        ({"data": Evil()}, "it wants .*print"),
    ],
)
def test_a_folder_is_judged_by_its_content(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_cifar(tmp_path / "cifar-100-python", good_train() | change)
    with pytest.raises(DataError, match=message):
        cifar100(tmp_path)


@pytest.mark.parametrize("names", [5, None, "x" * 100, ["apple"] * 99])
def test_the_names_of_the_classes_are_a_list(tmp_path: Path, names: object) -> None:
    write_cifar(tmp_path / "cifar-100-python", {})
    meta = tmp_path / "cifar-100-python" / "meta"
    meta.write_bytes(pickle.dumps({"fine_label_names": names}))
    with pytest.raises(DataError, match=r"meta names .*, not 100 classes"):
        cifar100(tmp_path)
    meta.write_bytes(b"\x80\x04].")  # a list
    with pytest.raises(DataError, match=r"meta lacks fine_label_names"):
        cifar100(tmp_path)


def test_any_order_of_the_images_is_fine(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-100-python", good_train())
    assert len(cifar100(tmp_path).train) == 50_000


def test_cut_off_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    write_cifar(folder, good_train())
    (folder / "train").write_bytes((folder / "train").read_bytes()[:1000])
    with pytest.raises(DataError, match=r"train cannot be read as a CIFAR-100 file"):
        cifar100(tmp_path)
    (folder / "train").write_bytes(b"\x80\x04K\x05K\x06s.")  # an item for a number
    with pytest.raises(DataError, match=r"train cannot be read as a CIFAR-100 file"):
        cifar100(tmp_path)
    (folder / "test").unlink()
    with pytest.raises(DataError, match="lacks test"):
        cifar100(tmp_path)


def test_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there: the download cannot succeed
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"downloading https://.*cifar-100-python.tar.gz failed.*put the files"):
        cifar100(tmp_path)
    assert not list(tmp_path.iterdir())


def test_several_processes_may_download_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, root, sums = tmp_path / "archive.tar.gz", tmp_path / "root", {}
    image = {"data": np.zeros((1, 3072), np.uint8), "fine_labels": [0]}
    with tarfile.open(packed, "w:gz") as archive:
        for name, content in (("train", image), ("test", image), ("meta", {"fine_label_names": ["apple"]})):
            file = io.BytesIO(pickle.dumps(content))
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size, sums[name] = len(file.getvalue()), hashlib.md5(file.getvalue()).hexdigest()
            archive.addfile(member, file)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/archive.tar.gz")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        for _ in range(2):  # the second time as if another process was faster
            _download(root)
            assert [path.name for path in root.iterdir()] == ["cifar-100-python"]
            assert {path.name for path in (root / "cifar-100-python").iterdir()} == {"train", "test", "meta"}
    finally:
        server.shutdown()
        server.server_close()


def test_a_held_out_part_is_stratified_fixed_and_disjoint() -> None:
    whole = digits()
    held = whole.hold_out(0.1)
    assert len(held.train) + len(held.test) == len(whole.train)
    counts = torch.bincount(whole.train.targets)
    assert torch.bincount(held.test.targets).tolist() == [round(0.1 * int(count)) for count in counts]
    rows = {image.numpy().tobytes() for image in held.train.images}
    assert len(rows & {image.numpy().tobytes() for image in whole.test.images}) == 0
    everything = torch.cat([held.train.images, held.test.images]).flatten(1).long().sum(1).sort().values
    assert torch.equal(everything, whole.train.images.flatten(1).long().sum(1).sort().values)
    torch.manual_seed(5)
    assert torch.equal(whole.hold_out(0.1).test.images, held.test.images)
    assert (held.name, held.classes, held.flip) == (whole.name, whole.classes, whole.flip)
    with pytest.raises(ConfigError, match=r"DATASET\.VAL_SPLIT 0\.001 holds out no image of any class of digits"):
        whole.hold_out(0.001)


def test_a_data_set_that_is_handed_over_is_checked_too(tmp_path: Path) -> None:
    whole = digits()
    wrong = replace(whole, train=replace(whole.train, images=whole.train.images / 255))
    given = load_config(None, ["DATASET.TYPE=digits", "DISTILLER.TYPE=NONE", f"LOG.PREFIX={tmp_path}"])
    with pytest.raises(DataError, match=r"its training images are a tensor \[1437, 32, 32, 3\] of float32"):
        build_run(given, dataset=wrong)
    assert list(tmp_path.iterdir()) == []
