"""The command ``export``: write a trained network as a file that does not need this package.

Each file is loaded again and compared with the network before it replaces an existing one.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdistiller_norm.build import open_checkpoint
from mdistiller_norm.engine.checkpoint import load_into, load_weights
from mdistiller_norm.errors import CheckpointError, ConfigError, DataError, first_line
from mdistiller_norm.files import whole_file
from mdistiller_norm.models import build_model
from mdistiller_norm.models.base import Network
from mdistiller_norm.plugins import import_plugin

Forward = Callable[[Tensor], Tensor]
Metadata = dict[str, Any]
TOLERANCE = 1e-4  # of a logit, relative to the largest of its batch: other kernels sum in another order
ABOUT = "about.json"  # name of the metadata in a .pt2
SUFFIXES = {".pt2": "pt2", ".onnx": "onnx", ".pth": "state_dict", ".pt": "state_dict"}
_REQUIRED = ("name", "variant", "dataset", "classes", "mean", "std", "image_size")


class Student(NamedTuple):
    """A trained network in eval mode, its metadata, and normalised test images or the reason why there are none."""

    network: Network
    about: Metadata
    images: Tensor | None
    missing: str = ""


def load_student(path: Path, model: str = "", kind: str = "", root: Path = Path("data"), count: int = 64) -> Student:
    """Load a weights file as ``build.open_checkpoint`` does, with ``count`` test images if they are available."""
    weights = load_weights(path)
    about, complete = weights.about, weights.about.keys() >= {*_REQUIRED}
    try:
        if complete and (kind or about.get("type")) == "cifar100" and not (root / "cifar-100-python").exists():
            raise DataError(f"{root / 'cifar-100-python'} does not exist")  # do not download it for a check
        network, dataset = open_checkpoint(path, model, kind, root)
        images, _ = next(iter(dataset.eval_loader(count, torch.device("cpu"))))
    except DataError as error:
        if not complete:
            raise
        network = build_model(model or about["name"], len(about["classes"]), variant=about["variant"])
        load_into(network, weights, f"{network.name} with {network.num_classes} classes")
        return Student(network.eval(), metadata(about, network), None, str(error))
    about = about | {
        "variant": dataset.variant, "dataset": dataset.name, "classes": list(dataset.classes),
        "mean": list(dataset.mean), "std": list(dataset.std), "image_size": list(dataset.image_size),
    }  # fmt: skip
    return Student(network.eval(), metadata(about, network), images)


def metadata(about: Metadata, network: Network) -> Metadata:
    """Return the metadata of an exported file: the facts of a weights file and the preprocessing of its images."""
    kept = {key: about[key] for key in (*_REQUIRED, "top1") if key in about} | {"name": network.name}
    from_files = about.get("type") in ("imagenet", "image_folder", "webdataset")
    resize = about.get("resize", 256) if from_files else about["image_size"][0]
    return kept | {"resize": resize, "crop": "center", "interpolation": "bilinear, antialiased", "channels": "RGB"}


def export(student: Student, path: Path, form: str, with_normalisation: bool) -> list[str]:
    """Write a network, load the file again, compare both, and return lines about the file.

    Args:
        student: the network.
        path: file to write; on failure an existing file is kept.
        form: format, a value of :data:`SUFFIXES`.
        with_normalisation: include the normalisation, so that the input are pixels in [0, 1].

    Raises:
        CheckpointError: the file cannot be written, or its logits differ by more than rounding.
    """
    module: nn.Module = student.network
    mean, std = (torch.tensor(student.about[key]).expand(3) for key in ("mean", "std"))
    taken = "RGB in 0..1, minus mean, divided by std"
    if with_normalisation:
        norm = nn.BatchNorm2d(3, eps=0.0, affine=False)
        norm.load_state_dict({"running_mean": mean, "running_var": std**2}, strict=False)
        module, taken = nn.Sequential(norm, module).eval(), "RGB in 0..1"
    height, width = student.about["image_size"]
    about = student.about | {"input": f"float32 [B, 3, {height}, {width}], {taken}"}
    try:
        with whole_file(path) as file:
            file.write(_encode(form, module, about))
            file.flush()
            forward = read(Path(file.name), form, about)
            if with_normalisation:
                lines = check(lambda images: forward(images * std[:, None, None] + mean[:, None, None]), student)
            else:
                lines = check(forward, student)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error})") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not written: {error}") from error
    return [f"{path}: {about['name']}, {len(about['classes'])} classes, input {about['input']}", *lines]


def check(forward: Forward, student: Student) -> list[str]:
    """Compare an export, a function of normalised images, with its network; return the largest differences in lines."""
    random = torch.randn(16, 3, *student.about["image_size"], generator=torch.Generator().manual_seed(0))
    kinds, lines = {"random": random, student.about["dataset"]: student.images}, []
    for kind, images in kinds.items():
        if images is None:
            lines.append(f"checked on random images only: {student.missing}")
            continue
        largest = 0.0
        for batch in (images[:1], images):
            with torch.no_grad():
                expected = student.network(batch)
                difference = float((forward(batch) - expected).abs().max())
            if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
                raise CheckpointError(f"on {kind} images its logits differ by {difference:.2g} from the network's")
            largest = max(largest, difference)
        lines.append(f"largest difference of a logit: {largest:.2g} on {kind} images, batches of 1 and {len(images)}")
    return lines


def _encode(form: str, module: nn.Module, about: Metadata) -> bytes:
    """Return the content of a file; PyTorch's writers of files abort the process if the disk is full."""
    content = io.BytesIO()
    if form == "state_dict":
        torch.save({"model": module.state_dict()}, content)
        return content.getvalue()
    example = torch.zeros(2, 3, *about["image_size"])  # a batch of 1 would become a constant
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    try:
        program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
        if form == "pt2":
            torch.export.save(program, content, extra_files={ABOUT: json.dumps(about)})
            return content.getvalue()
        onnx = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    except Exception as error:  # any error of a user's network; its cause names the operation
        reason = first_line(error.__cause__ or error)
        raise ConfigError(f"{about['name']} cannot be exported ({reason}); use --format state_dict") from error
    assert onnx is not None
    for key, value in about.items():
        onnx.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    encoded: bytes = onnx.model_proto.SerializeToString()
    return encoded


