"""Shortcuts in decoding change nothing: only the rows that are needed, and whole batches on the device that trains."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_user_error, tool, unpacked
from PIL import Image

from mdistiller_norm.data.decode import View, decode, decode_box, draw_view, jpeg_header, train_image
from mdistiller_norm.data.image_folder import MEAN, STD, image_folder
from mdistiller_norm.data.image_reader import LARGE, ImageOptions, TrainReader

CPU = torch.device("cpu")
OPTIONS = ImageOptions(size=64, mean=MEAN, std=STD, workers=0)
QUANTISATION, COMMENT = b"\xff\xdb", b"\xff\xfe"  # markers


@pytest.fixture(scope="module")
def jpegs() -> list[Path]:
    return sorted((unpacked("imagenet_samples", "imagenet_samples/val") / "imagenet_samples").rglob("*.JPEG"))


def noise(height: int, width: int, mode: str = "RGB", **options: object) -> bytes:
    """A JPEG of random pixels, whose colours differ as much as can be from one row to the next."""
    options.setdefault("subsampling", "4:4:4")
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def tree(jpegs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of real JPEGs, and of files that not every decoder takes: grey, progressive, CMYK, PNG, damaged."""
    root = tmp_path_factory.mktemp("tree") / "mixed"
    for number, files in enumerate((jpegs[:6], jpegs[-6:])):
        for split in ("train", "val"):
            folder = root / split / f"class{number}"
            folder.mkdir(parents=True)
            for path in files if split == "train" else files[:1]:
                (folder / path.name).write_bytes(path.read_bytes())
    odd = root / "train" / "class0"
    whole = noise(90, 120)
    (odd / "odd_cmyk.jpg").write_bytes(noise(90, 120, "CMYK"))
    (odd / "odd_cut.jpg").write_bytes(whole[: len(whole) // 2])
    (odd / "odd_large.jpg").write_bytes(noise(900, 1300))
    (odd / "odd_grey.jpg").write_bytes(noise(90, 120, "L"))
    (odd / "odd_progressive.jpg").write_bytes(noise(90, 120, progressive=True))
    (odd / "odd_tables.jpg").write_bytes(whole.replace(QUANTISATION, COMMENT))  # its header and end are sound
    Image.open(io.BytesIO(whole)).save(odd / "odd_picture.png")
    return root


# Only the rows that are needed


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_a_box_is_that_part_of_the_image(subsampling: str, options: dict[str, object]) -> None:
    content = noise(150, 133, subsampling=subsampling, **options)
    header, image = jpeg_header(content), decode(content)
    assert header is not None
    for top, left, height, width in ((0, 0, 1, 1), (0, 7, 16, 50), (31, 40, 33, 93), (5, 0, 128, 133), (149, 0, 1, 9)):
        box = decode_box(content, header, View(top, left, height, width, False))
        assert torch.equal(box, image[:, top : top + height, left : left + width])


def test_boxes_of_real_images_are_resized_as_before(jpegs: list[Path]) -> None:
    random = np.random.default_rng(0)
    for path in jpegs[::3]:
        content = path.read_bytes()
        header, image = jpeg_header(content), decode(content)
        assert header is not None
        assert (header.height, header.width) == image.shape[1:]
        view = draw_view(random, header.height, header.width, (0.08, 1.0))
        box = decode_box(content, header, view)
        assert torch.equal(train_image(box, view._replace(top=0, left=0), 224), train_image(image, view, 224))


def test_only_sound_grey_and_colour_jpegs_have_a_header(tree: Path) -> None:
    known = {path.stem: jpeg_header(path.read_bytes()) is not None for path in tree.rglob("odd_*")}
    assert known == {
        "odd_cmyk": False, "odd_cut": False, "odd_grey": True, "odd_large": True, "odd_progressive": True,
        "odd_tables": True, "odd_picture": False,
    }  # fmt: skip
    for content in (b"", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xc0\x00\xff\xd9", b"\xff\xd8\xff\xe0\x00\x00" * 9):
        assert jpeg_header(content) is None


# Whole batches on the device


def batches(
    tree: Path, decode: str, device: torch.device = CPU, workers: int = 0
) -> tuple[list[list[torch.Tensor]], list[str]]:
    """Two epochs, and what was said."""
    said: list[str] = []
    data = image_folder(tree, replace(OPTIONS, decode=decode, workers=workers))
    loader = data.train_loader(5, 0, device, warn=said.append)
    return [[tensor.cpu() for tensor in batch] for epoch in (1, 2) for batch in loader.batches(epoch)], said


def pairs(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> Iterator[torch.Tensor]:
    """Differences of the images of two runs, batch by batch; all else is equal."""
    for (images, *rest), (others, *rests) in zip(a, b, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(rest, rests, strict=True))
        yield images.int() - others.int()


def test_a_reader_gives_the_views_of_whole_images(tree: Path) -> None:
    reader, key = TrainReader(image_folder(tree, OPTIONS).train, OPTIONS), 8
    for first in (0, 70):  # in a batch of several groups, too
        wanted = list(range(len(reader.split.source))) * (1 + first // 10)
        made, broken = reader[(key, wanted)], list[str]()
        for row in range(first, first + len(reader.split.source)):
            index, image = reader.view(key, wanted[row], broken)
            assert index == made.indices[row]
            assert torch.equal(image, made.images[row])
            large = reader.split.source.name(wanted[row]).endswith("odd_large.jpg")
            opened = reader.open(key, wanted[row])
            assert large == (opened is not None and opened.view.height * opened.view.width > LARGE)
        assert set(broken) == set(made.broken)
        assert len(set(broken)) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_decoded_on_the_device_are_those_of_the_workers(tree: Path, workers: int) -> None:
    usual, said = batches(tree, "cpu")
    decoded, said_then = batches(tree, "device", workers=workers)
    # torchvision and simplejpeg may be built with different releases of libjpeg-turbo: one level is left for that.
    assert all(difference.abs().max() <= 1 for difference in pairs(usual, decoded))
    reports = [line for line in said_then if "another sample takes its place" in line]
    assert sorted(line.split(" (")[0] for line in reports) == sorted(line.split(" (")[0] for line in said)
    assert len(said) == 2
    # The workers see that a file is cut; wrong tables only the decoder does.
    (refused,) = set(said_then) - set(reports)
    assert "odd_tables.jpg cannot be decoded on the cpu device: the CPU decodes such files" in refused


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or not asked for by -m cuda")
def test_batches_decoded_on_a_gpu_are_close_to_those_of_the_workers(tree: Path) -> None:
    usual, _ = batches(tree, "cpu")
    decoded, _ = batches(tree, "cuda", torch.device("cuda"))
    # nvJPEG rounds otherwise, and interpolates colours that are stored at half the size otherwise.
    assert all(difference.float().abs().mean() < 2 for difference in pairs(usual, decoded))


def test_a_run_decodes_on_its_device(tree: Path, tmp_path: Path) -> None:
    command = [
        "train", "--cfg", "configs/digits/vanilla_resnet8.yaml", "DATASET.TYPE", "image_folder", "DATASET.ROOT", tree,
        "DATASET.IMAGE_SIZE", 32, "DATASET.RESIZE", 36, "DEVICE", "cpu", "LOG.PREFIX", tmp_path, "SOLVER.EPOCHS", 1,
        "SOLVER.BATCH_SIZE", 6, "DATASET.DECODE",
    ]  # fmt: skip
    assert "another sample takes its place" in tool(*command, "device").stdout
    assert_user_error(tool(*command, "cuda", check=False), "DATASET.DECODE cuda", "this run is on the cpu")
