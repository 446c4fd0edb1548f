"""Image folders and shards: real JPEGs through worker processes, the loaders and training runs."""

import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, unpacked
from PIL import Image, PngImagePlugin
from short_runs import assert_same_state
from torchvision import transforms as T

from mdistiller_norm.cli import execute, main
from mdistiller_norm.config import load_config
from mdistiller_norm.data import ImageOptions, Share, image_folder, open_dataset, tiny_imagenet
from mdistiller_norm.data.decode import decode, draw_crop, eval_image, train_image
from mdistiller_norm.data.folder import MEAN, STD
from mdistiller_norm.data.shards import INDEX, webdataset
from mdistiller_norm.engine.checkpoint import load, save_atomically
from mdistiller_norm.errors import CheckpointError, ConfigError, DataError
from mdistiller_norm.models import build_model
from mdistiller_norm.predict import preprocess
from mdistiller_norm.run import build_run, train
from mdistiller_norm.student import load_student

CPU = torch.device("cpu")
VANILLA = ROOT / "configs" / "digits" / "vanilla_resnet8.yaml"
SMALL = ImageOptions(size=48, resize=56, mean=MEAN, std=STD, workers=0)
RUN = [
    "DATASET.TYPE=image_folder", "DATASET.IMAGE_SIZE=32", "DATASET.NUM_WORKERS=0",
    "DISTILLER.STUDENT=resnet8", "SOLVER.BATCH_SIZE=8", "SOLVER.EPOCHS=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def jpegs():
    root = unpacked("imagenet_samples", "imagenet_samples/val")
    return sorted((root / "imagenet_samples").rglob("*.JPEG"))


@pytest.fixture
def copy(tree, tmp_path):
    return Path(shutil.copytree(tree, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def shards(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "tiny_shards"
    pack(tree, out)
    return out


def pack(root, out):
    assert execute(f"shards --root {root} --out {out} --per-shard 10 --workers 0".split()) == 0


def run_config(tree, out, name, *overrides):
    words = [f"DATASET.ROOT={tree}", f"LOG.PREFIX={out}", f"EXPERIMENT.NAME={name}"]
    return load_config(None, [*RUN, *words, *overrides])


def epoch(dataset, number=1, **options):
    return list(dataset.train_loader(8, 0, CPU, **options).batches(number))


def same(a, b):
    pairs = [zip(*batches, strict=True) for batches in zip(a, b, strict=True)]
    return all(torch.equal(x, y) for pair in pairs for x, y in pair)


def contents(split):
    return sorted((split.read(index), int(target)) for index, target in enumerate(split.targets))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_decode_equals_pillow(jpegs):
    files = [(path.read_bytes(), 0) for path in jpegs[::4]]
    with Image.open(jpegs[0]) as image:
        for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")):
            files.append((encoded(image.convert(mode), kind), int(mode == "CMYK")))
    for content, tolerance in files:
        with Image.open(io.BytesIO(content)) as image:
            expected = torch.from_numpy(np.array(image.convert("RGB"))).int()
        assert (decode(content).permute(1, 2, 0).int() - expected).abs().max() <= tolerance


def test_large_texts_and_16_bits_are_read_and_other_formats_refused():
    text = PngImagePlugin.PngInfo()
    text.add_text("history", "x" * 2**21, zip=True)
    image, deep = Image.new("RGB", (8, 8)), np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert decode(encoded(image, "PNG", pnginfo=text)).shape == (3, 8, 8)
    for kind in ("PNG", "TIFF"):
        pixels = decode(encoded(Image.fromarray(deep), kind))
        assert torch.equal(pixels[1].flatten(), torch.arange(256).byte())
    for content in (encoded(image, "EPS"), encoded(image, "PCX"), b"text"):
        with pytest.raises(ValueError, match="not an image of the formats JPEG, PNG"):
            decode(content)
    with pytest.raises(ValueError, match="32 bits have no known range"):
        decode(encoded(Image.fromarray(deep.astype(np.float32)), "TIFF"))


def test_thin_images_need_little_memory():
    for height, width in ((1, 20_000), (20_000, 1)):
        image = torch.full((3, height, width), 7, dtype=torch.uint8)
        crop = draw_crop(np.random.default_rng(0), height, width, (0.08, 1.0))
        for view in (train_image(image, crop, 224), eval_image(image, 256, 224)):
            assert torch.equal(view, torch.full((3, 224, 224), 7, dtype=torch.uint8))


def test_crops_are_within_two_levels_of_torchvision(jpegs):
    random = np.random.default_rng(0)
    for path in jpegs[::8]:
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


def test_crops_are_distributed_as_in_torchvision():
    random, draws, size = np.random.default_rng(1), 4000, (375, 500)
    ours = np.array([draw_crop(random, *size, (0.08, 1.0)) for _ in range(draws)], dtype=float)
    draw = partial(T.RandomResizedCrop.get_params, torch.empty(3, *size), [0.08, 1.0])
    theirs = np.array([draw([3 / 4, 4 / 3]) for _ in range(draws)])
    assert (ours[:, :2] + ours[:, 2:4] <= size).all()
    for a, b in zip(ours.T[:4], theirs.T, strict=True):
        assert abs(a.mean() - b.mean()) < 5 * np.hypot(a.std(), b.std()) / draws**0.5 + 1e-9
        assert a.std() == pytest.approx(b.std(), rel=0.1, abs=1)
    assert ours[:, 4].mean() == pytest.approx(0.5, abs=0.05)
    assert draw_crop(random, 10, 1000, (1.0, 1.0))[:4] == (0, 493, 10, 13)  # no attempt fits


def test_folder_is_counted_named_and_measured(tree):
    data = image_folder(tree, ImageOptions(size=64, resize=64))
    assert data.summary() == "tiny: 3 classes, 36 + 12 images"
    assert data.targets.bincount().tolist() == [12, 12, 12]
    assert data.classes == tuple(sorted(path.name for path in (tree / "train").iterdir()))
    assert (data.variant, image_folder(tree, ImageOptions()).variant) == ("cifar", "imagenet")
    backwards = tuple(reversed(data.classes))
    unit = image_folder(tree, replace(SMALL, classes=backwards, mean=(0.0,) * 3, std=(1.0,) * 3))
    assert (unit.classes, unit.mean, unit.std) == (backwards, (0.0,) * 3, (1.0,) * 3)
    images = [decode(path.read_bytes()) for path in sorted((tree / "train").rglob("*.JPEG"))]
    pixels = torch.stack(images).double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-3)
    assert data.std == pytest.approx(pixels.std((0, 2, 3)).tolist(), abs=1e-3)


def test_nested_folders_count_and_hidden_files_do_not(copy, capsys):
    folder = min((copy / "train").iterdir())
    files = sorted(folder.iterdir())
    kept = {file.read_bytes() for file in files if file != files[5]}
    for place, some in (("a/b", files[:3]), (".trash", files[5:6])):
        (folder / place).mkdir(parents=True)
        for file in some:
            file.rename(folder / place / file.name)
    (folder / "._0.JPEG").write_bytes(b"of another system")
    shutil.move(folder / "a", copy / "elsewhere")
    (folder / "linked.jpg").symlink_to(copy / "elsewhere")  # a folder with the name of an image
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "cycle").symlink_to(folder)
    build_run(run_config(copy, copy.parent, "hidden")).trainer.log.close()
    printed = capsys.readouterr().out
    assert "warning: 2 images are left out: their names begin with a dot" in printed
    data = image_folder(copy, SMALL)
    assert torch.bincount(data.targets).tolist() == [11, 12, 12]
    assert {data.train.read(index) for index in range(11)} == kept


def test_names_that_are_not_utf8_are_escaped(copy):
    file = next((copy / "val").rglob("*.JPEG"))
    file.rename(os.fsdecode(os.fsencode(file.parent) + b"/caf\xe9.jpg"))
    data = image_folder(copy, SMALL)
    assert sum(data.test.name(index).endswith(r"caf\udce9.jpg") for index in range(12)) == 1
    assert data.unreadable() == []
    (copy / "train" / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(DataError, match=r"caf\\udce9 in .*train has a name that is not UTF-8"):
        image_folder(copy, SMALL)


def test_epochs_contain_every_sample_once_in_new_orders_and_crops(tree):
    data = image_folder(tree, SMALL)
    first, second = epoch(data), epoch(data, 2)
    for batches in (first, second):
        assert [len(images) for images, *_ in batches] == [8, 8, 8, 8, 4]
        targets, indices = (torch.cat([batch[part] for batch in batches]) for part in (1, 2))
        assert sorted(indices.tolist()) == list(range(36))
        assert torch.equal(targets, data.targets[indices])
    assert not same(first, second)
    batch = data.train_loader(8, 0, CPU).prepare(*first[0])
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    usual = T.functional.normalize(first[0][0].permute(0, 3, 1, 2) / 255, MEAN, STD)
    torch.testing.assert_close(batch.images, usual)
    images, targets, *_ = epoch(image_folder(tree, replace(SMALL, randaugment=9)))[0]
    assert torch.equal(targets, batch.targets)
    assert not torch.equal(images, first[0][0])


def test_workers_and_processes_do_not_change_a_pixel(tree):
    alone = image_folder(tree, SMALL)
    expected = epoch(alone, 3)
    loader = image_folder(tree, replace(SMALL, workers=2)).train_loader(8, 0, CPU)
    assert not same(list(loader.batches(1)), expected)
    assert {type(each).__name__ for each in multiprocessing.active_children()} == {"ForkProcess"}
    next(loader.batches(2))  # the rest of this epoch is dropped
    assert same(list(loader.batches(3)), expected)  # by the same workers
    assert same(list(loader.batches(3, 2)), expected[2:])
    halves = [epoch(alone, 3, share=Share(rank, 2)) for rank in range(2)]
    for whole, *parts in zip(expected, *halves, strict=True):
        for tensor, *pieces in list(zip(whole, *parts, strict=True))[:3]:
            assert torch.equal(torch.cat(pieces), tensor)


class Slow:
    def __reduce__(self):
        os.kill(max(child.pid for child in multiprocessing.active_children()), signal.SIGKILL)
        time.sleep(30)


def test_worker_that_is_killed_while_a_checkpoint_is_saved_is_reported(tree, tmp_path, capsys):
    def program(arguments):
        batches = image_folder(tree, replace(SMALL, workers=2)).train_loader(8, 0, CPU).batches(1)
        next(batches)
        save_atomically(Slow(), tmp_path / "latest.pt")
        return 0

    assert main([], program) == 2
    message = capsys.readouterr().err
    assert "killed by signal" in message
    assert "lower DATASET.NUM_WORKERS" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_program_that_fails_ends_its_workers(tree):
    code = f"""
import torch
from pathlib import Path
from mdistiller_norm.data import ImageOptions, image_folder

options = ImageOptions(size=48, mean=(0.5,) * 3, std=(0.5,) * 3, workers=2)
batches = image_folder(Path({str(tree)!r}), options).train_loader(8, 0, torch.device("cpu")).batches(1)
next(batches)
raise RuntimeError("out of memory")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stderr.splitlines()[-1] == "RuntimeError: out of memory"


def test_damaged_training_image_is_replaced_and_reported_once(copy):
    damaged = sorted((copy / "train").rglob("*.JPEG"))[7]
    damaged.write_bytes(damaged.read_bytes()[:300])
    measured = replace(SMALL, mean=(), std=())
    expected = epoch(image_folder(copy, measured))
    assert 7 not in torch.cat([indices for _, _, indices, _ in expected])
    for workers in (0, 2):
        lines = []
        data = image_folder(copy, replace(measured, workers=workers, max_broken=1))
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
    check = f"train --cfg {VANILLA} --check-data DATASET.ROOT={copy}".split()
    assert execute([*check, *RUN]) == 2
    with pytest.raises(DataError, match=rf"{copy}: 2 images cannot be read \(listed above\)"):
        pack(copy, copy.parent / "out")
    printed = capsys.readouterr().out
    assert printed.count("tiny: 3 classes, 36 + 12 images") == 2
    assert all(printed.count(str(file)) == 2 for file in files)
    with pytest.raises(DataError, match=f"the test image .*{files[1].name}"):
        build_run(run_config(copy, copy.parent / "runs", "damaged"))
    assert list(copy.parent.iterdir()) == [copy]


def test_small_shared_memory_is_reported(tree, limited_files):
    limited_files(50_000)
    with pytest.raises(DataError, match="/dev/shm is too small"):
        epoch(image_folder(tree, replace(SMALL, workers=2)))
    assert len(epoch(image_folder(tree, SMALL))) == 5


def test_batch_norm_on_a_single_value_is_refused(tree, tmp_path):
    refused = ["DATASET.VARIANT=imagenet", "DISTILLER.STUDENT=ResNet18", "SOLVER.BATCH_SIZE=35"]
    with pytest.raises(ConfigError, match=r"35 leaves one of the 36 images .* norm of ResNet18"):
        build_run(run_config(tree, tmp_path, "single", *refused))
    # resnet8 has maps of 8 x 8 pixels
    build_run(run_config(tree, tmp_path, "maps", "SOLVER.BATCH_SIZE=35")).trainer.log.close()
    assert [path.name for path in (tmp_path / "distill").iterdir()] == ["maps"]


def test_shards_contain_the_same_images_and_classes(tree, shards, tmp_path):
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


TRUNCATED = r"000001\.tar cannot be read \(truncated or damaged after byte \d+\)"


@pytest.mark.parametrize(
    ("change", "indexed", "message"),
    [
        (lambda whole, middle: whole[:middle], False, TRUNCATED),
        (lambda whole, middle: whole[:middle] + bytes(len(whole) - middle), False, TRUNCATED),
        (lambda whole, middle: whole[:middle], True, r"index\.npz does not match the shards"),
    ],
)
def test_damaged_shards_are_refused(shards, tmp_path, change, indexed, message):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    path = copy / "train" / "000001.tar"
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[6].offset
    path.write_bytes(change(path.read_bytes(), middle))
    if not indexed:
        (copy / "train" / INDEX).unlink()
    with pytest.raises(DataError, match=message):
        webdataset(copy, SMALL)


def test_weights_without_metadata_are_preprocessed_like_the_evaluation(tree, tmp_path):
    network = build_model("ResNet18", 3, variant="imagenet")
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    student = load_student(tmp_path / "bare.pth", "ResNet18", "image_folder", tree)
    path = max((tree / "val").rglob("*.JPEG"))
    ((images, *_),) = student.dataset.eval_loader(12, CPU)
    torch.testing.assert_close(preprocess(path, student.about), images[-1])


def test_wrong_options_and_missing_folders_are_refused(copy):
    with pytest.raises(ConfigError, match=r"RESIZE must be >= DATASET\.IMAGE_SIZE 48, got 47"):
        image_folder(copy, replace(SMALL, resize=47))
    first = min((copy / "val").iterdir())
    shutil.rmtree(first)
    with pytest.raises(DataError, match=f"val has no images .* of class {first.name}"):
        image_folder(copy, SMALL)
    shutil.rmtree(copy / "val")
    with pytest.raises(DataError, match=r"val cannot be read .* without val, set DATASET\.VAL_S"):
        image_folder(copy, SMALL)


def test_shards_are_written_completely_or_not_at_all(copy, shards, tmp_path, limited_files):
    with pytest.raises(DataError, match=r"tiny_shards has shards: choose another folder"):
        pack(copy, shards)
    full = tmp_path / "full"
    limited_files(5000)
    with pytest.raises(DataError, match=r"full cannot be written \(.*File too large\)"):
        pack(copy, full)
    limited_files(-1)
    assert not list(full.iterdir())
    (full / ".unfinished_shards" / "train").mkdir(parents=True)  # of a killed process
    pack(copy, full)
    assert {path.name for path in full.iterdir()} == {"classes.txt", "train", "val"}
    assert webdataset(full, SMALL).summary() == "full: 3 classes, 36 + 12 images"


@pytest.fixture(scope="module")
def kd(tree, tmp_path_factory):
    """The folder of the runs and the overrides with a teacher that was trained in it on the tree."""
    out = tmp_path_factory.mktemp("runs")
    train(run_config(tree, out, "whole"))
    weights = f"DISTILLER.TEACHER_WEIGHTS={out}/distill/whole/student_last.pt"
    return out, ["DISTILLER.TYPE=KD", "DISTILLER.TEACHER=resnet8", weights]


def test_teacher_trained_on_other_images_is_reported(tree, kd, tmp_path, capsys):
    def build(name, *overrides):
        build_run(run_config(tree, tmp_path, name, *kd[1], *overrides))
        return capsys.readouterr().out

    assert "was trained" not in build("same")
    (tmp_path / "moved").symlink_to(shutil.copytree(tree, tmp_path / "another"))
    moved = build("moved", f"DATASET.ROOT={tmp_path / 'moved'}")
    assert "was trained on tiny, not on another" in moved
    assert "image_size [32, 32] (here [40, 40])" in build("size", "DATASET.IMAGE_SIZE=40")
    first, second, third = sorted(folder.name for folder in (tree / "train").iterdir())
    with pytest.raises(CheckpointError, match=f"has class '{first}' for '{second}'"):
        build("order", f"DATASET.CLASSES=[{second},{first},{third}]")


def test_resumed_run_with_mixed_images_and_randaugment_is_bit_identical(tree, kd):
    out, teacher = kd
    given = ["DATASET.MIXUP=0.2", "DATASET.CUTMIX=1", "DATASET.RANDAUGMENT=9", *teacher]
    train(run_config(tree, out, "mixed", *given))
    train(run_config(tree, out, "parts", *given, "SOLVER.EPOCHS=1"))
    train(run_config(tree, out, "parts", *given, "DATASET.NUM_WORKERS=2"), resume=True)
    files = [out / "distill" / name / "latest.pt" for name in ("mixed", "parts", "whole")]
    mixed, parts, plain = (load(file)["trainable"] for file in files)
    assert_same_state(mixed, parts)
    assert not torch.equal(mixed["student.conv1.weight"], plain["student.conv1.weight"])


def test_images_are_held_out_the_same_everywhere(copy, tmp_path, capsys):
    split = ["DATASET.VAL_SPLIT=0.25", "SOLVER.EPOCHS=1", "DISTILLER.TEACHER=resnet8"]
    train(run_config(copy, tmp_path, "teacher", *split))
    result = train(run_config(copy, tmp_path, "student", *split, "DISTILLER.TYPE=KD"))
    assert result["teacher"]["file"].endswith("distill/teacher/student_last.pt")
    capsys.readouterr()
    assert execute(["eval", "-c", f"{tmp_path}/distill/student/student_last.pt"]) == 0
    shown = capsys.readouterr().out
    assert f"top-1 {result['last']['top1']:6.2f}" in shown
    assert " 9 images of 32x32" in shown
    shutil.rmtree(copy / "val")
    pack(copy, tmp_path / "packed")
    assert "no folder val: train on the shards with DATASET.VAL_SPL" in capsys.readouterr().out
    options = replace(SMALL, val_split=0.25, train=False)
    packed = open_dataset("webdataset", tmp_path / "packed", options)
    assert packed.summary() == "packed: 3 classes, 27 + 9 images"
    assert packed.test.targets.bincount().tolist() == [3, 3, 3]


@pytest.fixture
def original(copy):
    """The tree in the layout in which Tiny-ImageNet is distributed."""
    root = copy.with_name("tiny-imagenet-200")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for folder in sorted((copy / "train").iterdir()):
        shutil.move(folder, root / "train" / folder.name / "images")
        for file in sorted((copy / "val" / folder.name).iterdir()):
            lines.append(f"{file.name}\t{folder.name}\t0\t0\t63\t63\n")
            file.rename(root / "val" / "images" / file.name)
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    return root


def test_layouts_of_tiny_imagenet_are_equal(tree, original):
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


MDISTILLER = """
EXPERIMENT: {NAME: "", TAG: "kd,dot,r18,r18", PROJECT: "dot_tinyimagenet"}
DATASET: {TYPE: "tiny_imagenet", NUM_WORKERS: 16}
DISTILLER: {TYPE: "KD", TEACHER: "ResNet18", STUDENT: "ResNet18"}
SOLVER:
  {BATCH_SIZE: 256, EPOCHS: 200, LR: 0.2, LR_DECAY_STAGES: [60, 120, 160], LR_DECAY_RATE: 0.1, WEIGHT_DECAY: 0.0005,
  MOMENTUM: 0.9, TYPE: "SGD", TRAINER: "dot", DOT: {DELTA: 0.075}}
"""


VIT = pytest.param("vit_tiny_tiny_imagenet", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["mdistiller", "resnet18_folder", VIT])
def test_configs_train(tree, original, kd, tmp_path, name):
    """Train for one epoch, with small networks in place of residual ones."""
    config, root = ROOT / "configs" / "recipes" / f"{name}.yaml", tree
    keys = f"DATASET.NUM_WORKERS=0 DATASET.VARIANT=cifar SOLVER.EPOCHS=1 LOG.PREFIX={tmp_path}"
    if name == "mdistiller":
        config, root = tmp_path / "run.yaml", original.parent
        config.write_text(MDISTILLER)
    if name.startswith("vit"):
        pytest.importorskip("timm", reason="timm is not installed")
    else:
        keys += " DISTILLER.STUDENT=resnet8"
    result = train(load_config(config, [*keys.split(), f"DATASET.ROOT={root}", *kd[1]]))
    assert (result["method"], result["last"]["epoch"]) == (["KD"], 1)
