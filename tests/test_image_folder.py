"""Image folders and shards: real JPEGs through worker processes, the loaders and training runs."""

import gzip
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, unpacked
from PIL import Image, PngImagePlugin
from torchvision import transforms as T

from mdistiller_norm.cli import execute, main
from mdistiller_norm.config import Config, load_config
from mdistiller_norm.data import (
    ImageOptions,
    Share,
    image_folder,
    imagenet,
    open_dataset,
    tiny_imagenet,
)
from mdistiller_norm.data.decode import decode, draw_crop, eval_image, train_image
from mdistiller_norm.data.folder import MEAN, STD, ImageDataset, measure
from mdistiller_norm.data.shards import INDEX, webdataset
from mdistiller_norm.engine.checkpoint import load, save_atomically
from mdistiller_norm.errors import CheckpointError, ConfigError, DataError
from mdistiller_norm.models import build_model
from mdistiller_norm.run import build_run, train

CPU = torch.device("cpu")
Epoch = list[tuple[torch.Tensor, ...]]
VANILLA = str(ROOT / "configs" / "digits" / "vanilla_resnet8.yaml")
SMALL = ImageOptions(size=48, resize=56, mean=MEAN, std=STD, workers=0)
RUN = [
    "DATASET.TYPE=image_folder", "DATASET.IMAGE_SIZE=32", "DATASET.RESIZE=36", "DATASET.NUM_WORKERS=0",
    "DISTILLER.STUDENT=resnet8", "SOLVER.BATCH_SIZE=8", "SOLVER.EPOCHS=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def jpegs() -> list[Path]:
    root = unpacked("imagenet_samples", "imagenet_samples/val")
    return sorted((root / "imagenet_samples").rglob("*.JPEG"))


def run_config(tree: Path, out: Path, name: str, *overrides: str) -> Config:
    words = [f"DATASET.ROOT={tree}", f"LOG.PREFIX={out}", f"EXPERIMENT.NAME={name}"]
    return load_config(None, [*RUN, *words, *overrides])


@pytest.fixture
def copy(tree: Path, tmp_path: Path) -> Path:
    """A copy of the tree that a test may damage."""
    return Path(shutil.copytree(tree, tmp_path / "tiny"))


def epoch(dataset: ImageDataset, number: int = 1, first: int = 0, **options: Any) -> Epoch:
    return list(dataset.train_loader(8, 0, CPU, **options).batches(number, first))


def same(a: Epoch, b: Epoch) -> bool:
    pairs = [zip(*batches, strict=True) for batches in zip(a, b, strict=True)]
    return all(torch.equal(x, y) for pair in pairs for x, y in pair)


def contents(split: Any) -> list[tuple[bytes, int]]:
    return sorted((split.read(index), int(target)) for index, target in enumerate(split.targets))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Pixels


def test_decode_equals_pillow(jpegs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    files = [(path.read_bytes(), 0) for path in jpegs[::4]]
    with Image.open(jpegs[0]) as image:
        for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")):
            files.append((encoded(image.convert(mode), kind), int(mode == "CMYK")))
    for content, tolerance in files:
        with Image.open(io.BytesIO(content)) as image:
            expected = torch.from_numpy(np.array(image.convert("RGB"))).int()
        assert (decode(content).permute(1, 2, 0).int() - expected).abs().max() <= tolerance
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(encoded(Image.new("1", (12, 12)), "PNG"))  # Pillow warns about its size


def test_large_texts_and_16_bits_are_read_and_other_formats_refused() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("history", "x" * 2**21, zip=True)
    image, deep = (
        Image.new("RGB", (8, 8)),
        (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16),
    )
    assert decode(encoded(image, "PNG", pnginfo=text)).shape == (3, 8, 8)
    for kind in ("PNG", "TIFF"):
        pixels = decode(encoded(Image.fromarray(deep), kind))
        assert torch.equal(pixels[1].flatten(), torch.arange(256).byte()), "the upper 8 bits"
    for content in (encoded(image, "EPS"), encoded(image, "PCX"), b"text"):
        with pytest.raises(ValueError, match="not an image of the formats JPEG, PNG"):
            decode(content)
    with pytest.raises(ValueError, match="32 bits have no known range"):
        decode(encoded(Image.fromarray(deep.astype(np.float32)), "TIFF"))


def test_thin_images_need_little_memory() -> None:
    for height, width in ((1, 20_000), (20_000, 1)):
        image = torch.full((3, height, width), 7, dtype=torch.uint8)
        crop = draw_crop(np.random.default_rng(0), height, width, (0.08, 1.0))
        for view in (train_image(image, crop, 224), eval_image(image, 256, 224)):
            assert torch.equal(view, torch.full((3, 224, 224), 7, dtype=torch.uint8))


def test_crops_are_within_two_levels_of_torchvision(jpegs: list[Path]) -> None:
    random = np.random.default_rng(0)
    for path in jpegs[::5]:
        with Image.open(path) as file:
            picture = file.convert("RGB")
        image = decode(path.read_bytes())
        crop = draw_crop(random, *image.shape[1:], (0.08, 1.0))
        usual = T.functional.resized_crop(picture, *crop[:4], [224, 224])
        usual = T.functional.hflip(usual) if crop[4] else usual
        centre = T.Compose([T.Resize(256), T.CenterCrop(224)])(picture)
        pairs = ((train_image(image, crop, 224), usual), (eval_image(image, 256, 224), centre))
        for ours, theirs in pairs:
            difference = ours.int() - T.functional.pil_to_tensor(theirs).int()
            assert difference.abs().max() <= 2
            assert difference.float().abs().mean() < 0.3


def test_crops_are_distributed_as_in_torchvision() -> None:
    random, draws = np.random.default_rng(1), 4000
    for height, width, scale in ((375, 500, (0.08, 1.0)), (100, 400, (0.5, 1.0))):
        blank = torch.empty(3, height, width)
        ours = np.array(
            [draw_crop(random, height, width, scale) for _ in range(draws)], dtype=float
        )
        draw = partial(T.RandomResizedCrop.get_params, blank, list(scale), [3 / 4, 4 / 3])
        theirs = np.array([draw() for _ in range(draws)])
        assert (ours[:, :2] + ours[:, 2:4] <= (height, width)).all()
        for a, b in zip(ours.T[:4], theirs.T, strict=True):
            assert abs(a.mean() - b.mean()) < 5 * np.hypot(a.std(), b.std()) / draws**0.5 + 1e-9
            assert a.std() == pytest.approx(b.std(), rel=0.1, abs=1)
        assert ours[:, 4].mean() == pytest.approx(0.5, abs=0.05)
    assert draw_crop(random, 10, 1000, (1.0, 1.0))[:4] == (0, 493, 10, 13)  # no attempt fits


# The folder


def test_folder_is_counted_named_and_measured(tree: Path) -> None:
    data = image_folder(tree, ImageOptions(size=64, resize=64))
    assert data.summary() == "tiny: 3 classes, 36 + 12 images"
    assert data.targets.bincount().tolist() == [12, 12, 12]
    assert data.classes == tuple(sorted(path.name for path in (tree / "train").iterdir()))
    assert (data.variant, image_folder(tree, ImageOptions()).variant) == ("cifar", "imagenet")
    backwards = tuple(reversed(data.classes))
    assert image_folder(tree, replace(SMALL, classes=backwards)).classes == backwards
    assert imagenet(tree, SMALL).name == "imagenet"
    unit = image_folder(tree, replace(SMALL, mean=(0.0,) * 3, std=(1.0,) * 3))
    assert (unit.mean, unit.std) == ((0.0,) * 3, (1.0,) * 3)
    images = [decode(path.read_bytes()) for path in sorted((tree / "train").rglob("*.JPEG"))]
    pixels = torch.stack(images) / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-3)
    assert data.std == pytest.approx(pixels.double().std((0, 2, 3)).tolist(), abs=1e-3)


def test_nested_folders_count_and_hidden_files_do_not(copy, capsys):
    before = image_folder(copy, SMALL)
    folder = copy / "train" / before.classes[1]
    files = sorted(folder.iterdir())
    kept = {file.read_bytes() for file in files if file != files[5]}
    for place, some in (("a/b", files[:3]), ("z", files[3:5]), (".trash", files[5:6])):
        (folder / place).mkdir(parents=True)
        for file in some:
            file.rename(folder / place / file.name)
    (folder / "._0.JPEG").write_bytes(b"of another system")
    shutil.move(folder / "a", copy / "elsewhere")
    (folder / "linked.jpg").symlink_to(copy / "elsewhere")  # a folder with the name of an image
    (folder / "z" / "cycle").symlink_to(folder)
    (folder / "b.pgm").write_bytes(encoded(Image.new("L", (8, 8)), "PPM"))
    after = image_folder(copy, SMALL)
    assert after.summary() == "tiny: 3 classes, 36 + 12 images"
    build_run(run_config(copy, copy.parent, "hidden")).trainer.log.close()
    assert (
        "warning: 2 images are left out: their names begin with a dot" in capsys.readouterr().out
    )
    assert torch.bincount(after.targets).tolist() == [12, 12, 12]
    added = (folder / "b.pgm").read_bytes()
    assert {after.train.read(index) for index in range(12, 24)} == {*kept, added}
    assert after.unreadable() == []


def test_names_that_are_not_utf8_are_escaped(copy: Path) -> None:
    file = next((copy / "val").rglob("*.JPEG"))
    file.rename(os.fsdecode(os.fsencode(file.parent) + b"/caf\xe9.jpg"))
    data = image_folder(copy, SMALL)
    assert sum(data.test.name(index).endswith(r"caf\udce9.jpg") for index in range(12)) == 1
    assert data.unreadable() == []
    (copy / "train" / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(DataError, match=r"caf\\udce9 in .*train has a name that is not UTF-8"):
        image_folder(copy, SMALL)


def test_measuring_skips_unreadable_images_and_constant_channels(copy: Path) -> None:
    first, *others = sorted((copy / "train").rglob("*.JPEG"))
    with Image.open(first) as image:
        without_blue = np.asarray(image.convert("RGB")) * np.array([1, 1, 0], np.uint8)
    Image.fromarray(without_blue).save(first, "PNG")
    for path in others:
        path.write_bytes(b"")
    mean, std = measure(image_folder(copy, SMALL).train, SMALL)
    assert mean[0] > 0
    assert (mean[2], std[2]) == (0.0, 1.0)
    first.write_bytes(b"")
    with pytest.raises(DataError, match="none of the images such as"):
        image_folder(copy, ImageOptions(size=64))


# Loading


def test_epochs_contain_every_sample_once_in_new_orders_and_crops(tree: Path) -> None:
    data = image_folder(tree, SMALL)
    first, second = epoch(data), epoch(data, 2)
    for batches in (first, second):
        indices = torch.cat([batch[2] for batch in batches])
        assert sorted(indices.tolist()) == list(range(36))
        assert [len(images) for images, *_ in batches] == [8, 8, 8, 8, 4]
        assert all(
            torch.equal(targets, data.targets[indices]) for _, targets, indices, _ in batches
        )
    assert not same(first, second)
    batch = data.train_loader(8, 0, CPU).prepare(*first[0])
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    usual = T.functional.normalize(first[0][0].permute(0, 3, 1, 2) / 255, MEAN, STD)
    torch.testing.assert_close(batch.images, usual)
    assert batch.views.tolist() == [-1] * 8


def test_workers_and_processes_do_not_change_a_pixel(tree: Path) -> None:
    alone = image_folder(tree, SMALL)
    expected = epoch(alone, 3)
    loader = image_folder(tree, replace(SMALL, workers=2)).train_loader(8, 0, CPU)
    assert not same(list(loader.batches(1)), expected)
    next(loader.batches(2))  # the rest of this epoch is dropped
    assert same(list(loader.batches(3)), expected)  # by the same workers
    assert same(list(loader.batches(3, 2)), expected[2:])
    halves = [epoch(alone, 3, share=Share(rank, 2)) for rank in range(2)]
    for whole, *parts in zip(expected, *halves, strict=True):
        for tensor, *pieces in list(zip(whole, *parts, strict=True))[:3]:
            assert torch.equal(torch.cat(pieces), tensor)


class Slow:
    """Kills a worker while it is saved."""

    def __reduce__(self):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(30)


def test_worker_that_is_killed_while_a_checkpoint_is_saved_is_reported(tree, tmp_path, capsys):
    def program(arguments: object) -> int:
        batches = image_folder(tree, replace(SMALL, workers=2)).train_loader(8, 0, CPU).batches(1)
        next(batches)
        save_atomically(Slow(), tmp_path / "latest.pt")
        return 0

    assert main([], program) == 2
    message = capsys.readouterr().err
    assert "killed by signal" in message
    assert "lower DATASET.NUM_WORKERS" in message
    assert not list(tmp_path.iterdir())


def test_program_that_fails_ends_its_workers(tree: Path) -> None:
    code = f"""
import torch
from pathlib import Path
from mdistiller_norm.data import ImageOptions, image_folder

options = ImageOptions(size=48, mean=(0.5,) * 3, std=(0.5,) * 3, workers=2)
batches = image_folder(Path({str(tree)!r}), options).train_loader(8, 0, torch.device("cpu")).batches(1)
next(batches)
raise RuntimeError("out of memory")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stderr.splitlines()[-1] == "RuntimeError: out of memory"


def test_damaged_training_image_is_replaced_and_reported_once(copy: Path) -> None:
    damaged = sorted((copy / "train").rglob("*.JPEG"))[7]
    damaged.write_bytes(damaged.read_bytes()[:300])
    expected = epoch(image_folder(copy, SMALL))
    assert 7 not in torch.cat([indices for _, _, indices, _ in expected])
    for workers in (0, 2):
        lines: list[str] = []
        data = image_folder(copy, replace(SMALL, workers=workers, max_broken=1))
        loader = data.train_loader(8, 0, CPU)
        loader.warn = lines.append
        assert same(list(loader.batches(1)), expected)
        list(loader.batches(2))
        (line,) = lines
        assert line.startswith(f"{damaged} (")
        assert line.endswith(") cannot be read: another sample takes its place")
    with pytest.raises(DataError, match="1 unreadable images: see --check-data"):
        epoch(image_folder(copy, replace(SMALL, max_broken=0)))


def test_check_data_and_shards_list_unreadable_files(copy, capsys):
    files = [sorted((copy / split).rglob("*.JPEG"))[3] for split in ("train", "val")]
    files[0].write_bytes(b"")
    files[1].write_bytes(b"\xff\xd8\xff\xe0 not an image")
    assert execute(["train", "--cfg", VANILLA, "--check-data", *RUN, f"DATASET.ROOT={copy}"]) == 2
    with pytest.raises(
        DataError, match=rf"{copy}: 2 images cannot be read \(listed above\): replace"
    ):
        execute(
            ["shards", "--root", str(copy), "--out", str(copy.parent / "out"), "--workers", "0"]
        )
    printed = capsys.readouterr().out
    assert printed.count("tiny: 3 classes, 36 + 12 images") == 2
    assert all(printed.count(str(file)) == 2 for file in files)
    assert "2 images cannot be read" in printed
    assert not (copy.parent / "out").exists()
    with pytest.raises(DataError, match=f"the test image .*{files[1].name}"):
        list(image_folder(copy, SMALL).eval_loader(8, CPU))
    with pytest.raises(DataError, match=f"the test image .*{files[1].name}"):
        build_run(run_config(copy, copy.parent / "runs", "damaged"))
    assert not (copy.parent / "runs").exists()


def test_small_shared_memory_is_reported(
    tree: Path, limited_files: Callable[[int], None]
) -> None:
    limited_files(50_000)
    with pytest.raises(DataError, match="/dev/shm is too small"):
        epoch(image_folder(tree, replace(SMALL, workers=2)))
    assert len(epoch(image_folder(tree, SMALL))) == 5


def test_batch_norm_on_a_single_value_is_refused(tree: Path, tmp_path: Path) -> None:
    refused = ["DATASET.VARIANT=imagenet", "DISTILLER.STUDENT=ResNet18", "SOLVER.BATCH_SIZE=35"]
    with pytest.raises(ConfigError, match=r"35 leaves one of the 36 images .* norm of ResNet18"):
        build_run(run_config(tree, tmp_path, "single", *refused))
    # resnet8 has maps of 8 x 8 pixels
    build_run(run_config(tree, tmp_path, "maps", "SOLVER.BATCH_SIZE=35")).trainer.log.close()
    assert [path.name for path in (tmp_path / "distill").iterdir()] == ["maps"]


# Shards


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "tiny_shards"
    pack(tree, out)
    return out


def pack(root: Path, out: Path) -> None:
    command = [
        "shards",
        "--root",
        str(root),
        "--out",
        str(out),
        "--per-shard",
        "10",
        "--workers",
        "0",
    ]
    assert execute(command) == 0


def test_shards_contain_the_same_images_and_classes(
    tree: Path, shards: Path, tmp_path: Path
) -> None:
    files, packed = image_folder(tree, SMALL), webdataset(shards, SMALL)
    assert packed.classes == files.classes
    assert packed.summary() == "tiny_shards: 3 classes, 36 + 12 images"
    assert contents(packed.train) == contents(files.train)
    with tarfile.open(shards / "train" / "000000.tar") as tar:
        assert [Path(name).suffix for name in tar.getnames()] == [".jpg", ".cls"] * 10
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    for split in ("train", "val"):
        (copy / split / INDEX).unlink()
    assert same(epoch(webdataset(copy, SMALL)), epoch(packed))


def index(**change: Any) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        with np.load(root / "train" / INDEX) as content:
            np.savez(root / "train" / INDEX, **(dict(content) | change))

    return damage


def shard(
    change: Callable[[bytes, int], bytes], keep_index: bool = False
) -> Callable[[Path], None]:
    """Change the second shard, given its bytes and the position of a header in the middle."""

    def damage(root: Path) -> None:
        path = root / "train" / "000001.tar"
        with tarfile.open(path) as tar:
            middle = tar.getmembers()[6].offset
        path.write_bytes(change(path.read_bytes(), middle))
        if not keep_index:
            (root / "train" / INDEX).unlink()

    return damage


def lone_image() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
        tar.addfile(tarfile.TarInfo("._b.jpg"))
    return file.getvalue()


TRUNCATED = r"000001\.tar cannot be read \(truncated or damaged after byte \d+\)"
STALE = r"index\.npz does not match the shards"
CLASSES = r"classes\.txt must contain one class name per line"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shard(lambda whole, middle: whole[:middle]), TRUNCATED),
        (shard(lambda whole, middle: whole[:middle] + bytes(len(whole) - middle)), TRUNCATED),
        (
            shard(lambda whole, middle: whole[:middle] + b"x" * 512 + whole[middle + 512 :]),
            TRUNCATED,
        ),
        (shard(lambda whole, middle: gzip.compress(whole)), r"000001\.tar cannot be read"),
        (shard(lambda whole, middle: lone_image()), "a must have both an image and a .cls"),
        (shard(lambda whole, middle: whole[:5000], keep_index=True), STALE),
        (index(shards=["000000.tar"]), STALE),
        (
            index(targets=np.full(36, -1)),
            r"class numbers of .*classes\.txt must be in 0\.\.2, got -1\.\.-1",
        ),
        (
            index(places=np.empty((0, 3), np.int64), targets=np.empty(0, np.int64)),
            "train has no shards",
        ),
        (lambda root: (root / "classes.txt").write_bytes(b"a\nb\nc\n\n\nd\n"), CLASSES),
    ],
)
def test_damaged_shards_are_refused(shards, tmp_path, damage, message):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(DataError, match=message):
        webdataset(copy, SMALL)


def test_wrong_options_and_missing_folders_are_refused(copy, shards, tmp_path):
    for options, message in (
        (replace(SMALL, resize=47), r"DATASET\.RESIZE must be >= DATASET\.IMAGE_SIZE 48, got 47"),
        (replace(SMALL, std=()), r"set both DATASET\.MEAN and DATASET\.STD, or neither"),
    ):
        with pytest.raises(ConfigError, match=message):
            image_folder(copy, options)
    with pytest.raises(DataError, match=r"the classes of DATASET\.CLASSES in the same order"):
        webdataset(shards, replace(SMALL, classes=("b", "a", "c")))
    first = min((copy / "val").iterdir())
    shutil.rmtree(first)
    with pytest.raises(DataError, match=f"val has no images .* of class {first.name}"):
        image_folder(copy, SMALL)
    shutil.rmtree(copy / "val")
    with pytest.raises(
        DataError, match=r"val cannot be read \(No such file or directory\): images"
    ):
        train(run_config(copy, tmp_path / "out", "run"))
    assert not (tmp_path / "out").exists()


def test_shards_are_written_completely_or_not_at_all(copy, shards, tmp_path, limited_files):
    with pytest.raises(DataError, match=r"tiny_shards has shards: choose another folder"):
        pack(copy, shards)
    limited_files(5000)
    with pytest.raises(DataError, match=r"full cannot be written \(.*File too large\)"):
        pack(copy, tmp_path / "full")
    limited_files(-1)
    assert not list((tmp_path / "full").iterdir())
    (tmp_path / "full" / ".unfinished_shards" / "train").mkdir(
        parents=True
    )  # of a killed process
    pack(copy, tmp_path / "full")
    assert {path.name for path in (tmp_path / "full").iterdir()} == {
        "classes.txt",
        "train",
        "val",
    }
    assert webdataset(tmp_path / "full", SMALL).summary() == "full: 3 classes, 36 + 12 images"


# Runs


@pytest.fixture(scope="module")
def run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs, with an uninterrupted one on the tree."""
    out = tmp_path_factory.mktemp("runs")
    train(run_config(tree, out, "whole"))
    return out


def test_teacher_trained_on_other_images_is_reported(tree, run, tmp_path, capsys):
    given = ["DISTILLER.TYPE=KD", "DISTILLER.TEACHER=resnet8"]
    given += [f"DISTILLER.TEACHER_WEIGHTS={run}/distill/whole/student_last.pt"]

    def build(name: str, *overrides: str) -> str:
        build_run(run_config(tree, tmp_path, name, *given, *overrides))
        return "".join(
            line for line in capsys.readouterr().out.splitlines() if "was trained" in line
        )

    assert build("same") == ""
    (tmp_path / "moved").symlink_to(shutil.copytree(tree, tmp_path / "another"))
    moved = build("moved", f"DATASET.ROOT={tmp_path / 'moved'}")
    assert "was trained on tiny, not on another" in moved
    larger = build("size", "DATASET.IMAGE_SIZE=40", "DATASET.RESIZE=44")
    assert "image_size [32, 32] (here [40, 40])" in larger
    first, second, third = sorted(folder.name for folder in (tree / "train").iterdir())
    with pytest.raises(CheckpointError, match=f"has class '{first}' for '{second}'"):
        build("order", f"DATASET.CLASSES=[{second},{first},{third}]")


# Tiny-ImageNet, and folders without val

MDISTILLER = """
EXPERIMENT: {NAME: "", TAG: "kd,dot,r18,r18", PROJECT: "dot_tinyimagenet"}
DATASET: {TYPE: "tiny_imagenet", NUM_WORKERS: 16}
DISTILLER: {TYPE: "KD", TEACHER: "ResNet18", STUDENT: "ResNet18"}
SOLVER:
  {BATCH_SIZE: 256, EPOCHS: 200, LR: 0.2, LR_DECAY_STAGES: [60, 120, 160], LR_DECAY_RATE: 0.1, WEIGHT_DECAY: 0.0005,
  MOMENTUM: 0.9, TYPE: "SGD", TRAINER: "dot", DOT: {DELTA: 0.075}}
"""


@pytest.fixture
def original(copy: Path) -> Path:
    """The tree in the layout in which Tiny-ImageNet is distributed."""
    (copy / "val" / "images").mkdir()
    lines = []
    for label in sorted(folder.name for folder in (copy / "train").iterdir()):
        (copy / "train" / label).rename(copy / "images")
        (copy / "train" / label).mkdir()
        (copy / "images").rename(copy / "train" / label / "images")
        for file in sorted((copy / "val" / label).iterdir()):
            lines.append(f"{file.name}\t{label}\t0\t0\t63\t63\n")
            file.rename(copy / "val" / "images" / file.name)
        (copy / "val" / label).rmdir()
    (copy / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    copy.rename(copy.with_name("tiny-imagenet-200"))
    return copy.with_name("tiny-imagenet-200")


def test_layouts_of_tiny_imagenet_are_equal(tree: Path, original: Path) -> None:
    options = ImageOptions(workers=0)
    folders, downloaded = tiny_imagenet(tree, options), tiny_imagenet(original.parent, options)
    assert downloaded.summary() == "tiny_imagenet: 3 classes, 36 + 12 images"
    assert (downloaded.image_size, downloaded.variant) == ((64, 64), "cifar")
    assert downloaded.mean[0] == 0.4802
    assert downloaded.classes == folders.classes
    assert same(epoch(downloaded), epoch(folders))
    assert contents(downloaded.test) == contents(folders.test)
    (original / "val" / "val_annotations.txt").unlink()
    with pytest.raises(DataError, match="val has no class folders or val_annotations"):
        tiny_imagenet(original, options)


@pytest.mark.parametrize("name", ["mdistiller", "vit_tiny_tiny_imagenet", "resnet18_folder"])
def test_configs_train(tree: Path, original: Path, tmp_path: Path, name: str) -> None:
    """Train for one epoch, with small networks in place of residual ones."""
    config, root = ROOT / "configs" / "recipes" / f"{name}.yaml", tree
    if name == "mdistiller":
        config, root = tmp_path / "run.yaml", original.parent
        config.write_text(MDISTILLER)
    torch.save(build_model("resnet8", 3).state_dict(), tmp_path / "teacher.pth")
    keys = ["DATASET.NUM_WORKERS=0", "DATASET.VARIANT=cifar", f"DATASET.ROOT={root}"]
    keys += ["SOLVER.EPOCHS=1", f"LOG.PREFIX={tmp_path}", "DISTILLER.TEACHER=resnet8"]
    keys += [f"DISTILLER.TEACHER_WEIGHTS={tmp_path}/teacher.pth"]
    if name.startswith("vit"):
        pytest.importorskip("timm", reason="timm is not installed")
    else:
        keys.append("DISTILLER.STUDENT=resnet8")
    result = train(load_config(config, keys))
    assert (result["method"], result["last"]["epoch"]) == (["KD"], 1)


def test_folder_without_val_is_split_the_same_everywhere(copy, tmp_path, capsys):
    shutil.rmtree(copy / "val")
    split = ["DATASET.VAL_SPLIT=0.25", "SOLVER.EPOCHS=1"]
    train(run_config(copy, tmp_path, "teacher", *split))
    kd = ["DISTILLER.TYPE=KD", "DISTILLER.TEACHER=resnet8"]
    result = train(run_config(copy, tmp_path, "student", *split, *kd))
    assert result["teacher"]["file"].endswith("distill/teacher/student_last.pt")
    path = tmp_path / "distill" / "student" / "student_last.pt"
    capsys.readouterr()
    assert execute(["eval", "-c", str(path)]) == 0
    assert f"top-1 {result['last']['top1']:6.2f}" in (shown := capsys.readouterr().out)
    assert " 9 images of 32x32" in shown
    assert execute(["compare", str(path.parent), "--json"]) == 0
    (network,) = json.loads(capsys.readouterr().out)["networks"]
    assert network["measured_top1"] == pytest.approx(result["best"]["top1"])
    whole = open_dataset("image_folder", copy, replace(SMALL, val_split=0.25, train=False))
    assert whole.test.targets.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    with pytest.raises(
        DataError, match=r"val cannot be read .* without val, set DATASET\.VAL_SPLIT"
    ):
        image_folder(copy, SMALL)
    pack(copy, tmp_path / "packed")
    assert (
        "has no folder val: train on the shards with DATASET.VAL_SPLIT" in capsys.readouterr().out
    )
    for needs_train in (True, False):
        options = replace(SMALL, val_split=0.25, train=needs_train)
        packed = open_dataset("webdataset", tmp_path / "packed", options)
        assert packed.summary() == "packed: 3 classes, 27 + 9 images"


# Augmentation


def test_resumed_run_with_mixed_images_and_randaugment_is_bit_identical(
    tree: Path, run: Path
) -> None:
    given = [
        "DATASET.MIXUP=0.2",
        "DATASET.CUTMIX=1",
        "DATASET.RANDAUGMENT=9",
        "DISTILLER.TYPE=KD",
    ]
    teacher = f"DISTILLER.TEACHER_WEIGHTS={run}/distill/whole/student_last.pt"
    given += ["DISTILLER.TEACHER=resnet8", teacher]
    train(run_config(tree, run, "mixed", *given))
    train(run_config(tree, run, "mixed_parts", *given, "SOLVER.EPOCHS=1"))
    train(run_config(tree, run, "mixed_parts", *given, "DATASET.NUM_WORKERS=2"), resume=True)
    names = ("mixed", "mixed_parts", "whole")
    mixed, parts, plain = (
        load(run / "distill" / name / "latest.pt")["trainable"] for name in names
    )
    assert all(torch.equal(mixed[key], parts[key]) for key in mixed)
    assert not torch.equal(mixed["student.conv1.weight"], plain["student.conv1.weight"])


def test_randaugment_changes_training_images_only(tree: Path) -> None:
    plain, augmented = (image_folder(tree, replace(SMALL, randaugment=level)) for level in (0, 9))
    state = torch.get_rng_state()
    first = epoch(augmented)
    assert torch.equal(torch.get_rng_state(), state)
    for (images, targets, *_), (others, expected, *_) in zip(first, epoch(plain), strict=True):
        assert torch.equal(targets, expected)
        assert not torch.equal(images, others)
    tests = [next(iter(dataset.eval_loader(12, CPU)))[0] for dataset in (plain, augmented)]
    assert torch.equal(*tests)
