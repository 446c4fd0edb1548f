"""The command ``predict``: classify image files with a trained network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdistiller_norm.build import build_device, placed
from mdistiller_norm.data.decode import UNREADABLE, decode, eval_image
from mdistiller_norm.data.folder import EXTENSIONS
from mdistiller_norm.errors import DataError, first_line, needs_extra
from mdistiller_norm.export import SUFFIXES, Forward, read
from mdistiller_norm.student import Metadata, add_student_arguments, load_student, positive

Entry = dict[str, Any]


def open_network(
    path: Path, model: str, kind: str, root: Path | None, device: torch.device
) -> tuple[Forward, Metadata]:
    """Load a weights file, run folder, ``.pt2`` or ``.onnx`` as a function of images, with its metadata."""
    form = SUFFIXES.get(path.suffix)
    if form in ("pt2", "onnx"):
        if not path.is_file():
            raise DataError(f"{path} does not exist")
        with needs_extra("onnx", f"{path}"):
            return read(path, form)
    student = load_student(path, model, kind, root, with_data=False)
    return placed(student.network, device), student.about | {"normalised": True}


def preprocess(path: Path, about: Metadata) -> Tensor:
    """Return an image file as the network's input ``[3, H, W]``: resized, cropped and, if expected, normalised."""
    pixels = eval_image(decode(path.read_bytes()), about["resize"], about["image_size"][0]).float() / 255
    if not about["normalised"]:
        return pixels
    mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
    return (pixels - mean) / std


@torch.inference_mode()
def predict(
    forward: Forward,
    about: Metadata,
    paths: Sequence[Path],
    *,
    top: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[Entry]:
    """Yield an entry for each image file, in order: its ``top`` classes with probabilities, or its decoding error.

    ``forward`` is a function of images ``[B, 3, H, W]`` on ``device`` that returns logits.
    """
    for start in range(0, len(paths), batch_size):
        images: dict[Path, Tensor] = {}
        entries: dict[Path, Entry] = {}
        for path in paths[start : start + batch_size]:
            entries[path] = {"image": str(path)}
            try:
                images[path] = preprocess(path, about)
            except UNREADABLE as error:
                entries[path]["error"] = first_line(error)
        if images:
            probabilities = forward(torch.stack([*images.values()]).to(device)).float().softmax(1).cpu()
            for path, row in zip(images, probabilities, strict=True):
                values, indices = row.topk(min(top, len(row)))
                pairs = zip(indices.tolist(), values.tolist(), strict=True)
                entries[path]["classes"] = [
                    {"class": about["classes"][i], "probability": p} for i, p in pairs
                ]
        yield from entries.values()


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the image files in the given order, folders replaced by all images in them."""
    images = []
    for path in paths:
        found = (
            sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
            if path.is_dir()
            else [path]
        )
        if not found or not path.exists():
            raise DataError(f"{path} does not exist or has no images ({', '.join(EXTENSIONS)})")
        images += found
    return images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``predict``."""
    parser.epilog = f"example: {parser.prog} -c output/digits/student_normkd photos/ --top 3"
    add = parser.add_argument
    add(
        "-c",
        "--ckpt",
        required=True,
        type=Path,
        metavar="PATH",
        help="weights, run folder, .pt2 or .onnx file",
    )
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of images")
    add("--top", type=positive, default=5, metavar="N", help="number of classes of each image (default: 5)")
    add("--json", action="store_true", help="print a JSON list")
    add_student_arguments(parser, batch_size=64)


def main(options: argparse.Namespace) -> int:
    """Print the top classes of each image; return 1 if an image cannot be read."""
    exported = SUFFIXES.get(options.ckpt.suffix) in ("pt2", "onnx")
    device = torch.device("cpu") if exported else build_device(options.device)
    paths = find_images(options.images)
    forward, about = open_network(options.ckpt, options.model, options.dataset, options.root, device)
    found = []
    for entry in predict(
        forward, about, paths, top=options.top, batch_size=options.batch_size, device=device
    ):
        found.append(entry)
        if "error" in entry:
            print(f"error: {entry['image']} cannot be read ({entry['error']})", file=sys.stderr)
        elif not options.json:
            classes = [f"{each['class']} {100 * each['probability']:.1f}%" for each in entry["classes"]]
            print(f"{entry['image']}: {', '.join(classes)}")
    if options.json:
        print(json.dumps(found, indent=2))
    return int(any("error" in entry for entry in found))