def read(path: Path, form: str, about: Metadata) -> Forward:
    """Load an exported file as a function of images; a state dict requires the metadata of its network."""
    if form == "state_dict":
        network = build_model(about["name"], len(about["classes"]), variant=about["variant"])
        load_into(network, load_weights(path), about["name"])
        return network.eval()
    if form == "pt2":
        with path.open("rb") as file:
            module: Forward = torch.export.load(file).module()
        return module
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``export``."""
    parser.epilog = f"example: {parser.prog} -c output/digits/student_normkd/student_best.pt --format onnx"
    add = parser.add_argument
    add("-c", "--ckpt", required=True, type=Path, metavar="FILE", help="checkpoint")
    add("-o", "--out", type=Path, metavar="FILE", help="default: beside the checkpoint, with the format's suffix")
    add("--format", choices=list(dict.fromkeys(SUFFIXES.values())), help="default: by the suffix of -o, else pt2")
    add("--with-normalisation", action="store_true", help="include the normalisation: the input are pixels in 0..1")
    add("--force", action="store_true", help="replace an existing file")
    add("-m", "--model", default="", help="model name; default: the name stored in student_*.pt")
    add("-d", "--dataset", default="", help="data set; default: the one stored in student_*.pt, else cifar100")
    add("-bs", "--batch-size", type=int, default=64, help="number of test images to check the file with")
    add("--root", type=Path, default=Path("data"), help="folder of the data sets")
    add("--plugin", nargs="+", type=import_plugin, metavar="FILE", help="EXPERIMENT.PLUGINS of the run")


def main(options: argparse.Namespace) -> int:
    """Export a checkpoint; all options are checked before it is loaded."""
    if options.batch_size < 1:
        raise ConfigError(f"-bs must be >= 1, got {options.batch_size}")
    form: str = options.format or (SUFFIXES.get(options.out.suffix, "") if options.out else "pt2")
    path: Path = options.out or options.ckpt.with_suffix(next(s for s, name in SUFFIXES.items() if name == form))
    if SUFFIXES.get(path.suffix) != form:
        raise ConfigError(f"-o {path} must end in the suffix of its format: {', '.join(SUFFIXES)}")
    if form == "state_dict" and options.with_normalisation:
        raise ConfigError("--with-normalisation requires --format pt2 or onnx: a state dict has weights only")
    if form == "onnx":
        packages = ("onnx", "onnxscript", "onnxruntime")
        if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
            raise ConfigError(f"--format onnx requires `python -m pip install {' '.join(missing)}`")
    if path.resolve() == options.ckpt.resolve() or path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"-o {path} must be a file in an existing folder, and not the checkpoint")
    if path.exists() and not options.force:
        raise ConfigError(f"{path} exists: choose another -o, or replace it with --force")
    student = load_student(options.ckpt, options.model, options.dataset, options.root, options.batch_size)
    print("\n".join(export(student, path, form, options.with_normalisation)))
    return 0
