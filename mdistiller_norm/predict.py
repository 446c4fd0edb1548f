"""The command ``predict``: classify image files with a trained network."""

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
from mdistiller_norm.data.folder import EXTENSIONS, image_names
from mdistiller_norm.errors import DataError, first_line, needs_extra
from mdistiller_norm.export import EXECUTABLE, SUFFIXES, Forward, read
from mdistiller_norm.student import Metadata, load_student


def preprocess(path: Path, about: Metadata) -> Tensor:
    """Return an image file as the network's input ``[3, H, W]``: resized, cropped and, if expected, normalised."""
    image = eval_image(decode(path.read_bytes()), about["resize"], about["image_size"][0])
    pixels = image.float() / 255
    if not about.get("normalised", True):
        return pixels
    mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
    return (pixels - mean) / std


@torch.inference_mode()
def predict(
    forward: Forward, about: Metadata, paths: Sequence[Path], top: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return an entry for each image file, in order: its ``top`` classes with probabilities, or its decoding error.

    ``forward`` is a function of images ``[B, 3, H, W]`` on ``device`` that returns logits.
    """
    images: list[Tensor] = []
    entries: list[dict[str, Any]] = [{"image": str(path)} for path in paths]
    for path, entry in zip(paths, entries, strict=True):
        try:
            images.append(preprocess(path, about))
        except UNREADABLE as error:
            entry["error"] = first_line(error)
    if not images:
        return entries
    probabilities = forward(torch.stack(images).to(device)).float().softmax(1).cpu()
    values, indices = probabilities.topk(min(top, probabilities.shape[1]))
    readable = [entry for entry in entries if "error" not in entry]
    for entry, row, numbers in zip(readable, values.tolist(), indices.tolist(), strict=True):
        names = [about["classes"][number] for number in numbers]
        entry["classes"] = [
            {"class": n, "probability": p} for n, p in zip(names, row, strict=True)
        ]
    return entries


def find_images(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the image files in the given order, folders replaced by the images in them that training would read."""
    for path in paths:
        names = image_names(str(path), "/") if path.is_dir() else ()
        found = sorted(Path(f"{path}{name}") for name in names if "/." not in name)
        if not found and not path.is_file():
            raise DataError(f"{path} does not exist or has no images ({', '.join(EXTENSIONS)})")
        yield from found or [path]


def main(options: argparse.Namespace) -> int:
    """Print the top classes of each image; return 1 if an image cannot be read."""
    paths = list(find_images(options.images))
    device, form = torch.device("cpu"), SUFFIXES.get(options.ckpt.suffix, "")
    if form == "safetensors":
        raise DataError(
            f"{options.ckpt} has no network: use the run folder, its .pt file, .pt2 or .onnx"
        )
    if form in EXECUTABLE:
        if not options.ckpt.is_file():
            raise DataError(f"{options.ckpt} does not exist")
        with needs_extra("onnx", str(options.ckpt)):
            forward, about = read(options.ckpt, form)
    else:
        device = build_device(options.device)
        student = load_student(
            options.ckpt, options.model, options.dataset, options.root, with_data=False
        )
        forward, about = placed(student.network, device), student.about
    found: list[dict[str, Any]] = []
    for start in range(0, len(paths), options.batch_size):
        batch = paths[start : start + options.batch_size]
        for entry in predict(forward, about, batch, options.top, device):
            found.append(entry)
            if "error" in entry:
                print(
                    f"error: {entry['image']} cannot be read ({entry['error']})", file=sys.stderr
                )
            elif not options.json:
                classes = [
                    f"{each['class']} {each['probability']:.1%}" for each in entry["classes"]
                ]
                print(f"{entry['image']}: {', '.join(classes)}")
    if options.json:
        print(json.dumps(found, indent=2))
    return int(any("error" in entry for entry in found))
